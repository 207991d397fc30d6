//! Labelled examples: a folder of images per class, a pair of IDX files, or a table of classified texts.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use refit_data::Records;
use refit_data::classes::Classified;
use refit_data::images::{Image, ImageFolder, decode_image, idx};

use refit_store::Artifact;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::suggest::nearest;

/// Labelled examples.
#[derive(Clone, Debug)]
pub enum Labelled {
    /// Image files of a folder per class.
    Images {
        /// The folder.
        dir: PathBuf,
        /// Names of the classes: those of the folders, in name order.
        classes: Vec<String>,
        /// File and class of each image.
        items: Vec<(PathBuf, usize)>,
    },
    /// An IDX pair.
    Idx {
        /// Its directory and part: `DIR/train`.
        path: PathBuf,
        /// Pixels and labels.
        data: Arc<idx::Labelled>,
    },
    /// A table of texts and labels.
    Table(Arc<Records>),
}

/// Which part of an IDX data set is meant by its directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// `train`.
    Train,
    /// `t10k`.
    HeldOut,
}

/// What the name of an IDX file of images ends in, after its part.
const IMAGES: &str = "-images-idx3-ubyte";

impl Labelled {
    /// Opens a folder with one folder of images per class, a directory with IDX pairs (of which `part` is taken, or the only
    /// one), the images' file of a pair, or a table (`.jsonl`, `.csv`, `.tsv`, `.parquet`).
    ///
    /// # Errors
    /// A path that is none of these; files that cannot be read.
    pub fn open(path: &Path, part: Part) -> Result<Self> {
        let bad = |problem: String| {
            Err(Error::BadData { source_name: path.display().to_string(), problem })
        };
        if path.is_file() {
            if let Some(part) = part_of(path) {
                return Self::idx(path.parent().unwrap_or(Path::new("")), &part);
            }
            if is_table(path) {
                let records = Records::open(path)?;
                if records.is_empty() {
                    return bad("the table has no rows".into());
                }
                return Ok(Self::Table(Arc::new(records)));
            }
            return bad(format!(
                "not the images of an IDX pair (NAME{IMAGES}), and no table (.jsonl, .csv, .parquet); name one of these, or \
                 a folder with one folder per class"
            ));
        }
        if let Some(part) = choose(path, part) {
            return Self::idx(path, &part);
        }
        let ImageFolder { classes, items } = ImageFolder::open(path)?;
        Ok(Self::Images { dir: path.to_owned(), classes, items })
    }

    fn idx(dir: &Path, part: &str) -> Result<Self> {
        let data = idx::read_labelled(dir, part)?;
        let path = dir.join(part);
        if data.is_empty() {
            let source_name = format!("{}{IMAGES}", path.display());
            return Err(Error::BadData { source_name, problem: "there are no images".into() });
        }
        Ok(Self::Idx { path, data: Arc::new(data) })
    }

    /// The number of examples.
    pub fn len(&self) -> usize {
        match self {
            Self::Images { items, .. } => items.len(),
            Self::Idx { data, .. } => data.len(),
            Self::Table(records) => records.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The label of each image, as it is written: the name of its folder, or the number that IDX has. Empty for a table.
    pub fn image_labels(&self) -> Vec<String> {
        match self {
            Self::Images { classes, items, .. } => {
                items.iter().map(|(_, class)| classes[*class].clone()).collect()
            }
            Self::Idx { data, .. } => data.labels.iter().map(u8::to_string).collect(),
            Self::Table(_) => Vec::new(),
        }
    }

    /// Image `i`.
    ///
    /// # Errors
    /// A file that cannot be decoded; an example that is no image.
    pub fn image(&self, i: usize) -> Result<Image> {
        let found = match self {
            Self::Images { items, .. } => Some(decode_image(&items[i].0)?),
            Self::Idx { data, .. } => data.image(i),
            Self::Table(_) => None,
        };
        found.ok_or_else(|| Error::BadData {
            source_name: self.name(i),
            problem: "there is no image here".into(),
        })
    }

    /// The content of image `i`, by which its features are found again.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn image_key(&self, i: usize) -> Result<refit_train::features::Key> {
        let key = refit_train::features::key;
        match self {
            Self::Images { items, .. } => {
                let path = &items[i].0;
                let bytes = std::fs::read(path)
                    .map_err(|source| Error::Io { path: path.clone(), source })?;
                Ok(key(&[b"file", &bytes]))
            }
            _ => {
                let Image { width, height, channels, data } = self.image(i)?;
                Ok(key(&[b"pixels", format!("{width} {height} {channels}").as_bytes(), &data]))
            }
        }
    }

    /// How messages call example `i`.
    pub fn name(&self, i: usize) -> String {
        match self {
            Self::Images { items, .. } => items[i].0.display().to_string(),
            Self::Idx { path, .. } => format!("{}{IMAGES}: image {i}", path.display()),
            Self::Table(records) => {
                let line = records.rows().get(i).map_or(0, |row| row.line);
                format!("{}:{line}", records.path().display())
            }
        }
    }

    /// The path, for messages and lineage.
    pub fn source(&self) -> String {
        match self {
            Self::Images { dir, .. } => dir.display().to_string(),
            Self::Idx { path, .. } => format!("{}{IMAGES}", path.display()),
            Self::Table(records) => records.path().display().to_string(),
        }
    }

    /// How much it is, in words.
    pub fn size(&self) -> String {
        match self {
            Self::Table(records) => format!("{} records", records.len()),
            _ => format!("{} images", self.len()),
        }
    }

    /// SHA-256 of names, labels and content.
    ///
    /// # Errors
    /// Files that cannot be read.
    pub fn sha256(&self) -> Result<String> {
        let mut all: Vec<u8> = Vec::new();
        match self {
            Self::Table(records) => {
                let table = crate::inputs::TrainingData::Records(records.clone());
                return Ok(table.sha256());
            }
            Self::Images { items, classes, .. } => {
                for (i, (_, class)) in items.iter().enumerate() {
                    all.extend(classes[*class].as_bytes());
                    all.extend(self.image_key(i)?);
                }
            }
            Self::Idx { data, .. } => {
                all.extend(&data.labels);
                all.extend(&data.pixels);
            }
        }
        Ok(refit_store::hash::hex(&all))
    }
}

impl Labelled {
    /// The class of each image among those of a model that names them so.
    ///
    /// # Errors
    /// A folder that is no class of the model.
    pub fn image_classes(&self, labels: &[Option<String>]) -> Result<Vec<usize>> {
        if let Self::Images { dir, classes, items } = self {
            let numbers = folder_classes(&dir.display().to_string(), classes, labels)?;
            return Ok(items.iter().map(|(_, class)| numbers[*class]).collect());
        }
        // Labels of IDX files are numbers: of classes that bear them as names, else of classes in order.
        let written = self.image_labels();
        let by_name = |label: &String| labels.iter().position(|l| l.as_ref() == Some(label));
        let named: Option<Vec<usize>> = written.iter().map(by_name).collect();
        Ok(named.unwrap_or_else(|| written.iter().filter_map(|label| label.parse().ok()).collect()))
    }
}

/// The class of each text among `count` classes of a model that names them so; a class may also be named by its number.
///
/// # Errors
/// A label that is no class of the model, with file and line.
pub fn text_classes(
    texts: &Classified,
    labels: &[Option<String>],
    count: usize,
) -> Result<Vec<usize>> {
    let name = |i: usize| labels.get(i).cloned().flatten().unwrap_or_else(|| i.to_string());
    let names: Vec<String> = (0..count).map(name).collect();
    Ok(texts.numbers(&names, true)?)
}

/// Names of a model's classes by number, as far as its config has them.
pub fn class_names(artifact: &Artifact) -> Vec<Option<String>> {
    let named = artifact.config().raw().get("id2label").and_then(Value::as_object);
    let named: Vec<(usize, String)> = named
        .into_iter()
        .flatten()
        .filter_map(|(class, label)| Some((class.parse().ok()?, label.as_str()?.to_owned())))
        .filter(|(class, _)| *class < 1 << 20)
        .collect();
    let count = named.iter().map(|(class, _)| class + 1).max().unwrap_or(0);
    let mut labels = vec![None; count];
    for (class, label) in named {
        labels[class] = Some(label);
    }
    labels
}

/// The model's class of each folder: by its label, by its number, or in the order of names where there are as
/// many folders as classes.
fn folder_classes(dir: &str, folders: &[String], labels: &[Option<String>]) -> Result<Vec<usize>> {
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
    let hint = nearest(stranger, &known).map(|name| format!(" (did you mean `{name}`?)"));
    Err(Error::BadData {
        source_name: dir.to_owned(),
        problem: format!(
            "the folder `{stranger}` is no class of the model{}; name folders after its {} labels, or number them",
            hint.unwrap_or_default(),
            labels.len(),
        ),
    })
}

/// Whether a path names a table of records.
pub fn is_table(path: &Path) -> bool {
    let name = path.to_string_lossy().to_lowercase();
    let name = name.strip_suffix(".gz").unwrap_or(&name);
    [".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"].iter().any(|end| name.ends_with(end))
}

/// `train` of `train-images-idx3-ubyte.gz`.
fn part_of(images: &Path) -> Option<String> {
    let name = images.file_name()?.to_str()?;
    let part = name.strip_suffix(".gz").unwrap_or(name).strip_suffix(IMAGES)?;
    Some(part.to_owned())
}

/// The part of an IDX data set that is wanted: `t10k` comes first by name, `train` last; else the only one.
fn choose(dir: &Path, wanted: Part) -> Option<String> {
    let entries = std::fs::read_dir(dir).ok()?;
    let mut parts: Vec<String> = entries.filter_map(|entry| part_of(&entry.ok()?.path())).collect();
    parts.sort();
    match wanted {
        Part::HeldOut => parts.into_iter().next(),
        Part::Train => parts.iter().find(|part| *part == "train").or(parts.first()).cloned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wanted_part_of_a_data_set_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(choose(dir.path(), Part::HeldOut), None);
        for name in ["train-images-idx3-ubyte", "t10k-images-idx3-ubyte.gz", "notes.txt"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        assert_eq!(choose(dir.path(), Part::HeldOut).as_deref(), Some("t10k"));
        assert_eq!(choose(dir.path(), Part::Train).as_deref(), Some("train"));
        assert_eq!(part_of(Path::new("d/train-images-idx3-ubyte")).as_deref(), Some("train"));
        assert_eq!(part_of(Path::new("d/train-labels-idx1-ubyte")), None);
    }

    #[test]
    fn folders_find_their_classes() {
        let some = |names: &[&str]| -> Vec<String> { names.iter().map(|n| (*n).into()).collect() };
        let labels: Vec<Option<String>> =
            ["shirt", "shoe", "bag"].iter().map(|l| Some((*l).to_owned())).collect();
        let of = |names: &[&str]| folder_classes("d", &some(names), &labels);
        assert_eq!(of(&["bag", "shoe"]).unwrap(), [2, 1]);
        assert_eq!(of(&["0", "2"]).unwrap(), [0, 2]);
        assert_eq!(of(&["a", "b", "c"]).unwrap(), [0, 1, 2]);
        let message = of(&["bag", "shoo"]).unwrap_err().to_string();
        assert!(message.contains("`shoo`") && message.contains("`shoe`"), "{message}");
        assert_eq!(folder_classes("d", &some(&["x", "y"]), &[]).unwrap(), [0, 1]);
    }

    #[test]
    fn an_idx_pair_has_labels_and_keys_by_content() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, head: &[u8], data: &[u8]| {
            std::fs::write(dir.path().join(name), [head, data].concat()).unwrap();
        };
        let (images, labels) =
            ([0, 0, 8, 3, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0, 2], [0, 0, 8, 1, 0, 0, 0, 3]);
        write("train-images-idx3-ubyte", &images, &[1, 2, 3, 4, 1, 2]);
        write("train-labels-idx1-ubyte", &labels, &[7, 0, 7]);
        let found = Labelled::open(dir.path(), Part::HeldOut).unwrap();
        assert_eq!(found.image_labels(), ["7", "0", "7"]);
        let keys: Vec<_> = (0..3).map(|i| found.image_key(i).unwrap()).collect();
        assert!(keys[0] == keys[2] && keys[0] != keys[1]);
        assert!(found.name(1).ends_with("train-images-idx3-ubyte: image 1"), "{}", found.name(1));
        let error = Labelled::open(&dir.path().join("train-labels-idx1-ubyte"), Part::Train);
        assert!(error.unwrap_err().to_string().contains("IDX pair"));
    }
}
