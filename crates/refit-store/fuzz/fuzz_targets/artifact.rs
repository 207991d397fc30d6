//! `cargo +nightly fuzz run artifact`: a file of arbitrary bytes, under every name, is opened and read to the end or
//! refused; scanning it gives a verdict either way.
#![no_main]

use refit_store::Artifact;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let Some((kind, bytes)) = input.split_first() else { return };
    let names = ["m.safetensors", "m.gguf", "m.pth", "config.json", "model.safetensors.index.json"];
    let dir = std::env::temp_dir().join(format!("refit-fuzz-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("the temporary directory takes new files");
    let path = dir.join(names[usize::from(*kind) % names.len()]);
    std::fs::write(&path, bytes).expect("the temporary directory takes new files");
    for place in [&path, &dir] {
        let _ = refit_store::scan::scan(place);
        let Ok(artifact) = Artifact::open(place) else { continue };
        let _ = (artifact.side_files(), artifact.tokenizer_json(), artifact.load_report());
        for tensor in artifact.tensors() {
            artifact.read_f32(&tensor.name).expect("what was opened can be read");
        }
    }
    let _ = std::fs::remove_file(&path);
});
