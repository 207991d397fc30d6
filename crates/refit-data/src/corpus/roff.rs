//! Manual pages to plain text: enough of troff's `man` macros to keep the prose
//! and drop the typography. Tables, equations and conditional code go; a
//! paragraph becomes one line, and display blocks keep their lines.

/// The plain text of a page written with the `man` macros. Empty for a page that
/// only points to another one (`.so`).
pub fn to_text(source: &str) -> String {
    let mut page = Page::default();
    let joined = source.replace("\\\n", "");
    let mut lines = joined.lines();
    while let Some(line) = lines.next() {
        let Some(request) = line.strip_prefix(['.', '\'']) else {
            page.text(&unescape(line), !line.starts_with(' '));
            continue;
        };
        let request = request.trim_start();
        let (name, rest) = request.split_once(char::is_whitespace).unwrap_or((request, ""));
        match name {
            "so" => return String::new(),
            "SH" | "SS" => page.heading(&arguments(rest, line, &mut lines).join(" ")),
            "PP" | "P" | "LP" | "HP" | "RS" | "RE" | "sp" | "br" | "TQ" => page.end_paragraph(),
            "TP" => {
                page.end_paragraph();
                page.tag = true;
            }
            "IP" => {
                page.end_paragraph();
                if let Some(tag) = arguments(rest, line, &mut lines).first() {
                    page.text(tag, true);
                    page.end_paragraph();
                }
            }
            "B" | "I" | "SM" | "SB" | "MR" => {
                page.text(&arguments(rest, line, &mut lines).join(" "), true);
            }
            "BR" | "BI" | "IR" | "IB" | "RB" | "RI" | "UR" | "MT" => {
                page.text(&arguments(rest, line, &mut lines).concat(), true);
            }
            "UE" | "ME" => page.text(&arguments(rest, "", &mut lines).concat(), true),
            "nf" | "EX" => page.set_fill(false),
            "fi" | "EE" => page.set_fill(true),
            "TS" => skip_until(&mut lines, "TE"),
            "EQ" => skip_until(&mut lines, "EN"),
            "de" | "ig" | "am" => skip_until(&mut lines, "."),
            "if" | "ie" | "el" => skip_braces(rest, &mut lines),
            _ => {}
        }
    }
    page.end_paragraph();
    page.out.trim().to_owned()
}

#[derive(Default)]
struct Page {
    out: String,
    paragraph: String,
    no_fill: bool,
    /// The next text line is the tag of a `.TP` item.
    tag: bool,
}

impl Page {
    fn text(&mut self, text: &str, filled: bool) {
        if self.no_fill {
            self.out.push_str(text.trim_end());
            self.out.push('\n');
            return;
        }
        // A line that starts with a space breaks the one before it.
        if text.trim().is_empty() || !filled {
            self.end_paragraph();
        }
        if !self.paragraph.is_empty() {
            self.paragraph.push(' ');
        }
        self.paragraph.push_str(text.trim());
        if std::mem::take(&mut self.tag) {
            self.end_paragraph();
        }
    }

    fn heading(&mut self, title: &str) {
        self.end_paragraph();
        self.no_fill = false;
        self.paragraph.push_str(title);
        self.end_paragraph();
    }

    fn end_paragraph(&mut self) {
        self.tag = false;
        let text = std::mem::take(&mut self.paragraph);
        if !text.trim().is_empty() {
            self.out.push_str(text.trim());
            self.out.push('\n');
        }
        if !self.out.is_empty() && !self.out.ends_with("\n\n") {
            self.out.push('\n');
        }
    }

    fn set_fill(&mut self, fill: bool) {
        self.end_paragraph();
        self.no_fill = !fill;
    }
}

/// A macro's arguments: blank-separated, quotes group, `""` is a quote. Without
/// any, the font macros take the next line.
fn arguments(rest: &str, line: &str, lines: &mut std::str::Lines) -> Vec<String> {
    let rest = rest.split("\\\"").next().unwrap_or("").trim();
    if rest.is_empty() {
        let takes_next = [".B", ".I", ".SM", ".SB", ".SH", ".SS"].contains(&line.trim_end());
        return if takes_next { lines.next().map(unescape).into_iter().collect() } else { vec![] };
    }
    let mut out = Vec::new();
    let mut chars = rest.chars().peekable();
    while chars.peek().is_some() {
        let (mut word, mut quoted) = (String::new(), false);
        while let Some(c) = chars.next() {
            match c {
                '"' if quoted && chars.peek() == Some(&'"') => word.extend(chars.next()),
                '"' if quoted => break,
                '"' if word.is_empty() => quoted = true,
                ' ' | '\t' if !quoted => break,
                '\\' => {
                    word.push(c);
                    word.extend(chars.next());
                }
                c => word.push(c),
            }
        }
        while chars.next_if(|c| *c == ' ' || *c == '\t').is_some() {}
        out.push(unescape(&word));
    }
    out
}

fn skip_until(lines: &mut std::str::Lines, end: &str) {
    for line in lines.by_ref() {
        if line.strip_prefix('.').is_some_and(|l| l.trim() == end) {
            return;
        }
    }
}

fn skip_braces(rest: &str, lines: &mut std::str::Lines) {
    let depth =
        |line: &str| line.matches("\\{").count() as i64 - line.matches("\\}").count() as i64;
    let mut open = depth(rest);
    while open > 0 {
        let Some(line) = lines.next() else { return };
        open += depth(line);
    }
}

/// Removes escapes: fonts, sizes, motions and registers go, special characters
/// become Unicode.
fn unescape(line: &str) -> String {
    let mut out = String::with_capacity(line.len());
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('"' | '#') | None => break,
            Some('-') => out.push('-'),
            Some('e' | '\\') => out.push('\\'),
            Some('~' | ' ' | '0') => out.push(' '),
            Some('\'') => out.push('\''),
            Some('`') => out.push('`'),
            Some('.') => out.push('.'),
            Some('(') => {
                let name: String = chars.by_ref().take(2).collect();
                out.push_str(special(&name));
            }
            Some('[') => {
                let name: String = chars.by_ref().take_while(|c| *c != ']').collect();
                out.push_str(special(&name));
            }
            Some('*') => {
                let name = bracketed(&mut chars);
                out.push_str(special(&name));
            }
            Some('f' | 'n' | 'm' | 'M' | 'F' | 'k' | 'g') => drop(bracketed(&mut chars)),
            Some('s') => {
                let mut rest = chars.as_str();
                rest = rest.strip_prefix(['+', '-']).unwrap_or(rest);
                chars = rest.strip_prefix(|c: char| c.is_ascii_digit()).unwrap_or(rest).chars();
            }
            Some('h' | 'v' | 'w' | 'l' | 'L' | 'D' | 'o' | 'b' | 'N' | 'x' | 'X' | 'Z') => {
                if let Some(quote) = chars.next() {
                    chars.by_ref().take_while(|c| *c != quote).for_each(drop);
                }
            }
            // Zero-width marks: \& \| \^ \% \: \/ \, \c \) \{ \} \u \d \z ...
            Some(_) => {}
        }
    }
    out
}

/// The name after `\f`, `\*`, `\n`: one character, `(xx` or `[...]`.
fn bracketed(chars: &mut std::str::Chars) -> String {
    match chars.next() {
        Some('(') => chars.by_ref().take(2).collect(),
        Some('[') => chars.by_ref().take_while(|c| *c != ']').collect(),
        Some(c) => c.into(),
        None => String::new(),
    }
}

fn special(name: &str) -> &'static str {
    match name {
        "aq" | "cq" | "oq" => "'",
        "dq" | "lq" | "rq" => "\"",
        "ga" => "`",
        "ha" => "^",
        "ti" => "~",
        "rs" => "\\",
        "en" | "hy" | "mi" => "-",
        "em" => "—",
        "bu" => "•",
        "co" => "©",
        "rg" => "®",
        "tm" => "™",
        "<=" => "<=",
        ">=" => ">=",
        "!=" => "!=",
        "==" => "==",
        "->" => "->",
        "<-" => "<-",
        "+-" => "±",
        "mu" | "mc" => "×",
        "pl" => "+",
        "eq" => "=",
        "at" => "@",
        "sh" => "#",
        "lB" => "[",
        "rB" => "]",
        "lC" => "{",
        "rC" => "}",
        "la" => "<",
        "ra" => ">",
        "ba" | "or" => "|",
        "Do" => "$",
        "de" => "°",
        "sc" => "§",
        "if" => "∞",
        "ss" => "ß",
        "'e" => "é",
        "'a" => "á",
        "'i" => "í",
        "'o" => "ó",
        "'u" => "ú",
        "`e" => "è",
        "`a" => "à",
        ":a" => "ä",
        ":o" => "ö",
        ":u" => "ü",
        ",c" => "ç",
        "~n" => "ñ",
        "o a" | "oa" => "å",
        "/o" => "ø",
        "Po" => "£",
        "Eu" => "€",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn prose_is_filled_and_displays_are_kept() {
        let page = ".\\\" comment\n.TH X 1\n.SH NAME\nfoo \\- does\n.BR bar (2),\nmore.\n.PP\n\
                    Second \\fIone\\fP.\n.nf\n  a = b;\n  c\\en\n.fi\n.TP\n.B \\-x\nThe option.\n";
        let want = "NAME\n\nfoo - does bar(2), more.\n\nSecond one.\n\n  a = b;\n  c\\n\n\n-x\n\nThe option.";
        assert_eq!(to_text(page), want);
    }

    #[test]
    fn quotes_group_and_font_macros_take_the_next_line() {
        let page = ".SH A\n.BI \"int f(int \" x \", int \" y );\n.B\nnext \\(dqline\\(dq\n";
        assert_eq!(to_text(page), "A\n\nint f(int x, int y); next \"line\"");
    }

    #[test]
    fn tables_conditionals_and_links_go() {
        let page = ".SH A\n.TS\nl l.\na\tb\n.TE\n.if t \\{\nzzz\n.\\}\nkept\n.de XX\ngone\n..\n";
        assert_eq!(to_text(page), "A\n\nkept");
        assert_eq!(to_text(".so man7/queue.7\n"), "");
    }

    proptest! {
        #[test]
        fn never_panics(page in "([.']?[A-Za-z]{0,2}[ \"\\\\(\\[{}*fhs'a-zé]{0,20}\n){0,30}") {
            let _ = to_text(&page);
        }
    }
}
