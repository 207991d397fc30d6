//! IDX files (LeCun), the format of MNIST and Fashion-MNIST; gzip or plain.

use super::Image;
use crate::{Error, Result, file};
use std::path::Path;

/// Where Debian's `dataset-fashion-mnist` puts the files.
pub const FASHION_MNIST_DIR: &str = "/usr/share/datasets/fashion-mnist";

/// The classes of Fashion-MNIST, in the order of their labels.
#[rustfmt::skip]
pub const FASHION_MNIST_CLASSES: [&str; 10] = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
];

/// A tensor of bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Idx {
    /// Outermost first.
    pub shape: Vec<usize>,
    /// Row-major.
    pub data: Vec<u8>,
}

/// Reads an IDX file of unsigned bytes.
///
/// # Errors
/// A file that is missing, of another format or element type, or whose length is
/// not what its header says.
pub fn read(path: impl AsRef<Path>) -> Result<Idx> {
    let path = path.as_ref();
    parse(path, &file::read(path)?)
}

fn parse(path: &Path, bytes: &[u8]) -> Result<Idx> {
    let &[0, 0, kind, rank, ..] = bytes else {
        return Err(Error::file(path, "not an IDX file (it begins with two zero bytes)"));
    };
    if kind != 8 {
        let message = format!("IDX element type {kind:#04x}; only unsigned bytes (0x08) are read");
        return Err(Error::file(path, message));
    }
    let data_at = 4 + 4 * usize::from(rank);
    let header = bytes.get(4..data_at).ok_or_else(|| Error::file(path, "truncated IDX header"))?;
    let shape: Vec<usize> = header
        .chunks_exact(4)
        .map(|b| u32::from_be_bytes(b.try_into().expect("invariant: chunks of 4")) as usize)
        .collect();
    let expected = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
    let data = bytes[data_at..].to_vec();
    if expected != Some(data.len()) {
        let message = format!(
            "the header says {shape:?}, but {} data bytes follow; fetch the file again",
            data.len()
        );
        return Err(Error::file(path, message));
    }
    Ok(Idx { shape, data })
}

/// Images of one size with their labels.
#[derive(Debug, Clone)]
pub struct Labelled {
    /// Rows of an image.
    pub height: usize,
    /// Columns of an image.
    pub width: usize,
    /// All images, one after another.
    pub pixels: Vec<u8>,
    /// One per image.
    pub labels: Vec<u8>,
}

impl Labelled {
    /// The number of images.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// Image `i`, grey; `None` beyond the last.
    pub fn image(&self, i: usize) -> Option<Image> {
        let size = self.height * self.width;
        let data = self.pixels.get(i * size..(i + 1) * size)?.to_vec();
        Some(Image { width: self.width, height: self.height, channels: 1, data })
    }
}

/// Reads `<part>-images-idx3-ubyte[.gz]` and `<part>-labels-idx1-ubyte[.gz]`;
/// `part` is `train` or `t10k`.
///
/// # Errors
/// As [`read`], and when images and labels do not go together.
pub fn read_labelled(dir: impl AsRef<Path>, part: &str) -> Result<Labelled> {
    let dir = dir.as_ref();
    let find = |name: String| {
        let zipped = dir.join(format!("{name}.gz"));
        if zipped.is_file() { zipped } else { dir.join(name) }
    };
    let images_path = find(format!("{part}-images-idx3-ubyte"));
    let images = read(&images_path)?;
    let labels = read(find(format!("{part}-labels-idx1-ubyte")))?;
    match (&images.shape[..], &labels.shape[..]) {
        (&[n, height, width], &[m]) if n == m => {
            Ok(Labelled { height, width, pixels: images.data, labels: labels.data })
        }
        (images, labels) => {
            let message = format!(
                "images {images:?} and labels {labels:?} do not go together; expected [n, height, width] and [n]"
            );
            Err(Error::file(&images_path, message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn headers_are_checked() {
        let good = [0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 6];
        let idx = parse(Path::new("a"), &good).unwrap();
        assert_eq!((idx.shape, idx.data.len()), (vec![2, 3], 6));
        let message = |bytes: &[u8]| parse(Path::new("a"), bytes).unwrap_err().to_string();
        assert!(message(&good[..17]).contains("[2, 3], but 5 data bytes"));
        assert!(message(&good[..7]).contains("truncated"));
        assert!(message(&[0, 0, 13, 1, 0, 0, 0, 0]).contains("0x0d"));
        assert!(message(b"PNG!").contains("not an IDX"));
    }

    #[test]
    fn images_and_labels_go_together() {
        let dir = tempfile::tempdir().unwrap();
        let write =
            |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).unwrap();
        write("train-images-idx3-ubyte", &[0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 1, 7, 9]);
        write("train-labels-idx1-ubyte", &[0, 0, 8, 1, 0, 0, 0, 2, 1, 0]);
        let data = read_labelled(dir.path(), "train").unwrap();
        assert_eq!((data.len(), data.image(1).unwrap().data, data.image(2)), (2, vec![9], None));
        write("train-labels-idx1-ubyte", &[0, 0, 8, 1, 0, 0, 0, 1, 1]);
        assert!(
            read_labelled(dir.path(), "train").unwrap_err().to_string().contains("go together")
        );
    }

    proptest! {
        #[test]
        fn never_panics(mut bytes in proptest::collection::vec(any::<u8>(), 4..60)) {
            bytes[..3].copy_from_slice(&[0, 0, 8]);
            let _ = parse(Path::new("x"), &bytes);
        }
    }
}
