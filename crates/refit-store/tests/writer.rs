//! The writer: what it writes others read, and nothing is lost or half written.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

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
