//! Images against PIL, and the real Fashion-MNIST where it is installed.

use refit_data::images::{Filter, decode_image, idx};
use std::path::{Path, PathBuf};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

#[test]
fn resizing_is_that_of_pil_in_every_bit() {
    let image = decode_image(fixture("resize.png")).unwrap();
    let index: serde_json::Value =
        serde_json::from_slice(&std::fs::read(fixture("resize.json")).unwrap()).unwrap();
    let expected = std::fs::read(fixture("resize.bin")).unwrap();
    let mut rest = &expected[..];
    for case in index["cases"].as_array().unwrap() {
        let filter: Filter = serde_json::from_value(case["filter"].clone()).unwrap();
        let size = |key: &str| case[key].as_u64().unwrap() as usize;
        let (width, height) = (size("width"), size("height"));
        let (want, after) = rest.split_at(width * height * 3);
        rest = after;
        let got = image.resize(width, height, filter);
        assert!(got.data == want, "{filter:?} to {width} x {height}");
    }
    assert!(image.to_grey().data == rest, "luma");
}

#[test]
fn fashion_mnist_opens_where_it_is_installed() {
    let dir = Path::new(idx::FASHION_MNIST_DIR);
    if !dir.is_dir() {
        return;
    }
    let test = idx::read_labelled(dir, "t10k").unwrap();
    assert_eq!((test.len(), test.height, test.width), (10_000, 28, 28));
    let per_class = |c: u8| test.labels.iter().filter(|l| **l == c).count();
    assert!((0..10).all(|c| per_class(c) == 1000));
}
