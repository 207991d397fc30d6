//! Classified texts: a column of texts, a column of labels, and the classes that the labels name.

use std::collections::HashMap;
use std::path::PathBuf;

use serde_json::Value;

use crate::{Error, Records, Result, Tokenizer};

/// Texts with the names of their classes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Classified {
    /// The texts.
    pub texts: Vec<String>,
    /// One label each, as it is written.
    pub labels: Vec<String>,
    /// File and line of each, for messages.
    pub places: Vec<(PathBuf, usize)>,
}

impl Classified {
    /// Reads the columns `text` and `label` of a table. Numbers and truth values are labels by how they are written.
    ///
    /// # Errors
    /// A column that is not there; with file and line: a text that is empty or no text, a label that is missing, empty, a list
    /// or an object.
    pub fn read(records: &Records, text: &str, label: &str) -> Result<Self> {
        let (text_at, label_at) = (records.column(text)?, records.column(label)?);
        let mut all = Self::default();
        for row in records.rows() {
            let fail = |message: String| Err(Error::line(records.path(), row.line, message));
            let words = match &row.values[text_at] {
                Value::String(words) => words.clone(),
                value @ Value::Number(_) => value.to_string(),
                Value::Null => String::new(),
                other => return fail(format!("`{text}` is {other}, expected a text")),
            };
            if words.trim().is_empty() {
                return fail(format!("`{text}` is empty; remove the line or give it words"));
            }
            let name = match &row.values[label_at] {
                Value::String(name) => name.trim().to_owned(),
                value @ (Value::Number(_) | Value::Bool(_)) => value.to_string(),
                Value::Null => String::new(),
                other => {
                    return fail(format!("`{label}` is {other}, expected the name of a class"));
                }
            };
            if name.is_empty() {
                return fail(format!(
                    "`{label}` is missing; every line needs the name of its class"
                ));
            }
            all.texts.push(words);
            all.labels.push(name);
            all.places.push((records.path().to_owned(), row.line));
        }
        Ok(all)
    }

    /// Adds the texts of another table.
    pub fn extend(&mut self, other: Self) {
        self.texts.extend(other.texts);
        self.labels.extend(other.labels);
        self.places.extend(other.places);
    }

    /// The number of texts.
    pub fn len(&self) -> usize {
        self.texts.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.texts.is_empty()
    }

    /// Where text `i` stands, as messages say it.
    pub fn place(&self, i: usize) -> String {
        self.places
            .get(i)
            .map_or_else(String::new, |(path, line)| format!("{}:{line}", path.display()))
    }

    /// The number of each label among `classes`; a label may also be the number of a class where `numbered`.
    ///
    /// # Errors
    /// A label that is no class, with file and line.
    pub fn numbers(&self, classes: &[String], numbered: bool) -> Result<Vec<usize>> {
        let by_name: HashMap<&str, usize> =
            classes.iter().enumerate().map(|(i, name)| (name.as_str(), i)).collect();
        let number = |(i, label): (usize, &String)| {
            let of_number = || {
                let number = label.parse::<usize>().ok().filter(|_| numbered)?;
                (number < classes.len()).then_some(number)
            };
            by_name.get(label.as_str()).copied().or_else(of_number).ok_or_else(|| {
                let some: Vec<&str> = classes.iter().take(12).map(String::as_str).collect();
                let more = if classes.len() > some.len() { ", ..." } else { "" };
                let (path, line) = &self.places[i];
                let known = some.join(", ");
                Error::line(
                    path,
                    *line,
                    format!("the label `{label}` is no class; classes: {known}{more}"),
                )
            })
        };
        self.labels.iter().enumerate().map(number).collect()
    }
}

/// The classes that labels name: numbers by size where all are whole numbers, else in the order of their names.
pub fn classes<'a>(labels: impl IntoIterator<Item = &'a String>) -> Vec<String> {
    let mut names: Vec<String> = labels.into_iter().cloned().collect();
    names.sort();
    names.dedup();
    let numbers: Option<Vec<i64>> = names.iter().map(|name| name.parse().ok()).collect();
    if let Some(numbers) = numbers {
        let mut pairs: Vec<(i64, String)> = numbers.into_iter().zip(names).collect();
        pairs.sort();
        names = pairs.into_iter().map(|(_, name)| name).collect();
    }
    names
}

/// Tokens of a text with special tokens, at most `most` of them: what is too long loses the end of the text and keeps its
/// special tokens. Also returns whether something was cut.
///
/// # Errors
/// What the tokenizer says.
pub fn encode_within(tokenizer: &Tokenizer, text: &str, most: usize) -> Result<(Vec<u32>, bool)> {
    let ids = tokenizer.encode(text, true)?;
    if ids.len() <= most {
        return Ok((ids, false));
    }
    let bare = tokenizer.encode(text, false)?;
    let added = ids.len() - bare.len();
    let at = (0..=added).find(|&at| ids[at..at + bare.len()] == bare[..]);
    let Some(at) = at.filter(|_| added < most) else {
        return Ok((ids[..most].to_vec(), true));
    };
    let mut cut = ids[..at].to_vec();
    cut.extend(&bare[..most - added]);
    cut.extend(&ids[at + bare.len()..]);
    Ok((cut, true))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records(lines: &str) -> Records {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data.jsonl");
        std::fs::write(&path, lines).unwrap();
        Records::open(&path).unwrap()
    }

    #[test]
    fn labels_are_read_as_they_are_written() {
        let records = records(
            "{\"text\": \"a b\", \"label\": \" no \"}\n\n{\"text\": \"c\", \"label\": 10}\n{\"text\": \"d\", \"label\": true}\n",
        );
        let found = Classified::read(&records, "text", "label").unwrap();
        assert_eq!(found.labels, ["no", "10", "true"]);
        assert!(found.place(1).ends_with("data.jsonl:3"));
        let classes = classes(&found.labels);
        assert_eq!(classes, ["10", "no", "true"]);
        assert_eq!(found.numbers(&classes, false).unwrap(), [1, 0, 2]);
        let error = found.numbers(&["no".into(), "yes".into()], false).unwrap_err().to_string();
        assert!(
            error.contains("data.jsonl:3") && error.contains("`10`") && error.contains("no, yes")
        );
    }

    #[test]
    fn whole_numbers_are_ordered_by_size() {
        let names = |labels: &[&str]| {
            let labels: Vec<String> = labels.iter().map(|l| (*l).to_owned()).collect();
            classes(&labels)
        };
        assert_eq!(names(&["10", "9", "1", "9"]), ["1", "9", "10"]);
        assert_eq!(names(&["10", "9", "x"]), ["10", "9", "x"]);
    }

    #[test]
    fn mistakes_name_file_and_line() {
        for (lines, wanted) in [
            (
                "{\"text\": \"a\", \"label\": 1}\n{\"text\": \"  \", \"label\": 1}\n",
                "data.jsonl:2: `text` is empty",
            ),
            ("{\"text\": \"a\", \"label\": \"\"}\n", "data.jsonl:1: `label` is missing"),
            ("{\"text\": \"a\", \"label\": [1]}\n", "data.jsonl:1: `label` is [1]"),
            ("{\"text\": [\"a\"], \"label\": 1}\n", "data.jsonl:1: `text` is [\"a\"]"),
            ("{\"text\": \"a\"}\n", "no column `label`"),
        ] {
            let error = Classified::read(&records(lines), "text", "label").unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}\nshould contain {wanted}");
        }
    }
}
