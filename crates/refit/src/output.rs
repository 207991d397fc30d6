//! What verbs print: JSON for programs, aligned text for people; errors on standard error.

use std::io::{IsTerminal, Write};

use serde_json::{Value, json};

use crate::failure::{Code, Failure, Result};

/// What a verb found: printed once, at the end.
#[derive(Debug)]
pub struct Outcome {
    /// The machine-readable answer.
    pub json: Value,
    /// The same for people.
    pub text: String,
    /// [`Code::Ok`], or [`Code::No`] when a check failed.
    pub code: Code,
}

impl Outcome {
    /// An answer that is not a failed check.
    pub fn new(json: Value, text: impl Into<String>) -> Self {
        Self { json, text: text.into(), code: Code::Ok }
    }

    /// Turns it into exit code 1 unless `held`.
    #[must_use]
    pub fn holds(mut self, held: bool) -> Self {
        if !held {
            self.code = Code::No;
        }
        self
    }
}

/// Prints an outcome on standard output.
pub fn print(outcome: &Outcome, as_json: bool) -> Result {
    let mut out = std::io::stdout().lock();
    let written = if as_json {
        serde_json::to_writer(&mut out, &outcome.json)
            .map_err(std::io::Error::from)
            .and_then(|()| out.write_all(b"\n"))
    } else if outcome.text.is_empty() {
        Ok(())
    } else {
        out.write_all(outcome.text.trim_end().as_bytes()).and_then(|()| out.write_all(b"\n"))
    };
    match written.and_then(|()| out.flush()) {
        // A reader that has seen enough (`refit inspect | head`) is no error.
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        Err(e) => Err(Failure::system(format!("standard output: cannot write: {e}"))),
        Ok(()) => Ok(()),
    }
}

/// Prints a failure on standard error.
pub fn print_failure(failure: &Failure, as_json: bool) {
    let mut err = std::io::stderr().lock();
    let _ = if as_json {
        let body = json!({"error": {"code": failure.code as u8, "message": failure.message}});
        writeln!(err, "{body}")
    } else if err.is_terminal() {
        writeln!(err, "\x1b[1;31merror:\x1b[0m {}", failure.message)
    } else {
        writeln!(err, "error: {}", failure.message)
    };
}

/// Rows of text in aligned columns; the first column is flush left, numbers are flush right.
#[derive(Debug, Default)]
pub struct Table {
    rows: Vec<Vec<String>>,
    left: usize,
}

impl Table {
    /// A table whose first `left` columns are text.
    pub fn new(left: usize, head: &[&str]) -> Self {
        Self { rows: vec![head.iter().map(|&cell| cell.to_owned()).collect()], left }
    }

    /// Adds a row.
    pub fn row<I: IntoIterator<Item = S>, S: Into<String>>(&mut self, cells: I) {
        self.rows.push(cells.into_iter().map(Into::into).collect());
    }

    /// True when only the head is there.
    pub fn is_empty(&self) -> bool {
        self.rows.len() <= 1
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for (i, row) in self.rows.iter().enumerate() {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                let pad = widths[column] - cell.chars().count();
                if column > 0 {
                    line.push_str("  ");
                }
                if column < self.left {
                    line.push_str(cell);
                    line.extend(std::iter::repeat_n(' ', pad));
                } else {
                    line.extend(std::iter::repeat_n(' ', pad));
                    line.push_str(cell);
                }
            }
            writeln!(f, "{}", line.trim_end())?;
            if i == 0 {
                let rule: usize = widths.iter().sum::<usize>() + 2 * columns.saturating_sub(1);
                writeln!(f, "{}", "─".repeat(rule))?;
            }
        }
        Ok(())
    }
}

/// Lines of `name  value`, names padded to one width.
pub fn facts<'a>(rows: impl IntoIterator<Item = (&'a str, String)>) -> String {
    let rows: Vec<(&str, String)> = rows.into_iter().collect();
    let width = rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    rows.iter().map(|(name, value)| format!("{name:width$}  {value}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(1, &["name", "n"]);
        table.row(["a", "1"]);
        table.row(["longer", "1000"]);
        assert_eq!(table.to_string(), "name       n\n────────────\na          1\nlonger  1000\n");
    }
}
