use super::Tokenizer;
use crate::{Error, Result};
use minijinja::value::{Kwargs, Serde, ValueKind};
use minijinja::{Environment, ErrorKind, Value as Jinja};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::path::Path;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, or what the template knows.
    pub role: String,
    /// Plain text.
    pub content: String,
}

impl Message {
    /// A turn of `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Message { role: role.into(), content: content.into() }
    }
}

impl Tokenizer {
    /// The model's chat template, a Jinja source.
    pub fn chat_template(&self) -> Option<&str> {
        self.template.as_deref()
    }

    /// The conversation as the model was trained to read it. Encode the result
    /// *without* special tokens: the template writes them.
    ///
    /// # Errors
    /// No template; a template that does not parse, or that refuses the messages.
    pub fn render_chat(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        self.render_chat_with(&messages, add_generation_prompt, Map::new())
    }

    /// [`Tokenizer::render_chat`] for messages of any shape (tool calls, parts)
    /// and with further variables for the template (`tools`, `enable_thinking`).
    ///
    /// # Errors
    /// As [`Tokenizer::render_chat`].
    pub fn render_chat_with(
        &self,
        messages: &impl Serialize,
        add_generation_prompt: bool,
        variables: Map<String, Value>,
    ) -> Result<String> {
        let template = self.template.as_deref().ok_or_else(|| {
            let message = "no chat template (tokenizer_config.json, chat_template.jinja); this is not a chat model: pass a plain prompt";
            Error::file(&self.origin, message)
        })?;
        let fail = |e: minijinja::Error| {
            let line = e.line().map_or(String::new(), |l| format!(", line {l}"));
            let why = e.detail().map_or_else(|| e.to_string(), str::to_owned);
            Error::file(&self.origin, format!("chat template{line}: {why}"))
        };
        let source = template_source(template);
        let environment = environment();
        let template = environment.template_from_str(&source).map_err(fail)?;
        let mut context = self.special_texts.clone();
        context.insert("add_generation_prompt".into(), add_generation_prompt.into());
        context.extend(variables);
        let messages = serde_json::to_value(messages)
            .map_err(|e| Error::Invalid(format!("the messages are not JSON: {e}")))?;
        context.insert("messages".into(), messages);
        template.render(Jinja::from(Serde(&context))).map_err(fail)
    }
}

/// The template of `chat_template.jinja`, or of `tokenizer_config.json`, where it
/// is a string or a list of named ones.
pub(super) fn find_template(
    origin: &Path,
    file: Option<Vec<u8>>,
    config: &Map<String, Value>,
) -> Result<Option<String>> {
    if let Some(bytes) = file {
        return crate::file::utf8(&origin.join("chat_template.jinja"), bytes).map(Some);
    }
    let named = |list: &Vec<Value>| {
        let default =
            list.iter().find(|t| t.get("name").and_then(Value::as_str) == Some("default"));
        Some(default.or(list.first())?.get("template")?.as_str()?.to_owned())
    };
    Ok(match config.get("chat_template") {
        Some(Value::String(template)) => Some(template.clone()),
        Some(Value::Array(list)) => named(list),
        _ => None,
    })
}

/// `{% generation %}` marks the assistant's tokens for training; it renders as if
/// it were not there.
fn template_source(template: &str) -> String {
    let mut out = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(start) = rest.find("{%") {
        let Some(end) = rest[start..].find("%}") else { break };
        let tag = &rest[start..start + end];
        let word = tag[2..].trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let other = match word {
            "generation" => tag.replace("generation", "if true"),
            "endgeneration" => tag.replace("endgeneration", "endif"),
            _ => tag.to_owned(),
        };
        out.push_str(&rest[..start]);
        out.push_str(&other);
        rest = &rest[start + end..];
    }
    out.push_str(rest);
    out
}

/// Jinja as `transformers.apply_chat_template` sets it up.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = minijinja::syntax::SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()
        .expect("invariant: the default delimiters are valid");
    environment.set_syntax(syntax);
    environment.set_fuel(Some(10_000_000));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |message: String| -> Result<String, _> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |format: String| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        strftime(&format, now.map_or(0, |d| d.as_secs()))
    });
    environment.add_filter("tojson", |value: Jinja, options: Kwargs| {
        let indent: Option<usize> = options.get("indent")?;
        let _ensure_ascii: Option<bool> = options.get("ensure_ascii")?;
        options.assert_all_used()?;
        if value.kind() == ValueKind::Undefined {
            let message = "Object of type Undefined is not JSON serializable";
            return Err(minijinja::Error::new(ErrorKind::InvalidOperation, message));
        }
        let value = serde_json::to_value(&value)
            .map_err(|e| minijinja::Error::new(ErrorKind::InvalidOperation, e.to_string()))?;
        let mut out = String::new();
        python_json(&value, indent, 0, &mut out);
        Ok(Jinja::from_safe_string(out))
    });
    environment
}

/// `json.dumps(value, ensure_ascii=False, indent=indent)`.
fn python_json(value: &Value, indent: Option<usize>, depth: usize, out: &mut String) {
    let line = |depth: usize, out: &mut String| {
        if let Some(width) = indent {
            out.push('\n');
            out.push_str(&" ".repeat(width * depth));
        }
    };
    let comma = if indent.is_some() { "," } else { ", " };
    match value {
        Value::Array(items) if !items.is_empty() => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                out.push_str(if i > 0 { comma } else { "" });
                line(depth + 1, out);
                python_json(item, indent, depth + 1, out);
            }
            line(depth, out);
            out.push(']');
        }
        Value::Object(items) if !items.is_empty() => {
            out.push('{');
            for (i, (key, item)) in items.iter().enumerate() {
                out.push_str(if i > 0 { comma } else { "" });
                line(depth + 1, out);
                out.push_str(&Value::String(key.clone()).to_string());
                out.push_str(": ");
                python_json(item, indent, depth + 1, out);
            }
            line(depth, out);
            out.push('}');
        }
        other => out.push_str(&other.to_string()),
    }
}

/// The fields of `strftime` that chat templates use, in UTC.
fn strftime(format: &str, unix: u64) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] =
        ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (mut rest, second) = (unix / 86_400, unix % 86_400);
    let weekday = DAYS[(rest % 7) as usize];
    let is_leap = |y: u64| y.is_multiple_of(4) && (!y.is_multiple_of(100) || y.is_multiple_of(400));
    let mut year = 1970;
    while rest >= 365 + u64::from(is_leap(year)) {
        rest -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let day_of_year = rest + 1;
    let lengths = [31, 28 + u64::from(is_leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while rest >= lengths[month] {
        rest -= lengths[month];
        month += 1;
    }
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        out += &match chars.next() {
            Some('Y') => year.to_string(),
            Some('y') => format!("{:02}", year % 100),
            Some('m') => format!("{:02}", month + 1),
            Some('d') => format!("{:02}", rest + 1),
            Some('e') => format!("{:2}", rest + 1),
            Some('j') => format!("{day_of_year:03}"),
            Some('B') => MONTHS[month].into(),
            Some('b' | 'h') => MONTHS[month][..3].into(),
            Some('A') => weekday.into(),
            Some('a') => weekday[..3].into(),
            Some('H') => format!("{:02}", second / 3600),
            Some('M') => format!("{:02}", second / 60 % 60),
            Some('S') => format!("{:02}", second % 60),
            Some('F') => format!("{year}-{:02}-{:02}", month + 1, rest + 1),
            Some('%') => "%".into(),
            Some(other) => format!("%{other}"),
            None => "%".into(),
        };
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_strftime() {
        // date -u -d @1732406399 "+%d %b %Y %A %H:%M:%S %j"
        assert_eq!(
            strftime("%d %b %Y %A %H:%M:%S %j %%", 1_732_406_399),
            "23 Nov 2024 Saturday 23:59:59 328 %"
        );
        assert_eq!(strftime("%F", 951_782_400), "2000-02-29");
    }

    #[test]
    fn json_is_pythons() {
        let value = serde_json::json!({"b": [1, 2.5, null], "a": "é<", "e": {}});
        let mut out = String::new();
        python_json(&value, None, 0, &mut out);
        assert_eq!(out, r#"{"b": [1, 2.5, null], "a": "é<", "e": {}}"#);
        out.clear();
        python_json(&serde_json::json!({"a": [1]}), Some(2), 0, &mut out);
        assert_eq!(out, "{\n  \"a\": [\n    1\n  ]\n}");
    }

    #[test]
    fn generation_marks_render_as_nothing() {
        let source = template_source("a{%- generation -%} b {% endgeneration %}c{% if x");
        assert_eq!(source, "a{%- if true -%} b {% endif %}c{% if x");
    }
}
