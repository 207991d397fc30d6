use super::{Record, Records};
use crate::{Error, Result, file};
use serde_json::{Map, Value};
use std::path::Path;

pub(super) fn open(path: &Path) -> Result<Records> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let name = name.strip_suffix(".gz").unwrap_or(&name);
    match name.rsplit_once('.').map_or("", |(_, extension)| extension) {
        "jsonl" | "ndjson" => jsonl(path, &file::read_text(path)?),
        "csv" => delimited(path, &file::read_text(path)?, b','),
        "tsv" => delimited(path, &file::read_text(path)?, b'\t'),
        "parquet" => parquet(path),
        _ => {
            Err(Error::file(path, "unknown kind of table; expected .jsonl, .csv, .tsv or .parquet"))
        }
    }
}

pub(super) fn jsonl(path: &Path, text: &str) -> Result<Records> {
    let mut table = Table::default();
    for (number, line) in text.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let row: Map<String, Value> = serde_json::from_str(line).map_err(|e| {
            let column = e.column();
            let why = e.to_string();
            let why = why.split(" at line").next().unwrap_or("");
            Error::line(path, number + 1, format!("not a JSON object: {why} (column {column})"))
        })?;
        table.push(number + 1, row);
    }
    table.finish(path)
}

pub(super) fn delimited(path: &Path, text: &str, delimiter: u8) -> Result<Records> {
    let mut reader = csv::ReaderBuilder::new().delimiter(delimiter).from_reader(text.as_bytes());
    let fail = |e: csv::Error| {
        let line = e.position().map_or(1, |p| p.line() as usize);
        let why = match e.kind() {
            csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
                format!(
                    "{len} fields, but the header has {expected_len}; quote fields that contain the delimiter"
                )
            }
            _ => e.to_string(),
        };
        Error::line(path, line, why)
    };
    let columns: Vec<String> = reader.headers().map_err(fail)?.iter().map(str::to_owned).collect();
    for (i, name) in columns.iter().enumerate() {
        if columns[..i].contains(name) {
            return Err(Error::line(path, 1, format!("the header names `{name}` twice")));
        }
    }
    let mut rows = Vec::new();
    for record in reader.records() {
        let record = record.map_err(fail)?;
        let line = record.position().map_or(0, |p| p.line() as usize);
        rows.push(Record { line, values: record.iter().map(cell).collect() });
    }
    Ok(Records { path: path.to_owned(), columns, rows })
}

/// A CSV cell has no type of its own: a number if it reads back as it is written,
/// else text.
fn cell(text: &str) -> Value {
    let parsed: Option<Value> = match text {
        "" => return Value::Null,
        "true" | "false" => Some(Value::Bool(text == "true")),
        _ => text.parse::<i64>().ok().filter(|n| n.to_string() == text).map(Value::from),
    };
    let float = || {
        let plain = text.bytes().all(|b| b.is_ascii_digit() || b"+-.eE".contains(&b));
        let leading_zero = text.trim_start_matches('-').starts_with('0') && !text.contains('.');
        text.parse::<f64>()
            .ok()
            .filter(|x| plain && !leading_zero && x.is_finite())
            .map(Value::from)
    };
    parsed.or_else(float).unwrap_or_else(|| Value::String(text.to_owned()))
}

#[cfg(not(feature = "parquet"))]
fn parquet(path: &Path) -> Result<Records> {
    Err(Error::file(
        path,
        "this build reads no Parquet; build with the `parquet` feature, or convert to .jsonl",
    ))
}

#[cfg(feature = "parquet")]
fn parquet(path: &Path) -> Result<Records> {
    use parquet::file::reader::{FileReader, SerializedFileReader};
    let open = std::fs::File::open(path).map_err(Error::io(path))?;
    let fail = |e: parquet::errors::ParquetError| {
        Error::file(
            path,
            format!("not readable as Parquet: {e} (snappy, gzip and no compression are supported)"),
        )
    };
    // The reader panics on some damaged files.
    let read = crate::foreign::call(|| {
        let reader = SerializedFileReader::new(open)?;
        let mut table = Table::default();
        for (number, row) in reader.get_row_iter(None)?.enumerate() {
            let fields = row?.into_columns().into_iter().map(|(name, field)| (name, value(field)));
            table.push(number + 1, fields.collect());
        }
        Ok(table)
    });
    let damaged = |message| {
        fail(parquet::errors::ParquetError::General(format!("it is damaged ({message})")))
    };
    let table = read.map_err(damaged)?.map_err(fail)?;
    table.finish(path)
}

#[cfg(feature = "parquet")]
fn value(field: parquet::record::Field) -> Value {
    use parquet::record::Field as F;
    match field {
        F::Null => Value::Null,
        F::Bool(v) => v.into(),
        F::Byte(v) => v.into(),
        F::Short(v) => v.into(),
        F::Int(v) => v.into(),
        F::Long(v) => v.into(),
        F::UByte(v) => v.into(),
        F::UShort(v) => v.into(),
        F::UInt(v) => v.into(),
        F::ULong(v) => v.into(),
        F::Float(v) => f64::from(v).into(),
        F::Double(v) => v.into(),
        F::Str(v) => v.into(),
        F::Bytes(v) => String::from_utf8_lossy(v.data()).into_owned().into(),
        F::Group(row) => row.into_columns().into_iter().map(|(k, v)| (k, value(v))).collect(),
        F::ListInternal(list) => list.elements().iter().cloned().map(value).collect(),
        F::MapInternal(map) => {
            let text = |k: Value| k.as_str().map_or_else(|| k.to_string(), str::to_owned);
            map.entries().iter().cloned().map(|(k, v)| (text(value(k)), value(v))).collect()
        }
        // Dates, times and decimals, as they print.
        other => other.to_string().into(),
    }
}

/// Rows whose columns are discovered on the way.
#[derive(Default)]
struct Table {
    columns: Vec<String>,
    index: std::collections::HashMap<String, usize>,
    rows: Vec<Record>,
}

impl Table {
    fn push(&mut self, line: usize, row: Map<String, Value>) {
        let mut values = vec![Value::Null; self.columns.len()];
        for (name, value) in row {
            let at = *self.index.entry(name).or_insert_with_key(|name| {
                self.columns.push(name.clone());
                self.columns.len() - 1
            });
            if at >= values.len() {
                values.resize(at + 1, Value::Null);
            }
            values[at] = value;
        }
        self.rows.push(Record { line, values });
    }

    fn finish(mut self, path: &Path) -> Result<Records> {
        let width = self.columns.len();
        self.rows.iter_mut().for_each(|row| row.values.resize(width, Value::Null));
        Ok(Records { path: path.to_owned(), columns: self.columns, rows: self.rows })
    }
}
