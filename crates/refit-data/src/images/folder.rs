//! Image folders: one subdirectory per class.

use super::{Image, decode_image};
use crate::{Error, Result};
use std::path::{Path, PathBuf};

/// The files of a directory whose subdirectories are classes, as torchvision's
/// `ImageFolder`: classes in name order, files in name order. Images are decoded
/// when asked for.
#[derive(Debug, Clone)]
pub struct ImageFolder {
    /// Names of the subdirectories; a label is an index into them.
    pub classes: Vec<String>,
    /// File and label.
    pub items: Vec<(PathBuf, usize)>,
}

const EXTENSIONS: [&str; 4] = ["png", "jpg", "jpeg", "bmp"];

impl ImageFolder {
    /// Lists `dir`; files that are not PNG, JPEG or BMP by name are left out.
    ///
    /// # Errors
    /// A directory that cannot be read, no class, or a class without an image.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let mut folder = ImageFolder { classes: vec![], items: vec![] };
        for class in entries(dir)?.into_iter().filter(|p| p.is_dir()) {
            let label = folder.classes.len();
            let before = folder.items.len();
            folder.collect(&class, label)?;
            if folder.items.len() == before {
                return Err(Error::file(
                    &class,
                    "no PNG, JPEG or BMP file in this class; remove the directory or add images",
                ));
            }
            folder.classes.push(class.file_name().unwrap_or_default().to_string_lossy().into());
        }
        if folder.classes.is_empty() {
            return Err(Error::file(
                dir,
                "no subdirectories; expected one per class, with its images inside",
            ));
        }
        Ok(folder)
    }

    fn collect(&mut self, dir: &Path, label: usize) -> Result<()> {
        for path in entries(dir)? {
            let extension = path.extension().map(|e| e.to_string_lossy().to_lowercase());
            if path.is_dir() && !path.is_symlink() {
                self.collect(&path, label)?;
            } else if extension.is_some_and(|e| EXTENSIONS.contains(&e.as_str())) {
                self.items.push((path, label));
            }
        }
        Ok(())
    }

    /// Decodes item `i`; `None` beyond the last.
    pub fn load(&self, i: usize) -> Option<Result<(Image, usize)>> {
        let (path, label) = self.items.get(i)?;
        Some(decode_image(path).map(|image| (image, *label)))
    }
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let listing = std::fs::read_dir(dir).map_err(Error::io(dir))?;
    let mut paths: Vec<PathBuf> =
        listing.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>().map_err(Error::io(dir))?;
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_directories_in_name_order() {
        let dir = tempfile::tempdir().unwrap();
        assert!(ImageFolder::open(dir.path()).unwrap_err().to_string().contains("one per class"));
        for (class, value) in [("dog", 200u8), ("cat", 100)] {
            std::fs::create_dir(dir.path().join(class)).unwrap();
            let pixels = image::RgbImage::from_pixel(2, 3, image::Rgb([value, 0, 1]));
            pixels.save(dir.path().join(class).join("1.png")).unwrap();
            std::fs::write(dir.path().join(class).join("notes.txt"), "x").unwrap();
        }
        let folder = ImageFolder::open(dir.path()).unwrap();
        assert_eq!(folder.classes, ["cat", "dog"]);
        let (image, label) = folder.load(1).unwrap().unwrap();
        assert_eq!((image.width, image.height, image.data[0], label), (2, 3, 200, 1));
        assert!(folder.load(2).is_none());
        std::fs::create_dir(dir.path().join("empty")).unwrap();
        assert!(ImageFolder::open(dir.path()).unwrap_err().to_string().contains("no PNG"));
    }
}
