//! `s3://`, `gs://`, `az://`: a file or a prefix in an object store. Credentials come from the environment variables
//! that each provider's own tools read.

use std::io::Write;

use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt};

use super::cache::Entry;
use super::{Progress, PullOptions, Pulled, entry_point, extension, fault, offline};
use crate::error::{Error, Result};

pub(super) fn resolve(
    source: &str,
    options: &PullOptions,
    progress: Progress<'_>,
) -> Result<Pulled> {
    resolve_with(source, options, progress, open)
}

/// As [`resolve`], with a store and a prefix from `open`, which is asked only where the cache has no answer.
fn resolve_with(
    source: &str,
    options: &PullOptions,
    progress: Progress<'_>,
    open: impl FnOnce(&str) -> Result<(Box<dyn ObjectStore>, Key)>,
) -> Result<Pulled> {
    let entry = Entry::open(source, "store", source, options)?;
    let (manifest, from_cache) = match entry.verified()?.filter(|_| !options.refresh) {
        Some(manifest) => (manifest, true),
        None if options.is_offline() => return Err(offline(source)),
        None => {
            let (store, prefix) = open(source)?;
            fetch(source, store.as_ref(), &prefix, &entry, progress)?;
            (entry.commit(source.to_owned(), None)?, false)
        }
    };
    let root = entry.files_dir();
    let files = manifest.records();
    let path = entry_point(source, &root, &files, None)?;
    Ok(Pulled { path, root, files, source: manifest.source, sha256: None, from_cache })
}

fn failed(source: &str, error: &object_store::Error) -> Error {
    fault(
        source,
        error.to_string(),
        "check the address, the provider's credentials in the environment, and the network",
    )
}

/// The store of an address, with what the environment says of its provider, and the place in it.
fn open(source: &str) -> Result<(Box<dyn ObjectStore>, Key)> {
    let url = source.parse().map_err(|error| {
        fault(source, format!("not an address: {error}"), "write s3://BUCKET/PREFIX")
    })?;
    let variables = std::env::vars().map(|(name, value)| (name.to_lowercase(), value));
    object_store::parse_url_opts(&url, variables).map_err(|error| failed(source, &error))
}

fn fetch(
    source: &str,
    store: &dyn ObjectStore,
    prefix: &Key,
    entry: &Entry,
    progress: Progress<'_>,
) -> Result<()> {
    let failed = |error: object_store::Error| failed(source, &error);
    let staging = entry.staging_dir()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::io(&staging, "start a runtime for", error))?;
    runtime.block_on(async {
        let objects = list(store, prefix).await.map_err(failed)?;
        if objects.is_empty() {
            return Err(fault(
                source,
                "there is nothing under this address",
                "check the bucket and the prefix",
            ));
        }
        let total = objects.iter().map(|(_, _, size)| size).sum();
        let mut done = 0;
        for (key, name, _) in objects {
            let target = staging.join(&name);
            let parent = target.parent().expect("invariant: joined below the staging directory");
            std::fs::create_dir_all(parent).map_err(|error| Error::io(parent, "create", error))?;
            let mut file = std::fs::File::create(&target)
                .map_err(|error| Error::io(&target, "create", error))?;
            let size = store.head(&key).await.map_err(failed)?.size;
            // Ranges keep one piece in memory, however large the object.
            const PIECE: u64 = 8 << 20;
            let mut at = 0;
            while at < size {
                let end = (at + PIECE).min(size);
                let bytes = store.get_range(&key, at..end).await.map_err(failed)?;
                file.write_all(&bytes).map_err(|error| Error::io(&target, "write", error))?;
                at = end;
                progress(done + at, Some(total));
            }
            done += size;
        }
        Ok(())
    })
}

/// `(key, relative name, size)` of the object itself, or of all objects below the prefix that are not code.
async fn list(
    store: &dyn ObjectStore,
    prefix: &Key,
) -> object_store::Result<Vec<(Key, String, u64)>> {
    if let Ok(object) = store.head(prefix).await {
        let name = prefix.filename().unwrap_or("object").to_owned();
        return Ok(vec![(prefix.clone(), name, object.size)]);
    }
    let mut objects = Vec::new();
    let mut pending = vec![prefix.clone()];
    while let Some(dir) = pending.pop() {
        let listing = store.list_with_delimiter(Some(&dir)).await?;
        pending.extend(listing.common_prefixes);
        for object in listing.objects {
            let name: Vec<_> = object.location.prefix_match(prefix).into_iter().flatten().collect();
            let name = name.iter().map(|part| part.as_ref()).collect::<Vec<_>>().join("/");
            let plain = !name.is_empty()
                && name.split('/').all(|part| !matches!(part, "" | "." | ".."))
                && !name.contains('\\');
            if plain && !matches!(extension(&name).as_str(), "py" | "pyc" | "so" | "sh") {
                objects.push((object.location, name, object.size));
            }
        }
    }
    Ok(objects)
}

#[cfg(test)]
mod tests {
    use super::*;
    use object_store::memory::InMemory;

    /// A bucket with a sharded model, code beside it, and another model next door.
    fn bucket() -> InMemory {
        let store = InMemory::new();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        for (key, bytes) in [
            ("models/a/config.json", b"{}".to_vec()),
            ("models/a/model-00001-of-00002.safetensors", vec![1; 9 << 20]),
            ("models/a/model-00002-of-00002.safetensors", vec![2; 3]),
            ("models/a/1_Pooling/config.json", b"{}".to_vec()),
            ("models/a/modeling.py", b"raise SystemExit".to_vec()),
            ("models/ab/model.gguf", b"other".to_vec()),
        ] {
            runtime.block_on(store.put(&Key::from(key), bytes.into())).unwrap();
        }
        store
    }

    fn pull(cache: &std::path::Path, source: &str, key: &str) -> Result<Pulled> {
        let options = PullOptions { cache: Some(cache.to_owned()), ..Default::default() };
        resolve_with(source, &options, &|_, _| {}, |_| Ok((Box::new(bucket()), Key::from(key))))
    }

    #[test]
    fn a_prefix_is_fetched_once_without_its_code() {
        let cache = tempfile::tempdir().unwrap();
        let first = pull(cache.path(), "s3://b/models/a", "models/a").unwrap();
        let names: Vec<_> = first.files.iter().map(|file| &*file.name).collect();
        assert_eq!(
            names,
            [
                "1_Pooling/config.json",
                "config.json",
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors"
            ]
        );
        assert!(!first.from_cache && first.path == first.root);
        // Larger than one piece, and whole.
        let large = std::fs::read(first.path.join("model-00001-of-00002.safetensors")).unwrap();
        assert_eq!(large, vec![1; 9 << 20]);
        let options = PullOptions { cache: Some(cache.path().to_owned()), ..Default::default() };
        let second = resolve_with("s3://b/models/a", &options, &|_, _| {}, |_| {
            panic!("the cache answers alone")
        })
        .unwrap();
        assert!(second.from_cache && second.files == first.files);
    }

    #[test]
    fn an_object_of_its_own_is_the_model() {
        let cache = tempfile::tempdir().unwrap();
        let source = "s3://b/models/ab/model.gguf";
        let pulled = pull(cache.path(), source, "models/ab/model.gguf").unwrap();
        assert!(pulled.path.is_file() && pulled.path.ends_with("model.gguf"));
        assert_eq!(std::fs::read(&pulled.path).unwrap(), b"other");
    }

    #[test]
    fn what_is_not_there_is_said() {
        let cache = tempfile::tempdir().unwrap();
        let error = pull(cache.path(), "s3://b/none", "none").unwrap_err().to_string();
        assert!(error.contains("nothing under this address"), "{error}");
        let offline =
            PullOptions { cache: Some(cache.path().to_owned()), offline: true, refresh: false };
        let error = resolve("s3://b/none", &offline, &|_, _| {}).unwrap_err().to_string();
        assert!(error.contains("offline"), "{error}");
        let error = open("s3://").err().unwrap().to_string();
        assert!(error.starts_with("s3://"), "{error}");
    }
}
