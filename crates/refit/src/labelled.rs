//! Labelled images, as they are named on the command line: a folder per class, or a pair of IDX files.

use std::path::{Path, PathBuf};

use refit_data::images::{Image, ImageFolder, decode_image, idx};

use crate::cli::App;
use crate::failure::{Failure, Result};
use crate::inputs;

/// Images with the numbers of their classes.
pub enum Labelled {
    /// Files of a folder per class.
    Files(Vec<(PathBuf, usize)>),
    /// An IDX pair: where it lies, and its content.
    Idx(PathBuf, idx::Labelled),
}

/// What the name of an IDX file of images ends in, after its part (`train`, `t10k`).
const IMAGES: &str = "-images-idx3-ubyte";

impl Labelled {
    /// Opens what `source` names: a path, or a source such as `deb:dataset-fashion-mnist`. `labels` are the
    /// model's own names of its classes.
    pub fn open(app: &App, source: &str, labels: &[Option<String>]) -> Result<Self> {
        let path = inputs::pull(app, source, false)?.path;
        let (dir, part) = match path.is_file() {
            true => (crate::verbs::parent(&path), part(&path)),
            false => (path.clone(), held_out(&path)),
        };
        if let Some(part) = part {
            let data = idx::read_labelled(&dir, &part)?;
            if data.is_empty() {
                return Err(Failure::usage(format!("{}: there are no images", path.display())));
            }
            return Ok(Self::Idx(dir.join(part), data));
        }
        if path.is_file() {
            return Err(Failure::usage(format!(
                "{}: not the images of an IDX pair (NAME{IMAGES}); name that file, or a folder with one folder per class",
                path.display()
            )));
        }
        let folder = ImageFolder::open(&path)?;
        let classes = numbers(&path, &folder.classes, labels)?;
        let items = folder.items.into_iter().map(|(file, label)| (file, classes[label]));
        Ok(Self::Files(items.collect()))
    }

    /// The number of images.
    pub fn len(&self) -> usize {
        match self {
            Self::Files(items) => items.len(),
            Self::Idx(_, data) => data.len(),
        }
    }

    /// Image `i` and the number of its class.
    pub fn load(&self, i: usize) -> Result<(Image, usize)> {
        match self {
            Self::Files(items) => Ok((decode_image(&items[i].0)?, items[i].1)),
            Self::Idx(_, data) => {
                let image = data.image(i).ok_or_else(|| {
                    Failure::usage(format!("{}: the images end too early", self.name(i)))
                })?;
                Ok((image, usize::from(data.labels[i])))
            }
        }
    }

    /// How messages call image `i`.
    pub fn name(&self, i: usize) -> String {
        match self {
            Self::Files(items) => items[i].0.display().to_string(),
            Self::Idx(path, _) => format!("{}{IMAGES}: image {i}", path.display()),
        }
    }
}

/// `train` of `train-images-idx3-ubyte.gz`.
fn part(images: &Path) -> Option<String> {
    let name = images.file_name()?.to_str()?;
    let part = name.strip_suffix(".gz").unwrap_or(name).strip_suffix(IMAGES)?;
    Some(part.to_owned())
}

/// The part of an IDX data set that is measured on: `t10k` where it is there, else the only one.
fn held_out(dir: &Path) -> Option<String> {
    let entries = std::fs::read_dir(dir).ok()?;
    let mut parts: Vec<String> = entries.filter_map(|entry| part(&entry.ok()?.path())).collect();
    parts.sort();
    parts.into_iter().next()
}

/// The model's class of each folder: by its label, by its number, or in the order of names where there are as
/// many folders as classes.
fn numbers(dir: &Path, folders: &[String], labels: &[Option<String>]) -> Result<Vec<usize>> {
    let by_label = |name: &String| labels.iter().position(|label| label.as_ref() == Some(name));
    type Way<'a> = &'a dyn Fn(&String) -> Option<usize>;
    let ways: [Way; 2] = [&by_label, &|name: &String| name.parse().ok()];
    for way in ways {
        let found: Option<Vec<usize>> = folders.iter().map(way).collect();
        if let Some(found) = found {
            return Ok(found);
        }
    }
    if labels.is_empty() || labels.len() == folders.len() {
        return Ok((0..folders.len()).collect());
    }
    let known: Vec<&str> = labels.iter().flatten().map(String::as_str).collect();
    let stranger = folders.iter().find(|name| by_label(name).is_none());
    let stranger = stranger.map_or("", String::as_str);
    Err(Failure::usage(format!(
        "{}: the folder `{stranger}` is no class of the model{}; name folders after its {} labels, or number them",
        dir.display(),
        crate::suggest::did_you_mean(stranger, known),
        labels.len(),
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_find_their_classes() {
        let some = |names: &[&str]| -> Vec<String> { names.iter().map(|n| (*n).into()).collect() };
        let labels: Vec<Option<String>> =
            ["shirt", "shoe", "bag"].iter().map(|l| Some((*l).to_owned())).collect();
        let of = |names: &[&str]| numbers(Path::new("d"), &some(names), &labels);
        assert_eq!(of(&["bag", "shoe"]).unwrap(), [2, 1]);
        assert_eq!(of(&["0", "2"]).unwrap(), [0, 2]);
        assert_eq!(of(&["a", "b", "c"]).unwrap(), [0, 1, 2]);
        let message = of(&["bag", "shoo"]).unwrap_err().message;
        assert!(message.contains("`shoo`") && message.contains("`shoe`"), "{message}");
        assert_eq!(numbers(Path::new("d"), &some(&["x", "y"]), &[]).unwrap(), [0, 1]);
    }

    #[test]
    fn the_held_out_part_of_a_data_set_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(held_out(dir.path()), None);
        for name in ["train-images-idx3-ubyte", "t10k-images-idx3-ubyte.gz", "notes.txt"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        assert_eq!(held_out(dir.path()).as_deref(), Some("t10k"));
        assert_eq!(part(Path::new("d/train-images-idx3-ubyte")).as_deref(), Some("train"));
        assert_eq!(part(Path::new("d/train-labels-idx1-ubyte")), None);
    }
}
