use super::read::{delimited, jsonl};
use super::*;
use proptest::prelude::*;
use serde_json::json;

fn path() -> &'static Path {
    Path::new("data.x")
}

#[test]
fn jsonl_rows_keep_their_lines() {
    let text = "{\"text\": \"a\", \"label\": 1}\n\n{\"label\": 0.5, \"more\": [1]}\n";
    let records = jsonl(path(), text).unwrap();
    assert_eq!(records.columns(), ["text", "label", "more"]);
    assert_eq!(
        records.rows()[1],
        Record { line: 3, values: vec![json!(null), json!(0.5), json!([1])] }
    );
    let kinds: Vec<Kind> = records.schema().iter().map(|c| c.kind).collect();
    assert_eq!(kinds, [Kind::Text, Kind::Float, Kind::List]);
    assert_eq!(records.schema()[0].missing, 1);
    let error = records.texts("text").unwrap_err().to_string();
    assert_eq!(error, "data.x:3: `text` is null, expected a text");
    let error = jsonl(path(), "{}\n[1]\n").unwrap_err().to_string();
    assert!(error.starts_with("data.x:2: not a JSON object"), "{error}");
}

#[test]
fn csv_cells_become_numbers_only_when_they_read_back() {
    let text = "id,text,zip\n1,\"a, \"\"b\"\"\nc\",007\n2,1e3,\n";
    let records = delimited(path(), text, b',').unwrap();
    assert_eq!(records.rows()[0].values, [json!(1), json!("a, \"b\"\nc"), json!("007")]);
    assert_eq!(
        records.rows()[1],
        Record { line: 4, values: vec![json!(2), json!(1000.0), json!(null)] }
    );
    let error = delimited(path(), "a,b\n1,2\n1,2,3\n", b',').unwrap_err().to_string();
    assert!(error.starts_with("data.x:3: 3 fields, but the header has 2"), "{error}");
    assert!(delimited(path(), "a,a\n", b',').unwrap_err().to_string().contains("`a` twice"));
}

#[test]
fn columns_are_mapped_by_name() {
    let mut records = delimited(path(), "sentence,y\nhi,1\n", b',').unwrap();
    records.map_columns(&[("text", "sentence"), ("label", "y")]).unwrap();
    assert_eq!(records.texts("text").unwrap(), ["hi"]);
    assert_eq!(records.integers("label").unwrap(), [1]);
    let error = records.map_columns(&[("a", "zzz")]).unwrap_err().to_string();
    assert!(error.contains("no column `zzz`; there are: text, label"), "{error}");
    assert!(records.map_columns(&[("text", "label")]).is_err());
    assert!(records.preview(3).contains("text=\"hi\""));
}

#[test]
fn what_spoils_an_evaluation_is_found() {
    let train = delimited(path(), "text,label\nA  b,0\na B,0\na b,1\n ,1\nc,7\n", b',').unwrap();
    let findings = check(&train, "text", Some(Labels { column: "label", classes: 2 })).unwrap();
    let want = [
        Finding::Duplicate { line: 3, first: 2 },
        Finding::Contradiction { line: 4, first: 2 },
        Finding::Empty { line: 5 },
        Finding::BadLabel { line: 6, label: "7".into() },
    ];
    assert_eq!(findings, want);
    let test = delimited(path(), "text\nnew\nC\n", b',').unwrap();
    assert_eq!(
        overlap(&train, &test, "text").unwrap(),
        [Finding::Overlap { line: 3, train_line: 6 }]
    );
}

#[test]
fn the_extension_decides() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.jsonl.gz");
    let mut gz =
        flate2::write::GzEncoder::new(std::fs::File::create(&file).unwrap(), Default::default());
    std::io::Write::write_all(&mut gz, b"{\"a\": 1}\n").unwrap();
    gz.finish().unwrap();
    assert_eq!(Records::open(&file).unwrap().len(), 1);
    std::fs::write(dir.path().join("a.xls"), "x").unwrap();
    assert!(
        Records::open(dir.path().join("a.xls")).unwrap_err().to_string().contains("unknown kind")
    );
}

/// A small table of two columns, one of them with a hole.
#[cfg(feature = "parquet")]
fn write_parquet(file: &Path) {
    use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
    use parquet::file::{properties::WriterProperties, writer::SerializedFileWriter};
    use std::sync::Arc;
    let schema = "message m { required binary text (UTF8); optional int64 label; }";
    let schema = Arc::new(parquet::schema::parser::parse_message_type(schema).unwrap());
    let properties =
        WriterProperties::builder().set_compression(parquet::basic::Compression::SNAPPY);
    let out = std::fs::File::create(file).unwrap();
    let mut writer = SerializedFileWriter::new(out, schema, Arc::new(properties.build())).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    let texts = [ByteArray::from("one"), ByteArray::from("zwö")];
    column.typed::<ByteArrayType>().write_batch(&texts, None, None).unwrap();
    column.close().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    column.typed::<Int64Type>().write_batch(&[4], Some(&[1, 0]), None).unwrap();
    column.close().unwrap();
    group.close().unwrap();
    writer.close().unwrap();
}

#[cfg(feature = "parquet")]
#[test]
fn parquet_rows_come_out_typed() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.parquet");
    write_parquet(&file);
    let records = Records::open(&file).unwrap();
    assert_eq!(records.texts("text").unwrap(), ["one", "zwö"]);
    assert_eq!(records.rows()[1], Record { line: 2, values: vec![json!("zwö"), json!(null)] });
    std::fs::write(&file, b"PAR1 nonsense").unwrap();
    assert!(Records::open(&file).unwrap_err().to_string().contains("not readable as Parquet"));
}

proptest! {
    #[test]
    fn readers_never_panic(text in "([{}\\[\\]\",:0-9a-z\r\n ]{0,12}\n){0,8}") {
        for records in [jsonl(path(), &text), delimited(path(), &text, b',')].into_iter().flatten() {
            let _ = (records.schema(), records.preview(2));
        }
    }

    #[cfg(feature = "parquet")]
    #[test]
    fn damaged_parquet_is_refused(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.parquet");
        std::fs::write(&file, [b"PAR1", &bytes[..], b"\x10\0\0\0PAR1"].concat()).unwrap();
        let _ = Records::open(&file);
    }

    /// A changed file is refused, or gives rows that are as wide as its columns.
    #[cfg(feature = "parquet")]
    #[test]
    fn changed_parquet_is_read_or_refused(
        cut in any::<prop::sample::Index>(), keep in 0u8..4,
        edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        static WHOLE: std::sync::LazyLock<Vec<u8>> = std::sync::LazyLock::new(|| {
            let dir = tempfile::tempdir().unwrap();
            write_parquet(&dir.path().join("a.parquet"));
            std::fs::read(dir.path().join("a.parquet")).unwrap()
        });
        let mut bytes = WHOLE.clone();
        for (at, byte) in edits {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if keep == 0 {
            bytes.drain(..cut.index(bytes.len()));
        }
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.parquet");
        std::fs::write(&file, &bytes).unwrap();
        if let Ok(records) = Records::open(&file) {
            prop_assert!(records.rows().iter().all(|row| row.values.len() == records.columns().len()));
        }
    }
}
