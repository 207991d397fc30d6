//! How fast an artifact opens, decodes and is written: `cargo run --release --example throughput MODEL [OUT]`.

use std::time::Instant;

use refit_store::{Artifact, ArtifactWriter, Card, DType, Lineage, Result, WritePlan};

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let Some(model) = arguments.next() else {
        eprintln!("usage: throughput MODEL [OUT]");
        std::process::exit(2);
    };
    let start = Instant::now();
    let artifact = Artifact::open(&model)?;
    println!("open            {:8.1} ms, {} tensors", millis(start), artifact.tensors().len());
    let start = Instant::now();
    let side: usize = artifact.side_files().iter().map(|file| file.name.len()).sum();
    println!("side files      {:8.1} ms, {} ({side})", millis(start), artifact.side_files().len());
    let start = Instant::now();
    let mut values = Vec::new();
    for info in artifact.tensors() {
        values.push(artifact.read_f32(&info.name)?);
    }
    let bytes: usize = values.iter().map(|tensor| tensor.len() * 4).sum();
    report("read to f32", start, bytes);
    let start = Instant::now();
    for (info, tensor) in artifact.tensors().iter().zip(&mut values) {
        artifact.read_f32_into(&info.name, 0, tensor)?;
    }
    report("read again", start, bytes);
    let Some(out) = arguments.next() else { return Ok(()) };
    let mut plan = WritePlan::like(&artifact, Some(DType::F32), "throughput");
    plan.force = true;
    let start = Instant::now();
    let writer = ArtifactWriter::create(out.as_ref(), plan)?;
    println!("create          {:8.1} ms", millis(start));
    let start = Instant::now();
    for (info, tensor) in artifact.tensors().iter().zip(&values) {
        writer.write_f32(&info.name, 0, tensor)?;
        writer.done(&info.name)?;
    }
    report("write f32", start, bytes);
    let start = Instant::now();
    writer.finish(Lineage::new("copy", serde_json::Value::Null), Card::new("copy"))?;
    report("hash and finish", start, bytes);
    Ok(())
}

fn millis(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}

fn report(what: &str, start: Instant, bytes: usize) {
    let time = millis(start);
    println!("{what:15} {time:8.1} ms, {:.2} GB/s", bytes as f64 / time / 1e6);
}
