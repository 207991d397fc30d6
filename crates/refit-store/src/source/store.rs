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
    let entry = Entry::open(source, "store", source, options)?;
    let (manifest, from_cache) = match entry.verified()?.filter(|_| !options.refresh) {
        Some(manifest) => (manifest, true),
        None if options.is_offline() => return Err(offline(source)),
        None => {
            fetch(source, &entry, progress)?;
            (entry.commit(source.to_owned(), None)?, false)
        }
    };
    let root = entry.files_dir();
    let files = manifest.records();
    let path = entry_point(source, &root, &files, None)?;
    Ok(Pulled { path, root, files, source: manifest.source, sha256: None, from_cache })
}

fn fetch(source: &str, entry: &Entry, progress: Progress<'_>) -> Result<()> {
    let failed = |error: object_store::Error| {
        fault(
            source,
            error.to_string(),
            "check the address, the provider's credentials in the environment, and the network",
        )
    };
    let url = source.parse().map_err(|error| {
        fault(source, format!("not an address: {error}"), "write s3://BUCKET/PREFIX")
    })?;
    let variables = std::env::vars().map(|(name, value)| (name.to_lowercase(), value));
    let (store, prefix) = object_store::parse_url_opts(&url, variables).map_err(failed)?;
    let staging = entry.staging_dir()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::io(&staging, "start a runtime for", error))?;
    runtime.block_on(async {
        let objects = list(store.as_ref(), &prefix).await.map_err(failed)?;
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
