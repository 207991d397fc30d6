//! Chat templates: Jinja programs that other tools run. A template that reaches for Python's internals is an attack.

use super::{Findings, Severity};

/// Words by which template injections leave the sandbox. No chat template needs any of them.
const FORBIDDEN: &[&str] = &[
    "__class__",
    "__mro__",
    "__subclasses__",
    "__globals__",
    "__builtins__",
    "__import__",
    "__init__",
    "__base__",
    "__bases__",
    "__dict__",
    "__getattribute__",
    "__getitem__",
    "__code__",
    "__reduce__",
    "__self__",
    "__func__",
    "func_globals",
    "gi_frame",
    "gi_code",
    "f_globals",
    "f_locals",
    "f_builtins",
    "cr_frame",
    "tb_frame",
    "mro()",
    "os.system",
    "os.popen",
    "popen(",
    "subprocess",
    "importlib",
    "builtins",
    "lipsum",
    "cycler",
    "joiner",
    "_TemplateReference",
    "self._",
    "request.application",
    "get_flashed_messages",
    "url_for",
    "eval(",
    "exec(",
    "compile(",
    "open(",
    "\\x5f",
    "\\u005f",
    "\\137",
    "|attr",
    "| attr",
    "format_map",
    "% include",
    "%- include",
    "% import",
    "%- import",
    "% from",
    "%- from",
    "% extends",
    "%- extends",
];

/// Why a template is dangerous, or `None`.
pub(super) fn danger(template: &str) -> Option<String> {
    let squeezed: String = {
        // `| attr`, `|  attr` and a line break between them are the same to Jinja.
        let mut words = template.split_whitespace().collect::<Vec<_>>().join(" ");
        words = words.replace("| ", "|").replace(" |", "|");
        words
    };
    // 'Quo' ~ 'ted' and 'a' + 'b' join strings; without quotes and joints the word shows.
    let joined: String =
        squeezed.chars().filter(|c| !matches!(c, '\'' | '"' | '~' | '+' | ' ' | ',')).collect();
    let found = FORBIDDEN.iter().find(|word| {
        let tight: String = word.chars().filter(|c| *c != ' ').collect();
        squeezed.contains(**word) || (word.starts_with("__") && joined.contains(&tight))
    });
    found.map(|word| format!("uses `{word}`, which no chat template needs"))
}

pub(super) fn scan(template: &str, name: &str, findings: &mut Findings<'_>) {
    if let Some(why) = danger(template) {
        findings.add(Severity::Danger, format!("template `{name}` {why}"));
    }
}

/// Why a piece of metadata looks like code, or `None`.
pub(super) fn code_in(text: &str) -> Option<String> {
    let lower = text.trim_start().to_lowercase();
    let script =
        ["#!/", "<script", "<?php", "import os", "__import__", "exec(", "eval(", "subprocess"];
    if let Some(mark) = script
        .iter()
        .find(|mark| lower.starts_with(**mark) || (mark.contains('_') && lower.contains(**mark)))
    {
        return Some(format!("begins like code (`{mark}`)"));
    }
    let pickle = matches!(text.as_bytes(), [0x80, 0..=5, ..])
        || lower.starts_with("gasv")
        || lower.starts_with("gan") && lower.ends_with("lg==");
    pickle.then(|| "holds a pickle".to_owned())
}
