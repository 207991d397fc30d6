//! pip's configuration: where it looks for packages, from its files and environment variables.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::net::Route;

/// Where pip looks, in the order that it asks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Config {
    /// Index addresses; empty with `no-index`.
    pub indexes: Vec<String>,
    /// Directories and pages with links to packages.
    pub find_links: Vec<String>,
    pub certificates: Option<PathBuf>,
    pub proxy: Option<String>,
    pub timeout: Option<u64>,
}

impl Config {
    /// Reads the files that pip reads and the `PIP_*` variables, which win.
    pub fn load() -> Self {
        let env = |name: &str| std::env::var(name).ok();
        let mut settings = BTreeMap::new();
        for path in files(&env) {
            if let Ok(text) = std::fs::read_to_string(&path) {
                parse_ini(&text, &mut settings);
            }
        }
        for (name, value) in std::env::vars() {
            if let Some(option) = name.strip_prefix("PIP_").filter(|_| !value.is_empty()) {
                settings.insert(option.to_lowercase().replace('_', "-"), value);
            }
        }
        Self::from_settings(&settings)
    }

    fn from_settings(settings: &BTreeMap<String, String>) -> Self {
        let list = |key: &str| -> Vec<String> {
            settings
                .get(key)
                .map(|v| v.split_whitespace().map(str::to_owned).collect())
                .unwrap_or_default()
        };
        let no_index = settings.get("no-index").is_some_and(|value| is_true(value));
        let first = settings.get("index-url").map_or("https://pypi.org/simple", |url| url.trim());
        let indexes = if no_index {
            Vec::new()
        } else {
            std::iter::once(first.to_owned()).chain(list("extra-index-url")).collect()
        };
        Self {
            indexes,
            find_links: list("find-links"),
            certificates: settings.get("cert").map(PathBuf::from),
            proxy: settings.get("proxy").cloned(),
            timeout: settings
                .get("timeout")
                .or(settings.get("default-timeout"))
                .and_then(|t| t.parse().ok()),
        }
    }

    pub fn route(&self) -> Route {
        Route {
            certificates: self.certificates.clone(),
            proxy: self.proxy.clone(),
            timeout: self.timeout.map(Duration::from_secs),
        }
    }
}

/// Configuration files from the weakest to the strongest.
fn files(env: &dyn Fn(&str) -> Option<String>) -> Vec<PathBuf> {
    let chosen = env("PIP_CONFIG_FILE");
    if chosen.as_deref() == Some("/dev/null") || chosen.as_deref() == Some("nul") {
        return Vec::new();
    }
    let mut files = Vec::new();
    let home = env("HOME").or_else(|| env("USERPROFILE")).map(PathBuf::from);
    if cfg!(windows) {
        files.extend(env("PROGRAMDATA").map(|dir| Path::new(&dir).join("pip/pip.ini")));
        files.extend(home.as_ref().map(|home| home.join("pip/pip.ini")));
        files.extend(env("APPDATA").map(|dir| Path::new(&dir).join("pip/pip.ini")));
    } else {
        let shared = env("XDG_CONFIG_DIRS")
            .filter(|dirs| !dirs.is_empty())
            .unwrap_or_else(|| "/etc/xdg".to_owned());
        files.extend(shared.split(':').map(|dir| Path::new(dir).join("pip/pip.conf")));
        files.push(PathBuf::from("/etc/pip.conf"));
        if let Some(home) = &home {
            files.push(home.join(".pip/pip.conf"));
            if cfg!(target_os = "macos") {
                files.push(home.join("Library/Application Support/pip/pip.conf"));
            }
            let config = env("XDG_CONFIG_HOME").filter(|dir| !dir.is_empty());
            files.push(
                config.map_or_else(|| home.join(".config"), PathBuf::from).join("pip/pip.conf"),
            );
        }
    }
    let site = if cfg!(windows) { "pip.ini" } else { "pip.conf" };
    files.extend(env("VIRTUAL_ENV").map(|dir| Path::new(&dir).join(site)));
    files.extend(chosen.map(PathBuf::from));
    files
}

/// Settings of the sections that concern downloads; later files win. Indented lines go on with the value.
fn parse_ini(text: &str, settings: &mut BTreeMap<String, String>) {
    let mut wanted = false;
    let mut current: Option<String> = None;
    for line in text.lines() {
        let trimmed = line.trim();
        if trimmed.is_empty() || trimmed.starts_with(['#', ';']) {
            continue;
        }
        if let Some(section) = trimmed.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            wanted = matches!(section.trim(), "global" | "install" | "download");
            current = None;
        } else if !wanted {
            continue;
        } else if line.starts_with([' ', '\t']) && current.is_some() {
            if let Some(value) = current.as_ref().and_then(|key| settings.get_mut(key)) {
                value.push('\n');
                value.push_str(trimmed);
            }
        } else if let Some((key, value)) = trimmed.split_once(['=', ':']) {
            let key = key.trim().to_lowercase().replace('_', "-");
            settings.insert(key.clone(), value.trim().to_owned());
            current = Some(key);
        }
    }
}

fn is_true(value: &str) -> bool {
    matches!(value.trim().to_lowercase().as_str(), "1" | "true" | "yes" | "on" | "y" | "t")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn config(texts: &[&str]) -> Config {
        let mut settings = BTreeMap::new();
        for text in texts {
            parse_ini(text, &mut settings);
        }
        Config::from_settings(&settings)
    }

    #[test]
    fn later_files_win_and_lists_span_lines() {
        let config = config(&[
            "[global]\nindex-url = https://old/simple\ntimeout: 60\n",
            "# ours\n[global]\nindex_url = https://new/simple\nextra-index-url =\n    https://a/simple\n    https://b/simple\n[list]\nformat = json\n[install]\nfind-links = /wheels https://links/\n",
        ]);
        assert_eq!(config.indexes, ["https://new/simple", "https://a/simple", "https://b/simple"]);
        assert_eq!(config.find_links, ["/wheels", "https://links/"]);
        assert_eq!(config.timeout, Some(60));
    }

    #[test]
    fn defaults_and_no_index() {
        assert_eq!(config(&[""]).indexes, ["https://pypi.org/simple"]);
        assert!(config(&["[global]\nno-index = true\nfind-links = /w\n"]).indexes.is_empty());
    }

    #[test]
    fn files_in_pips_order() {
        let env = |name: &str| match name {
            "HOME" => Some("/home/u".to_owned()),
            "VIRTUAL_ENV" => Some("/venv".to_owned()),
            "PIP_CONFIG_FILE" => Some("/x.conf".to_owned()),
            _ => None,
        };
        if cfg!(target_os = "linux") {
            let files = files(&env);
            assert_eq!(files.first().unwrap(), Path::new("/etc/xdg/pip/pip.conf"));
            assert_eq!(files.last().unwrap(), Path::new("/x.conf"));
            assert!(files.contains(&PathBuf::from("/home/u/.config/pip/pip.conf")));
        }
        assert!(
            super::files(&|name| (name == "PIP_CONFIG_FILE").then(|| "/dev/null".to_owned()))
                .is_empty()
        );
    }

    proptest! {
        #![proptest_config(crate::testing::cases(256))]

        #[test]
        fn any_text_is_a_configuration(
            text in "(\\[global\\]|\\[list\\]|\\[|\\]|\n|\n |=|:|#|index-url|timeout|no_index|https://h/|true|9{30}|é| ){0,40}",
        ) {
            let config = config(&[&text]);
            // Only `no-index` leaves pip without an index.
            prop_assert!(!config.indexes.is_empty() || text.contains("no_index"));
        }

        #[test]
        fn what_is_written_is_read(
            first in "[a-z:/.@]{1,20}", more in proptest::collection::vec("[a-z/.]{1,12}", 0..4), timeout in any::<u64>(),
            colon: bool, section in 0usize..3,
        ) {
            let equals = if colon { ":" } else { "=" };
            let section = ["global", "install", "download"][section];
            let text = format!(
                "# pip\n[other]\nindex-url = no\n[{section}]\nindex-url {equals} {first}\nextra_index_url {equals}\n  {}\ntimeout {equals} {timeout}\n",
                more.join("\n\t"),
            );
            let config = config(&[&text]);
            prop_assert_eq!(&config.indexes[0], &first);
            prop_assert_eq!(&config.indexes[1..], &more[..]);
            prop_assert_eq!(config.timeout, Some(timeout));
        }
    }
}
