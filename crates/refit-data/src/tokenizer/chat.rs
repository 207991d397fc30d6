use super::Tokenizer;
use crate::{Error, Result};
use minijinja::value::{Kwargs, Serde, ValueKind};
use minijinja::{Environment, ErrorKind, Value as Jinja};
use serde::{Deserialize, Serialize};
use serde_json::ser::{Formatter, Serializer};
use serde_json::{Map, Value};
use std::io::Write;
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
        let mut context = self.special_texts.clone();
        context.insert("add_generation_prompt".into(), add_generation_prompt.into());
        context.extend(variables);
        let messages = serde_json::to_value(messages)
            .map_err(|e| Error::Invalid(format!("the messages are not JSON: {e}")))?;
        context.insert("messages".into(), messages);
        let render = || {
            let environment = environment();
            let template = environment.template_from_str(&source)?;
            template.render(Jinja::from(Serde(&context)))
        };
        // An error may hold values of the template: it goes no further than its stack.
        let render = || render().map_err(fail);
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, render);
            let thread = thread.map_err(Error::io(&self.origin))?;
            thread.join().expect("invariant: rendering does not panic")
        })
    }
}

/// Work that one rendering may do: some thousand turns of the longest templates in use.
const FUEL: u64 = 1_000_000;

/// Bytes of stack for one rendering (address space: what is not used is never touched). A template can nest a list in
/// itself once for every instruction or so, and Jinja walks values by recursion: the fuel must run out first. Twice what
/// the deepest nests needed that were tried.
const STACK: usize = 512 << 20;

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
        // `{%}` opens a tag and does not close it.
        let Some(end) = rest[start + 2..].find("%}") else { break };
        let (tag, after) = rest[start..].split_at(end + 2);
        let word = tag[2..].trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let other = match word {
            "generation" => tag.replace("generation", "if true"),
            "endgeneration" => tag.replace("endgeneration", "endif"),
            _ => tag.to_owned(),
        };
        out.push_str(&rest[..start]);
        out.push_str(&other);
        rest = after;
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
    environment.set_fuel(Some(FUEL));
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
        let text = python_json(&value, indent)
            .map_err(|e| minijinja::Error::new(ErrorKind::InvalidOperation, e))?;
        Ok(Jinja::from_safe_string(text))
    });
    environment
}

/// Bytes of JSON that one `tojson` gives at most. A template can hold a list in itself, doubled again and again: a few
/// lines whose JSON would fill any memory.
const MAX_JSON: usize = 16 << 20;

/// `json.dumps(value, ensure_ascii=False, indent=indent)`.
fn python_json(value: &impl Serialize, indent: Option<usize>) -> Result<String, String> {
    if let Some(width) = indent.filter(|width| *width > 100) {
        return Err(format!("an indent of {width} spaces; at most 100 are written"));
    }
    let mut out = Limited { bytes: Vec::new() };
    let formatter = PythonFormatter { indent, depth: 0, filled: false };
    value
        .serialize(&mut Serializer::with_formatter(&mut out, formatter))
        .map_err(|e| e.to_string())?;
    Ok(String::from_utf8(out.bytes).expect("invariant: JSON is UTF-8"))
}

struct Limited {
    bytes: Vec<u8>,
}

impl Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.bytes.len() + bytes.len() > MAX_JSON {
            return Err(std::io::Error::other("more than 16 MiB of JSON"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A space behind commas and colons; with an indent, a line for every element.
struct PythonFormatter {
    indent: Option<usize>,
    depth: usize,
    /// The innermost list or object has an element.
    filled: bool,
}

impl PythonFormatter {
    fn open<W: ?Sized + Write>(&mut self, out: &mut W, bracket: &[u8]) -> std::io::Result<()> {
        // As deep as JSON is read.
        if self.depth == 128 {
            return Err(std::io::Error::other("lists and objects nested more than 128 deep"));
        }
        self.depth += 1;
        self.filled = false;
        out.write_all(bracket)
    }

    fn close<W: ?Sized + Write>(&mut self, out: &mut W, bracket: &[u8]) -> std::io::Result<()> {
        self.depth -= 1;
        if std::mem::replace(&mut self.filled, true) {
            self.line(out)?;
        }
        out.write_all(bracket)
    }

    fn next<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        self.filled = true;
        match (first, self.indent) {
            (true, _) => {}
            (false, None) => out.write_all(b", ")?,
            (false, Some(_)) => out.write_all(b",")?,
        }
        self.line(out)
    }

    fn line<W: ?Sized + Write>(&self, out: &mut W) -> std::io::Result<()> {
        let Some(width) = self.indent else { return Ok(()) };
        write!(out, "\n{:1$}", "", width * self.depth)
    }
}

impl Formatter for PythonFormatter {
    fn begin_array<W: ?Sized + Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        self.open(out, b"[")
    }

    fn end_array<W: ?Sized + Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        self.close(out, b"]")
    }

    fn begin_array_value<W: ?Sized + Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        self.next(out, first)
    }

    fn begin_object<W: ?Sized + Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        self.open(out, b"{")
    }

    fn end_object<W: ?Sized + Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        self.close(out, b"}")
    }

    fn begin_object_key<W: ?Sized + Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        self.next(out, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(b": ")
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
        assert_eq!(
            python_json(&value, None).unwrap(),
            r#"{"b": [1, 2.5, null], "a": "é<", "e": {}}"#
        );
        let indented = python_json(&serde_json::json!({"a": [1]}), Some(2)).unwrap();
        assert_eq!(indented, "{\n  \"a\": [\n    1\n  ]\n}");
        let value = serde_json::json!({"a": [], "b": [[1, {}], {"c": 2}], "d": {}});
        let pretty = serde_json::to_string_pretty(&value).unwrap();
        assert_eq!(python_json(&value, Some(2)).unwrap(), pretty);
        assert!(python_json(&value, Some(usize::MAX)).is_err());
    }

    #[test]
    fn generation_marks_render_as_nothing() {
        let source = template_source("a{%- generation -%} b {% endgeneration %}c{% if x");
        assert_eq!(source, "a{%- if true -%} b {% endif %}c{% if x");
        for odd in ["{%}", "{%", "{%%}", "{%}%}", "é{%é%}{%"] {
            assert_eq!(template_source(odd), odd);
        }
    }
}
