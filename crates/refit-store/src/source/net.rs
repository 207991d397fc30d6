//! HTTPS: one agent, system or configured certificates, resumed downloads.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Progress, fault, unreachable};
use crate::error::{Error, Result};
use crate::hash;

/// Where certificate bundles lie, after what the environment names.
const BUNDLES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// Largest index page or API answer that is read.
const MAX_PAGE: u64 = 64 << 20;

pub(super) struct Client {
    agent: ureq::Agent,
    /// The source as the user gave it, for messages.
    source: String,
}

/// How to reach a server.
#[derive(Debug, Clone, Default)]
pub(super) struct Route {
    pub certificates: Option<PathBuf>,
    pub proxy: Option<String>,
    pub timeout: Option<Duration>,
}

impl Client {
    pub fn new(source: &str, route: &Route) -> Result<Self> {
        let timeout = route.timeout.unwrap_or(Duration::from_secs(30));
        let proxy = match &route.proxy {
            Some(url) => Some(ureq::Proxy::new(url).map_err(|error| {
                fault(
                    source,
                    format!("the proxy `{url}` is not usable: {error}"),
                    "correct pip's or the environment's proxy",
                )
            })?),
            None => ureq::Proxy::try_from_env(),
        };
        let tls = ureq::tls::TlsConfig::builder().root_certs(roots(route)?).build();
        let agent = ureq::Agent::config_builder()
            .tls_config(tls)
            .proxy(proxy)
            .user_agent(concat!("refit/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(timeout))
            .timeout_recv_response(Some(timeout))
            .http_status_as_error(false)
            .build()
            .new_agent();
        Ok(Self { agent, source: source.to_owned() })
    }

    /// A page as text, and its content type. `None` for 404.
    pub fn page(&self, url: &Url, accept: &str) -> Result<Option<(String, String)>> {
        let mut response = self.get(url, &[("Accept", accept.to_owned())])?;
        match response.status().as_u16() {
            200 => {}
            404 | 410 => return Ok(None),
            status => return Err(self.refused(url, status)),
        }
        let kind = response.body().mime_type().unwrap_or_default().to_owned();
        let text = response
            .body_mut()
            .with_config()
            .limit(MAX_PAGE)
            .read_to_string()
            .map_err(|error| self.broken(url, &error.to_string()))?;
        Ok(Some((text, kind)))
    }

    /// Downloads into `target`, going on where an earlier run stopped, and checks size and sha256.
    pub fn download(
        &self,
        url: &Url,
        target: &Path,
        sha256: Option<&str>,
        progress: Progress<'_>,
    ) -> Result<String> {
        let part = target.with_added_extension("part");
        // The part may be of another file under the same name: then the hash fails and it starts over, once.
        let resumed = fs::metadata(&part).map_or(0, |metadata| metadata.len());
        let mut found = self.fetch(url, &part, resumed, progress)?;
        if sha256.is_some_and(|want| want != found) && resumed > 0 {
            found = self.fetch(url, &part, 0, progress)?;
        }
        if let Some(want) = sha256.filter(|want| *want != found) {
            fs::remove_file(&part).map_err(|error| Error::io(&part, "remove", error))?;
            return Err(fault(
                &self.source,
                format!(
                    "{url} has sha256 {found}, but {want} was promised; the download was deleted"
                ),
                "try again; if it stays so, the server or something on the way changes the file",
            ));
        }
        fs::rename(&part, target).map_err(|error| Error::io(target, "create", error))?;
        Ok(found)
    }

    /// Appends to (or replaces) `part` and returns the sha256 of all of it.
    fn fetch(&self, url: &Url, part: &Path, from: u64, progress: Progress<'_>) -> Result<String> {
        let range: Vec<_> =
            (from > 0).then(|| ("Range", format!("bytes={from}-"))).into_iter().collect();
        let mut response = self.get(url, &range)?;
        let status = response.status().as_u16();
        let (from, opened) = match status {
            206 if from > 0 => (from, OpenOptions::new().append(true).open(part)),
            200 => (0, File::create(part)),
            // The whole file is there already.
            416 if from > 0 => {
                return hash::file(part).map_err(|error| Error::io(part, "read", error));
            }
            status => return Err(self.refused(url, status)),
        };
        let mut file = opened.map_err(|error| Error::io(part, "create", error))?;
        let total = response.body().content_length().map(|length| from + length);
        let mut body = response.body_mut().as_reader();
        let mut buffer = vec![0; 1 << 17];
        let mut done = from;
        progress(done, total);
        loop {
            let read =
                body.read(&mut buffer).map_err(|error| self.broken(url, &error.to_string()))?;
            if read == 0 {
                break;
            }
            file.write_all(&buffer[..read]).map_err(|error| Error::io(part, "write", error))?;
            done += read as u64;
            progress(done, total);
        }
        file.flush().map_err(|error| Error::io(part, "write", error))?;
        if total.is_some_and(|total| done < total) {
            return Err(self.broken(url, "the connection closed early"));
        }
        hash::file(part).map_err(|error| Error::io(part, "read", error))
    }

    fn get(
        &self,
        url: &Url,
        headers: &[(&str, String)],
    ) -> Result<ureq::http::Response<ureq::Body>> {
        // A compressed transfer would make ranges and lengths mean other bytes.
        let mut request = self.agent.get(&url.bare).header("Accept-Encoding", "identity");
        if let Some(authorization) = &url.authorization {
            request = request.header("Authorization", authorization);
        }
        for (name, value) in headers {
            request = request.header(*name, value);
        }
        request.call().map_err(|error| {
            unreachable(
                &self.source,
                format!("cannot reach {url}: {error}"),
                "check the network, proxy and certificates; or give the path of a copy, or use builtin:tiny",
            )
        })
    }

    fn refused(&self, url: &Url, status: u16) -> Error {
        let help = match status {
            401 | 403 => {
                "log in, set the token or credentials for this server, or accept the model's terms there"
            }
            404 | 410 => "check the name, the version and the file",
            429 => "the server asks for patience: wait a little and try again",
            _ => "try again later, or give the path of a copy",
        };
        let reason = format!("{url} answers {status}");
        match status {
            404 | 410 => fault(&self.source, reason, help),
            // Whoever turns a request away, a registry or a proxy before it, has not said that the source is wrong.
            _ => unreachable(&self.source, reason, help),
        }
    }

    fn broken(&self, url: &Url, reason: &str) -> Error {
        unreachable(
            &self.source,
            format!("the download of {url} broke off: {reason}"),
            "run again: it goes on where it stopped",
        )
    }
}

fn roots(route: &Route) -> Result<ureq::tls::RootCerts> {
    let named = route.certificates.clone().map(|path| (path, true));
    let from_env = ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"]
        .iter()
        .filter_map(std::env::var_os)
        .filter(|value| !value.is_empty())
        .map(|value| (PathBuf::from(value), true));
    let usual = BUNDLES.iter().map(|path| (PathBuf::from(path), false));
    for (path, must) in named.into_iter().chain(from_env).chain(usual) {
        match fs::read(&path) {
            Ok(pem) => {
                let certificates: Vec<_> = ureq::tls::parse_pem(&pem)
                    .filter_map(|item| match item {
                        Ok(ureq::tls::PemItem::Certificate(certificate)) => Some(certificate),
                        _ => None,
                    })
                    .collect();
                if certificates.is_empty() {
                    return Err(Error::malformed(
                        &path,
                        "certificate bundle",
                        "it holds no PEM certificate",
                    ));
                }
                return Ok(ureq::tls::RootCerts::new_with_certs(&certificates));
            }
            Err(error) if must && path.is_file() => return Err(Error::io(&path, "read", error)),
            Err(_) => {}
        }
    }
    Ok(ureq::tls::RootCerts::WebPki)
}

/// An address whose credentials never show in messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Url {
    bare: String,
    authorization: Option<String>,
}

impl Url {
    /// Takes `user:password@` out of an address; `&` percent escapes in it are decoded.
    pub fn new(address: &str) -> Self {
        let bare_url = |bare: &str| Self { bare: bare.to_owned(), authorization: None };
        let Some((scheme, rest)) = address.split_once("://") else { return bare_url(address) };
        let host_end = rest.find('/').unwrap_or(rest.len());
        let Some(at) = rest[..host_end].rfind('@') else { return bare_url(address) };
        let credentials = percent_decode(&rest[..at]);
        let credentials = if credentials.contains(&b':') {
            credentials
        } else {
            [credentials, b":".to_vec()].concat()
        };
        Self {
            bare: format!("{scheme}://{}", &rest[at + 1..]),
            authorization: Some(format!("Basic {}", base64(&credentials))),
        }
    }

    pub fn with_token(address: &str, token: Option<&str>) -> Self {
        let mut url = Self::new(address);
        url.authorization = token.map(|token| format!("Bearer {token}")).or(url.authorization);
        url
    }

    /// Resolves a link on this page. Credentials go along only to the same server.
    pub fn join(&self, link: &str) -> Self {
        let origin_end = self.bare.find("://").map_or(0, |at| {
            self.bare[at + 3..].find('/').map_or(self.bare.len(), |slash| at + 3 + slash)
        });
        let origin = &self.bare[..origin_end];
        let absolute = if link.contains("://") {
            link.to_owned()
        } else if let Some(path) = link.strip_prefix("//") {
            format!("{}://{path}", self.bare.split("://").next().unwrap_or("https"))
        } else if link.starts_with('/') {
            format!("{origin}{link}")
        } else {
            let page = self.bare.split(['?', '#']).next().unwrap_or_default();
            let base =
                &page[..page.rfind('/').map_or(page.len(), |slash| slash + 1).max(origin_end)];
            normalise(&format!("{base}{link}"), origin_end)
        };
        let mut url = Self::new(&absolute);
        let same = url
            .bare
            .strip_prefix(origin)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        if same && url.authorization.is_none() {
            url.authorization.clone_from(&self.authorization);
        }
        url
    }
}

impl std::fmt::Display for Url {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.bare)
    }
}

/// Removes `.` and `..` from the path that begins at `start`.
fn normalise(address: &str, start: usize) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in address[start..].split('/') {
        match part {
            "." => {}
            ".." => {
                if parts.len() > 1 {
                    parts.pop();
                }
            }
            part => parts.push(part),
        }
    }
    format!("{}{}", &address[..start], parts.join("/"))
}

pub(super) fn percent_decode(text: &str) -> Vec<u8> {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        let hex = |at: usize| bytes.get(at).and_then(|b| (*b as char).to_digit(16));
        match (bytes[i], hex(i + 1), hex(i + 2)) {
            (b'%', Some(high), Some(low)) => {
                out.push((high * 16 + low) as u8);
                i += 3;
            }
            (byte, ..) => {
                out.push(byte);
                i += 1;
            }
        }
    }
    out
}

fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    bytes
        .chunks(3)
        .flat_map(|chunk| {
            let word = chunk.iter().fold(0u32, |word, byte| word << 8 | u32::from(*byte))
                << (8 * (3 - chunk.len()));
            (0..4).map(move |i| {
                if i <= chunk.len() {
                    ALPHABET[(word >> (18 - 6 * i) & 63) as usize] as char
                } else {
                    '='
                }
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_taken_out() {
        let url = Url::new("https://user:p%40ss@index.example/simple/");
        assert_eq!(url.to_string(), "https://index.example/simple/");
        assert_eq!(url.authorization.as_deref(), Some("Basic dXNlcjpwQHNz"));
        assert_eq!(base64(b"a"), "YQ==");
        assert_eq!(base64(b"ab"), "YWI=");
        assert_eq!(base64(b"abc"), "YWJj");
    }

    #[test]
    fn links_resolve_and_keep_credentials_at_home() {
        let page = Url::new("https://u:p@h.example/simple/x/");
        let joined = |link: &str| page.join(link);
        assert_eq!(joined("../../files/x.whl").to_string(), "https://h.example/files/x.whl");
        assert_eq!(joined("/a/b").to_string(), "https://h.example/a/b");
        assert_eq!(joined("x.whl").to_string(), "https://h.example/simple/x/x.whl");
        assert!(joined("x.whl").authorization.is_some());
        assert!(joined("https://other.example/x.whl").authorization.is_none());
        assert!(joined("https://h.example.evil/x.whl").authorization.is_none());
        assert_eq!(joined("//cdn.example/x").to_string(), "https://cdn.example/x");
    }
}
