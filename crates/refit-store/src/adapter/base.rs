//! An adapter against the model that it is put on.

use super::Adapter;
use super::form::{Form, Part, Prompt, Side};
use crate::architecture::Layout;
use crate::artifact::Artifact;
use crate::error::{Error, Result};

/// Sites that a message names.
const SHOWN: usize = 5;

impl Adapter {
    /// Gives every site the base's own name where the two differ by what stands before it: an adapter of
    /// `BertForSequenceClassification` says `bert.encoder...` and a bare encoder's file `encoder...`, as
    /// transformers itself allows. Does nothing where no such prefix makes the names meet.
    pub fn align(&mut self, base: &Artifact) {
        let has = |site: &str| base.contains(&format!("{site}.weight"));
        let missing = |part: &&Part| !matches!(part.form, Form::Full { .. }) && !has(&part.site);
        let Some(first) = self.parts.iter().find(missing).map(|part| part.site.clone()) else {
            return;
        };
        let mut dots = first.match_indices('.').map(|(at, _)| at + 1);
        let shorter = dots.find(|&at| has(&first[at..])).map(|at| first[..at].to_owned());
        let end = format!(".{first}.weight");
        let longer = base.tensors().iter().find_map(|info| {
            Some(format!("{}.", info.name.strip_suffix(&end).filter(|rest| !rest.is_empty())?))
        });
        let renamed = |site: &str| match (&shorter, &longer) {
            (Some(prefix), _) => site.strip_prefix(&**prefix).map(str::to_owned),
            (None, Some(prefix)) => Some(format!("{prefix}{site}")),
            (None, None) => None,
        };
        for part in &mut self.parts {
            let name = part.tensor();
            if !base.contains(&name)
                && let Some(site) = renamed(&part.site)
                && base.contains(&format!("{site}{}", &name[part.site.len()..]))
            {
                part.site = site;
            }
        }
        super::read::sort(&mut self.parts);
    }

    /// Checks that every site is in the base with the shape that the adapter was trained on, and a prompt with the
    /// base's layers and width. Whole modules that the base lacks (a new head among `modules_to_save`, the output head
    /// of a model that ties it) are no error, as long as something else meets the base.
    ///
    /// # Errors
    /// [`Error::AdapterMisfit`] with the first few names and both shapes.
    pub fn check_base(&self, base: &Artifact) -> Result<()> {
        if self.parts.is_empty() && self.prompt.is_none() {
            // It changes nothing, and says so: that fits every base.
            return Ok(());
        }
        let mut problems = Vec::new();
        let mut touched = 0;
        for part in &self.parts {
            match self.fit(part, base) {
                Ok(met) => touched += usize::from(met),
                Err(problem) => problems.push(problem),
            }
        }
        if let Some(prompt) = &self.prompt {
            match prompt_fit(prompt, base) {
                None => touched += 1,
                Some(problem) => problems.push(problem),
            }
        }
        let misfit = |problems: String| Error::AdapterMisfit {
            adapter: self.path.clone(),
            base: base.path().to_owned(),
            problems,
        };
        if !problems.is_empty() {
            let total = self.parts.len() + usize::from(self.prompt.is_some());
            let count = problems.len();
            let more = if count > SHOWN { ", ..." } else { "" };
            problems.truncate(SHOWN);
            let listed = problems.join("; ");
            return Err(misfit(format!("{count} of {total} parts do not: {listed}{more}")));
        }
        if touched == 0 {
            return Err(misfit("it changes no tensor of the model".to_owned()));
        }
        Ok(())
    }

    /// True if the part meets a tensor of the base, false for one that the base rightly lacks.
    fn fit(&self, part: &Part, base: &Artifact) -> Result<bool, String> {
        let name = part.tensor();
        let Ok(info) = base.tensor(&name) else {
            return self.absent(part, &name, base);
        };
        let layout = base.architecture().site(&name).map(|site| site.layout);
        // Without a known architecture the configuration's own word counts.
        let turned = match layout {
            Some(layout) => layout == Layout::InOut,
            None => self.config.get("fan_in_fan_out").and_then(|v| v.as_bool()) == Some(true),
        };
        if let Form::Full { values, .. } | Form::Delta { values, .. } = &part.form {
            return match values.shape == info.shape {
                true => Ok(true),
                false => Err(shapes(&name, &values.shape, &info.shape)),
            };
        }
        let rows = info.shape.first().copied().unwrap_or(1);
        let columns = info.shape.iter().skip(1).product();
        let (out, inputs) =
            if turned && info.shape.len() == 2 { (columns, rows) } else { (rows, columns) };
        let (wanted_out, wanted_inputs) = match &part.form {
            // A parallel adapter reads another place than the site's own input.
            Form::Bottleneck { position, .. } if position == "heads" => (None, None),
            Form::Bottleneck { .. } => (part.form.dims().0, None),
            form => form.dims(),
        };
        let fits = wanted_out.is_none_or(|dim| dim == out)
            && wanted_inputs.is_none_or(|dim| dim == inputs);
        let kernel = info.shape.len() > 2 && !self.reads_kernels(&part.form);
        if fits && !kernel {
            return Ok(true);
        }
        let show = |dim: Option<usize>| dim.map_or("any".to_owned(), |dim| dim.to_string());
        let order = if turned { ", stored [in, out]" } else { "" };
        Err(format!(
            "`{name}` is {:?}{order}, the adapter's {} is for [out {}, in {}]",
            info.shape,
            part.form.name(),
            show(wanted_out),
            show(wanted_inputs)
        ))
    }

    /// LoRA and LoHa act on flattened kernels; (IA)^3 on outputs, which are their rows.
    fn reads_kernels(&self, form: &Form) -> bool {
        matches!(form, Form::Lora { .. } | Form::Loha { .. } | Form::Ia3 { side: Side::Output, .. })
    }

    fn absent(&self, part: &Part, name: &str, base: &Artifact) -> Result<bool, String> {
        if matches!(&part.form, Form::Bottleneck { .. }) {
            // A place without a weight of its own, such as a whole attention.
            let below = format!("{}.", part.site);
            if base.tensors().iter().any(|info| info.name.starts_with(&below)) {
                return Ok(true);
            }
        }
        let site = base.architecture().site(name);
        if let Form::Full { values, .. } = &part.form {
            return match site.filter(|site| site.shape != values.shape) {
                None => Ok(false),
                Some(site) => Err(shapes(name, &values.shape, &site.shape)),
            };
        }
        let tied = site.filter(|site| !site.stored).and_then(|site| site.tied_to.as_deref());
        Err(match tied {
            Some(other) => format!("`{name}` is tied to `{other}` and not stored; untie it first"),
            None => {
                let names = base.tensors().iter().map(|info| &*info.name);
                match crate::artifact::nearest(name, names).first() {
                    Some(near) => format!("`{name}` is not in the model (nearest: `{near}`)"),
                    None => format!("`{name}` is not in the model"),
                }
            }
        })
    }
}

fn shapes(name: &str, adapter: &[usize], base: &[usize]) -> String {
    format!("`{name}` is {base:?} in the model and {adapter:?} in the adapter")
}

/// What of a prompt does not fit the model's configuration; keys that it does not state are not held against it.
fn prompt_fit(prompt: &Prompt, base: &Artifact) -> Option<String> {
    let config = base.config();
    let differs = |what: &str, adapter: usize, base: Option<usize>| {
        let base = base.filter(|&base| base != adapter)?;
        Some(format!("its {what} {adapter}, the model's {base}"))
    };
    let hidden = config.usize("hidden_size").or_else(|| config.usize("n_embd"));
    match prompt {
        Prompt::Input { table, .. } => differs("width is", table.columns(), hidden),
        Prompt::Prefix { layers, .. } => {
            let depth = config.usize("num_hidden_layers").or_else(|| config.usize("n_layer"));
            let heads = config.usize("num_attention_heads").or_else(|| config.usize("n_head"));
            let kv_heads = config.usize("num_key_value_heads").or(heads);
            let per_head = |hidden: usize| hidden.checked_div(heads?);
            let head_dim = config.usize("head_dim").or_else(|| per_head(hidden?));
            let width = kv_heads.and_then(|heads| heads.checked_mul(head_dim?));
            differs("number of layers is", *layers, depth)
                .or_else(|| differs("keys and values have width", prompt.width(), width))
        }
    }
}
