//! Tables: JSONL, CSV and Parquet files as rows of named values, with the line of
//! each row kept for error messages.

mod check;
mod read;

pub use check::{Finding, Labels, check, overlap};

use crate::{Error, Result};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// A table of one file.
#[derive(Debug, Clone, PartialEq)]
pub struct Records {
    path: PathBuf,
    columns: Vec<String>,
    rows: Vec<Record>,
}

/// A row.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// Line of the file, from 1; the row number for Parquet.
    pub line: usize,
    /// One per column; `Null` where the row has none.
    pub values: Vec<Value>,
}

/// What a column holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Kind {
    Empty,
    Bool,
    Integer,
    Float,
    Text,
    List,
    Object,
    Mixed,
}

/// A column as inferred from every row.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Column {
    /// Its name.
    pub name: String,
    /// What its values are; integers and floats together are floats.
    pub kind: Kind,
    /// Rows without a value.
    pub missing: usize,
    /// Distinct values, counted up to 1000.
    pub distinct: usize,
}

impl Records {
    /// Reads a file by its extension: `.jsonl`/`.ndjson`, `.csv`/`.tsv` (with a
    /// header row) or `.parquet`; the first two also with `.gz` behind.
    ///
    /// # Errors
    /// Another extension, or a row that does not parse, with its line.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        read::open(path.as_ref())
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Column names: those of the header, or of the JSON objects in the order they
    /// first appear.
    pub fn columns(&self) -> &[String] {
        &self.columns
    }

    /// All rows.
    pub fn rows(&self) -> &[Record] {
        &self.rows
    }

    /// The number of rows.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The index of a column.
    ///
    /// # Errors
    /// No such column; the message lists those there are.
    pub fn column(&self, name: &str) -> Result<usize> {
        self.columns.iter().position(|c| c == name).ok_or_else(|| {
            let message = format!("no column `{name}`; there are: {}", self.columns.join(", "));
            Error::file(&self.path, message)
        })
    }

    /// Renames columns: each pair is (name wanted, name in the file).
    ///
    /// # Errors
    /// A name that is not in the file, or one that would be there twice.
    pub fn map_columns(&mut self, mapping: &[(&str, &str)]) -> Result<()> {
        let mut columns = self.columns.clone();
        for (wanted, present) in mapping {
            columns[self.column(present)?] = (*wanted).to_owned();
        }
        for (i, name) in columns.iter().enumerate() {
            if columns[..i].contains(name) {
                let message = format!("two columns would be named `{name}`; map the other one too");
                return Err(Error::file(&self.path, message));
            }
        }
        self.columns = columns;
        Ok(())
    }

    /// A column of texts; numbers are written out.
    ///
    /// # Errors
    /// No such column, or a row whose value is missing, a list or an object.
    pub fn texts(&self, column: &str) -> Result<Vec<String>> {
        let at = self.column(column)?;
        let text = |row: &Record| match &row.values[at] {
            Value::String(text) => Ok(text.clone()),
            value @ (Value::Number(_) | Value::Bool(_)) => Ok(value.to_string()),
            other => Err(self.row_error(row, column, "a text", other)),
        };
        self.rows.iter().map(text).collect()
    }

    /// A column of whole numbers.
    ///
    /// # Errors
    /// No such column, or a row whose value is not a whole number.
    pub fn integers(&self, column: &str) -> Result<Vec<i64>> {
        let at = self.column(column)?;
        let integer = |row: &Record| {
            let value = &row.values[at];
            value.as_i64().ok_or_else(|| self.row_error(row, column, "a whole number", value))
        };
        self.rows.iter().map(integer).collect()
    }

    fn row_error(&self, row: &Record, column: &str, wanted: &str, found: &Value) -> Error {
        let found = shorten(&found.to_string(), 40);
        Error::line(&self.path, row.line, format!("`{column}` is {found}, expected {wanted}"))
    }

    /// What each column holds.
    pub fn schema(&self) -> Vec<Column> {
        let describe = |(at, name): (usize, &String)| {
            let values = || self.rows.iter().map(move |r| &r.values[at]);
            let mut seen = std::collections::HashSet::new();
            for value in values().filter(|v| !v.is_null()) {
                if seen.len() < 1000 {
                    seen.insert(value.to_string());
                }
            }
            Column {
                name: name.clone(),
                kind: values().map(kind).fold(Kind::Empty, join),
                missing: values().filter(|v| v.is_null()).count(),
                distinct: seen.len(),
            }
        };
        self.columns.iter().enumerate().map(describe).collect()
    }

    /// The schema and the first `rows` rows for a person to look at.
    pub fn preview(&self, rows: usize) -> String {
        let mut out = format!("{}: {} rows\n", self.path.display(), self.len());
        for column in self.schema() {
            let Column { name, kind, missing, distinct } = column;
            let kind = format!("{kind:?}").to_lowercase();
            let many = if distinct == 1000 { "1000+".into() } else { distinct.to_string() };
            out += &format!("  {name}: {kind}, {many} distinct, {missing} missing\n");
        }
        for row in self.rows.iter().take(rows) {
            let cells = self.columns.iter().zip(&row.values);
            let cells: Vec<_> =
                cells.map(|(name, v)| format!("{name}={}", shorten(&v.to_string(), 60))).collect();
            out += &format!("  line {}: {}\n", row.line, cells.join("  "));
        }
        out
    }
}

fn kind(value: &Value) -> Kind {
    match value {
        Value::Null => Kind::Empty,
        Value::Bool(_) => Kind::Bool,
        Value::Number(n) if n.is_f64() => Kind::Float,
        Value::Number(_) => Kind::Integer,
        Value::String(_) => Kind::Text,
        Value::Array(_) => Kind::List,
        Value::Object(_) => Kind::Object,
    }
}

fn join(a: Kind, b: Kind) -> Kind {
    match (a, b) {
        (Kind::Empty, kind) | (kind, Kind::Empty) => kind,
        (Kind::Integer, Kind::Float) | (Kind::Float, Kind::Integer) => Kind::Float,
        (a, b) if a == b => a,
        _ => Kind::Mixed,
    }
}

fn shorten(text: &str, limit: usize) -> String {
    match text.char_indices().nth(limit) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests;
