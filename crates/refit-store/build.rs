//! Lists the files of the embedded model. A tree without them builds, and says so when they are asked for.

use std::fmt::Write;
use std::path::Path;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let assets = Path::new(&std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets it"))
        .join("../../assets");
    // A path that does not exist counts as changed in every build, so the parent stands in for it.
    let tiny = assets.join("tiny");
    println!("cargo::rerun-if-changed={}", if tiny.exists() { &tiny } else { &assets }.display());
    let mut files: Vec<_> = std::fs::read_dir(&tiny)
        .into_iter()
        .flatten()
        .filter_map(|item| Some(item.ok()?.path()))
        .filter(|path| path.is_file())
        .collect();
    files.sort();
    let mut list = String::from("&[\n");
    for path in files {
        let name =
            path.file_name().expect("a listed file has a name").to_string_lossy().into_owned();
        let path = path.canonicalize().expect("a listed file exists");
        writeln!(list, "    ({name:?}, include_bytes!({:?}).as_slice()),", path)
            .expect("strings take writes");
    }
    list.push(']');
    let out = Path::new(&std::env::var("OUT_DIR").expect("cargo sets it")).join("builtin_tiny.rs");
    std::fs::write(out, list).expect("the build directory is writable");
}
