//! Recipes of mergekit (`mergekit-yaml`, read against 0.1.5), run unchanged.
//!
//! | file | what |
//! |---|---|
//! | [`config`] | the YAML, with errors that say where and what would be right |
//! | [`setting`] | values: plain, graded over layers, chosen by filters |
//! | [`layout`] | from slices and models to tensors |
//! | [`vocabulary`], [`chat`] | tokenizers and chat templates |
//!
//! Where mergekit does something that its recipe does not say, refit does what is right and says so; with
//! [`Recipe::compat`] it does what mergekit does. The guide's page on merging lists the differences.

use std::path::Path;

use refit_store::SideFile;
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::inputs::Inputs;
use crate::method::{Context, Info, Output, Plan};
use crate::registry::{self, Configured};

pub mod chat;
pub mod config;
pub mod layout;
pub mod setting;
pub mod vocabulary;

pub use config::is_mergekit;

/// The name under which a recipe is kept beside the model that it made, as mergekit keeps it.
pub const KEPT: &str = "mergekit_config.yml";

/// A recipe, ready to be planned and run as a method is.
#[derive(Debug)]
pub struct Recipe {
    config: config::Config,
    text: String,
    /// Follow mergekit to the letter.
    pub compat: bool,
}

impl Recipe {
    /// Reads a recipe; `path` is for messages.
    ///
    /// # Errors
    /// [`crate::Error::Recipe`], or YAML that is malformed.
    pub fn parse(path: &Path, text: &str, compat: bool) -> Result<Self> {
        let config = config::parse(path, text, compat)?;
        Ok(Self { config, text: text.to_owned(), compat })
    }

    /// Every model that it names, as it is written, the base first: what `inputs.models` must hold.
    pub fn models(&self) -> Vec<String> {
        self.config.models()
    }

    /// Whether the first of [`models`](Self::models) is a base.
    pub fn has_base(&self) -> bool {
        self.config.base.is_some()
    }

    /// The method's entry in the registry.
    ///
    /// # Errors
    /// None: every method of a recipe is registered.
    pub fn entry(&self) -> Result<&'static registry::Entry> {
        registry::get(self.config.method.about.name)
    }
}

impl Configured for Recipe {
    fn info(&self) -> &'static Info {
        self.entry()
            .map(|entry| entry.info)
            .expect("invariant: every kernel's method is registered")
    }

    fn parameters(&self) -> Value {
        let path = Path::new(KEPT);
        let recipe: Value = refit_store::yaml::parse(path, &self.text).unwrap_or_default();
        json!({"recipe": recipe, "mergekit_compat": self.compat})
    }

    fn plan(&self, inputs: &Inputs) -> Result<Plan> {
        if let Some(adapter) = inputs.adapters.first() {
            let problem = format!(
                "this is an adapter, and recipes merge models; merge it into its base first: refit apply merge-adapter MODEL {} \
                 -o OUT",
                adapter.source
            );
            return Err(Error::BadData { source_name: adapter.source.clone(), problem });
        }
        let program = layout::program(&self.config, inputs, &self.models(), self.compat)?;
        let mut plan = Plan {
            method: self.config.method.about.name.to_owned(),
            parameters: self.parameters(),
            ..Plan::default()
        };
        let compat = if self.compat { &["--mergekit-compat"][..] } else { &[] };
        let words = ["refit", "run", KEPT].iter().chain(compat).chain(&["-o", "OUT"]);
        plan.command = Some(words.map(|word| (*word).to_owned()).collect());
        program.describe(inputs, &mut plan);
        Ok(plan)
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        let mut program = layout::program(&self.config, inputs, &self.models(), self.compat)?;
        program.side_files.push(SideFile::from_bytes(KEPT, self.text.as_bytes().to_vec()));
        program.run(inputs, plan, cx)
    }
}
