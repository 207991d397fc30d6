//! From a config and a list of tensors to sites, with a strict account of what does not fit.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;

use indexmap::IndexMap;
use serde::Serialize;
use serde_json::{Map, Value as Json};

use super::expr::{self, Fault, Value};
use super::schema::{self, Blocks, Entry, Expr, Schema};
use super::{Architecture, Dims, Kind, Role, Site, infer};

/// An architecture and how well the artifact's tensors fit it.
#[derive(Debug, Clone)]
pub struct Resolved {
    /// Sites of every tensor.
    pub architecture: Architecture,
    /// What does not fit.
    pub report: LoadReport,
}

/// A tensor whose shape is not the one that the config promises.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Misshaped {
    /// Its name.
    pub name: String,
    /// Shape by the config; `None` where a key is missing.
    pub expected: Vec<Option<usize>>,
    /// Shape as stored.
    pub found: Vec<usize>,
}

/// A name that should not be there or is not there, with the nearest name on the other side.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Stray {
    /// The name.
    pub name: String,
    /// The closest name among those of the opposite kind.
    pub nearest: Option<String>,
}

/// Result of a strict load: every expected tensor and its shape against what is stored.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct LoadReport {
    /// Expected but absent; `nearest` is the closest unexpected tensor.
    pub missing: Vec<Stray>,
    /// Stored but not expected; `nearest` is the closest missing tensor.
    pub unexpected: Vec<Stray>,
    /// Stored with another shape than the config promises.
    pub misshaped: Vec<Misshaped>,
    /// Config keys that are absent, so that sizes which depend on them were not checked.
    pub absent_keys: Vec<String>,
}

impl LoadReport {
    /// True when every tensor is where it belongs with the shape it should have.
    pub fn is_clean(&self) -> bool {
        self.missing.is_empty() && self.unexpected.is_empty() && self.misshaped.is_empty()
    }

    /// What keeps the model from being run or changed, in one line: missing and mis-shaped tensors, counted, with
    /// the first few names. `None` when there is nothing of the kind; unexpected tensors do no harm.
    pub fn misfit(&self) -> Option<String> {
        let missing = self.missing.iter().map(|stray| match &stray.nearest {
            Some(nearest) => format!("`{}` (stored instead: `{nearest}`?)", stray.name),
            None => format!("`{}`", stray.name),
        });
        let misshaped = self.misshaped.iter().map(Misshaped::to_string);
        let parts = [("missing", few(missing)), ("of another shape", few(misshaped))];
        let parts: Vec<_> = parts
            .into_iter()
            .filter_map(|(what, few)| few.map(|(count, few)| format!("{count} {what} ({few})")))
            .collect();
        (!parts.is_empty()).then(|| parts.join("; "))
    }

    /// Tensors that the architecture does not have, in one line; `None` when there are none.
    pub fn strays(&self) -> Option<String> {
        let names = self.unexpected.iter().map(|stray| match &stray.nearest {
            Some(nearest) => format!("`{}` (meant as `{nearest}`?)", stray.name),
            None => format!("`{}`", stray.name),
        });
        few(names).map(|(count, few)| format!("{count} ({few})"))
    }
}

/// How many there are, as `3 tensors`, and the first three; `None` for none.
fn few(items: impl ExactSizeIterator<Item = String>) -> Option<(String, String)> {
    const SHOWN: usize = 3;
    let count = items.len();
    let mut text = items.take(SHOWN).collect::<Vec<_>>().join(", ");
    if count > SHOWN {
        text.push_str(&format!(" and {} more", count - SHOWN));
    }
    let tensors = if count == 1 { "tensor" } else { "tensors" };
    (count > 0).then(|| (format!("{count} {tensors}"), text))
}

impl fmt::Display for Misshaped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let expected: Vec<_> = self
            .expected
            .iter()
            .map(|dim| dim.map_or_else(|| "?".to_owned(), |dim| dim.to_string()))
            .collect();
        write!(f, "`{}` is {:?}, the config says [{}]", self.name, self.found, expected.join(", "))
    }
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 12;
        if self.is_clean() {
            return f.write_str("every tensor fits the config");
        }
        let mut first = true;
        let mut section =
            |f: &mut fmt::Formatter<'_>, title: &str, lines: Vec<String>| -> fmt::Result {
                if lines.is_empty() {
                    return Ok(());
                }
                if !std::mem::take(&mut first) {
                    writeln!(f)?;
                }
                write!(f, "{} {title}:", lines.len())?;
                for line in lines.iter().take(SHOWN) {
                    write!(f, "\n  {line}")?;
                }
                if lines.len() > SHOWN {
                    write!(f, "\n  ... and {} more", lines.len() - SHOWN)?;
                }
                Ok(())
            };
        let stray = |stray: &Stray, hint: &str| match &stray.nearest {
            Some(nearest) => format!("`{}` ({hint} `{nearest}`)", stray.name),
            None => format!("`{}`", stray.name),
        };
        section(f, "missing", self.missing.iter().map(|s| stray(s, "stored instead?")).collect())?;
        section(f, "unexpected", self.unexpected.iter().map(|s| stray(s, "meant as")).collect())?;
        let misshaped = self.misshaped.iter().map(Misshaped::to_string);
        section(f, "of another shape", misshaped.collect())
    }
}

/// Matches tensors `(name, shape)` against the description of the config's `model_type`.
///
/// Without a `model_type` a family is recognised by its tensor names; a type without a description is inferred.
/// In both cases the result is marked `inferred`.
pub fn resolve<'a>(
    config: &Map<String, Json>,
    tensors: impl IntoIterator<Item = (&'a str, &'a [usize])>,
) -> Resolved {
    let stored: BTreeMap<&str, &[usize]> = tensors.into_iter().collect();
    let model_type = config.get("model_type").and_then(Json::as_str);
    let (schemas, inferred) = match model_type {
        Some(name) => (schema::lookup(name).into_iter().collect(), false),
        None => (recognise(&stored), true),
    };
    let attempts = schemas.into_iter().flat_map(|schema| {
        let prefixes = schema.prefixes.iter().map(String::as_str);
        prefixes
            .chain(schema.prefixes.is_empty().then_some(""))
            .map(|prefix| Matcher::new(schema, config, &stored, prefix).run())
            .collect::<Vec<_>>()
    });
    // Of equals the last is taken: that must be the first family with its usual prefix.
    let attempts: Vec<_> = attempts.collect();
    let best = attempts.into_iter().rev().max_by_key(|matcher| {
        let fitting = matcher.hits - matcher.misshaped.len();
        (fitting, matcher.hits, std::cmp::Reverse(matcher.missing.len()))
    });
    let Some(best) = best else {
        let architecture = infer::infer(model_type.unwrap_or("unknown"), config, &stored);
        return Resolved { architecture, report: LoadReport::default() };
    };
    let model_type = model_type.unwrap_or(&best.schema.model_type).to_owned();
    best.finish(model_type, inferred)
}

/// The descriptions whose fingerprints are wholly present. Families that differ in sizes alone have names in common:
/// the shapes decide among them.
fn recognise(stored: &BTreeMap<&str, &[usize]>) -> Vec<&'static Schema> {
    let present = |schema: &&Schema| {
        !schema.fingerprint.is_empty()
            && schema.prefixes.iter().map(String::as_str).chain([""]).any(|prefix| {
                schema
                    .fingerprint
                    .iter()
                    .all(|name| stored.contains_key(format!("{prefix}{name}").as_str()))
            })
    };
    schema::FILES.iter().filter_map(|(name, _)| schema::lookup(name)).filter(present).collect()
}

/// Layers or experts that are looked for even where fewer tensors are stored.
const MOST_LOOPS: usize = 256;

/// Pairs of names that are compared in the search for the one that was meant.
const MOST_PAIRS: usize = 50_000;

/// Loop variables, innermost last.
type Loops = Vec<(String, usize)>;

/// Where a group of modules stands.
struct Place<'s> {
    /// Text before the module's name.
    at: String,
    loops: Loops,
    layer: Option<usize>,
    stack: Option<&'s str>,
}

struct Matcher<'s> {
    schema: &'s Schema,
    config: &'s Map<String, Json>,
    stored: &'s BTreeMap<&'s str, &'s [usize]>,
    prefix: &'s str,
    /// Sizes that the config does not give, learned from stored shapes.
    learned: RefCell<HashMap<String, usize>>,
    absent_keys: RefCell<BTreeSet<String>>,
    sites: Vec<Site>,
    /// Candidates for each site's norm, resolved when all names are known.
    norms: Vec<Vec<String>>,
    seen: HashSet<String>,
    missing: Vec<(String, Role)>,
    misshaped: Vec<Misshaped>,
    hits: usize,
}

impl<'s> Matcher<'s> {
    fn new(
        schema: &'s Schema,
        config: &'s Map<String, Json>,
        stored: &'s BTreeMap<&'s str, &'s [usize]>,
        prefix: &'s str,
    ) -> Self {
        Self {
            schema,
            config,
            stored,
            prefix,
            learned: RefCell::default(),
            absent_keys: RefCell::default(),
            sites: Vec::new(),
            norms: Vec::new(),
            seen: HashSet::new(),
            missing: Vec::new(),
            misshaped: Vec::new(),
            hits: 0,
        }
    }

    fn run(mut self) -> Self {
        let schema = self.schema;
        let bare =
            |at: &str| Place { at: at.to_owned(), loops: Loops::new(), layer: None, stack: None };
        self.entries(&schema.tensors, &bare(self.prefix));
        let mut counted = HashMap::<Option<&str>, usize>::new();
        for block in &schema.blocks {
            let count = counted.entry(block.stack.as_deref()).or_default();
            self.block(block, count);
        }
        self.entries(&schema.after, &bare(self.prefix));
        self.entries(&schema.outside, &bare(""));
        self
    }

    fn block(&mut self, block: &'s Blocks, counted: &mut usize) {
        let at = format!("{}{}", self.prefix, block.at);
        for loops in self.iterate(&block.each, &at, &Loops::new()) {
            let layer =
                loops.iter().find(|(name, _)| name == "layer").map_or(*counted, |(_, i)| *i);
            *counted += 1;
            let place = Place {
                at: self.fill(&at, &loops),
                loops,
                layer: Some(layer),
                stack: block.stack.as_deref(),
            };
            self.entries(&block.tensors, &place);
        }
    }

    fn entries(&mut self, entries: &'s IndexMap<String, Entry>, place: &Place<'s>) {
        for (name, entry) in entries {
            if entry.each.is_empty() {
                self.entry(name, entry, place, &place.loops);
                continue;
            }
            let template = format!("{}{name}", place.at);
            for loops in self.iterate(&entry.each, &template, &place.loops) {
                self.entry(name, entry, place, &loops);
            }
        }
    }

    /// Every assignment of the loop variables, outermost slowest. A count that the config does not give is read
    /// off the names that are stored. A config that claims far more than could be stored is not followed to the end.
    fn iterate(&self, each: &IndexMap<String, Expr>, template: &str, outer: &Loops) -> Vec<Loops> {
        each.iter().fold(vec![outer.clone()], |assignments, (variable, count)| {
            let extend = |loops: Loops| {
                let count = self
                    .size(count, &loops)
                    .unwrap_or_else(|_| self.count_stored(template, variable, &loops));
                (0..count.min(self.stored.len().max(MOST_LOOPS))).map(move |i| {
                    let mut loops = loops.clone();
                    loops.push((variable.clone(), i));
                    loops
                })
            };
            assignments.into_iter().flat_map(extend).collect()
        })
    }

    fn count_stored(&self, template: &str, variable: &str, loops: &Loops) -> usize {
        let Some((head, _)) = template.split_once(&format!("{{{variable}}}")) else { return 0 };
        let head = self.fill(head, loops);
        self.stored
            .range(head.as_str()..)
            .map_while(|(name, _)| name.strip_prefix(head.as_str()))
            .filter_map(|rest| rest.split('.').next()?.parse::<usize>().ok())
            .max()
            .map_or(0, |last| last + 1)
    }

    fn entry(&mut self, name: &str, entry: &'s Entry, place: &Place<'s>, loops: &Loops) {
        if entry.when.as_ref().is_some_and(|when| !self.holds(when, loops)) {
            return;
        }
        let stored = |other: &String| self.stored.contains_key(format!("{other}.weight").as_str());
        let alone = |other: &String| !stored(other) && !self.stores_part_of(name);
        if entry.beside.as_ref().is_some_and(alone) || entry.unless.as_ref().is_some_and(stored) {
            return;
        }
        let optional = entry.optional && !self.is_half_of_a_pair(name);
        let module = format!("{}{}", place.at, self.fill(name, loops));
        let weight = if entry.raw { module.clone() } else { format!("{module}.weight") };
        let tied_to = entry.tie.as_ref().map(|target| format!("{}{target}.weight", self.prefix));
        let site = Site {
            name: weight.clone(),
            role: entry.role,
            layer: place.layer,
            shape: Vec::new(),
            norm: None,
            tied_to: None,
            layout: entry.layout,
            stack: place.stack.map(str::to_owned),
            expert: loops.iter().find(|(name, _)| name == "expert").map(|(_, i)| *i),
            fused: self.fused(entry, loops),
            interleaved: entry.interleaved,
            stored: true,
        };
        let norms = entry
            .norm
            .iter()
            .flat_map(|norm| {
                let norm = self.fill(norm, loops);
                [
                    format!("{}{norm}.weight", place.at),
                    format!("{}{norm}.weight", self.prefix),
                    format!("{norm}.weight"),
                ]
            })
            .collect();
        self.expect(site.clone(), &entry.shape, loops, norms, optional, tied_to);
        let aside =
            Site { layout: Default::default(), fused: Vec::new(), interleaved: false, ..site };
        // A bias and the running statistics have one value per output.
        let outputs = match entry.layout {
            super::Layout::InOut => entry.shape.last(),
            _ => entry.shape.first(),
        }
        .map_or(&[][..], std::slice::from_ref);
        if let Some(bias) = &entry.bias {
            let maybe = bias.0 == "maybe" || optional;
            if maybe || self.holds(bias, loops) {
                let bias =
                    Site { name: format!("{module}.bias"), role: Role::Bias, ..aside.clone() };
                self.expect(bias, outputs, loops, Vec::new(), maybe, None);
            }
        }
        if entry.stats {
            for statistic in ["running_mean", "running_var"] {
                let site = Site {
                    name: format!("{module}.{statistic}"),
                    role: Role::Stat,
                    ..aside.clone()
                };
                self.expect(site, outputs, loops, Vec::new(), optional, None);
            }
            let counter = format!("{module}.num_batches_tracked");
            if self.stored.contains_key(counter.as_str()) {
                self.expect(
                    Site { name: counter, role: Role::Stat, ..aside },
                    &[],
                    loops,
                    Vec::new(),
                    true,
                    None,
                );
            }
        }
    }

    /// Whether a weight or a bias of a module outside the trunk is stored.
    fn stores_part_of(&self, module: &str) -> bool {
        ["weight", "bias"].iter().any(|end| self.stored.contains_key(&*format!("{module}.{end}")))
    }

    /// Whether a module stands beside this one of which something is stored, so that this one is not left out but lost.
    fn is_half_of_a_pair(&self, name: &str) -> bool {
        let outside = self.schema.outside.iter();
        outside
            .filter(|(_, entry)| entry.beside.as_deref() == Some(name))
            .any(|(partner, _)| self.stores_part_of(partner))
    }

    /// Checks one expected tensor against what is stored.
    fn expect(
        &mut self,
        mut site: Site,
        shape: &[Expr],
        loops: &Loops,
        norms: Vec<String>,
        optional: bool,
        tied_to: Option<String>,
    ) {
        let found = self.stored.get(site.name.as_str()).copied();
        let tied = tied_to.is_some() && self.tied();
        let Some(found) = found else {
            let table = tied_to
                .and_then(|target| Some((self.stored.get(target.as_str())?.to_vec(), target)));
            match table {
                Some((shape, target)) if tied => {
                    site.shape = shape;
                    site.tied_to = Some(target);
                    site.stored = false;
                    self.push(site, norms);
                }
                _ if optional => {}
                _ => self.missing.push((site.name, site.role)),
            }
            return;
        };
        self.hits += 1;
        let expected: Vec<Option<usize>> = shape
            .iter()
            .enumerate()
            .map(|(i, dim)| self.dimension(dim, loops, found.get(i).copied()))
            .collect();
        let fits = expected.len() == found.len()
            && expected
                .iter()
                .zip(found)
                .all(|(expected, found)| expected.is_none_or(|e| e == *found));
        if !fits {
            self.misshaped.push(Misshaped {
                name: site.name.clone(),
                expected,
                found: found.to_vec(),
            });
        }
        site.shape = found.to_vec();
        site.tied_to = tied_to.filter(|target| tied && self.stored.contains_key(target.as_str()));
        self.push(site, norms);
    }

    fn push(&mut self, site: Site, norms: Vec<String>) {
        self.seen.insert(site.name.clone());
        self.sites.push(site);
        self.norms.push(norms);
    }

    /// Whether the head shares the embedding table. A config that does not say so, with no head stored, can mean
    /// nothing else.
    fn tied(&self) -> bool {
        match self.config.get("tie_word_embeddings").and_then(Json::as_bool) {
            Some(tied) => tied,
            None => {
                self.name("tied", &Loops::new()).is_none_or(|v| v.truthy())
                    || !self
                        .stored
                        .keys()
                        .any(|name| name.contains("head") || name.contains("embed_out"))
            }
        }
    }

    fn fused(&self, entry: &Entry, loops: &Loops) -> Vec<(Role, usize)> {
        entry
            .fused
            .iter()
            .map(|(role, size)| Some((*role, self.size(size, loops).ok()?)))
            .collect::<Option<_>>()
            .unwrap_or_default()
    }

    /// One dimension; a bare name that the config does not give is learned from the stored shape.
    fn dimension(&self, dim: &Expr, loops: &Loops, found: Option<usize>) -> Option<usize> {
        match self.size(dim, loops) {
            Ok(size) => Some(size),
            Err(fault) => {
                if let Fault::Unknown(name) = fault {
                    self.absent_keys.borrow_mut().insert(self.absent_key(name));
                }
                if let Some(found) = found.filter(|_| self.schema.names.contains_key(&dim.0)) {
                    self.learned.borrow_mut().insert(dim.0.clone(), found);
                }
                None
            }
        }
    }

    fn size(&self, expr: &Expr, loops: &Loops) -> Result<usize, Fault> {
        let value = expr::eval(&expr.0, &|name| self.name(name, loops))?;
        value.size().ok_or_else(|| Fault::Invalid(format!("`{}` is {value:?}, not a size", expr.0)))
    }

    fn holds(&self, expr: &Expr, loops: &Loops) -> bool {
        expr::eval(&expr.0, &|name| self.name(name, loops)).is_ok_and(|value| value.truthy())
    }

    /// A name's value: loop variable, size learned from shapes, `let`, config key (dots descend).
    fn name(&self, name: &str, loops: &Loops) -> Option<Value> {
        if let Some((_, index)) = loops.iter().rev().find(|(variable, _)| variable == name) {
            return Some(Value::Num(*index as f64));
        }
        if let Some(size) = self.learned.borrow().get(name) {
            return Some(Value::Num(*size as f64));
        }
        if let Some(position) = self.schema.names.get_index_of(name) {
            return self.let_name(position, loops);
        }
        self.config_key(name)
    }

    /// The `let` at `position`, which may use earlier ones; its own name inside it means the config key.
    fn let_name(&self, position: usize, loops: &Loops) -> Option<Value> {
        let (_, expr) = self.schema.names.get_index(position)?;
        let earlier = |inner: &str| match self.schema.names.get_index_of(inner) {
            Some(other) if other < position => self.name(inner, loops),
            Some(_) => self.config_key(inner),
            None => self.name(inner, loops),
        };
        expr::eval(&expr.0, &earlier).ok()
    }

    /// The config key whose absence leaves `name` without a value.
    fn absent_key(&self, name: String) -> String {
        let Some((position, _, expr)) = self.schema.names.get_full(&name) else { return name };
        let earlier = |inner: &str| match self.schema.names.get_index_of(inner) {
            Some(other) if other < position => self.name(inner, &Loops::new()),
            _ => self.config_key(inner),
        };
        match expr::eval(&expr.0, &earlier) {
            // Only earlier names are asked further: that ends.
            Err(Fault::Unknown(inner)) => match self.schema.names.get_index_of(&inner) {
                Some(other) if other < position => self.absent_key(inner),
                _ => inner,
            },
            _ => name,
        }
    }

    fn config_key(&self, path: &str) -> Option<Value> {
        let mut keys = path.split('.');
        let first = self.config.get(keys.next()?)?;
        let json = keys.try_fold(first, |json, key| json.get(key))?;
        if let Json::Object(map) = json {
            // `len(id2label)` counts a map's entries.
            return Some(Value::List(vec![Value::Num(0.0); map.len()]));
        }
        Value::from_json(json)
    }

    /// Replaces `{expr}` by its value.
    fn fill(&self, template: &str, loops: &Loops) -> String {
        let mut out = String::with_capacity(template.len());
        let mut rest = template;
        while let Some((head, tail)) = rest.split_once('{') {
            let Some((hole, after)) = tail.split_once('}') else { break };
            out.push_str(head);
            match expr::eval(hole, &|name| self.name(name, loops)) {
                Ok(Value::Num(n)) => out.push_str(&(n as i64).to_string()),
                Ok(Value::Str(s)) => out.push_str(&s),
                // A variable of an inner loop stays for the next pass.
                _ => out.extend(["{", hole, "}"]),
            }
            rest = after;
        }
        out.push_str(rest);
        out
    }

    fn finish(mut self, model_type: String, inferred: bool) -> Resolved {
        let bare_backbone = self.schema.prefixes.first().is_some_and(|usual| usual != self.prefix);
        let has_head = self.sites.iter().any(|site| site.role == Role::Head);
        self.missing.retain(|(_, role)| *role != Role::Head || !(has_head || bare_backbone));

        for (site, candidates) in self.sites.iter_mut().zip(&self.norms) {
            site.norm = candidates.iter().find(|name| self.seen.contains(*name)).cloned();
        }
        let mut unexpected = Vec::new();
        for (name, shape) in self.stored.iter().filter(|(name, _)| !self.seen.contains(**name)) {
            let site = infer::site(name, shape);
            if self.schema.ignore.iter().any(|pattern| glob(pattern, name)) {
                self.sites.push(Site { role: Role::Other, ..site });
            } else {
                self.sites.push(site);
                unexpected.push((*name).to_owned());
            }
        }
        let missing: Vec<String> =
            std::mem::take(&mut self.missing).into_iter().map(|(name, _)| name).collect();
        // Quadratic work on wholly foreign files would be slow and say nothing.
        let related = missing.len().saturating_mul(unexpected.len()) <= MOST_PAIRS;
        let stray = |name: &String, others: &[String]| Stray {
            name: name.clone(),
            nearest: if related { nearest(name, others) } else { None },
        };
        let report = LoadReport {
            missing: missing.iter().map(|name| stray(name, &unexpected)).collect(),
            unexpected: unexpected.iter().map(|name| stray(name, &missing)).collect(),
            misshaped: std::mem::take(&mut self.misshaped),
            absent_keys: self.absent_keys.take().into_iter().collect(),
        };
        let dims = self.dims();
        let kind = self.schema.kind.unwrap_or(Kind::Decoder);
        let summary = self.schema.summary.clone();
        Resolved {
            architecture: Architecture::new(model_type, kind, inferred, self.sites, dims, summary),
            report,
        }
    }

    fn dims(&self) -> Dims {
        let size = |name: &str| self.name(name, &Loops::new()).and_then(|value| value.size());
        let counted = || {
            let layers: HashSet<_> = self
                .sites
                .iter()
                .filter_map(|site| Some((site.stack.as_deref(), site.layer?)))
                .collect();
            (!layers.is_empty()).then_some(layers.len())
        };
        Dims {
            hidden: size("hidden"),
            layers: size("layers").or_else(counted),
            heads: size("heads"),
            kv_heads: size("kv_heads"),
            head_dim: size("head_dim"),
            ffn: size("ffn"),
            vocab: size("vocab"),
            context: size("context"),
            window: size("window"),
        }
    }
}

/// `*` matches any run of characters.
fn glob(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((head, tail)) => name.strip_prefix(head).is_some_and(|rest| {
            tail.is_empty() || rest.char_indices().any(|(i, _)| glob(tail, &rest[i..]))
        }),
    }
}

/// The candidate most like `name`, if any is close enough to be meant.
fn nearest(name: &str, candidates: &[String]) -> Option<String> {
    candidates
        .iter()
        .map(|candidate| (strsim::normalized_damerau_levenshtein(name, candidate), candidate))
        .filter(|(likeness, _)| *likeness >= 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(crate::testing::cases(256))]

        /// A changed description is refused, or resolves to a site for every tensor.
        #[test]
        fn a_changed_description_is_refused_or_resolves(
            which in any::<prop::sample::Index>(),
            edits in proptest::collection::vec((any::<prop::sample::Index>(), "[a-z0-9:{}\\[\\], ?*+^\"'.\n-]{0,2}"), 1..3),
        ) {
            let (_, text) = schema::FILES[which.index(schema::FILES.len())];
            let mut text = text.to_owned();
            for (at, with) in edits {
                let at = at.index(text.len());
                if text.is_char_boundary(at) && text.is_char_boundary(at + 1) {
                    text.replace_range(at..at + 1, &with);
                }
            }
            let Ok(schema) = serde_saphyr::from_str::<Schema>(&text) else { return Ok(()) };
            let shape = [4usize, 4];
            let names = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "h.1.attn.bias", "x"];
            let stored: BTreeMap<&str, &[usize]> = names.iter().map(|name| (*name, &shape[..])).collect();
            let config = serde_json::json!({"hidden_size": 4, "num_hidden_layers": 2, "depths": [1, 2]});
            let config = config.as_object().expect("invariant: an object");
            let resolved = Matcher::new(&schema, config, &stored, "").run().finish("x".to_owned(), false);
            let sites = resolved.architecture.sites.iter().filter(|site| site.stored);
            prop_assert!(names.iter().all(|name| sites.clone().any(|site| site.name == *name)));
        }
    }
}
