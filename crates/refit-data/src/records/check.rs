use super::Records;
use crate::Result;
use serde_json::Value;
use std::collections::HashMap;

/// Something about the data that would spoil a training or an evaluation.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(tag = "finding", rename_all = "snake_case")]
pub enum Finding {
    /// A text without content.
    Empty {
        /// Its line.
        line: usize,
    },
    /// A text that occurred before.
    Duplicate {
        /// Its line.
        line: usize,
        /// The line of the first one.
        first: usize,
    },
    /// A text that occurred before with another label.
    Contradiction {
        /// Its line.
        line: usize,
        /// The line of the first one.
        first: usize,
    },
    /// A label that is not one of the classes.
    BadLabel {
        /// Its line.
        line: usize,
        /// What stands there.
        label: String,
    },
    /// A test text that is also in the training data.
    Overlap {
        /// Its line in the test file.
        line: usize,
        /// The line in the training file.
        train_line: usize,
    },
}

/// Where the labels stand and what they may be.
#[derive(Debug, Clone, Copy)]
pub struct Labels<'a> {
    /// Name of the label column.
    pub column: &'a str,
    /// Whole numbers must be below this.
    pub classes: usize,
}

/// Checks a column of texts, and its labels if there are any.
///
/// # Errors
/// A column that is not there.
pub fn check(records: &Records, text: &str, labels: Option<Labels>) -> Result<Vec<Finding>> {
    let text = records.column(text)?;
    let label = labels.map(|l| records.column(l.column)).transpose()?;
    let mut findings = Vec::new();
    let mut seen: HashMap<String, (usize, Option<&Value>)> = HashMap::new();
    for row in records.rows() {
        let line = row.line;
        let value = label.map(|at| &row.values[at]);
        if let (Some(value), Some(labels)) = (value, labels)
            && value.as_u64().is_none_or(|v| v >= labels.classes as u64)
        {
            findings.push(Finding::BadLabel { line, label: value.to_string() });
        }
        let Some(key) = key(&row.values[text]) else {
            findings.push(Finding::Empty { line });
            continue;
        };
        match seen.get(&key) {
            Some(&(first, other)) if other == value => {
                findings.push(Finding::Duplicate { line, first });
            }
            Some(&(first, _)) => findings.push(Finding::Contradiction { line, first }),
            None => drop(seen.insert(key, (line, value))),
        }
    }
    Ok(findings)
}

/// Texts of `test` that are in `train`.
///
/// # Errors
/// A column that is not there.
pub fn overlap(train: &Records, test: &Records, text: &str) -> Result<Vec<Finding>> {
    let (in_train, in_test) = (train.column(text)?, test.column(text)?);
    let mut known: HashMap<String, usize> = HashMap::new();
    for row in train.rows() {
        if let Some(key) = key(&row.values[in_train]) {
            known.entry(key).or_insert(row.line);
        }
    }
    let find = |row: &super::Record| {
        let train_line = *known.get(&key(&row.values[in_test])?)?;
        Some(Finding::Overlap { line: row.line, train_line })
    };
    Ok(test.rows().iter().filter_map(find).collect())
}

/// Texts that differ in case or white space alone count as equal; `None` when
/// there is nothing.
fn key(value: &Value) -> Option<String> {
    let text = match value {
        Value::Null => return None,
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let words: Vec<String> = text.split_whitespace().map(str::to_lowercase).collect();
    (!words.is_empty()).then(|| words.join(" "))
}
