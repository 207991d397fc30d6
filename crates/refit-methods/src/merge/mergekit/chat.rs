//! Chat templates of merged models.

use refit_store::{Artifact, SideFile};
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::inputs::ModelInput;
use crate::suggest::nearest;

/// Formats that a recipe can name, written anew from their descriptions.
const NAMED: &[(&str, &str)] = &[
    (
        "chatml",
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    ),
    (
        "llama3",
        "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    ),
    (
        "mistral",
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}{% else %}{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}{% endif %}{% endfor %}",
    ),
    (
        "alpaca",
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}{% else %}{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}",
    ),
    (
        "exaone",
        "{% for message in messages %}{{ '[|' + message['role'] + '|]' + message['content'] }}{% if message['role'] == 'user' %}{{ '\\n' }}{% else %}{{ '[|endofturn|]\\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}",
    ),
];

/// The template that a recipe asks for; `auto` is the one that most models have, the first of equals.
///
/// # Errors
/// A name that is none, and a text that is no template.
pub fn choose(wanted: &str, models: &[ModelInput]) -> Result<Option<String>> {
    if wanted == "auto" {
        let mut counted: Vec<(String, usize)> = Vec::new();
        for template in models.iter().filter_map(|model| template(&model.artifact)) {
            match counted.iter_mut().find(|(known, _)| *known == template) {
                Some((_, count)) => *count += 1,
                None => counted.push((template, 1)),
            }
        }
        let most = counted.iter().map(|(_, count)| *count).max();
        return Ok(counted.into_iter().find(|(_, count)| Some(*count) == most).map(|(t, _)| t));
    }
    if let Some((_, template)) = NAMED.iter().find(|(name, _)| *name == wanted) {
        return Ok(Some((*template).to_owned()));
    }
    if wanted.len() >= 20 && wanted.contains('{') {
        return Ok(Some(wanted.to_owned()));
    }
    let names: Vec<&str> = NAMED.iter().map(|(name, _)| *name).chain(["auto"]).collect();
    let hint = match nearest(wanted, &names) {
        Some(near) => format!(" (did you mean `{near}`?)"),
        None => String::new(),
    };
    let problem =
        format!("`{wanted}` is no template and no name of one{hint}; names: {}", names.join(", "));
    Err(Error::recipe("chat_template", problem))
}

/// A model's own template.
fn template(artifact: &Artifact) -> Option<String> {
    let files = artifact.side_files();
    let read = |name: &str| files.iter().find(|file| file.name == name)?.read().ok();
    if let Some(text) = read("chat_template.jinja").and_then(|bytes| String::from_utf8(bytes).ok())
    {
        return Some(text.trim().to_owned());
    }
    let config: Value = serde_json::from_slice(&read("tokenizer_config.json")?).ok()?;
    let found = match &config["chat_template"] {
        Value::Array(list) => {
            list.iter().find(|entry| entry["name"] == "default").map(|entry| &entry["template"])
        }
        other => Some(other),
    };
    found?.as_str().map(|text| text.trim().to_owned())
}

/// The files that carry a template, from the tokenizer's configuration that goes along.
///
/// # Errors
/// A tokenizer configuration that is no JSON.
pub fn files(template: &str, tokenizer_config: Option<Vec<u8>>) -> Result<Vec<SideFile>> {
    let mut config: Value = match tokenizer_config {
        Some(bytes) => serde_json::from_slice(&bytes).map_err(|error| {
            Error::recipe("tokenizer_config.json", format!("not valid JSON: {error}"))
        })?,
        None => json!({}),
    };
    config["chat_template"] = json!(template);
    let mut text = config.to_string().into_bytes();
    if let Ok(pretty) = serde_json::to_vec_pretty(&config) {
        text = pretty;
    }
    Ok(vec![
        SideFile::from_bytes("tokenizer_config.json", text),
        SideFile::from_bytes("chat_template.jinja", template.as_bytes().to_vec()),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_templates_and_neither() {
        assert!(choose("chatml", &[]).unwrap().unwrap().contains("<|im_start|>"));
        let own = "{% for m in messages %}{{ m }}{% endfor %}";
        assert_eq!(choose(own, &[]).unwrap().as_deref(), Some(own));
        assert!(choose("chatlm", &[]).unwrap_err().to_string().contains("did you mean `chatml`"));
        assert_eq!(choose("auto", &[]).unwrap(), None);
    }
}
