//! The map as a page of the book.

use std::collections::BTreeSet;

use super::map::{Cell, Map, PAPERS, State};
use crate::registry;

/// The command that makes the page, as it quotes it.
const COMMAND: &str = "refit map --markdown > docs/src/map.md";

pub fn page(map: &Map) -> String {
    let mut text = format!(
        "<!-- Made by `{COMMAND}`. Do not edit: it follows from the methods. -->\n# The map\n\n\
         What refit has in each cell of the taxonomy of *Model Compression and Efficient Inference for Large Language Models: A \
         Survey* ([arXiv:2402.09748](https://arxiv.org/abs/2402.09748)), and beside it, on an axis of its own, what the survey \
         has no heading for. The survey's families were read in its abstract; their leaves are recalled. `refit map --check` \
         fails where a leaf has neither a method nor a reason, and a test runs it.\n\n\
         Of the {PAPERS} papers that make refit's scope, {} are methods, {} are studies that verbs carry out, and {} are \
         planned. The other methods are the baselines that they are measured against.\n",
        map.count(State::Method),
        map.count(State::Verbs),
        map.count(State::Planned),
    );
    text.push_str("\n## The survey\n");
    let mut family = "";
    for cell in &map.survey {
        if cell.path[0] != family {
            family = cell.path[0];
            text.push_str(&format!(
                "\n### {}\n\n| cell | what | methods | planned |\n|---|---|---|---|\n",
                capital(family)
            ));
        }
        let methods = match cell.gap {
            Some(gap) => format!("none: {gap}"),
            None => methods(cell),
        };
        text.push_str(&format!(
            "| {} | {} | {methods} | {} |\n",
            cell.path[1..].join(" > "),
            cell.about,
            cell.planned.join(", ")
        ));
    }
    text.push_str("\n## Reuse\n\n| cell | methods | planned |\n|---|---|---|\n");
    for cell in &map.reuse {
        let path = cell.path.join(" > ");
        text.push_str(&format!("| {path} | {} | {} |\n", methods(cell), cell.planned.join(", ")));
    }
    text
}

/// Methods with links to their pages, those of other cells with the parameter that takes them here, and verbs.
fn methods(cell: &Cell) -> String {
    let link = |name: &&str| format!("[{name}](methods/{name}.md)");
    let own: BTreeSet<&str> = cell.methods.iter().copied().collect();
    // In the order of the registry, in which families grow from the simple to the particular.
    let ordered = registry::all().iter().map(|entry| entry.info.name);
    let ordered = ordered.filter(|name| own.contains(name)).map(|name| link(&name));
    let offered = cell.offered.iter().map(|typed| format!("`{typed}`"));
    let verbs = cell.verbs.iter().map(|verb| format!("`refit {verb}`"));
    ordered.chain(offered).chain(verbs).collect::<Vec<_>>().join(", ")
}

fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}
