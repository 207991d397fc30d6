//! The map: the registry laid over the survey's leaves and the papers of the scope.

use serde::Serialize;
use serde_json::{Value, json};

use super::leaves::{FAMILIES, LEAVES, Leaf, Offer};
use super::papers::{SCOPE, ScopePaper};
use crate::method::Info;
use crate::registry;

/// How many papers make the scope.
pub const PAPERS: usize = 80;

/// Which of the two maps a path belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Axis {
    /// The survey's taxonomy.
    Survey,
    /// What the survey has no heading for.
    Reuse,
}

impl Axis {
    /// The axis of a path, by its first step.
    pub fn of(path: &[&str]) -> Self {
        match path.first() {
            Some(family) if FAMILIES.contains(family) => Self::Survey,
            _ => Self::Reuse,
        }
    }
}

/// Steps of a path that make a cell on the axis of reuse.
const REUSE_STEPS: usize = 2;

/// One cell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Cell {
    /// From the general to the particular.
    pub path: Vec<&'static str>,
    /// What belongs here; empty on the axis of reuse, whose paths say it.
    pub about: &'static str,
    /// Registered methods.
    pub methods: Vec<&'static str>,
    /// Registered methods of other cells that do this by a parameter, as they are typed.
    pub offered: Vec<String>,
    /// Papers of the scope whose methods are not registered yet.
    pub planned: Vec<&'static str>,
    /// Verbs that carry out a study.
    pub verbs: Vec<&'static str>,
    /// Why nothing stands here.
    pub gap: Option<&'static str>,
}

impl Cell {
    fn new(path: &[&'static str]) -> Self {
        Self {
            path: path.to_vec(),
            about: "",
            methods: Vec::new(),
            offered: Vec::new(),
            planned: Vec::new(),
            verbs: Vec::new(),
            gap: None,
        }
    }

    /// Whether anything that can be run stands here.
    pub fn is_covered(&self) -> bool {
        !(self.methods.is_empty() && self.offered.is_empty() && self.verbs.is_empty())
    }
}

/// What has become of a paper of the scope.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// A method of its name is registered.
    Method,
    /// It is a study, and verbs carry it out.
    Verbs,
    /// Not yet.
    Planned,
}

/// A paper of the scope with its place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Placed {
    /// The name of its method.
    pub name: &'static str,
    /// Which axis it is on.
    pub axis: Axis,
    /// Where on it.
    pub path: Vec<&'static str>,
    /// What has become of it.
    pub state: State,
}

/// The map.
#[derive(Clone, Debug)]
pub struct Map {
    /// Cells of the survey, in its order.
    pub survey: Vec<Cell>,
    /// Cells of the axis of reuse, by path.
    pub reuse: Vec<Cell>,
    /// The papers of the scope.
    pub papers: Vec<Placed>,
    problems: Vec<String>,
}

impl Map {
    /// The map of everything that is registered.
    pub fn of_registry() -> Self {
        let methods: Vec<&'static Info> = registry::all().iter().map(|entry| entry.info).collect();
        Self::lay(&methods, LEAVES, SCOPE)
    }

    /// Lays methods and papers over leaves. An [`Offer`] is looked up in the registry.
    pub fn lay(
        methods: &[&'static Info],
        leaves: &'static [Leaf],
        papers: &'static [ScopePaper],
    ) -> Self {
        let survey = leaves.iter().map(|leaf| Cell {
            about: leaf.about,
            offered: leaf.offered.map(|offer| offered(methods, offer)).unwrap_or_default(),
            gap: leaf.gap,
            ..Cell::new(leaf.path)
        });
        let mut map = Self {
            survey: survey.collect(),
            reuse: Vec::new(),
            papers: Vec::new(),
            problems: Vec::new(),
        };
        for info in methods {
            match map.cell(info.taxonomy.path) {
                Some(cell) => cell.methods.push(info.name),
                None => map.problems.push(format!(
                    "method `{}` stands at {}, which is no leaf of the survey: change its path, or add the leaf",
                    info.name,
                    info.taxonomy.path.join(" > ")
                )),
            }
        }
        for paper in papers {
            map.place(paper, methods);
        }
        map.reuse.sort_by(|a, b| a.path.cmp(&b.path));
        map.examine(papers);
        map
    }

    /// The cell of a path: the longest leaf that it begins with, or a cell of reuse, which is made where there is none.
    fn cell(&mut self, path: &'static [&'static str]) -> Option<&mut Cell> {
        if Axis::of(path) == Axis::Survey {
            let cells = self.survey.iter_mut().filter(|cell| path.starts_with(&cell.path));
            return cells.max_by_key(|cell| cell.path.len());
        }
        let short = &path[..path.len().min(REUSE_STEPS)];
        let at = match self.reuse.iter().position(|cell| cell.path == short) {
            Some(at) => at,
            None => {
                self.reuse.push(Cell::new(short));
                self.reuse.len() - 1
            }
        };
        self.reuse.get_mut(at)
    }

    fn place(&mut self, paper: &ScopePaper, methods: &[&'static Info]) {
        let info = methods.iter().find(|info| info.name == paper.name);
        let path = info.map_or(paper.path, |info| info.taxonomy.path);
        let state = match info {
            Some(_) => State::Method,
            None if !paper.verbs.is_empty() => State::Verbs,
            None => State::Planned,
        };
        let axis = Axis::of(path);
        if axis != Axis::of(paper.path) {
            self.problems.push(format!(
                "`{}` is on one axis as a paper of the scope ({}) and on the other as a method ({})",
                paper.name,
                paper.path.join(" > "),
                path.join(" > ")
            ));
        }
        self.papers.push(Placed { name: paper.name, axis, path: path.to_vec(), state });
        if state == State::Method {
            return;
        }
        match self.cell(path) {
            Some(cell) if state == State::Planned => cell.planned.push(paper.name),
            Some(cell) => {
                cell.verbs.extend(
                    paper
                        .verbs
                        .iter()
                        .filter(|verb| !cell.verbs.contains(verb))
                        .copied()
                        .collect::<Vec<_>>(),
                );
            }
            None => self.problems.push(format!(
                "paper `{}` stands at {}, which is no leaf of the survey",
                paper.name,
                path.join(" > ")
            )),
        }
    }

    fn examine(&mut self, papers: &[ScopePaper]) {
        for cell in &self.survey {
            let path = cell.path.join(" > ");
            let filled = cell.is_covered() || !cell.planned.is_empty();
            match (filled, cell.gap) {
                (false, None) => self.problems.push(format!(
                    "{path}: no method, no paper of the scope, and no reason why: register one, or say why there is none"
                )),
                (true, Some(_)) => self.problems.push(format!(
                    "{path}: something stands here ({}), so the reason why nothing does is out of date: remove it",
                    [cell.methods.join(", "), cell.offered.join(", "), cell.planned.join(", ")]
                        .into_iter()
                        .filter(|words| !words.is_empty())
                        .collect::<Vec<_>>()
                        .join(", ")
                )),
                _ => {}
            }
        }
        for (at, paper) in papers.iter().enumerate() {
            if papers[..at].iter().any(|earlier| earlier.name == paper.name) {
                self.problems
                    .push(format!("`{}` is twice among the papers of the scope", paper.name));
            }
        }
        if papers.len() != PAPERS {
            self.problems
                .push(format!("the scope has {} papers instead of {PAPERS}", papers.len()));
        }
    }

    /// What contradicts the registry: leaves without a method or a reason, reasons beside a method, methods and papers outside
    /// the map, papers on two axes or named twice. Empty when all is well.
    pub fn problems(&self) -> &[String] {
        &self.problems
    }

    /// How many papers are in a state.
    pub fn count(&self, state: State) -> usize {
        self.papers.iter().filter(|paper| paper.state == state).count()
    }

    /// Everything, for programs.
    pub fn json(&self) -> Value {
        json!({
            "survey": self.survey,
            "reuse": self.reuse,
            "papers": self.papers,
            "problems": self.problems,
        })
    }

    /// The page of the book.
    pub fn markdown(&self) -> String {
        super::page::page(self)
    }
}

/// Methods within a cell that take a parameter with a value, as they are typed.
fn offered(methods: &[&'static Info], offer: Offer) -> Vec<String> {
    let takes = |info: &&&'static Info| {
        let parameters = json!({ offer.parameter: offer.value });
        info.taxonomy.path.starts_with(offer.within)
            && registry::get(info.name).is_ok_and(|entry| entry.from_value(&parameters).is_ok())
    };
    let flag = offer.parameter.replace('_', "-");
    methods
        .iter()
        .filter(takes)
        .map(|info| format!("{} --{flag} {}", info.name, offer.value))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_holds_and_every_paper_of_the_scope_stands_once_on_one_axis() {
        let map = Map::of_registry();
        assert_eq!(map.problems(), [] as [String; 0]);
        assert_eq!(map.papers.len(), PAPERS);
        let on = |axis| map.papers.iter().filter(|paper| paper.axis == axis).count();
        assert_eq!((on(Axis::Survey), on(Axis::Reuse)), (31, 49));
        for cell in &map.survey {
            let reasons = cell.planned.len() + usize::from(cell.gap.is_some());
            assert!(cell.is_covered() || reasons > 0, "{:?}", cell.path);
        }
        for paper in &map.papers {
            let registered = registry::get(paper.name).is_ok();
            assert_eq!(registered, paper.state == State::Method, "{}", paper.name);
        }
    }

    #[test]
    fn every_method_stands_in_exactly_one_cell() {
        let map = Map::of_registry();
        for entry in registry::all() {
            let cells = map.survey.iter().chain(&map.reuse);
            let found = cells.filter(|cell| cell.methods.contains(&entry.info.name)).count();
            assert_eq!(found, 1, "{}", entry.info.name);
        }
    }

    #[test]
    fn patterns_of_n_out_of_m_are_offered_by_the_pruners_that_take_them() {
        let map = Map::of_registry();
        let cell = map.survey.iter().find(|cell| cell.path == ["pruning", "semi-structured"]);
        let offered = &cell.unwrap().offered;
        assert!(offered.contains(&"wanda --pattern 2:4".to_owned()), "{offered:?}");
    }

    const EMPTY: &[Leaf] =
        &[Leaf { path: &["pruning", "structured"], about: "", offered: None, gap: None }];
    const EXCUSED: &[Leaf] = &[Leaf { gap: Some("nobody asked"), ..EMPTY[0] }];

    fn wanda() -> Vec<&'static Info> {
        vec![registry::get("wanda").unwrap().info]
    }

    fn said(
        methods: &[&'static Info],
        leaves: &'static [Leaf],
        papers: &'static [ScopePaper],
    ) -> String {
        Map::lay(methods, leaves, papers).problems().join("\n")
    }

    #[test]
    fn an_empty_leaf_needs_a_reason_and_a_filled_one_must_have_none() {
        let empty = said(&[], EMPTY, SCOPE);
        assert!(!empty.contains("no method, no paper"), "papers are planned there: {empty}");
        let bare = said(&[], EMPTY, &[]);
        assert!(bare.contains("pruning > structured: no method, no paper"), "{bare}");
        let excused = said(&[], EXCUSED, &[]);
        assert!(!excused.contains("pruning > structured"), "{excused}");
        let planned = said(&[], EXCUSED, SCOPE);
        assert!(planned.contains("out of date") && planned.contains("minitron"), "{planned}");
        const HERE: &[Leaf] = &[Leaf { path: &["pruning"], ..EXCUSED[0] }];
        let stale = said(&wanda(), HERE, &[]);
        assert!(stale.contains("out of date") && stale.contains("wanda"), "{stale}");
    }

    #[test]
    fn what_is_outside_the_map_is_found() {
        let outside = said(&wanda(), EXCUSED, &[]);
        assert!(outside.contains("method `wanda` stands at pruning > unstructured"), "{outside}");
        const TWICE: &[ScopePaper] = &[
            ScopePaper { name: "wanda", path: &["reuse", "merging"], verbs: &[] },
            ScopePaper { name: "wanda", path: &["pruning", "unstructured"], verbs: &[] },
        ];
        let twice = said(&wanda(), LEAVES, TWICE);
        for part in ["on one axis", "twice among", "2 papers instead of 80"] {
            assert!(twice.contains(part), "{part}: {twice}");
        }
    }
}
