//! The book under `docs/` says what is so: links lead somewhere, commands and recipes run as they are
//! written, the pages of methods are those of the registry, and tests that are named exist.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use common::{Place, Ran, contents};
use serde_json::Value;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

fn book() -> PathBuf {
    Path::new(ROOT).join("docs/src")
}

/// Every page of the book: path below `docs/src`, text.
fn pages() -> Vec<(String, String)> {
    let pages: Vec<(String, String)> = contents(&book())
        .into_iter()
        .filter(|(name, _)| name.ends_with(".md"))
        .map(|(name, bytes)| (name, String::from_utf8(bytes).unwrap()))
        .collect();
    assert!(pages.len() > 20, "only {} pages in {}", pages.len(), book().display());
    pages
}

/// A fenced block: its language, the line it begins on, its text.
struct Block {
    language: String,
    line: usize,
    text: String,
}

fn blocks(page: &str) -> Vec<Block> {
    let mut blocks = Vec::new();
    let mut open: Option<Block> = None;
    for (i, line) in page.lines().enumerate() {
        match (line.trim_start().strip_prefix("```"), &mut open) {
            (Some(_), Some(_)) => blocks.extend(open.take()),
            (Some(language), None) => {
                let language = language.trim().to_owned();
                open = Some(Block { language, line: i + 1, text: String::new() });
            }
            (None, Some(block)) => block.text.extend([line, "\n"]),
            (None, None) => {}
        }
    }
    assert!(open.is_none(), "a code block is not closed:\n{page}");
    blocks
}

/// The lines outside fenced blocks.
fn prose(page: &str) -> String {
    let mut fenced = false;
    let keep = |line: &&str| {
        let fence = line.trim_start().starts_with("```");
        fenced ^= fence;
        !fence && !fenced
    };
    page.lines().filter(keep).collect::<Vec<_>>().join("\n")
}

#[test]
fn the_pages_of_methods_are_those_of_the_registry() {
    let place = Place::new();
    place.run(&["methods", "--markdown", "would", "--dry-run"]).code(0);
    assert!(place.names().is_empty());
    place.run(&["methods", "--markdown", "made"]).code(0);
    let (made, committed) = (contents(&place.path("made")), contents(&book().join("methods")));
    let names = |files: &[(String, Vec<u8>)]| -> Vec<String> {
        files.iter().map(|(name, _)| name.clone()).collect()
    };
    let remedy = "make the pages again with `cargo run -- methods --markdown docs/src/methods`, and \
                  list new ones in docs/src/SUMMARY.md";
    assert_eq!(names(&made), names(&committed), "{remedy}");
    for ((name, now), (_, then)) in made.iter().zip(&committed) {
        assert!(now == then, "docs/src/methods/{name} is stale: {remedy}");
    }
}

#[test]
fn the_readme_names_every_method() {
    let readme = std::fs::read_to_string(book().join("../../README.md")).unwrap();
    let listed = Place::new().run(&["methods", "--json"]).json();
    for method in listed["methods"].as_array().unwrap() {
        let name = method["name"].as_str().unwrap();
        assert!(readme.contains(&format!("`{name}`")), "{name} is not in README's table");
    }
}

#[test]
fn the_map_holds_and_its_page_is_that_of_the_registry() {
    let place = Place::new();
    place.run(&["map", "--check"]).code(0);
    let made = place.run(&["map", "--markdown"]).code(0).out;
    let committed = std::fs::read_to_string(book().join("map.md")).unwrap();
    let remedy = "make it again with `cargo run -- map --markdown > docs/src/map.md`";
    assert!(made == committed, "docs/src/map.md is stale: {remedy}");
    let map = place.run(&["map", "--json"]).json();
    assert_eq!(map["papers"].as_array().unwrap().len(), 80);
    let cells = map["survey"].as_array().unwrap().iter().chain(map["reuse"].as_array().unwrap());
    let verbs: Vec<&str> = cells
        .flat_map(|cell| cell["verbs"].as_array().unwrap())
        .filter_map(Value::as_str)
        .collect();
    assert!(verbs.contains(&"advise"), "{verbs:?}");
    for verb in verbs {
        place.run(&[verb, "--help"]).code(0);
    }
}

/// Headings as mdBook names them.
fn anchors(page: &str) -> BTreeSet<String> {
    let slug = |heading: &str| -> String {
        let kept = heading.chars().filter_map(|c| match c {
            c if c.is_alphanumeric() || c == '_' || c == '-' => Some(c.to_ascii_lowercase()),
            c if c.is_whitespace() => Some('-'),
            _ => None,
        });
        kept.collect()
    };
    prose(page)
        .lines()
        .filter(|line| line.starts_with('#'))
        .map(|line| slug(line.trim_start_matches('#').trim()))
        .collect()
}

/// Targets of `[text](target)` and of `{{#include target}}`.
fn links(page: &str) -> Vec<String> {
    let prose = prose(page);
    let mut rest = prose.as_str();
    let included =
        |line: &str| Some(line.trim().strip_prefix("{{#include ")?.strip_suffix("}}")?.to_owned());
    let mut found: Vec<String> = prose.lines().filter_map(included).collect();
    while let Some(at) = rest.find("](") {
        rest = &rest[at + 2..];
        found.extend(rest.split_once(')').map(|(target, _)| target.to_owned()));
    }
    found
}

#[test]
fn every_link_leads_somewhere_and_every_page_is_in_the_summary() {
    let mut dead = Vec::new();
    let mut check = |from: &Path, text: &str| {
        let folder = from.parent().unwrap();
        for target in links(text) {
            if target.starts_with("https://") {
                continue;
            }
            let (path, anchor) = target.split_once('#').unwrap_or((&target, ""));
            let to = if path.is_empty() { from.to_owned() } else { folder.join(path) };
            let there = match anchor {
                "" => to.exists(),
                _ => std::fs::read_to_string(&to).is_ok_and(|page| anchors(&page).contains(anchor)),
            };
            if !there {
                dead.push(format!("{}: {target}", from.display()));
            }
        }
    };
    let mut inside = BTreeSet::new();
    for (name, text) in pages() {
        check(&book().join(&name), &text);
        inside.insert(name);
    }
    for name in ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"] {
        let path = Path::new(ROOT).join(name);
        check(&path, &std::fs::read_to_string(&path).unwrap());
    }
    assert!(dead.is_empty(), "links that lead nowhere:\n{}", dead.join("\n"));

    let summary = std::fs::read_to_string(book().join("SUMMARY.md")).unwrap();
    let listed: BTreeSet<String> = links(&summary).into_iter().collect();
    inside.remove("SUMMARY.md");
    assert_eq!(inside, listed, "pages, and what docs/src/SUMMARY.md lists");
}

/// A block as it is run: what needs a network, a GPU or minutes is parsed only, by asking for help
/// after its last argument.
fn runnable(block: &str) -> String {
    const FAR: &[&str] = &["pypi:", "hf:", "deb:", "s3:", "--device", "refit claim "];
    let mut script = String::new();
    for line in block.replace("\\\n", " ").lines() {
        let line = line.split(" # ").next().unwrap_or_default().trim_end();
        let words: Vec<&str> = line.split_whitespace().collect();
        // Building refit is not the book's to test.
        if matches!(words.first(), Some(&("cargo" | "git" | "cd"))) {
            continue;
        }
        let far = FAR.iter().any(|what| line.contains(what)) && !words.contains(&"--dry-run");
        script.push_str(line);
        script.push_str(if far { " --help >/dev/null\n" } else { "\n" });
    }
    script
}

/// Runs the blocks of a page from the top to the bottom in one directory, later commands on what
/// earlier ones wrote, and says how many there were.
#[cfg(unix)]
fn run_page(name: &str, text: &str) -> usize {
    let binaries = Path::new(env!("CARGO_BIN_EXE_refit")).parent().unwrap();
    let path = format!("{}:{}", binaries.display(), std::env::var("PATH").unwrap_or_default());
    let place = Place::new();
    std::os::unix::fs::symlink(Path::new(ROOT).join("recipes"), place.path("recipes")).unwrap();
    let mut seen = 0;
    for block in blocks(text) {
        let ran = match block.language.as_str() {
            "yaml" if block.text.contains("steps:") => {
                place.write("recipe.yaml", &block.text);
                place.run(&["run", "recipe.yaml", "--dry-run"])
            }
            "sh" => {
                let mut shell = std::process::Command::new("sh");
                shell.args(["-eu", "-c", &runnable(&block.text)]).env("PATH", &path);
                for (key, value) in place.command().get_envs() {
                    shell.env(key, value.unwrap_or_default());
                }
                Ran::of(shell.current_dir(place.path("")).output().unwrap())
            }
            _ => continue,
        };
        let at = format!("docs/src/{name}:{}", block.line);
        assert_eq!(ran.code, 0, "{at}:\n{}\n{}\n{}", block.text, ran.out, ran.err);
        seen += 1;
    }
    seen
}

#[cfg(unix)]
#[test]
fn every_command_runs_as_it_is_written() {
    let pages = pages();
    let next = std::sync::atomic::AtomicUsize::new(0);
    let worker = || {
        let mut seen = 0;
        while let Some((name, text)) =
            pages.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed))
        {
            seen += run_page(name, text);
        }
        seen
    };
    let seen: usize = std::thread::scope(|scope| {
        let workers = [scope.spawn(worker), scope.spawn(worker)];
        workers.into_iter().map(|worker| worker.join().unwrap()).sum()
    });
    assert!(seen > 30, "only {seen} blocks were run");
}

/// Cells of the rows of all tables of a page.
fn rows(page: &str) -> Vec<Vec<String>> {
    let is_row = |line: &&str| line.starts_with('|') && !line.starts_with("|--");
    let cells = |line: &str| -> Vec<String> {
        line.trim().trim_matches('|').split(" | ").map(|cell| cell.trim().to_owned()).collect()
    };
    prose(page).lines().filter(is_row).map(cells).collect()
}

/// What stands between backticks.
fn code(text: &str) -> Vec<String> {
    text.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

#[test]
fn json_has_the_keys_that_the_book_promises() {
    let place = Place::new();
    // What the table calls `encoder`, `classifier` and so on.
    place.bert("encoder");
    place.vit("classifier");
    place.picture("picture.png");
    place.picture("pictures/LABEL_0/1.png");
    place.write("lines.txt", "w5 w6\nw7\n");
    place.write("records.jsonl", "{\"text\": \"And he said.\"}\n{\"text\": \"zq 0x7 kk\"}\n");
    place.write(
        "recipe.yaml",
        "name: small\ndata: {text: builtin:kjv}\nsteps:\n  - pull: builtin:tiny\n  - eval: original\n    \
         on: text\n    window: 64\n    max_tokens: 128\n",
    );
    let page = std::fs::read_to_string(book().join("guide/output.md")).unwrap();
    let mut seen = 0;
    for row in rows(&page) {
        let [command, keys] = &row[..] else { continue };
        let Some(command) = code(command).first().cloned() else { continue };
        let Some(command) = command.strip_prefix("refit ").map(str::to_owned) else { continue };
        let arguments: Vec<&str> = command.split(' ').chain(["--json"]).collect();
        let ran = place.run(&arguments);
        let found: Value = serde_json::from_str(&ran.out)
            .unwrap_or_else(|e| panic!("refit {command}: {e}:\n{}{}", ran.out, ran.err));
        let found: BTreeSet<String> = found.as_object().unwrap().keys().cloned().collect();
        let promised: BTreeSet<String> = code(keys).into_iter().collect();
        assert_eq!(
            found, promised,
            "keys of `refit {command} --json` and docs/src/guide/output.md"
        );
        seen += 1;
    }
    assert!(seen >= 22, "only {seen} commands in the table");
}

#[test]
fn the_guide_tells_of_every_verb() {
    let place = Place::new();
    let help = place.run(&["--help"]).code(0).out;
    let commands = help.split("Commands:").nth(1).unwrap().split("\n\n").next().unwrap();
    let verbs: Vec<&str> = commands
        .lines()
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|verb| *verb != "help")
        .collect();
    assert!(verbs.len() > 15, "{verbs:?}");
    let guide: String = pages()
        .into_iter()
        .filter(|(name, _)| name.starts_with("guide/"))
        .map(|(_, t)| t)
        .collect();
    for verb in verbs {
        assert!(guide.contains(&format!("refit {verb}")), "the guide never says `refit {verb}`");
    }
}

/// Every `fn name` in the sources of a crate's tests and modules, by path.
fn sources() -> BTreeMap<String, String> {
    let crates = Path::new(ROOT).join("crates");
    contents(&crates)
        .into_iter()
        .filter(|(name, _)| name.ends_with(".rs"))
        .map(|(name, bytes)| (name, String::from_utf8_lossy(&bytes).into_owned()))
        .collect()
}

/// What is wrong with a test that a study names as `path::name`, if anything.
fn missing(test: &str, sources: &BTreeMap<String, String>) -> Option<String> {
    let Some((path, function)) = test.split_once("::") else {
        return Some(format!("`{test}` is no path::name"));
    };
    let Some(source) = sources.get(path) else {
        return Some(format!("`{test}`: there is no crates/{path}"));
    };
    let there = source.contains(&format!("fn {function}(")) && source.contains("#[test]");
    (!there).then(|| format!("`{test}`: no such test; it may have another name by now"))
}

#[test]
fn tests_that_the_studies_name_exist() {
    let sources = sources();
    let (mut named, mut planned, mut wrong) = (0, 0, Vec::new());
    for (page, text) in pages().into_iter().filter(|(name, _)| name.starts_with("studies/")) {
        for row in rows(&text) {
            let [challenge, _, command, proof] = &row[..] else {
                wrong.push(format!("{page}: a row of {} cells instead of 4: {row:?}", row.len()));
                continue;
            };
            if proof == "planned" {
                planned += 1;
            } else if challenge != "challenge" {
                let tests = code(proof);
                if tests.is_empty() || code(command).is_empty() {
                    wrong.push(format!("{page}: `{challenge}` names no command or no test"));
                }
                named += tests.len();
                let bad = tests.iter().filter_map(|test| missing(test, &sources));
                wrong.extend(bad.map(|what| format!("{page}: {what}")));
            }
        }
    }
    assert!(wrong.is_empty(), "in docs/src:\n{}", wrong.join("\n"));
    assert!(named > 60 && planned > 10, "{named} tests named, {planned} rows planned");
}
