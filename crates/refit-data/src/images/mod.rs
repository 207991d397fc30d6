//! Images: IDX files, class folders, decoding, and the preprocessing a model was
//! trained with.

pub mod folder;
pub mod idx;
mod preprocess;
mod resize;
pub mod tiling;

pub use folder::ImageFolder;
pub use preprocess::{ChannelOrder, Preprocess, Resize};
pub use resize::Filter;

use crate::{Error, Result};
use std::path::Path;

/// Eight-bit pixels, rows top to bottom, channels innermost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// 1 (grey) or 3 (red, green, blue).
    pub channels: usize,
    /// `height * width * channels` values.
    pub data: Vec<u8>,
}

impl Image {
    /// Three equal channels from one; an RGB image as it is.
    pub fn to_rgb(&self) -> Image {
        if self.channels == 3 {
            return self.clone();
        }
        let data = self.data.iter().flat_map(|v| [*v; 3]).collect();
        Image { channels: 3, data, ..*self }
    }

    /// Luma (ITU-R 601-2, the fixed-point weights of PIL's `convert("L")`); a grey
    /// image as it is.
    pub fn to_grey(&self) -> Image {
        if self.channels == 1 {
            return self.clone();
        }
        let luma = |p: &[u8]| {
            let sum = u32::from(p[0]) * 19595 + u32::from(p[1]) * 38470 + u32::from(p[2]) * 7471;
            ((sum + 0x8000) >> 16) as u8
        };
        Image { channels: 1, data: self.data.chunks_exact(3).map(luma).collect(), ..*self }
    }

    /// PIL's `resize`: antialiased, and equal to it in every bit.
    pub fn resize(&self, width: usize, height: usize, filter: Filter) -> Image {
        resize::resize(self, width, height, filter)
    }

    /// The central `width` x `height` pixels, the odd pixel cut at the right and
    /// bottom; black where the image is smaller.
    pub fn center_crop(&self, width: usize, height: usize) -> Image {
        let mut data = vec![0; width * height * self.channels];
        let (left, out_left) = offsets(self.width, width);
        let (top, out_top) = offsets(self.height, height);
        let row = self.width.min(width) * self.channels;
        for y in 0..self.height.min(height) {
            let from = ((top + y) * self.width + left) * self.channels;
            let to = ((out_top + y) * width + out_left) * self.channels;
            data[to..to + row].copy_from_slice(&self.data[from..from + row]);
        }
        Image { width, height, channels: self.channels, data }
    }
}

/// Where the overlap begins in the source and in the target.
fn offsets(source: usize, target: usize) -> (usize, usize) {
    if source >= target { ((source - target) / 2, 0) } else { (0, (target - source).div_ceil(2)) }
}

/// Decodes a PNG, JPEG or BMP file to RGB. Transparency is dropped and EXIF
/// rotation ignored, as `PIL.Image.open(...).convert("RGB")` does.
///
/// # Errors
/// A file that is missing, of another format, damaged, or larger than 512 MiB
/// when decoded.
pub fn decode_image(path: impl AsRef<Path>) -> Result<Image> {
    let path = path.as_ref();
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    decode_bytes(path, &bytes)
}

/// [`decode_image`] of bytes; `path` is what errors name.
///
/// # Errors
/// As `decode_image`.
pub fn decode_bytes(path: &Path, bytes: &[u8]) -> Result<Image> {
    let mut reader = image::ImageReader::new(std::io::Cursor::new(bytes))
        .with_guessed_format()
        .map_err(Error::io(path))?;
    let mut limits = image::Limits::default();
    limits.max_alloc = Some(512 << 20);
    reader.limits(limits);
    if reader.format().is_none() {
        return Err(Error::file(path, "not an image (PNG, JPEG and BMP are read)"));
    }
    let decoded = reader.decode().map_err(|e| {
        Error::file(path, format!("cannot be decoded: {e}; PNG, JPEG and BMP are read"))
    })?;
    let rgb = decoded.into_rgb8();
    let (width, height) = (rgb.width() as usize, rgb.height() as usize);
    Ok(Image { width, height, channels: 3, data: rgb.into_raw() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ramp(width: usize, height: usize) -> Image {
        let data = (0..width * height).map(|i| i as u8).collect();
        Image { width, height, channels: 1, data }
    }

    #[test]
    fn crops_are_central_and_padded() {
        assert_eq!(ramp(4, 4).center_crop(2, 2).data, [5, 6, 9, 10]);
        assert_eq!(ramp(2, 1).center_crop(2, 3).data, [0, 0, 0, 1, 0, 0]);
    }

    #[test]
    fn grey_and_colour() {
        let rgb = ramp(2, 1).to_rgb();
        assert_eq!(rgb.data, [0, 0, 0, 1, 1, 1]);
        assert_eq!(rgb.to_grey(), ramp(2, 1));
        let red = Image { width: 1, height: 1, channels: 3, data: vec![255, 0, 0] };
        assert_eq!(red.to_grey().data, [76]);
    }

    #[test]
    fn what_is_no_image_is_said() {
        let error = decode_bytes(Path::new("a.txt"), b"hello").unwrap_err().to_string();
        assert!(error.starts_with("a.txt: not an image"), "{error}");
    }

    /// A picture with edges and gradients, as each kind of file.
    fn encoded(format: image::ImageFormat) -> Vec<u8> {
        let picture = image::RgbImage::from_fn(24, 17, |x, y| {
            image::Rgb([(x * 10) as u8, (y * 15) as u8, if x > y { 200 } else { 30 }])
        });
        let mut out = std::io::Cursor::new(Vec::new());
        picture.write_to(&mut out, format).unwrap();
        out.into_inner()
    }

    const FORMATS: [image::ImageFormat; 3] =
        [image::ImageFormat::Png, image::ImageFormat::Jpeg, image::ImageFormat::Bmp];

    #[test]
    fn every_kind_of_file_is_decoded() {
        for format in FORMATS {
            let image = decode_bytes(Path::new("x"), &encoded(format)).unwrap();
            assert_eq!((image.width, image.height, image.channels), (24, 17, 3));
            let near = |at: usize, want: u8| image.data[at].abs_diff(want) < 25;
            assert!(near(3 * 20 + 2, 200) && near(3 * (16 * 24) + 2, 30), "{format:?}");
        }
    }

    proptest! {
        #![proptest_config(crate::testing::cases(200))]

        /// A changed file is refused, or gives as many pixels as it says.
        #[test]
        fn changed_images_are_decoded_or_refused(
            kind in 0usize..3, cut in any::<prop::sample::Index>(), keep: bool,
            edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        ) {
            let mut bytes = encoded(FORMATS[kind]);
            for (at, byte) in edits {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            if !keep {
                bytes.truncate(cut.index(bytes.len()));
            }
            if let Ok(image) = decode_bytes(Path::new("x"), &bytes) {
                prop_assert_eq!(image.data.len(), 3 * image.width * image.height);
            }
        }

        #[test]
        fn damaged_images_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), kind in 0usize..3) {
            let magic: &[u8] = [b"\x89PNG\r\n\x1a\n".as_slice(), b"\xff\xd8\xff\xe0", b"BM"][kind];
            let _ = decode_bytes(Path::new("x"), &[magic, &bytes].concat());
        }
    }
}
