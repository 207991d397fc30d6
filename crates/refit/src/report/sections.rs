//! The parts of the page around the charts.

use std::fmt::Write;

use serde_json::Value;

use super::html::Esc;
use super::{is_baseline, number, palette};
use crate::recipe::record::{ArtifactRecord, Contest, Evaluation, RunRecord};

pub(super) fn header(page: &mut String, run: &RunRecord) {
    let _ = write!(
        page,
        "<header>\n<p class=\"mark\"><b>refit</b> {} · run <b>{}</b></p>\n<h1>{}</h1>\n",
        Esc(&run.refit),
        Esc(&run.name),
        Esc(&run.title)
    );
    if !run.summary.is_empty() {
        let _ = writeln!(page, "<p class=\"lead\">{}</p>", Esc(run.summary.trim()));
    }
    let mut facts = Vec::new();
    for original in run.artifacts.iter().filter(|a| a.method.is_none()) {
        facts.push(("model", display_name(original).to_owned()));
        if original.parameter_count > 0 {
            facts.push(("parameters", number::parameters(original.parameter_count)));
        }
    }
    if let Some(arm) = run.evaluations.first().and_then(|e| e.arms.first()) {
        facts.push(("scored tokens", number::count(arm.tokens)));
    }
    facts.push(("seed", run.seed.to_string()));
    if run.seconds > 0.0 {
        facts.push(("time", number::seconds(run.seconds)));
    }
    if let Some(peak) = run.peak_memory {
        facts.push(("peak memory", number::bytes(peak)));
    }
    page.push_str("<ul class=\"facts\">");
    for (name, value) in facts {
        let _ = write!(page, "<li>{name} <b>{}</b></li>", Esc(value));
    }
    page.push_str("</ul>\n");
    for note in &run.notes {
        let _ = writeln!(page, "<p class=\"note\">{}</p>", Esc(note));
    }
    page.push_str("</header>\n");
    let cards: Vec<String> = run.contests.iter().filter_map(|c| contest(run, c)).collect();
    if !cards.is_empty() {
        let _ = writeln!(page, "<section class=\"contests\">\n{}</section>", cards.concat());
    }
}

fn display_name(artifact: &ArtifactRecord) -> &str {
    artifact.source.as_deref().unwrap_or(&artifact.name)
}

/// The finding of one contest, in numbers and one sentence.
fn contest(run: &RunRecord, contest: &Contest) -> Option<String> {
    let (rival, method) = (run.arm(&contest.baseline)?, run.arm(&contest.candidate)?);
    let change = method.perplexity / rival.perplexity - 1.0;
    let big = if change.is_finite() {
        let sign = if change <= 0.0 { "\u{2212}" } else { "+" };
        format!("{sign}{:.1}\u{a0}%", change.abs() * 100.0)
    } else {
        "not finite".to_owned()
    };
    let (rival_name, method_name) = (run.label(&contest.baseline), run.label(&contest.candidate));
    let mut out = format!(
        "<div class=\"contest\"><h3>{}</h3><p class=\"big\">{big}<small>perplexity</small></p>\
         <p><b>{}</b> reaches {} where <b>{}</b> reaches {}",
        Esc(&contest.title),
        Esc(method_name),
        number::plain(method.perplexity),
        Esc(rival_name),
        number::plain(rival.perplexity),
    );
    let original = run
        .evaluations
        .iter()
        .find_map(|e| e.arms.iter().find(|arm| Some(&arm.artifact) == e.reference.as_ref()));
    if let Some(original) = original {
        let share =
            (rival.perplexity - method.perplexity) / (rival.perplexity - original.perplexity);
        if share.is_finite() && share > 0.0 && rival.perplexity > original.perplexity {
            let _ = write!(
                out,
                ": {:.0}\u{a0}% of the loss against the original ({}) is won back",
                share * 100.0,
                number::plain(original.perplexity)
            );
        }
    }
    out.push_str(".</p>");
    if let Some([low, high]) = contest.difference {
        let verdict = if high < 0.0 {
            "clear of zero: the gain is real on this text"
        } else if low > 0.0 {
            "clear of zero: the method is worse on this text"
        } else {
            "contains zero: not told apart on this text"
        };
        let _ = write!(
            out,
            "<p class=\"fine\">Difference in nats per token, paired bootstrap over windows, 95 %: {} to {}, {verdict}.</p>",
            signed(low),
            signed(high)
        );
    }
    out.push_str("</div>\n");
    Some(out)
}

/// A number with its sign, minus as it is set in print.
fn signed(value: f64) -> String {
    format!("{value:+.3}").replace('-', "−")
}

pub(super) fn figure(page: &mut String, title: &str, caption: &str, svg: &str) {
    let _ = writeln!(
        page,
        "<figure class=\"figure\"><figcaption><b>{}</b><span>{}</span></figcaption>\n{svg}\n</figure>",
        Esc(title),
        Esc(caption)
    );
}

pub(super) fn table(page: &mut String, run: &RunRecord, evaluation: &Evaluation) {
    let arms = &evaluation.arms;
    let has = |pick: fn(&ArtifactRecord) -> bool| {
        arms.iter().filter_map(|arm| run.artifact(&arm.artifact)).any(pick)
    };
    let with_bits = has(|a| a.bits_per_weight.is_some());
    let with_sparsity = has(|a| a.sparsity.is_some());
    let with_top1 = arms.iter().any(|arm| arm.top1_agreement.is_some());
    let mut heads = vec!["model", "perplexity", "KL, nats"];
    if with_top1 {
        heads.push("same top token");
    }
    if with_bits {
        heads.push("bits per weight");
    }
    if with_sparsity {
        heads.push("sparsity");
    }
    heads.extend(["packed size", "tokens/s", "made in"]);
    let _ = write!(
        page,
        "<section>\n<h2>All numbers</h2>\n<p class=\"sub\">{}, {} tokens scored. Packed size counts codes, \
         scales and masks in place of dense weights. Best of each group in green.</p>\n\
         <div class=\"scroll\"><table>\n<thead><tr>",
        Esc(&evaluation.text),
        number::count(arms.first().map_or(0, |arm| arm.tokens))
    );
    for head in &heads {
        let _ = write!(page, "<th scope=\"col\">{head}</th>");
    }
    page.push_str("</tr></thead>\n<tbody>\n");
    for (group, members) in super::groups(run, evaluation) {
        if !group.is_empty() {
            let _ = writeln!(
                page,
                "<tr><th scope=\"rowgroup\" colspan=\"{}\">{}</th></tr>",
                heads.len(),
                Esc(group)
            );
        }
        let best = |of: &dyn Fn(usize) -> Option<f64>| {
            let found = members.iter().filter_map(|&i| of(i)).fold(f64::INFINITY, f64::min);
            (members.len() > 1 && !group.is_empty()).then_some(found)
        };
        let best_perplexity = best(&|i| Some(arms[i].perplexity));
        let best_kl = best(&|i| arms[i].kl_to_reference);
        for &i in &members {
            let arm = &arms[i];
            let artifact = run.artifact(&arm.artifact);
            let colour = palette(run, evaluation, &arm.artifact);
            let pale = if is_baseline(run, &arm.artifact) { " pale" } else { "" };
            let _ = write!(
                page,
                "<tr><td><span class=\"dot b{colour}{pale}\"></span>{}</td>",
                Esc(run.label(&arm.artifact))
            );
            let mut cell = |text: Option<String>, best: bool| {
                let class = if best { " class=\"best\"" } else { "" };
                let _ = write!(page, "<td{class}>{}</td>", text.unwrap_or_else(|| "–".to_owned()));
            };
            cell(Some(number::plain(arm.perplexity)), best_perplexity == Some(arm.perplexity));
            let is_reference = Some(&arm.artifact) == evaluation.reference.as_ref();
            let kl = arm.kl_to_reference.filter(|_| !is_reference);
            cell(kl.map(number::plain), kl.is_some() && best_kl == kl);
            if with_top1 {
                let share = arm.top1_agreement.filter(|_| !is_reference);
                cell(share.map(|v| format!("{:.1} %", v * 100.0)), false);
            }
            if with_bits {
                cell(artifact.and_then(|a| a.bits_per_weight).map(|v| format!("{v:.3}")), false);
            }
            if with_sparsity {
                let share = artifact.and_then(|a| a.sparsity);
                cell(share.map(|v| format!("{:.1} %", v * 100.0)), false);
            }
            cell(artifact.map(|a| number::bytes(a.packed_bytes.unwrap_or(a.bytes))), false);
            cell(Some(number::count(arm.tokens_per_second.round() as u64)), false);
            let made = artifact.filter(|a| a.method.is_some());
            cell(made.map(|a| number::seconds(a.seconds)), false);
            page.push_str("</tr>\n");
        }
    }
    page.push_str("</tbody>\n</table></div>\n</section>\n");
}

pub(super) fn lineage(page: &mut String, run: &RunRecord) {
    if run.artifacts.iter().all(|artifact| artifact.content_hash.is_empty()) {
        return;
    }
    page.push_str(
        "<section>\n<h2>Lineage</h2>\n<p class=\"sub\">Every model directory carries its manifest; \
         <code>refit lineage DIR</code> verifies it against the bytes on disk.</p>\n<ul class=\"chain\">\n",
    );
    for artifact in &run.artifacts {
        let how = match &artifact.method {
            Some(method) => {
                let parents: Vec<&str> = artifact.parents.iter().map(|p| run.label(p)).collect();
                format!("{method} of {}", parents.join(", "))
            }
            None => {
                artifact.source.as_ref().map_or_else(String::new, |s| format!("pulled from {s}"))
            }
        };
        let _ = write!(
            page,
            "<li><span class=\"name\">{}</span> <span class=\"how\">{}</span><dl>",
            Esc(run.label(&artifact.name)),
            Esc(how)
        );
        if let Value::Object(parameters) = &artifact.parameters
            && !parameters.is_empty()
        {
            let list: Vec<String> = parameters
                .iter()
                .filter(|(_, value)| !value.is_null())
                .map(|(key, value)| match value {
                    Value::String(text) => format!("{key}={text}"),
                    other => format!("{key}={other}"),
                })
                .collect();
            let _ = write!(page, "<dt>parameters</dt><dd>{}</dd>", Esc(list.join(", ")));
        }
        let _ = write!(
            page,
            "<dt>BLAKE3</dt><dd><code>{}</code></dd><dt>path</dt><dd><code>{}</code></dd></dl></li>",
            Esc(&artifact.content_hash),
            Esc(&artifact.path)
        );
    }
    page.push_str("</ul>\n</section>\n");
}

pub(super) fn reproduce(page: &mut String, run: &RunRecord) {
    let whole = !run.recipe.is_empty();
    if !whole && run.steps.iter().all(|step| step.command.is_empty()) {
        return;
    }
    page.push_str("<section>\n<h2>Do it again</h2>\n");
    if whole {
        page.push_str("<p class=\"sub\">The whole run, or step by step.</p>\n");
    }
    page.push_str("<pre>");
    if whole {
        let _ = writeln!(page, "refit run {}\n", Esc(&run.recipe));
    }
    for step in run.steps.iter().filter(|step| !step.command.is_empty()) {
        let _ = write!(page, "{}", Esc(&step.command));
        if step.seconds > 0.0 {
            let _ = write!(page, "  <span class=\"c\"># {}</span>", number::seconds(step.seconds));
        }
        page.push('\n');
    }
    page.push_str("</pre>\n</section>\n");
}

pub(super) fn machine(page: &mut String, run: &RunRecord) {
    let machine = &run.machine;
    if machine.cores == 0 {
        // An artifact does not say where it was made.
        let _ = writeln!(
            page,
            "<footer>Written by refit {} from what lies beside the weights.</footer>",
            Esc(&run.refit)
        );
        return;
    }
    let memory = machine.memory.map_or_else(|| "unknown".to_owned(), number::bytes);
    let rows = [
        ("processor", machine.cpu.clone()),
        ("instruction sets", machine.features.join(", ")),
        ("threads", format!("{} of {} logical processors", machine.threads, machine.cores)),
        ("memory", memory),
        ("peak memory of the run", run.peak_memory.map_or_else(|| "unknown".into(), number::bytes)),
        ("wall time", number::seconds(run.seconds)),
        ("system", machine.system.clone()),
        ("device", machine.device.clone()),
    ];
    page.push_str("<section>\n<h2>Machine</h2>\n<dl class=\"machine\">");
    for (name, value) in rows.iter().filter(|(_, value)| !value.is_empty()) {
        let _ = write!(page, "<div><dt>{name}</dt><dd>{}</dd></div>", Esc(value));
    }
    page.push_str("</dl>\n</section>\n");
    if run.recipe_sha256.is_empty() {
        let _ = writeln!(page, "<footer>Written by refit {}.</footer>", Esc(&run.refit));
        return;
    }
    let _ = writeln!(
        page,
        "<footer>Written by refit {} from <code>run.json</code> (recipe sha256 <code>{}</code>).</footer>",
        Esc(&run.refit),
        Esc(run.recipe_sha256.get(..16).unwrap_or(&run.recipe_sha256))
    );
}
