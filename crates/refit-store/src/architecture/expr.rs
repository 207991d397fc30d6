//! The expressions of architecture files: integers and names of config keys, `+ - * / ^`, comparisons,
//! `a ?? b` (b when a is absent or null), indexing, `len`, `min`, `max`, `ceil` and list literals.
//!
//! Numbers are `f64`: every size that fits a file is exact in it, and ratios such as `mlp_ratio: 4.0` need
//! no second type.

use serde_json::Value as Json;

/// A value during evaluation.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Num(f64),
    Str(String),
    List(Vec<Value>),
}

impl Value {
    /// From a config value; `None` for null and objects.
    pub(super) fn from_json(json: &Json) -> Option<Self> {
        match json {
            Json::Number(n) => n.as_f64().map(Self::Num),
            Json::Bool(b) => Some(Self::Num(f64::from(*b))),
            Json::String(s) => Some(Self::Str(s.clone())),
            Json::Array(items) => {
                items.iter().map(Self::from_json).collect::<Option<_>>().map(Self::List)
            }
            Json::Null | Json::Object(_) => None,
        }
    }

    /// As a size; `None` when negative, fractional or not a number.
    pub(super) fn size(&self) -> Option<usize> {
        match self {
            Self::Num(n) if *n >= 0.0 && n.fract() == 0.0 && *n < 9e15 => Some(*n as usize),
            _ => None,
        }
    }

    pub(super) fn truthy(&self) -> bool {
        match self {
            Self::Num(n) => *n != 0.0,
            Self::Str(s) => !s.is_empty(),
            Self::List(l) => !l.is_empty(),
        }
    }
}

/// Why an expression has no value.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Fault {
    /// A name that is neither a config key, a `let` nor a loop variable.
    Unknown(String),
    /// The expression itself is wrong.
    Invalid(String),
}

type Eval<T> = Result<T, Fault>;

/// Brackets, powers and `??` within each other; no size needs more, and each costs stack.
const DEEPEST: usize = 64;

/// Evaluates `source`, with names looked up through `names`.
pub(super) fn eval(source: &str, names: &dyn Fn(&str) -> Option<Value>) -> Eval<Value> {
    let mut parser = Parser { source, rest: source.trim_start(), names, depth: 0 };
    let value = parser.coalesce()?;
    if parser.rest.is_empty() { Ok(value) } else { Err(parser.invalid("unexpected text")) }
}

struct Parser<'a> {
    source: &'a str,
    rest: &'a str,
    names: &'a dyn Fn(&str) -> Option<Value>,
    depth: usize,
}

impl Parser<'_> {
    /// Parses one level further down.
    fn nested(&mut self, parse: fn(&mut Self) -> Eval<Value>) -> Eval<Value> {
        if self.depth == DEEPEST {
            return Err(self.invalid("nested too deeply"));
        }
        self.depth += 1;
        let value = parse(self);
        self.depth -= 1;
        value
    }

    fn invalid(&self, what: &str) -> Fault {
        Fault::Invalid(format!("{what} at `{}` in `{}`", self.rest, self.source))
    }

    fn take(&mut self, token: &str) -> bool {
        let Some(rest) = self.rest.strip_prefix(token) else { return false };
        self.rest = rest.trim_start();
        true
    }

    fn need(&mut self, token: &str) -> Eval<()> {
        if self.take(token) { Ok(()) } else { Err(self.invalid(&format!("expected `{token}`"))) }
    }

    fn coalesce(&mut self) -> Eval<Value> {
        self.nested(Self::alternatives)
    }

    fn alternatives(&mut self) -> Eval<Value> {
        let left = self.comparison();
        if self.take("??") {
            let right = self.coalesce();
            return match left {
                Err(Fault::Unknown(_)) => right,
                other => other,
            };
        }
        left
    }

    /// Parses on after an unknown name, so that `??` can still follow.
    fn comparison(&mut self) -> Eval<Value> {
        let left = self.sum();
        for (token, test) in [
            ("==", (|a, b| a == b) as fn(&Value, &Value) -> bool),
            ("!=", |a, b| a != b),
            (">", |a, b| matches!((a, b), (Value::Num(a), Value::Num(b)) if a > b)),
            ("<", |a, b| matches!((a, b), (Value::Num(a), Value::Num(b)) if a < b)),
        ] {
            if self.take(token) {
                let right = self.sum();
                return Ok(Value::Num(f64::from(test(&left?, &right?))));
            }
        }
        left
    }

    fn sum(&mut self) -> Eval<Value> {
        let mut left = self.product();
        loop {
            left = if self.take("+") {
                arithmetic(left, self.product(), |a, b| a + b)
            } else if self.take("-") {
                arithmetic(left, self.product(), |a, b| a - b)
            } else {
                return left;
            };
        }
    }

    fn product(&mut self) -> Eval<Value> {
        let mut left = self.power();
        loop {
            left = if self.take("*") {
                arithmetic(left, self.power(), |a, b| a * b)
            } else if self.take("/") {
                arithmetic(left, self.power(), |a, b| a / b)
            } else {
                return left;
            };
        }
    }

    fn power(&mut self) -> Eval<Value> {
        let base = self.indexed();
        if self.take("^") { arithmetic(base, self.nested(Self::power), f64::powf) } else { base }
    }

    fn indexed(&mut self) -> Eval<Value> {
        let mut value = self.atom();
        while self.rest.starts_with('[') {
            self.need("[")?;
            let index = self.coalesce();
            self.need("]")?;
            value = match (value, index) {
                (Err(fault), _) | (_, Err(fault)) => Err(fault),
                (Ok(Value::List(items)), Ok(index)) => index
                    .size()
                    .and_then(|i| items.get(i).cloned())
                    .ok_or_else(|| Fault::Unknown(format!("{}[..]", self.source))),
                // A scalar where a list could stand holds for every index.
                (Ok(scalar), Ok(_)) => Ok(scalar),
            };
        }
        value
    }

    fn atom(&mut self) -> Eval<Value> {
        if self.take("(") {
            let value = self.coalesce();
            self.need(")")?;
            return value;
        }
        if self.take("[") {
            return self.arguments("]").map(Value::List);
        }
        if let Some(text) = self.rest.strip_prefix('\'') {
            let end = text.find('\'').ok_or_else(|| self.invalid("unclosed string"))?;
            self.rest = text[end + 1..].trim_start();
            return Ok(Value::Str(text[..end].to_owned()));
        }
        let word_end = self
            .rest
            .find(|c: char| !(c.is_alphanumeric() || c == '_' || c == '.'))
            .unwrap_or(self.rest.len());
        let word = &self.rest[..word_end];
        if word.is_empty() {
            return Err(self.invalid("expected a value"));
        }
        self.rest = self.rest[word_end..].trim_start();
        if word.starts_with(|c: char| c.is_ascii_digit()) {
            return word.parse().map(Value::Num).map_err(|_| self.invalid("malformed number"));
        }
        if self.take("(") {
            let arguments = self.arguments(")")?;
            return self.call(word, &arguments);
        }
        (self.names)(word).ok_or_else(|| Fault::Unknown(word.to_owned()))
    }

    /// Reads on to the closing bracket after an unknown name, so that `??` can still follow.
    fn arguments(&mut self, close: &str) -> Eval<Vec<Value>> {
        let mut values = Ok(Vec::new());
        let mut first = true;
        while !self.take(close) {
            if !std::mem::take(&mut first) {
                self.need(",")?;
            }
            match (self.coalesce(), &mut values) {
                (Ok(value), Ok(values)) => values.push(value),
                (Err(Fault::Unknown(name)), Ok(_)) => values = Err(Fault::Unknown(name)),
                (Err(invalid), _) => return Err(invalid),
                (Ok(_), Err(_)) => {}
            }
        }
        values
    }

    fn call(&self, function: &str, arguments: &[Value]) -> Eval<Value> {
        match (function, arguments) {
            ("len", [Value::List(items)]) => Ok(Value::Num(items.len() as f64)),
            ("min", [Value::Num(a), Value::Num(b)]) => Ok(Value::Num(a.min(*b))),
            ("max", [Value::Num(a), Value::Num(b)]) => Ok(Value::Num(a.max(*b))),
            ("ceil", [Value::Num(a)]) => Ok(Value::Num(a.ceil())),
            _ => Err(self.invalid(&format!("no function `{function}` of these arguments"))),
        }
    }
}

fn arithmetic(left: Eval<Value>, right: Eval<Value>, op: fn(f64, f64) -> f64) -> Eval<Value> {
    match (left?, right?) {
        (Value::Num(a), Value::Num(b)) => Ok(Value::Num(op(a, b))),
        (a, b) => Err(Fault::Invalid(format!("arithmetic on {a:?} and {b:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(source: &str) -> Eval<Value> {
        eval(source, &|name| match name {
            "hidden" => Some(Value::Num(576.0)),
            "heads" => Some(Value::Num(9.0)),
            "depths" => Some(Value::List([2.0, 2.0, 6.0].map(Value::Num).to_vec())),
            "kind" => Some(Value::Str("absolute".to_owned())),
            _ => None,
        })
    }

    #[test]
    fn precedence_and_functions() {
        assert_eq!(run("hidden / heads"), Ok(Value::Num(64.0)));
        assert_eq!(run("2 + 3 * 2 ^ 2"), Ok(Value::Num(14.0)));
        assert_eq!(run("(2 + 3) * depths[2]"), Ok(Value::Num(30.0)));
        assert_eq!(run("len(depths) - 1"), Ok(Value::Num(2.0)));
        assert_eq!(run("kind == 'absolute'"), Ok(Value::Num(1.0)));
        assert_eq!(run("[1, 2, 3][1]"), Ok(Value::Num(2.0)));
        assert_eq!(run("max(ceil(5 / 2), 1)"), Ok(Value::Num(3.0)));
    }

    #[test]
    fn absent_keys_fall_through() {
        assert_eq!(run("kv_heads ?? heads"), Ok(Value::Num(9.0)));
        assert_eq!(run("head_dim ?? hidden / heads"), Ok(Value::Num(64.0)));
        assert_eq!(run("missing * 2 ?? other ?? 7"), Ok(Value::Num(7.0)));
        assert_eq!(run("len(missing) ?? 2"), Ok(Value::Num(2.0)));
        assert_eq!(run("missing * 2"), Err(Fault::Unknown("missing".to_owned())));
    }

    #[test]
    fn nonsense_is_an_error() {
        for source in [
            "",
            "hidden +",
            "(hidden",
            "hidden hidden",
            "len(hidden)",
            "'open",
            "kind * 2",
            "1.2.3",
        ] {
            assert!(run(source).is_err(), "{source}");
        }
        for deep in ["(", "[", "2^", "1??", "len("] {
            assert!(run(&deep.repeat(10_000)).is_err(), "{deep}");
        }
    }

    /// An expression and its value, computed beside it.
    fn expression() -> impl Strategy<Value = (String, f64)> {
        let leaf = prop_oneof![
            (0u32..1000).prop_map(|n| (n.to_string(), f64::from(n))),
            Just(("hidden".to_owned(), 576.0)),
            Just(("depths[2]".to_owned(), 6.0)),
            Just(("missing ?? heads".to_owned(), 9.0)),
        ];
        let leaf = leaf.prop_map(|(text, value)| (format!("({text})"), value));
        leaf.prop_recursive(4, 24, 2, |inner| {
            (inner.clone(), inner, 0usize..6).prop_map(
                |((a, x), (b, y), operator)| match operator {
                    0 => (format!("({a} + {b})"), x + y),
                    1 => (format!("({a}-{b})"), x - y),
                    2 => (format!("({a} * {b})"), x * y),
                    3 => (format!("max({a}, {b})"), x.max(y)),
                    4 => (format!("[{a}, {b}][1]"), y),
                    _ => (format!("({a} > {b})"), f64::from(x > y)),
                },
            )
        })
    }

    proptest! {
        #![proptest_config(crate::testing::cases(256))]

        #[test]
        fn values_are_those_of_the_operations((source, value) in expression()) {
            prop_assert_eq!(run(&source), Ok(Value::Num(value)));
        }

        #[test]
        fn any_text_is_a_value_or_a_fault(source in "([-+*/^()\\[\\],?=<>!' ]|hidden|depths|kind|len|max|é|[0-9.]){0,40}") {
            let _ = run(&source);
        }

        #[test]
        fn a_changed_expression_is_a_value_or_a_fault(
            (source, _) in expression(), at in any::<prop::sample::Index>(), with in "[-+*/^(\\[?é'0]{0,2}",
        ) {
            let mut source = source;
            source.replace_range(at.index(source.len()).., &with);
            let _ = run(&source);
        }
    }
}
