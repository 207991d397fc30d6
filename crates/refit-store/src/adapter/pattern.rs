//! The regular expressions of `rank_pattern` and `alpha_pattern`.
//!
//! PEFT matches a key against the end of a module's name, from its start or after a dot. Sets of positions are carried
//! through the expression, so that no pattern takes more than polynomial time.

use std::collections::BTreeSet;

/// Groups may be nested this deep.
const MAX_DEPTH: usize = 32;

/// A repetition may ask for this many.
const MAX_REPEAT: usize = 1000;

/// A compiled key.
#[derive(Debug, Clone)]
pub(crate) struct Pattern(Node);

#[derive(Debug, Clone)]
enum Node {
    Char(char),
    Any,
    Class { negated: bool, items: Vec<Item> },
    Start,
    End,
    Cat(Vec<Node>),
    Alt(Vec<Node>),
    Repeat { node: Box<Node>, min: usize, max: Option<usize> },
}

#[derive(Debug, Clone)]
enum Item {
    Range(char, char),
    /// `d`, `w` or `s`, or the upper-case letter for what is not in it.
    Kind(char),
}

impl Item {
    fn holds(&self, c: char) -> bool {
        let within = |kind: char| match kind {
            'd' => c.is_ascii_digit(),
            'w' => c.is_alphanumeric() || c == '_',
            _ => c.is_whitespace(),
        };
        match *self {
            Self::Range(first, last) => (first..=last).contains(&c),
            Self::Kind(kind) if kind.is_ascii_uppercase() => !within(kind.to_ascii_lowercase()),
            Self::Kind(kind) => within(kind),
        }
    }
}

impl Pattern {
    /// Compiles literals, `.`, classes, `\d \w \s`, groups, `|`, `* + ? {m,n}` and anchors; the error says what else
    /// was met.
    pub fn new(text: &str) -> Result<Self, String> {
        let mut parser = Parser { rest: text.chars().collect(), at: 0, depth: 0 };
        let node = parser.alternatives()?;
        match parser.peek() {
            None => Ok(Self(node)),
            Some(c) => Err(format!("`{c}` is unmatched")),
        }
    }

    /// True if the key matches the beginning of `name`, as Python's `re.match`.
    pub fn matches_start(&self, name: &str) -> bool {
        let text: Vec<char> = name.chars().collect();
        !self.0.ends(&text, BTreeSet::from([0])).is_empty()
    }

    /// True if the key matches the end of `name`, from its start or from behind a dot.
    pub fn matches(&self, name: &str) -> bool {
        let text: Vec<char> = name.chars().collect();
        let starts = (0..text.len()).filter(|&at| at == 0 || text[at - 1] == '.').collect();
        self.0.ends(&text, starts).contains(&text.len())
    }
}

impl Node {
    /// Where a match can end that begins at one of `starts`.
    fn ends(&self, text: &[char], starts: BTreeSet<usize>) -> BTreeSet<usize> {
        let step = |holds: &dyn Fn(char) -> bool| -> BTreeSet<usize> {
            let next = starts.iter().filter(|&&at| text.get(at).is_some_and(|&c| holds(c)));
            next.map(|at| at + 1).collect()
        };
        match self {
            Self::Char(wanted) => step(&|c| c == *wanted),
            Self::Any => step(&|c| c != '\n'),
            Self::Class { negated, items } => {
                step(&|c| items.iter().any(|item| item.holds(c)) != *negated)
            }
            Self::Start => starts.into_iter().filter(|&at| at == 0).collect(),
            Self::End => starts.into_iter().filter(|&at| at == text.len()).collect(),
            Self::Cat(nodes) => nodes.iter().fold(starts, |at, node| node.ends(text, at)),
            Self::Alt(nodes) => {
                nodes.iter().flat_map(|node| node.ends(text, starts.clone())).collect()
            }
            Self::Repeat { node, min, max } => {
                let mut at = starts;
                for _ in 0..*min {
                    let next = node.ends(text, at.clone());
                    if next == at {
                        break;
                    }
                    at = next;
                }
                let mut all = at.clone();
                for _ in *min..max.unwrap_or(usize::MAX) {
                    at = node.ends(text, at).difference(&all).copied().collect();
                    if at.is_empty() {
                        break;
                    }
                    all.extend(&at);
                }
                all
            }
        }
    }
}

struct Parser {
    rest: Vec<char>,
    at: usize,
    depth: usize,
}

impl Parser {
    fn peek(&self) -> Option<char> {
        self.rest.get(self.at).copied()
    }

    fn take(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += 1;
        Some(c)
    }

    fn eat(&mut self, wanted: char) -> bool {
        let found = self.peek() == Some(wanted);
        self.at += usize::from(found);
        found
    }

    fn alternatives(&mut self) -> Result<Node, String> {
        let mut branches = vec![self.sequence()?];
        while self.eat('|') {
            branches.push(self.sequence()?);
        }
        Ok(if branches.len() == 1 { branches.remove(0) } else { Node::Alt(branches) })
    }

    fn sequence(&mut self) -> Result<Node, String> {
        let mut nodes = Vec::new();
        while let Some(c) = self.peek().filter(|c| !['|', ')'].contains(c)) {
            self.at += 1;
            let node = match c {
                '.' => Node::Any,
                '^' => Node::Start,
                '$' => Node::End,
                '(' => self.group()?,
                '[' => self.class()?,
                '\\' => self.escape()?,
                '*' | '+' | '?' => return Err(format!("`{c}` has nothing to repeat")),
                c => Node::Char(c),
            };
            let node = self.repeated(node)?;
            nodes.push(node);
        }
        Ok(Node::Cat(nodes))
    }

    fn repeated(&mut self, node: Node) -> Result<Node, String> {
        let (min, max) = match self.peek() {
            Some('*') => (0, None),
            Some('+') => (1, None),
            Some('?') => (0, Some(1)),
            Some('{') => {
                self.at += 1;
                let min = self.count()?;
                let max = match self.eat(',') {
                    false => Some(min.ok_or("`{` without a number")?),
                    true => self.count()?,
                };
                if self.peek() != Some('}') {
                    return Err("`{` is not closed".to_owned());
                }
                (min.unwrap_or(0), max)
            }
            _ => return Ok(node),
        };
        self.at += 1;
        // A lazy repetition matches the same whole names.
        self.eat('?');
        if max.is_some_and(|max| max < min) {
            return Err(format!("a repetition {{{min},{}}}", max.unwrap_or(0)));
        }
        Ok(Node::Repeat { node: Box::new(node), min, max })
    }

    fn count(&mut self) -> Result<Option<usize>, String> {
        let mut number = None;
        while let Some(digit) = self.peek().and_then(|c| c.to_digit(10)) {
            self.at += 1;
            let next = number.unwrap_or(0) * 10 + digit as usize;
            if next > MAX_REPEAT {
                return Err(format!("more than {MAX_REPEAT} repetitions"));
            }
            number = Some(next);
        }
        Ok(number)
    }

    fn group(&mut self) -> Result<Node, String> {
        if self.eat('?') && !self.eat(':') {
            return Err("look-around, named groups and flags are not supported".to_owned());
        }
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(format!("groups are nested more than {MAX_DEPTH} deep"));
        }
        let node = self.alternatives()?;
        self.depth -= 1;
        if self.eat(')') { Ok(node) } else { Err("`(` is not closed".to_owned()) }
    }

    fn class(&mut self) -> Result<Node, String> {
        let negated = self.eat('^');
        let mut items = Vec::new();
        loop {
            let c = self.take().ok_or("`[` is not closed")?;
            let first = match c {
                ']' if !items.is_empty() => return Ok(Node::Class { negated, items }),
                '\\' => match self.take().ok_or("`\\` at the end")? {
                    kind @ ('d' | 'w' | 's' | 'D' | 'W' | 'S') => {
                        items.push(Item::Kind(kind));
                        continue;
                    }
                    c if c.is_ascii_alphanumeric() => {
                        return Err(format!("`\\{c}` is not supported"));
                    }
                    c => c,
                },
                c => c,
            };
            let range = self.peek() == Some('-') && self.rest.get(self.at + 1) != Some(&']');
            let last = if range {
                self.at += 1;
                self.take().ok_or("`[` is not closed")?
            } else {
                first
            };
            if last < first || last == '\\' {
                return Err(format!("a range {first}-{last}"));
            }
            items.push(Item::Range(first, last));
        }
    }

    fn escape(&mut self) -> Result<Node, String> {
        match self.take().ok_or("`\\` at the end")? {
            kind @ ('d' | 'w' | 's' | 'D' | 'W' | 'S') => {
                Ok(Node::Class { negated: false, items: vec![Item::Kind(kind)] })
            }
            c if c.is_ascii_alphanumeric() => Err(format!("`\\{c}` is not supported")),
            c => Ok(Node::Char(c)),
        }
    }
}

/// The key that matches exactly this name.
pub(super) fn escape(name: &str) -> String {
    let mut text = String::from("^");
    for c in name.chars() {
        if !c.is_alphanumeric() && c != '_' {
            text.push('\\');
        }
        text.push(c);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NAME: &str = "model.layers.3.self_attn.q_proj";

    fn matches(pattern: &str, name: &str) -> bool {
        Pattern::new(pattern).unwrap_or_else(|reason| panic!("{pattern}: {reason}")).matches(name)
    }

    #[test]
    fn keys_match_the_end_of_a_name_as_in_peft() {
        // Each checked with `re.match(rf"(.*\.)?({key})$", name)`.
        for (pattern, expected) in [
            ("q_proj", true),
            ("proj", false),
            ("self_attn.q_proj", true),
            ("self_attn", false),
            (NAME, true),
            ("^model.*q_proj", true),
            ("^q_proj", false),
            (r"layers\.\d+\.self_attn\.[qk]_proj", true),
            (r"layers\.[012]\..*", false),
            (r"layers\.[0-3]\..*", true),
            (r"layers\.[^12]\..*", true),
            ("(k|q)_proj$", true),
            ("k_proj|q_proj", true),
            ("k_proj|v_proj", false),
            (r"layers\.(?:2|3)\.self_attn\.q_(proj)?", true),
            (r"\w+_proj", true),
            (r".{6}", true),
            (r".{7}", false),
            (r".{2,}proj", true),
            (r"q{1,2}_p[a-z]+?", true),
            ("", false),
        ] {
            assert_eq!(matches(pattern, NAME), expected, "{pattern}");
        }
        assert!(matches(&escape(NAME), NAME));
        assert!(!matches(&escape(NAME), &format!("x.{NAME}")));
    }

    #[test]
    fn what_is_not_supported_is_said() {
        for (pattern, words) in [
            ("(q", "not closed"),
            ("q)", "unmatched"),
            ("[q", "not closed"),
            ("*q", "nothing to repeat"),
            ("(?=q)", "look-around"),
            (r"\bq", "not supported"),
            ("q{2,1}", "repetition"),
            ("q{5000}", "more than"),
            ("[z-a]", "range"),
        ] {
            let reason = Pattern::new(pattern).expect_err(pattern);
            assert!(reason.contains(words), "{pattern}: {reason}");
        }
    }

    #[test]
    fn no_pattern_takes_exponential_time() {
        assert!(!matches("(((a*)*)*)*b", &"a".repeat(200)));
        assert!(matches("((a{0,1000}){0,1000}){1000}", &"a".repeat(100)));
    }

    proptest! {
        #[test]
        fn arbitrary_patterns_never_panic(pattern in r"[a-c.*+?{}(),|^$\[\]\\0-9-]{0,24}", name in "[a-c.]{0,12}") {
            if let Ok(pattern) = Pattern::new(&pattern) {
                pattern.matches(&name);
            }
        }
    }
}
