//! What a language model is trained on: token ids, and which of them it must learn to predict.
//!
//! A table of records becomes one example per row, by the columns that it has:
//!
//! | columns | learned | ends with |
//! |---|---|---|
//! | `messages` | the assistant's turns, in the model's chat template | what the template writes |
//! | `prompt`, `completion` | the completion | end of text |
//! | `instruction`, `input` (may be absent), `output` | the output | end of text |
//! | `text` | all of it | end of text |
//!
//! Plain text is cut into consecutive windows, all of which is learned.

use serde_json::Value;

use crate::records::Record;
use crate::tokenizer::{Message, Tokenizer};
use crate::{Error, Records, Result};

/// One sequence to learn from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// Token ids, at least two.
    pub ids: Vec<u32>,
    /// Which of them are to be predicted; as long as `ids`. The first never is.
    pub learned: Vec<bool>,
}

impl Example {
    /// An example that is learned as a whole.
    pub fn whole(ids: Vec<u32>) -> Self {
        let learned = vec![true; ids.len()];
        Self { ids, learned }
    }

    /// Tokens that are predicted.
    pub fn learned(&self) -> usize {
        self.learned.iter().skip(1).filter(|learned| **learned).count()
    }
}

/// How long an example may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Length {
    /// Most tokens of one example; windows of plain text have exactly as many.
    pub max: usize,
    /// Cut what is longer instead of refusing it.
    pub truncate: bool,
}

/// The columns that examples are made of.
#[derive(Debug, Clone, Copy)]
enum Form {
    Messages(usize),
    Pair { prompt: usize, input: Option<usize>, completion: usize },
    Text(usize),
}

impl Form {
    fn of(records: &Records) -> Result<Self> {
        let at = |name: &str| records.columns().iter().position(|column| column == name);
        if let Some(messages) = at("messages") {
            return Ok(Self::Messages(messages));
        }
        if let (Some(prompt), Some(completion)) = (at("prompt"), at("completion")) {
            return Ok(Self::Pair { prompt, input: None, completion });
        }
        if let (Some(prompt), Some(completion)) = (at("instruction"), at("output")) {
            return Ok(Self::Pair { prompt, input: at("input"), completion });
        }
        if let Some(text) = at("text") {
            return Ok(Self::Text(text));
        }
        let message = format!(
            "a language model learns from the columns `messages`, `prompt` and `completion`, `instruction` and `output`, \
             or `text`; found {}",
            records.columns().join(", ")
        );
        Err(Error::file(records.path(), message))
    }
}

/// Examples from a table, one per row.
///
/// # Errors
/// No usable columns, no rows; rows with empty or missing values, without anything to learn, or longer than `length` allows,
/// each with its line.
pub fn from_records(
    tokenizer: &Tokenizer,
    records: &Records,
    length: Length,
) -> Result<Vec<Example>> {
    if records.is_empty() {
        Form::of(records)?;
        return Err(Error::file(records.path(), "it has no rows; training needs at least one"));
    }
    each_record(tokenizer, records, length)?.collect()
}

/// The same row by row, for those who go on after a bad one.
///
/// # Errors
/// No usable columns.
pub fn each_record<'a>(
    tokenizer: &'a Tokenizer,
    records: &'a Records,
    length: Length,
) -> Result<impl Iterator<Item = Result<Example>> + 'a> {
    let form = Form::of(records)?;
    let example = move |row: &Record| {
        let fail = |message: String| Error::line(records.path(), row.line, message);
        let text = |at: usize| match &row.values[at] {
            Value::String(text) => Ok(text.as_str()),
            other => {
                let column = &records.columns()[at];
                Err(fail(format!("`{column}` is {}, expected a text", kind(other))))
            }
        };
        let mut example = match form {
            Form::Text(at) => {
                let text = text(at)?;
                if text.trim().is_empty() {
                    return Err(fail("`text` is empty; remove the line".into()));
                }
                Example::whole(ended(tokenizer, tokenizer.encode(text, true)?))
            }
            Form::Pair { prompt, input, completion } => {
                let mut head = text(prompt)?.to_owned();
                if let Some(more) = input.map(text).transpose()?.filter(|more| !more.is_empty()) {
                    head.push('\n');
                    head.push_str(more);
                }
                if input.is_some() || head.is_empty() {
                    head.push('\n');
                }
                let tail = text(completion)?;
                if tail.trim().is_empty() {
                    return Err(fail("nothing to learn: the completion is empty".into()));
                }
                let mut ids = tokenizer.encode(&head, true)?;
                let known = ids.len();
                ids.extend(tokenizer.encode(tail, false)?);
                let ids = ended(tokenizer, ids);
                let learned = (0..ids.len()).map(|i| i >= known).collect();
                Example { ids, learned }
            }
            Form::Messages(at) => chat(tokenizer, &row.values[at], &fail)?,
        };
        if example.ids.len() > length.max {
            if !length.truncate {
                return Err(fail(format!(
                    "{} tokens are more than the limit of {}; raise --max-length, split the record, or cut it with --truncate",
                    example.ids.len(),
                    length.max
                )));
            }
            example.ids.truncate(length.max);
            example.learned.truncate(length.max);
        }
        if example.learned() == 0 {
            return Err(fail(
                "nothing to learn: no token is left to predict; give the model something to say"
                    .into(),
            ));
        }
        Ok(example)
    };
    Ok(records.rows().iter().map(example))
}

/// Consecutive windows of `length.max` tokens of a text; a shorter last one counts when it has at least two.
///
/// # Errors
/// A text of fewer than two tokens.
pub fn from_text(
    tokenizer: &Tokenizer,
    source: &str,
    text: &str,
    length: Length,
) -> Result<Vec<Example>> {
    let ids = tokenizer.encode(text, false)?;
    let windows: Vec<Example> = ids
        .chunks(length.max.max(2))
        .filter(|window| window.len() > 1)
        .map(|window| Example::whole(window.to_vec()))
        .collect();
    if windows.is_empty() {
        let message = format!("{source}: {} tokens of text are too few to train on", ids.len());
        return Err(Error::Invalid(message));
    }
    Ok(windows)
}

/// `ids` with the end-of-text token, where the tokenizer has one and the ids do not end with it.
fn ended(tokenizer: &Tokenizer, mut ids: Vec<u32>) -> Vec<u32> {
    if let Some(&end) = tokenizer.special().eos.first()
        && ids.last() != Some(&end)
    {
        ids.push(end);
    }
    ids
}

/// A conversation in the model's template; the assistant's turns, with what ends them, are learned.
///
/// Each turn is found as what the template adds when the turn is appended, so any template works whose rendering of a
/// conversation begins with that of its beginning.
fn chat(tokenizer: &Tokenizer, value: &Value, fail: &dyn Fn(String) -> Error) -> Result<Example> {
    let messages: Vec<Message> = serde_json::from_value(value.clone())
        .map_err(|e| fail(format!("`messages` is no list of {{role, content}}: {e}")))?;
    if !messages.iter().any(|message| message.role == "assistant") {
        return Err(fail("nothing to learn: no message has the role `assistant`".into()));
    }
    let (mut ids, mut learned, mut done) = (Vec::new(), Vec::new(), String::new());
    let mut push = |text: &str, learn: bool| -> Result<()> {
        let more = tokenizer.encode(text, false)?;
        learned.extend(std::iter::repeat_n(learn, more.len()));
        ids.extend(more);
        Ok(())
    };
    for (i, message) in messages.iter().enumerate() {
        if message.role == "assistant" {
            let opened = tokenizer.render_chat(&messages[..i], true)?;
            let opening = opened.strip_prefix(&done).ok_or_else(|| fail(unstable(i)))?;
            push(opening, false)?;
            done = opened;
        }
        let whole = tokenizer.render_chat(&messages[..=i], false)?;
        let turn = whole.strip_prefix(&done).ok_or_else(|| fail(unstable(i)))?;
        push(turn, message.role == "assistant")?;
        done = whole;
    }
    Ok(Example { ids, learned })
}

fn unstable(turn: usize) -> String {
    format!(
        "the model's chat template rewrites earlier turns when message {} is added, so what is learned cannot be told apart; \
         give `prompt` and `completion` instead",
        turn + 1
    )
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "missing",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::tokenizer::TokenizerFiles;

    const TEMPLATE: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";

    fn tokenizer() -> Tokenizer {
        // One token per byte, and an end of text.
        let mut vocab = serde_json::Map::new();
        for byte in 0..128u8 {
            let c = if byte == b' ' { 'Ġ'.to_string() } else { (byte as char).to_string() };
            vocab.insert(c, byte.into());
        }
        let json = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [{"id": 128, "content": "<eos>", "special": true, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false}],
            "normalizer": null, "post_processor": null,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
        });
        let config = serde_json::json!({"eos_token": "<eos>", "chat_template": TEMPLATE});
        let files = TokenizerFiles {
            tokenizer_json: Some(json.to_string().into_bytes()),
            tokenizer_config: Some(config.to_string().into_bytes()),
            ..TokenizerFiles::default()
        };
        Tokenizer::from_files(Path::new("test"), files).unwrap()
    }

    fn records(lines: &str) -> Records {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("train.jsonl");
        std::fs::write(&path, lines).unwrap();
        Records::open(&path).unwrap()
    }

    const LENGTH: Length = Length { max: 64, truncate: false };

    /// What is learned, as text.
    fn learned(example: &Example) -> String {
        let kept: Vec<u32> = example
            .ids
            .iter()
            .zip(&example.learned)
            .filter(|(_, l)| **l)
            .map(|(i, _)| *i)
            .collect();
        tokenizer().decode(&kept, false).unwrap()
    }

    #[test]
    fn each_form_learns_its_part() {
        let t = tokenizer();
        for (line, wanted) in [
            (r#"{"text": "abc"}"#, "abc<eos>"),
            (r#"{"prompt": "ab", "completion": "cd"}"#, "cd<eos>"),
            (r#"{"instruction": "add", "input": "1 2", "output": "3"}"#, "3<eos>"),
            (
                r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                    {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}"#,
                "b</>d</>",
            ),
        ] {
            let examples = from_records(&t, &records(&line.replace('\n', " ")), LENGTH).unwrap();
            assert_eq!(learned(&examples[0]), wanted, "{line}");
        }
    }

    #[test]
    fn mistakes_name_file_and_line() {
        let t = tokenizer();
        let long = "x".repeat(80);
        for (lines, wanted) in [
            (
                "{\"text\": \"ab\"}\n{\"text\": \" \"}\n".to_owned(),
                "train.jsonl:2: `text` is empty",
            ),
            ("{\"prompt\": \"a\", \"completion\": \"\"}\n".into(), ":1: nothing to learn"),
            ("{\"prompt\": \"a\", \"completion\": 3}\n".into(), "`completion` is a number"),
            (format!("{{\"text\": \"{long}\"}}\n"), "81 tokens are more than the limit of 64"),
            ("{\"question\": \"a\"}\n".into(), "found question"),
            (
                "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}\n".into(),
                "no message has the role `assistant`",
            ),
        ] {
            let error = from_records(&t, &records(&lines), LENGTH).unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}\nshould contain {wanted}");
        }
        let cut = Length { max: 64, truncate: true };
        let kept = from_records(&t, &records(&format!("{{\"text\": \"{long}\"}}\n")), cut).unwrap();
        assert_eq!(kept[0].ids.len(), 64);
    }

    #[test]
    fn text_is_cut_into_windows() {
        let t = tokenizer();
        let windows = from_text(&t, "x", "abcdefghi", Length { max: 4, truncate: false }).unwrap();
        let lengths: Vec<usize> = windows.iter().map(|w| w.ids.len()).collect();
        assert_eq!(lengths, [4, 4], "a window of one token has nothing to predict");
        assert!(from_text(&t, "x", "a", LENGTH).is_err());
    }
}
