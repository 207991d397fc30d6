//! Writes the corpora of refit's own small model and builtin held-out texts:
//! `OUT/{kjv,man,wordnet}.{train,calib,eval}.txt`.
//!
//! ```text
//! apt-get install bible-kjv-text manpages manpages-dev wordnet-base
//! cargo run --release -p refit-data --example make_corpora -- OUT
//! ```
//! The same package versions give the same bytes. `calib` and `eval` of OUT are
//! what `assets/text/` holds; its README lists versions and licences. Manual pages
//! under the GPL are training text only; `man.NOTICE.txt` collects the copyright
//! lines of the pages that are held out.

use refit_data::corpus::{self, Document, HeldOut, hold_out, join, kjv};
use refit_data::wordnet::{DEBIAN_DIR, Glosses};
use std::collections::{BTreeSet, HashMap};
use std::error::Error;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

const HELD_OUT_BYTES: usize = 60_000;
/// Few pages of the calibration part may be passed on in a changed form.
const MAN_BYTES: usize = 28_000;
const FREE: [&str; 5] =
    ["Linux-man-pages-copyleft", "BSD-2-clause", "BSD-3-clause", "BSD-4-clause", "Expat"];

fn main() -> Result<(), Box<dyn Error>> {
    let out = PathBuf::from(std::env::args().nth(1).ok_or("usage: make_corpora OUT_DIR")?);
    fs::create_dir_all(&out)?;

    let bible = kjv::open(Path::new(kjv::DEBIAN_PATH))?;
    write(&out, "kjv", hold_out(bible, HELD_OUT_BYTES, |_| true)?)?;

    let glosses = corpus::glosses(&Glosses::open(DEBIAN_DIR)?);
    write(&out, "wordnet", hold_out(glosses, HELD_OUT_BYTES, |_| true)?)?;

    let (pages, free) = man_pages()?;
    let parts = hold_out(pages, MAN_BYTES, |d| free.contains_key(&d.name))?;
    let mut notices = String::new();
    for (part, documents) in [("calib", &parts.calib), ("eval", &parts.eval)] {
        for document in documents {
            let (licence, copyright) = &free[&document.name];
            notices
                .push_str(&format!("{} (man.{part}.txt), {licence}\n{copyright}\n", document.name));
        }
    }
    fs::write(out.join("man.NOTICE.txt"), notices)?;
    write(&out, "man", parts)
}

/// The copyright lines of a page's source.
fn copyright_of(page: &Path) -> Result<String, Box<dyn Error>> {
    let mut source = String::new();
    flate2::read::GzDecoder::new(fs::File::open(page)?).read_to_string(&mut source)?;
    let comments = source.lines().filter_map(|l| l.strip_prefix(".\\\""));
    let mut lines: Vec<_> =
        comments.map(str::trim).filter(|l| l.to_lowercase().contains("copyright")).collect();
    lines.retain(|l| l.contains(|c: char| c.is_ascii_digit()) || l.contains("(C)"));
    Ok(lines.iter().map(|l| format!("  {l}\n")).collect())
}

fn write(out: &Path, domain: &str, parts: HeldOut) -> Result<(), Box<dyn Error>> {
    for (part, documents) in [("train", parts.train), ("calib", parts.calib), ("eval", parts.eval)]
    {
        let text = join(&documents);
        println!("{domain}.{part}.txt: {} documents, {} bytes", documents.len(), text.len());
        if part != "train" && domain != "wordnet" {
            let names: Vec<_> = documents.iter().map(|d| d.name.as_str()).collect();
            println!("  {}", names.join(", "));
        }
        fs::write(out.join(format!("{domain}.{part}.txt")), text)?;
    }
    Ok(())
}

/// Page name to licence and copyright lines.
type Free = HashMap<String, (String, String)>;

/// The pages of `manpages` and `manpages-dev`, and those that may be held out.
fn man_pages() -> Result<(Vec<Document>, Free), Box<dyn Error>> {
    let mut paths = BTreeSet::new();
    let mut licences = HashMap::new();
    for package in ["manpages", "manpages-dev"] {
        let list = fs::read_to_string(format!("/var/lib/dpkg/info/{package}.list"))?;
        let pages = list.lines().filter(|l| l.starts_with("/usr/share/man/man"));
        // Aliases are symbolic links.
        paths.extend(pages.map(PathBuf::from).filter(|p| p.is_file() && !p.is_symlink()));
        let copyright = fs::read_to_string(format!("/usr/share/doc/{package}/copyright"))?;
        licences.extend(read_licences(&copyright));
    }
    let paths: Vec<PathBuf> = paths.into_iter().collect();
    let mut free = Free::new();
    for path in &paths {
        let key = path.strip_prefix("/usr/share/man")?.with_extension("");
        let licence = licences.get(key.to_string_lossy().as_ref()).map_or("", String::as_str);
        if FREE.contains(&licence) {
            let copyright = copyright_of(path)?;
            let documents = corpus::man_pages(&[path])?;
            let notice = |d: Document| (d.name, (licence.to_owned(), copyright.clone()));
            free.extend(documents.into_iter().map(notice));
        }
    }
    Ok((corpus::man_pages(&paths)?, free))
}

/// File to licence, from a machine-readable `debian/copyright`.
fn read_licences(text: &str) -> HashMap<String, String> {
    let mut licences = HashMap::new();
    for paragraph in text.split("\n\n") {
        let unfolded = paragraph.replace("\n ", " ");
        let field = |name: &str| unfolded.lines().find_map(|l| l.strip_prefix(name));
        let (Some(files), Some(licence)) = (field("Files:"), field("License:")) else { continue };
        // Old stanzas separate several licences by " and ": those never match one.
        licences
            .extend(files.split_whitespace().map(|f| (f.to_owned(), licence.trim().to_owned())));
    }
    licences
}
