//! `hf:owner/name[@revision][/file]`: a model hub over plain HTTPS, with Hugging Face's conventions for tokens,
//! endpoint and cache.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::cache::Entry;
use super::net::{Client, Route, Url};
use super::{Progress, PullOptions, Pulled, entry_point, extension, fault, offline};
use crate::error::{Error, Result};
use crate::hash;

struct Id<'s> {
    repo: String,
    revision: &'s str,
    member: Option<&'s str>,
}

fn parse<'s>(source: &str, rest: &'s str) -> Result<Id<'s>> {
    let wrong = || {
        fault(
            source,
            "this is not a model on a hub",
            "write hf:OWNER/NAME, hf:OWNER/NAME@REVISION or hf:OWNER/NAME/FILE",
        )
    };
    let (owner, rest) = rest.split_once('/').ok_or_else(wrong)?;
    let (head, member) =
        rest.split_once('/').map_or((rest, None), |(head, member)| (head, Some(member)));
    let (name, revision) = head.split_once('@').unwrap_or((head, "main"));
    let plain = |part: &str| {
        !part.is_empty()
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
            && !part.starts_with('.')
    };
    if ![owner, name, revision].into_iter().all(plain) {
        return Err(wrong());
    }
    Ok(Id { repo: format!("{owner}/{name}"), revision, member: member.filter(|m| !m.is_empty()) })
}

/// What the environment says about the hub, in the variables that Hugging Face's own tools read.
#[derive(Debug, Clone, Default)]
pub(super) struct Settings {
    /// Address of the hub, without a slash at its end.
    pub endpoint: String,
    pub token: Option<String>,
    /// Where Hugging Face's own tools keep what they fetched.
    pub cache: Option<PathBuf>,
    pub offline: bool,
}

impl Settings {
    fn load() -> Self {
        let endpoint = env("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        let token = || {
            let path = env("HF_TOKEN_PATH")
                .map(PathBuf::from)
                .or_else(|| Some(hub_home()?.join("token")))?;
            let text = std::fs::read_to_string(path).ok()?.trim().to_owned();
            (!text.is_empty()).then_some(text)
        };
        Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: env("HF_TOKEN").or_else(token),
            cache: env("HF_HUB_CACHE").map(PathBuf::from).or_else(|| Some(hub_home()?.join("hub"))),
            offline: env("HF_HUB_OFFLINE").is_some_and(|value| value != "0"),
        }
    }
}

pub(super) fn resolve(
    source: &str,
    rest: &str,
    options: &PullOptions,
    progress: Progress<'_>,
) -> Result<Pulled> {
    resolve_with(source, rest, options, progress, &Settings::load())
}

/// As [`resolve`], with these settings.
pub(super) fn resolve_with(
    source: &str,
    rest: &str,
    options: &PullOptions,
    progress: Progress<'_>,
    settings: &Settings,
) -> Result<Pulled> {
    let id = parse(source, rest)?;
    if !options.refresh
        && let Some(hub) = &settings.cache
        && let Some(pulled) = from_hub_cache(source, &id, hub)
    {
        return pulled;
    }
    let whole = format!("{}@{}", id.repo, id.revision);
    let key = id.member.map_or_else(|| whole.clone(), |member| format!("{whole}/{member}"));
    let entry = Entry::open(source, "hf", &key, options)?;
    let (manifest, from_cache) = match entry.verified()?.filter(|_| !options.refresh) {
        Some(manifest) => (manifest, true),
        None if options.is_offline() || settings.offline => return Err(offline(source)),
        None => {
            let revision = fetch(source, &id, &entry, progress, settings)?;
            (entry.commit(format!("hf:{}@{revision}", id.repo), None)?, false)
        }
    };
    let root = entry.files_dir();
    let files = manifest.records();
    let path = entry_point(source, &root, &files, id.member)?;
    Ok(Pulled { path, root, files, source: manifest.source, sha256: None, from_cache })
}

fn env(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn hub_home() -> Option<PathBuf> {
    let home = || Some(PathBuf::from(env("HOME").or_else(|| env("USERPROFILE"))?));
    let cache =
        || env("XDG_CACHE_HOME").map(PathBuf::from).or_else(|| Some(home()?.join(".cache")));
    env("HF_HOME").map(PathBuf::from).or_else(|| Some(cache()?.join("huggingface")))
}

/// A snapshot that Hugging Face's own tools fetched into `hub`, used where it lies.
fn from_hub_cache(source: &str, id: &Id<'_>, hub: &Path) -> Option<Result<Pulled>> {
    let repo = hub.join(format!("models--{}", id.repo.replace('/', "--")));
    let commit = std::fs::read_to_string(repo.join("refs").join(id.revision))
        .map_or_else(|_| id.revision.to_owned(), |text| text.trim().to_owned());
    let root = repo.join("snapshots").join(&commit);
    let path = id.member.map_or_else(|| root.clone(), |member| root.join(member));
    // A snapshot may hold the config alone; without weights it does not answer for a model.
    let answers = |path: &Path| path.is_file() || holds_weights(path);
    answers(&path).then(|| {
        let path = match id.member {
            Some(_) => path,
            None => entry_point(source, &root, &list(&root), None)?,
        };
        let source = format!("hf:{}@{commit}", id.repo);
        Ok(Pulled { path, root, files: Vec::new(), source, sha256: None, from_cache: true })
    })
}

fn holds_weights(dir: &Path) -> bool {
    list(dir).iter().any(|file| super::WEIGHTS.contains(&extension(&file.name).as_str()))
}

/// Names in a directory; hashes are not needed to choose among them.
fn list(dir: &Path) -> Vec<crate::lineage::FileRecord> {
    let items = std::fs::read_dir(dir).into_iter().flatten().flatten();
    items
        .map(|item| crate::lineage::FileRecord {
            name: item.file_name().to_string_lossy().into_owned(),
            size: 0,
            sha256: String::new(),
        })
        .collect()
}

#[derive(Deserialize)]
struct Repository {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Debug, Deserialize, Clone)]
struct Sibling {
    rfilename: String,
    #[serde(default)]
    size: Option<u64>,
    #[serde(default)]
    lfs: Option<Lfs>,
}

#[derive(Debug, Deserialize, Clone)]
struct Lfs {
    sha256: String,
}

/// The hub's description of a revision.
fn described(text: &str) -> std::result::Result<Repository, String> {
    let mut repository: Repository =
        serde_json::from_str(text).map_err(|error| error.to_string())?;
    let sha = &repository.sha;
    if sha.is_empty() || !sha.chars().all(|c| c.is_ascii_alphanumeric()) {
        return Err("its `sha` is no commit".to_owned());
    }
    let mut seen = HashSet::new();
    repository.siblings.retain(|file| seen.insert(file.rfilename.clone()));
    Ok(repository)
}

/// Downloads the files of a repository and returns the commit.
fn fetch(
    source: &str,
    id: &Id<'_>,
    entry: &Entry,
    progress: Progress<'_>,
    settings: &Settings,
) -> Result<String> {
    let Settings { endpoint, token, .. } = settings;
    let client = Client::new(source, &Route::default())?;
    let api = Url::with_token(
        &format!("{endpoint}/api/models/{}/revision/{}?blobs=true", id.repo, id.revision),
        token.as_deref(),
    );
    let (text, _) = client.page(&api, "application/json")?.ok_or_else(|| {
        fault(
            source,
            format!("{endpoint} has no such model or revision"),
            "check the name; a private model needs HF_TOKEN",
        )
    })?;
    let repository = described(&text).map_err(|reason| {
        fault(source, format!("{api} gives no model description: {reason}"), "check HF_ENDPOINT")
    })?;
    let wanted = choose(source, &repository.siblings, id.member)?;
    // Where a finished download waits: flat, and never one place for two names.
    let waiting = |file: &Sibling| {
        format!("{}-{}", repository.sha, &hash::hex(file.rfilename.as_bytes())[..32])
    };
    let total = wanted.iter().try_fold(0u64, |total, file| total.checked_add(file.size?));
    let (partial, staging) = (entry.partial_dir()?, entry.staging_dir()?);
    let mut before = 0u64;
    for file in &wanted {
        let url = Url::with_token(
            &format!("{endpoint}/{}/resolve/{}/{}", id.repo, repository.sha, file.rfilename),
            token.as_deref(),
        );
        // Staging is emptied by an interrupted run's successor; finished downloads wait outside of it.
        let flat = partial.join(waiting(file));
        if !flat.exists() {
            client.download(
                &url,
                &flat,
                file.lfs.as_ref().map(|lfs| lfs.sha256.as_str()),
                &|done, _| {
                    progress(done.saturating_add(before), total);
                },
            )?;
        }
        before = file.size.unwrap_or(0).saturating_add(before);
    }
    for file in &wanted {
        let flat = partial.join(waiting(file));
        let target = staging.join(&file.rfilename);
        let parent = target.parent().expect("invariant: joined below the staging directory");
        std::fs::create_dir_all(parent).map_err(|error| Error::io(parent, "create", error))?;
        std::fs::rename(&flat, &target).map_err(|error| Error::io(&target, "create", error))?;
    }
    Ok(repository.sha)
}

/// The files worth fetching: those of `member`, else the weights in the best format with all small files of the top
/// directory that are not code.
fn choose(source: &str, siblings: &[Sibling], member: Option<&str>) -> Result<Vec<Sibling>> {
    let safe = |name: &str| {
        !name.contains(['\\', '\0']) && name.split('/').all(|part| !matches!(part, "" | "." | ".."))
    };
    let files: Vec<&Sibling> = siblings.iter().filter(|file| safe(&file.rfilename)).collect();
    if let Some(member) = member {
        let inside = format!("{}/", member.trim_end_matches('/'));
        let wanted: Vec<_> = files
            .iter()
            .filter(|file| file.rfilename == member || file.rfilename.starts_with(&inside))
            .map(|file| (*file).clone())
            .collect();
        if wanted.is_empty() {
            let names: Vec<_> = files.iter().take(12).map(|file| file.rfilename.as_str()).collect();
            return Err(fault(
                source,
                format!("it has no file `{member}`"),
                format!("it has: {}", names.join(", ")),
            ));
        }
        return Ok(wanted);
    }
    let top: Vec<&Sibling> = files
        .iter()
        .copied()
        .filter(|file| !file.rfilename.contains('/') || file.rfilename == "1_Pooling/config.json")
        .collect();
    let of = |wanted: &str| top.iter().filter(|file| extension(&file.rfilename) == wanted).count();
    let format = ["safetensors", "bin", "pth", "pt"].into_iter().find(|format| of(format) > 0);
    let ggufs: Vec<_> = top.iter().filter(|file| extension(&file.rfilename) == "gguf").collect();
    let format = match (format, ggufs.as_slice()) {
        (Some(format), _) => format,
        (None, [_]) => "gguf",
        (None, []) => {
            return Err(fault(
                source,
                "it holds no weights that refit reads",
                "refit reads safetensors, GGUF and PyTorch files",
            ));
        }
        (None, several) => {
            let names: Vec<_> =
                several.iter().map(|file| format!("{source}/{}", file.rfilename)).collect();
            return Err(fault(
                source,
                format!("it holds {} GGUF files", several.len()),
                format!("name one: {}", names.join(", ")),
            ));
        }
    };
    let side = |name: &str| {
        matches!(extension(name).as_str(), "json" | "txt" | "model" | "md" | "jinja")
            || name.to_uppercase().starts_with("LICENSE")
    };
    Ok(top
        .into_iter()
        .filter(|file| extension(&file.rfilename) == format || side(&file.rfilename))
        .cloned()
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sources_are_parsed() {
        let id = parse("hf:x", "owner/name@v1.0/sub/model.gguf").unwrap();
        assert_eq!(
            (id.repo.as_str(), id.revision, id.member),
            ("owner/name", "v1.0", Some("sub/model.gguf"))
        );
        assert_eq!(parse("hf:x", "owner/name").unwrap().revision, "main");
        for bad in ["name", "owner/", "../name", "owner/na me", "owner/name@", "o/n@../../x"] {
            assert!(parse("hf:x", bad).is_err(), "{bad}");
        }
    }

    fn siblings(names: &[&str]) -> Vec<Sibling> {
        names
            .iter()
            .map(|n| Sibling { rfilename: (*n).to_owned(), size: None, lfs: None })
            .collect()
    }

    fn chosen(names: &[&str], member: Option<&str>) -> Vec<String> {
        choose("hf:o/n", &siblings(names), member)
            .unwrap()
            .into_iter()
            .map(|f| f.rfilename)
            .collect()
    }

    #[test]
    fn one_format_is_fetched_and_no_code() {
        let names = [
            "config.json",
            "model.safetensors",
            "pytorch_model.bin",
            "modeling.py",
            "onnx/model.onnx",
            "../x.json",
        ];
        assert_eq!(chosen(&names, None), ["config.json", "model.safetensors"]);
        assert_eq!(chosen(&names, Some("onnx")), ["onnx/model.onnx"]);
        assert_eq!(chosen(&["a.gguf", "README.md"], None), ["a.gguf", "README.md"]);
        let error =
            choose("hf:o/n", &siblings(&["a.gguf", "b.gguf"]), None).unwrap_err().to_string();
        assert!(error.contains("hf:o/n/b.gguf"), "{error}");
        assert!(choose("hf:o/n", &siblings(&["x.onnx"]), None).is_err());
        assert!(choose("hf:o/n", &siblings(&["../x"]), Some("../x")).is_err());
    }

    proptest! {
        #![proptest_config(crate::testing::cases(256))]

        /// Whatever a hub lists, what is fetched lies in the target and each name is fetched once.
        #[test]
        fn only_plain_names_are_chosen(
            names in proptest::collection::vec("(\\.\\./|\\./|/|\\\\|a|b/|é|\\.gguf|\\.safetensors|\\.json|\\.py|\u{0}){1,6}", 0..8),
            member in proptest::option::of("(\\.\\./|a|b/|\\.gguf){1,4}"),
            size in any::<u64>(),
        ) {
            let listed: Vec<_> = names.iter().map(|n| serde_json::json!({"rfilename": n, "size": size, "lfs": null})).collect();
            let text = serde_json::json!({"sha": "c0ffee", "siblings": listed}).to_string();
            let repository = described(&text).unwrap();
            if let Ok(chosen) = choose("hf:o/n", &repository.siblings, member.as_deref()) {
                let mut seen = HashSet::new();
                for file in chosen {
                    let path = Path::new(&file.rfilename);
                    let inside = path.components().all(|part| matches!(part, std::path::Component::Normal(_)));
                    prop_assert!(inside && !file.rfilename.contains(['\\', '\0']), "{:?}", file.rfilename);
                    prop_assert!(seen.insert(file.rfilename));
                }
            }
        }

        #[test]
        fn a_damaged_description_is_read_or_refused(at in any::<prop::sample::Index>(), with in "(\\PC|[0-9\"{}\\[\\],:-]){0,3}") {
            let mut text = r#"{"sha":"c0ffee","siblings":[{"rfilename":"a.gguf","size":12,"lfs":{"sha256":"ab"}},{"rfilename":"config.json"}]}"#.to_owned();
            let at = at.index(text.len());
            text.replace_range(at..at + 1, &with);
            if let Ok(repository) = described(&text) {
                prop_assert!(repository.sha.chars().all(|c| c.is_ascii_alphanumeric()) && !repository.sha.is_empty());
                let _ = choose("hf:o/n", &repository.siblings, None);
            }
        }

        #[test]
        fn any_source_is_an_id_or_an_error(rest in "(owner|/|@|main|\\.|\\.\\.|é| |a.gguf){0,8}") {
            if let Ok(id) = parse("hf:x", &rest) {
                prop_assert!(!id.repo.contains("..") || !id.repo.split('/').any(|part| part.starts_with('.')));
                prop_assert!(!id.revision.contains('/') && !id.revision.starts_with('.'));
            }
        }
    }
}
