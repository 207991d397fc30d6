//! Every method behind one type: what listings, flags, recipes and documentation are made from.

use std::sync::LazyLock;

use clap::{ArgMatches, Command};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::method::{Claim, Context, Info, Inputs, Method, Output, Plan};
use crate::suggest::nearest;

/// A method with its parameters set, its type erased.
pub trait Configured: Send + Sync + std::fmt::Debug {
    /// The method's description.
    fn info(&self) -> &'static Info;
    /// All parameters, defaults included, as a recipe would spell them.
    fn parameters(&self) -> Value;
    /// See [`Method::plan`]. The number of models and the presence of data are checked first.
    ///
    /// # Errors
    /// As [`Method::plan`].
    fn plan(&self, inputs: &Inputs) -> Result<Plan>;
    /// See [`Method::run`].
    ///
    /// # Errors
    /// As [`Method::run`].
    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output>;
}

/// Carries a method's description behind a `'static` reference.
struct Described<M>(std::marker::PhantomData<M>);

impl<M: Method> Described<M> {
    const INFO: &'static Info = &M::INFO;
}

impl<M: Method> Configured for M {
    fn info(&self) -> &'static Info {
        Described::<M>::INFO
    }

    fn parameters(&self) -> Value {
        serde_json::to_value(self)
            .expect("invariant: parameters are plain data and always serialize")
    }

    fn plan(&self, inputs: &Inputs) -> Result<Plan> {
        inputs.check(&M::INFO)?;
        Method::plan(self, inputs)
    }

    fn run(&self, inputs: &Inputs, plan: &Plan, cx: &mut Context) -> Result<Output> {
        Method::run(self, inputs, plan, cx)
    }
}

/// A method whose parameters are not set yet.
#[derive(Clone, Copy)]
pub struct Entry {
    /// The method's description.
    pub info: &'static Info,
    command: fn() -> Command,
    schema: fn() -> Value,
    from_matches: fn(&ArgMatches) -> Result<Box<dyn Configured>>,
    from_value: fn(&Value) -> Result<Box<dyn Configured>>,
    claim: fn() -> Option<Claim>,
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Entry").field(&self.info.name).finish()
    }
}

impl Entry {
    /// The entry of a method: the one line that its family's `mod.rs` needs.
    pub const fn of<M: Method>() -> Self {
        Self {
            info: Described::<M>::INFO,
            command: command::<M>,
            schema: schema::<M>,
            from_matches: from_matches::<M>,
            from_value: from_value::<M>,
            claim: M::claim,
        }
    }

    /// A command named after the method, with one flag per parameter. Names of models, `--out` and
    /// the like are added by the caller.
    pub fn command(&self) -> Command {
        (self.command)()
    }

    /// JSON schema of the parameters, with documentation and defaults.
    pub fn schema(&self) -> Value {
        (self.schema)()
    }

    /// Sets the parameters from a parsed command line.
    ///
    /// # Errors
    /// [`Error::Flags`] when `matches` did not come from [`command`](Self::command).
    pub fn from_matches(&self, matches: &ArgMatches) -> Result<Box<dyn Configured>> {
        (self.from_matches)(matches)
    }

    /// Sets the parameters from a recipe's mapping; missing keys take the defaults, and keys may
    /// be spelt with `-` or `_`.
    ///
    /// # Errors
    /// [`Error::UnknownParameter`] with the nearest name, [`Error::Parameters`] for wrong values.
    pub fn from_value(&self, value: &Value) -> Result<Box<dyn Configured>> {
        (self.from_value)(value)
    }

    /// The method with the paper's defaults.
    pub fn default(&self) -> Box<dyn Configured> {
        self.from_value(&Value::Null).expect("invariant: defaults are valid parameters")
    }

    /// The method's claim, when it has one.
    pub fn claim(&self) -> Option<Claim> {
        (self.claim)()
    }
}

fn command<M: Method>() -> Command {
    let paper = M::INFO.paper;
    let about = match paper.title {
        "" => M::INFO.summary.to_owned(),
        title => format!("{}\n\n{title} ({}, {})", M::INFO.summary, paper.reference, paper.year),
    };
    let command = Command::new(M::INFO.name).next_help_heading("Parameters of the method");
    // Afterwards: the derived code sets the struct's docstring, which says less.
    M::augment_args(command).about(M::INFO.summary).long_about(about)
}

fn schema<M: Method>() -> Value {
    schemars::schema_for!(M).to_value()
}

fn from_matches<M: Method>(matches: &ArgMatches) -> Result<Box<dyn Configured>> {
    let method = M::from_arg_matches(matches)
        .map_err(|source| Error::Flags { method: M::INFO.name, source: Box::new(source) })?;
    Ok(Box::new(method))
}

fn from_value<M: Method>(value: &Value) -> Result<Box<dyn Configured>> {
    let name = M::INFO.name;
    let given = match value {
        Value::Null => serde_json::Map::new(),
        Value::Object(map) => map.clone(),
        other => {
            let found = other.to_string();
            return Err(Error::NotAMapping { method: name, found });
        }
    };
    let schema = schema::<M>();
    let known: Vec<&str> = schema["properties"]
        .as_object()
        .map(|properties| properties.keys().map(String::as_str).collect())
        .unwrap_or_default();
    let mut parameters = serde_json::Map::new();
    for (key, value) in given {
        let field = key.replace('-', "_");
        if !known.contains(&field.as_str()) {
            return Err(Error::UnknownParameter {
                method: name,
                suggestion: nearest(&field, &known).map(str::to_owned),
                known: known.join(", "),
                key,
            });
        }
        if parameters.insert(field.clone(), value).is_some() {
            return Err(Error::DuplicateParameter { method: name, key: field });
        }
    }
    let method: M = serde_json::from_value(Value::Object(parameters))
        .map_err(|source| Error::Parameters { method: name, source })?;
    Ok(Box::new(method))
}

/// Every method, family by family.
pub fn all() -> &'static [Entry] {
    static ALL: LazyLock<Vec<Entry>> = LazyLock::new(|| {
        [
            crate::quantize::METHODS,
            crate::factorize::METHODS,
            crate::prune::METHODS,
            crate::merge::METHODS,
            crate::adapt::METHODS,
        ]
        .concat()
    });
    &ALL
}

/// The method of that name.
///
/// # Errors
/// [`Error::UnknownMethod`] with the nearest name.
pub fn get(name: &str) -> Result<&'static Entry> {
    all().iter().find(|entry| entry.info.name == name).ok_or_else(|| {
        let known: Vec<&str> = all().iter().map(|entry| entry.info.name).collect();
        Error::UnknownMethod {
            name: name.to_owned(),
            suggestion: nearest(name, &known).map(str::to_owned),
            known: known.join(", "),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Flags that every command has; a method must not take them for itself.
    const RESERVED: &[&str] = &[
        "models", "out", "seed", "threads", "force", "resume", "text", "labelled", "images",
        "data", "base", "json", "dry-run", "device", "help", "quiet", "verbose", "config", "model",
    ];

    #[test]
    fn names_are_unique_and_typable() {
        let mut names: Vec<_> = all().iter().map(|entry| entry.info.name).collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count, "two methods share a name");
        for name in names {
            assert!(name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-'));
        }
    }

    #[test]
    fn every_method_has_its_place_in_the_map() {
        for entry in all() {
            assert!(!entry.info.taxonomy.path.is_empty(), "{}", entry.info.name);
            assert!(!entry.info.summary.is_empty(), "{}", entry.info.name);
            for other in entry.info.taxonomy.composes_with {
                get(other).unwrap();
            }
        }
    }

    #[test]
    fn flags_and_recipes_have_the_same_defaults_and_the_same_names() {
        for entry in all() {
            let command = entry.command().no_binary_name(true);
            let flags: Vec<String> = command
                .get_arguments()
                .filter_map(|arg| arg.get_long())
                .map(|long| long.replace('-', "_"))
                .collect();
            let schema = entry.schema();
            let empty = serde_json::Map::new();
            let fields = schema["properties"].as_object().unwrap_or(&empty);
            for flag in &flags {
                assert!(fields.contains_key(flag), "{}: --{flag} is no field", entry.info.name);
                let reserved = flag.replace('_', "-");
                assert!(!RESERVED.contains(&reserved.as_str()), "{}: {flag}", entry.info.name);
            }
            for (field, schema) in fields {
                assert!(flags.contains(field), "{}: {field} has no flag", entry.info.name);
                assert!(schema["description"].is_string(), "{}: {field}", entry.info.name);
            }
            let matches = command.try_get_matches_from(std::iter::empty::<&str>()).unwrap();
            let from_flags = entry.from_matches(&matches).unwrap().parameters();
            assert_eq!(from_flags, entry.default().parameters(), "{}", entry.info.name);
            // What a recipe records can be read back.
            let again = entry.from_value(&from_flags).unwrap().parameters();
            assert_eq!(from_flags, again, "{}", entry.info.name);
        }
    }

    #[test]
    fn unknown_names_get_a_suggestion() {
        let Err(error) = get("rnt") else { panic!("rnt is no method") };
        assert!(error.to_string().contains("did you mean `rtn`"), "{error}");
        let value = serde_json::json!({"bit": 3});
        let error = get("rtn").unwrap().from_value(&value).unwrap_err().to_string();
        assert!(error.contains("`bit`") && error.contains("did you mean `bits`"), "{error}");
        let value = serde_json::json!({"bits": "three"});
        let error = get("rtn").unwrap().from_value(&value).unwrap_err().to_string();
        assert!(error.contains("rtn"), "{error}");
    }
}
