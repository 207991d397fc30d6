//! The writer: what it writes others read, and nothing is lost or half written.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use rayon::prelude::*;
use refit_store::{
    Artifact, ArtifactWriter, Card, DType, Error, Lineage, SideFile, TensorSpec, WritePlan,
};

fn spec(name: &str, shape: &[usize], dtype: DType) -> TensorSpec {
    TensorSpec { name: name.to_owned(), shape: shape.to_vec(), dtype }
}

fn plan() -> WritePlan {
    WritePlan {
        tensors: vec![
            spec("b.weight", &[64, 33], DType::F32),
            spec("a.weight", &[7, 5], DType::BF16),
            spec("c.scale", &[3], DType::F16),
            spec("d.mask", &[9], DType::U8),
            spec("e.empty", &[0, 4], DType::F32),
            spec("f.scalar", &[], DType::F64),
        ],
        side_files: vec![SideFile::from_bytes(
            "config.json",
            b"{\"model_type\":\"x\"}\n".as_slice(),
        )],
        identity: "inputs and parameters".to_owned(),
        ..WritePlan::default()
    }
}

fn values(name: &str, numel: usize) -> Vec<f32> {
    let first = f32::from(name.as_bytes()[0] - b'a');
    (0..numel).map(|i| ((i % 101) as f32 + first) % 128.0).collect()
}

fn numel(tensor: &TensorSpec) -> usize {
    tensor.shape.iter().product()
}

fn write(writer: &ArtifactWriter, tensor: &TensorSpec) {
    let values = values(&tensor.name, numel(tensor));
    // Two parts, the second first.
    let half = values.len() / 2;
    writer.write_f32(&tensor.name, half, &values[half..]).unwrap();
    writer.write_f32(&tensor.name, 0, &values[..half]).unwrap();
    writer.done(&tensor.name).unwrap();
}

fn finish(writer: ArtifactWriter) -> PathBuf {
    let lineage = Lineage::new("test", serde_json::json!({}));
    writer.finish(lineage, Card::new("test")).unwrap()
}

fn written(out: &Path, plan: WritePlan) -> PathBuf {
    let tensors = plan.tensors.clone();
    let writer = ArtifactWriter::create(out, plan).unwrap();
    tensors.par_iter().for_each(|tensor| write(&writer, tensor));
    finish(writer)
}

fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()))
        .collect()
}

#[test]
fn the_safetensors_crate_and_refit_read_what_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let out = written(&dir.path().join("deep/out"), plan());
    let bytes = fs::read(out.join("model.safetensors")).unwrap();
    let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");
    assert_eq!(theirs.len(), 6);
    assert_eq!((bytes.len() - theirs.iter().map(|(_, t)| t.data().len()).sum::<usize>()) % 8, 0);
    let artifact = Artifact::open(&out).unwrap();
    for tensor in plan().tensors {
        let view = theirs.tensor(&tensor.name).unwrap();
        assert_eq!(view.shape(), tensor.shape);
        assert_eq!(artifact.read_f32(&tensor.name).unwrap(), values(&tensor.name, numel(&tensor)));
        let shared = artifact.shared_bytes(&tensor.name).unwrap();
        assert_eq!(shared, view.data(), "{}", tensor.name);
    }
    assert_eq!(artifact.config().model_type(), Some("x"));
    let lineage = Lineage::read(&out).unwrap().unwrap();
    assert_eq!(lineage.tensors.len(), 6);
    assert!(Lineage::verify(&out).unwrap().is_ok());
    assert!(out.join("README.md").is_file());
    assert!(!dir.path().join("deep/.out.refit-partial").exists());
    assert!(!out.join(".refit-journal").exists());
}

#[test]
fn shards_hold_the_same_model() {
    let dir = tempfile::tempdir().unwrap();
    let one = written(&dir.path().join("one"), plan());
    let many =
        written(&dir.path().join("many"), WritePlan { max_shard_bytes: Some(100), ..plan() });
    assert!(
        many.join("model-00001-of-00003.safetensors").is_file(),
        "{:?}",
        contents(&many).keys()
    );
    let (one, many) = (Artifact::open(one).unwrap(), Artifact::open(many).unwrap());
    assert_eq!(one.tensors(), many.tensors());
    assert_eq!(one.content_hash().unwrap(), many.content_hash().unwrap());
}

#[test]
fn an_interrupted_run_goes_on_and_gives_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let whole = written(&dir.path().join("whole"), plan());
    let out = dir.path().join("out");
    let writer = ArtifactWriter::create(&out, plan()).unwrap();
    write(&writer, &plan().tensors[0]);
    // Half of another tensor, never declared done; then the process dies.
    writer.write_f32("a.weight", 0, &[5.0; 10]).unwrap();
    drop(writer);
    assert!(!out.exists());
    // A kill may also cut the journal's last line.
    let journal = dir.path().join(".out.refit-partial/.refit-journal");
    let mut text = fs::read(&journal).unwrap();
    text.extend(b"\"c.sca");
    fs::write(&journal, text).unwrap();
    let writer = ArtifactWriter::create(&out, plan()).unwrap();
    assert!(
        writer.is_done("b.weight") && !writer.is_done("a.weight") && !writer.is_done("c.scale")
    );
    for tensor in plan().tensors.iter().filter(|tensor| !writer.is_done(&tensor.name)) {
        write(&writer, tensor);
    }
    assert_eq!(contents(&finish(writer)), contents(&whole));
}

#[test]
fn the_work_of_another_plan_is_not_continued() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let writer = ArtifactWriter::create(&out, plan()).unwrap();
    write(&writer, &plan().tensors[0]);
    drop(writer);
    let other = WritePlan { identity: "other parameters".to_owned(), ..plan() };
    let writer = ArtifactWriter::create(&out, other).unwrap();
    assert!(!writer.is_done("b.weight"));
    // Two writers at once are told apart.
    assert!(matches!(ArtifactWriter::create(&out, plan()), Err(Error::Busy { .. })));
}

#[test]
fn existing_outputs_are_kept_unless_forced() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    fs::create_dir(&out).unwrap();
    written(&out, plan());
    let before = contents(&out);
    assert!(matches!(ArtifactWriter::create(&out, plan()), Err(Error::OutputExists { .. })));
    assert_eq!(contents(&out), before);
    let forced = WritePlan { force: true, tensors: plan().tensors[..2].to_vec(), ..plan() };
    // Until the new one is complete the old one stays.
    let writer = ArtifactWriter::create(&out, forced.clone()).unwrap();
    drop(writer);
    assert_eq!(contents(&out), before);
    written(&out, forced);
    assert_eq!(Artifact::open(&out).unwrap().tensors().len(), 2);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    let file = dir.path().join("file");
    fs::write(&file, "precious").unwrap();
    assert!(matches!(ArtifactWriter::create(&file, plan()), Err(Error::OutputExists { .. })));
}

#[test]
fn a_full_disk_shows_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let huge = WritePlan { tensors: vec![spec("w", &[1 << 24, 1 << 24], DType::F32)], ..plan() };
    let error = ArtifactWriter::create(&out, huge).unwrap_err();
    assert!(matches!(error, Error::DiskFull { .. }), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn plans_and_values_that_cannot_be_written_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let ggml = DType::Ggml(refit_store::GgmlType::Q4_0);
    let with = |tensors: Vec<TensorSpec>| WritePlan { tensors, ..plan() };
    let side = |name: &str| WritePlan {
        side_files: vec![SideFile::from_bytes(name, b"x".as_slice())],
        ..plan()
    };
    for bad in [
        with(vec![spec("w", &[2], DType::F32), spec("w", &[3], DType::F32)]),
        with(vec![spec("__metadata__", &[2], DType::F32)]),
        with(vec![spec("w", &[32], ggml)]),
        with(vec![spec("w", &[usize::MAX, 2], DType::F32)]),
        side("../escape"),
        side("/abs"),
        side("model.safetensors"),
    ] {
        let error = ArtifactWriter::create(&out, bad).unwrap_err();
        assert!(matches!(error, Error::BadPlan { .. }), "{error}");
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    let writer = ArtifactWriter::create(&out, plan()).unwrap();
    let error = writer.write_f32("c.scale", 0, &[1.0, 1e6]).unwrap_err();
    assert!(matches!(error, Error::CannotEncode { index: 1, .. }), "{error}");
    assert!(matches!(writer.write_f32("c.scale", 2, &[1.0, 1.0]), Err(Error::OutOfRange { .. })));
    assert!(matches!(writer.write_f32("c.scal", 0, &[1.0]), Err(Error::NoSuchTensor { .. })));
    assert!(matches!(writer.done("c.scale"), Err(Error::Incomplete { .. })));
    let lineage = Lineage::new("test", serde_json::json!({}));
    let error = writer.finish(lineage, Card::new("test")).unwrap_err();
    assert!(error.to_string().contains("`a.weight`"), "{error}");
    assert!(!out.exists());
}

/// Every type that safetensors has, with values that it holds exactly: whole ones from both ends of the integers, and
/// every kind of code of the small floats.
fn typed() -> Vec<(TensorSpec, Vec<f32>)> {
    let small = [0.0, 1.0, -1.0, 7.0, 100.0, -100.0, 64.0, -3.0, 2.0, -128.0, 127.0, 5.0];
    let unsigned = small.map(f32::abs);
    let e4m3 =
        [0.0, -0.0, 448.0, -448.0, 0.5, 1.125, -1.875, 0.001953125, 0.015625, 240.0, 3.5, -26.0];
    let e5m2 = [
        0.0,
        -0.0,
        57344.0,
        -57344.0,
        0.25,
        1.25,
        -1.75,
        1.5258789e-5,
        6.1035156e-5,
        f32::INFINITY,
        3.5,
        -28.0,
    ];
    let e8m0: [f32; 12] = std::array::from_fn(|i| 2.0f32.powi(23 * i as i32 - 127));
    let flags = [0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0];
    let with = |name: &str, dtype, mut values: [f32; 12], last: f32| {
        values[11] = last;
        (spec(name, &[3, 4], dtype), values.to_vec())
    };
    vec![
        with("bool", DType::Bool, flags, 1.0),
        with("e4m3", DType::F8E4M3, e4m3, -26.0),
        with("e5m2", DType::F8E5M2, e5m2, -28.0),
        with("e8m0", DType::F8E8M0, e8m0, 1.0),
        with("i16", DType::I16, small, -32768.0),
        with("i32", DType::I32, small, -2_147_483_648.0),
        with("i64", DType::I64, small, -9.223_372e18),
        with("i8", DType::I8, small, -128.0),
        with("u16", DType::U16, unsigned, 65535.0),
        with("u32", DType::U32, unsigned, 4_294_967_040.0),
        with("u64", DType::U64, unsigned, 1.844_674_3e19),
        with("u8", DType::U8, unsigned, 255.0),
    ]
}

#[test]
fn every_type_comes_back_in_one_file_and_in_shards() {
    let dir = tempfile::tempdir().unwrap();
    let tensors: Vec<TensorSpec> = typed().into_iter().map(|(spec, _)| spec).collect();
    for (name, max_shard_bytes, files) in [("one", None, 1), ("many", Some(64), 5)] {
        let plan = WritePlan { tensors: tensors.clone(), max_shard_bytes, ..plan() };
        let writer = ArtifactWriter::create(&dir.path().join(name), plan).unwrap();
        for (tensor, values) in typed() {
            writer.write_f32(&tensor.name, 5, &values[5..]).unwrap();
            writer.write_f32(&tensor.name, 0, &values[..5]).unwrap();
            writer.done(&tensor.name).unwrap();
        }
        let out = finish(writer);
        let shards: Vec<Vec<u8>> = contents(&out)
            .into_iter()
            .filter(|(name, _)| name.ends_with(".safetensors"))
            .map(|(_, bytes)| bytes)
            .collect();
        assert!(shards.len() >= files, "{} files", shards.len());
        let artifact = Artifact::open(&out).unwrap();
        for (tensor, values) in typed() {
            assert_eq!(artifact.tensor(&tensor.name).unwrap().dtype, tensor.dtype);
            let read = artifact.read_f32(&tensor.name).unwrap();
            let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&read), bits(&values), "{}", tensor.name);
            // The reference reader finds the same type, shape and bytes.
            let found = shards.iter().find_map(|bytes| {
                let file = safetensors::SafeTensors::deserialize(bytes).unwrap();
                let view = file.tensor(&tensor.name).ok()?;
                Some((view.dtype().to_string(), view.shape().to_vec(), view.data().to_vec()))
            });
            let (dtype, shape, data) = found.unwrap();
            assert_eq!((dtype, shape), (tensor.dtype.to_string(), tensor.shape));
            let mut raw = vec![0; data.len()];
            artifact.read_raw_into(&tensor.name, 0, &mut raw).unwrap();
            assert_eq!(raw, data, "{}", tensor.name);
        }
    }
    let open = |name: &str| Artifact::open(dir.path().join(name)).unwrap().content_hash().unwrap();
    assert_eq!(open("one"), open("many"));
}

#[test]
fn stored_bytes_of_every_type_pass_through() {
    let dir = tempfile::tempdir().unwrap();
    let tensors: Vec<TensorSpec> =
        DType::PLAIN.iter().map(|&dtype| spec(&format!("t.{dtype}"), &[2, 8], dtype)).collect();
    let plan = WritePlan { tensors: tensors.clone(), max_shard_bytes: Some(100), ..plan() };
    let writer = ArtifactWriter::create(&dir.path().join("out"), plan).unwrap();
    let bytes = |tensor: &TensorSpec| -> Vec<u8> {
        let flags = tensor.dtype == DType::Bool;
        let len = 16 * tensor.dtype.block_bytes();
        (0..len).map(|i| if flags { (i % 2) as u8 } else { (i * 37 + 11) as u8 }).collect()
    };
    for tensor in &tensors {
        let bytes = bytes(tensor);
        writer.write_raw(&tensor.name, 7, &bytes[7..]).unwrap();
        writer.write_raw(&tensor.name, 0, &bytes[..7]).unwrap();
        writer.done(&tensor.name).unwrap();
    }
    let artifact = Artifact::open(finish(writer)).unwrap();
    for tensor in &tensors {
        let mut raw = vec![0; bytes(tensor).len()];
        artifact.read_raw_into(&tensor.name, 0, &mut raw).unwrap();
        assert_eq!(raw, bytes(tensor), "{}", tensor.name);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A journal that lost its end says too little, never too much: the rest is written again, to the same bytes.
    #[test]
    fn a_journal_cut_anywhere_gives_the_same_bytes(cut in any::<prop::sample::Index>(), half: bool) {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let tensors = plan().tensors;
        let writer = ArtifactWriter::create(&out, plan()).unwrap();
        for tensor in &tensors[..4] {
            write(&writer, tensor);
        }
        drop(writer);
        let journal = dir.path().join(".out.refit-partial/.refit-journal");
        let text = fs::read(&journal).unwrap();
        fs::write(&journal, &text[..cut.index(text.len() + 1)]).unwrap();
        let writer = ArtifactWriter::create(&out, plan()).unwrap();
        for tensor in &tensors {
            prop_assert!(!writer.is_done(&tensor.name) || tensors[..4].contains(tensor));
            // A tensor that is written again may be written while it says that it is done.
            if !writer.is_done(&tensor.name) || half {
                write(&writer, tensor);
            }
        }
        let whole = written(&dir.path().join("whole"), plan());
        prop_assert_eq!(contents(&finish(writer)), contents(&whole));
    }

    /// Any other journal is taken for another run's: only names of the plan are ever done.
    #[test]
    fn a_damaged_journal_starts_over_or_goes_on(
        at in any::<prop::sample::Index>(), with in proptest::collection::vec(any::<u8>(), 0..4), before in 0usize..5,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let tensors = plan().tensors;
        let writer = ArtifactWriter::create(&out, plan()).unwrap();
        tensors[..before].iter().for_each(|tensor| write(&writer, tensor));
        drop(writer);
        let journal = dir.path().join(".out.refit-partial/.refit-journal");
        let mut text = fs::read(&journal).unwrap();
        let at = at.index(text.len());
        text.splice(at..at + 1, with);
        fs::write(&journal, text).unwrap();
        let writer = ArtifactWriter::create(&out, plan()).unwrap();
        for name in ["b.weight", "other", "", "a.weigh"] {
            prop_assert!(!writer.is_done(name) || tensors.iter().any(|tensor| tensor.name == name));
        }
        tensors.iter().for_each(|tensor| write(&writer, tensor));
        prop_assert!(Lineage::verify(&finish(writer)).unwrap().is_ok());
    }
}
