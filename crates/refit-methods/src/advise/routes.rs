//! Commands that are ready to paste, and names for what they write.

use serde_json::{Map, Value, json};

use super::files::stated;
use crate::emit::{flags, name_of, quoted};
use crate::quantize::export::{Export, Target};

/// A word for a model in names of outputs: the last part of its source, without what no file name should have.
pub fn stem(source: &str) -> String {
    let name = name_of(source);
    let name = name.rsplit(':').next().unwrap_or(&name);
    let name =
        [".safetensors", ".gguf"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
    let safe = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '-' };
    let safe: String = name.chars().map(safe).collect();
    match safe.trim_matches(['.', '-']) {
        "" => "model".to_owned(),
        stem => stem.to_owned(),
    }
}

/// What marks an output of a format.
fn suffix(to: Target) -> &'static str {
    match to {
        Target::Gguf => "gguf",
        Target::CompressedTensors => "ct",
        Target::Gptq => "gptq-packed",
        Target::Safetensors => "safetensors",
    }
}

/// The name of an export's output.
pub fn exported(stem: &str, export: &Export) -> String {
    format!("{stem}-{}", suffix(export.to))
}

/// A command that applies a method. `data` are flags with what the method reads beside the model.
pub fn apply(
    method: &str,
    model: &str,
    parameters: &Map<String, Value>,
    data: &[(&str, &str)],
    out: &str,
) -> String {
    let mut words: Vec<String> = ["refit", "apply", method, model].map(str::to_owned).into();
    words.extend(flags(method, &Value::Object(parameters.clone())));
    for (flag, source) in data {
        words.extend([format!("--{flag}"), (*source).to_owned()]);
    }
    words.extend(["-o".to_owned(), out.to_owned()]);
    line(&words)
}

/// A command that exports a model.
pub fn export(model: &str, export: &Export, out: &str) -> String {
    let mut words: Vec<String> = ["refit", "export", model].map(str::to_owned).into();
    words.extend(flags("export", &stated(export)));
    words.extend(["-o".to_owned(), out.to_owned()]);
    line(&words)
}

/// A command that measures perplexity, and the distance to the original; `result` is a model and flags that belong to it.
pub fn eval(result: &[String], reference: &str, text: &str) -> String {
    let against = ["--reference", reference, "--text", text].map(str::to_owned);
    line(&[&["refit".to_owned(), "eval".to_owned()], result, &against].concat())
}

fn line(words: &[String]) -> String {
    words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ")
}

/// Parameters of one pair.
pub fn one(key: &str, value: impl serde::Serialize) -> Map<String, Value> {
    Map::from_iter([(key.to_owned(), json!(value))])
}

#[cfg(test)]
mod tests {
    use super::*;
    use refit_store::{DType, GgmlType};

    #[test]
    fn outputs_are_named_after_the_model() {
        for (source, name) in [
            ("builtin:tiny", "tiny"),
            ("hf:owner/Some-Model", "Some-Model"),
            ("./a b/model.gguf", "model"),
            ("models/my model/", "my-model"),
            ("/", "model"),
        ] {
            assert_eq!(stem(source), name, "{source}");
        }
    }

    #[test]
    fn commands_are_what_a_shell_reads() {
        let parameters = Map::from_iter([
            ("bits".to_owned(), json!(3)),
            ("group".to_owned(), json!("row")),
            ("asymmetric".to_owned(), json!(true)),
        ]);
        assert_eq!(
            apply("gptq", "a b", &parameters, &[("text", "builtin:calibration")], "q"),
            "refit apply gptq 'a b' --bits 3 --group row --asymmetric --text builtin:calibration -o q"
        );
        let q8 = crate::quantize::export::ExportType(Some(DType::Ggml(GgmlType::Q8_0)));
        let gguf = Export { embedding_type: q8, ..Export::default() };
        assert_eq!(
            export("q", &gguf, "q-gguf"),
            "refit export q --to gguf --embedding-type Q8_0 -o q-gguf"
        );
    }
}
