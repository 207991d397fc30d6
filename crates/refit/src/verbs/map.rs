//! `refit map`: what refit has in each cell of the field's taxonomy.

use refit_methods::survey::{Cell, Map, State};

use crate::cli::App;
use crate::failure::Result;
use crate::output::{Outcome, Table};

/// Show which method covers which cell of the compression survey's taxonomy, and what is still planned
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print the page of the book instead
    #[arg(long)]
    markdown: bool,
    /// Exit with code 1 where a leaf has neither a method nor a reason, or the map contradicts the methods
    #[arg(long)]
    check: bool,
}

/// Lays the registry over the survey.
pub fn run(_app: &App, args: Args) -> Result<Outcome> {
    let map = Map::of_registry();
    let text = if args.markdown { map.markdown() } else { listing(&map) };
    let holds = map.problems().is_empty() || !args.check;
    Ok(Outcome::new(map.json(), text).holds(holds))
}

fn listing(map: &Map) -> String {
    let mut text = String::from("THE SURVEY (arXiv:2402.09748; its leaves are recalled)\n");
    text.push_str(&format!("{}\nREUSE (what the survey has no heading for)\n", table(&map.survey)));
    text.push_str(&table(&map.reuse).to_string());
    text.push_str(&format!(
        "\n{} papers make the scope: {} are methods, {} are studies that verbs carry out, {} are planned\n",
        map.papers.len(),
        map.count(State::Method),
        map.count(State::Verbs),
        map.count(State::Planned)
    ));
    for cell in map.survey.iter().filter(|cell| cell.gap.is_some()) {
        text.push_str(&format!("{}: {}\n", cell.path.join(" > "), cell.gap.unwrap_or_default()));
    }
    for problem in map.problems() {
        text.push_str(&format!("problem: {problem}\n"));
    }
    if map.problems().is_empty() {
        text.push_str("every leaf has a method, a planned paper or a reason\n");
    }
    text
}

fn table(cells: &[Cell]) -> Table {
    let mut table = Table::new(3, &["cell", "methods", "planned"]);
    for cell in cells {
        let offered = cell.offered.iter().map(String::as_str);
        let verbs: Vec<String> = cell.verbs.iter().map(|verb| format!("refit {verb}")).collect();
        let here = cell.methods.iter().copied().chain(offered);
        let here: Vec<&str> = here.chain(verbs.iter().map(String::as_str)).collect();
        let here = if cell.gap.is_some() { "none".to_owned() } else { here.join(", ") };
        table.row([cell.path.join(" > "), here, cell.planned.join(", ")]);
    }
    table
}
