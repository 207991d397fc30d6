//! Reports as Markdown.

use std::fmt::Write;

use super::{Report, Trial};
use crate::stats;

impl Report {
    /// The report as a Markdown page: verdict, checks, arms × seeds, cost, how to run it again.
    pub fn to_markdown(&self) -> String {
        let mut page = String::new();
        let mut line = |text: String| {
            page.push_str(&text);
            page.push('\n');
        };
        line(format!("# Claim: {}\n\n{}\n", self.method, self.question));
        let reason = self.reason.as_ref().map_or(String::new(), |reason| format!(": {reason}"));
        line(format!("**Verdict: {}**{reason}\n", self.verdict));
        if self.quick {
            line("This is the quick version; the full one decides.\n".into());
        }
        if !self.checks.is_empty() {
            line("| check | holds | measured |\n|---|---|---|".into());
            for check in &self.checks {
                let holds = if check.holds { "yes" } else { "**no**" };
                line(format!("| {} | {holds} | {} |", cell(&check.statement), cell(&check.detail)));
            }
            line(String::new());
        }
        for metric in self.metric_names() {
            line(self.metric_table(&metric));
        }
        if !self.trials.is_empty() {
            line(self.cost_table());
        }
        for note in &self.notes {
            line(format!("- {note}"));
        }
        if !self.notes.is_empty() {
            line(String::new());
        }
        line(self.how());
        page.truncate(page.trim_end().len());
        page.push('\n');
        page
    }

    /// Metrics in the order in which they first appear.
    fn metric_names(&self) -> Vec<String> {
        let mut names: Vec<String> = Vec::new();
        for metric in self.trials.iter().flat_map(|trial| &trial.metrics) {
            if !names.contains(&metric.name) {
                names.push(metric.name.clone());
            }
        }
        names
    }

    /// Arms in the order in which they first appear.
    fn arms(&self) -> Vec<&str> {
        let mut arms: Vec<&str> = Vec::new();
        for trial in &self.trials {
            if !arms.contains(&trial.arm.as_str()) {
                arms.push(&trial.arm);
            }
        }
        arms
    }

    fn of<'a>(&'a self, arm: &'a str) -> impl Iterator<Item = &'a Trial> {
        self.trials.iter().filter(move |trial| trial.arm == arm)
    }

    /// Seeds of any trial: those of the run first, others (deterministic arms) after them.
    fn columns(&self) -> Vec<u64> {
        let mut seeds = self.seeds.clone();
        for trial in &self.trials {
            if !seeds.contains(&trial.seed) {
                seeds.push(trial.seed);
            }
        }
        seeds.retain(|seed| self.trials.iter().any(|trial| trial.seed == *seed));
        seeds
    }

    fn metric_table(&self, metric: &str) -> String {
        let seeds = self.columns();
        let heads: String = seeds.iter().map(|seed| format!(" seed {seed} |")).collect();
        let mut table = format!("| {} |{heads} mean ± sd |\n|---|", cell(metric));
        table.push_str(&"---:|".repeat(seeds.len() + 1));
        table.push('\n');
        for arm in self.arms() {
            let value = |seed: u64| self.of(arm).find(|t| t.seed == seed)?.get(metric);
            let values: Vec<f64> = seeds.iter().filter_map(|&seed| value(seed)).collect();
            if values.is_empty() {
                continue;
            }
            let cells: String = seeds
                .iter()
                .map(|&seed| format!(" {} |", value(seed).map_or("-".into(), number)))
                .collect();
            let spread =
                stats::std_dev(&values).map_or(String::new(), |s| format!(" ± {}", number(s)));
            let mean = stats::mean(&values).map_or("-".into(), number);
            let _ = writeln!(table, "| {} |{cells} {mean}{spread} |", cell(arm));
        }
        table
    }

    fn cost_table(&self) -> String {
        let mut table = "| cost | seconds per trial | peak memory |\n|---|---:|---:|\n".to_string();
        for arm in self.arms() {
            let costs: Vec<_> = self.of(arm).map(|t| t.cost).filter(|c| c.seconds > 0.0).collect();
            let Some(mean) = stats::mean(&costs.iter().map(|c| c.seconds).collect::<Vec<_>>())
            else {
                continue;
            };
            let peak = costs.iter().filter_map(|c| c.peak_bytes).max();
            let bound = if costs.iter().all(|c| c.peak_is_own) { "" } else { "≤ " };
            let peak = peak.map_or("-".into(), |bytes| format!("{bound}{} MB", bytes / 1_000_000));
            let _ = writeln!(table, "| {} | {} | {peak} |", cell(arm), number(mean));
        }
        let total = self.cost.seconds;
        let _ = writeln!(table, "| all trials together | {} | |", number(total));
        table
    }

    fn how(&self) -> String {
        let mut text = format!("Run it again with `{}`", self.command);
        if !self.assets.is_empty() {
            let list: Vec<String> = self.assets.iter().map(|asset| format!("`{asset}`")).collect();
            let _ = write!(text, " on {}", list.join(", "));
        }
        text.push_str(".\n");
        if !self.paper.is_empty() {
            let _ = writeln!(text, "\nPaper: {}.", self.paper);
        }
        if !self.parameters.is_empty() {
            let list: Vec<String> =
                self.parameters.iter().map(|(name, value)| format!("{name} = {value}")).collect();
            let _ = writeln!(text, "\nParameters: {}.", list.join(", "));
        }
        let machine = &self.machine;
        let memory = machine
            .memory_bytes
            .map_or(String::new(), |bytes| format!(", {} GB memory", (bytes + (1 << 29)) >> 30));
        let vector = if machine.vector.is_empty() {
            String::new()
        } else {
            format!(", {}", machine.vector.join(" "))
        };
        let _ = writeln!(
            text,
            "\nMeasured by refit {} on {}, {}, {} threads{memory}{vector}.",
            self.version, machine.system, machine.processor, machine.threads
        );
        text
    }
}

/// Four significant digits, and no more than anyone reads.
fn number(value: f64) -> String {
    if !value.is_finite() {
        return if value.is_nan() {
            "nan".into()
        } else if value > 0.0 {
            "∞".into()
        } else {
            "-∞".into()
        };
    }
    let size = value.abs();
    if size >= 1e6 || (size > 0.0 && size < 1e-4) {
        return format!("{value:.3e}");
    }
    let digits = if size == 0.0 { 0 } else { (3 - size.log10().floor() as i32).max(0) };
    format!("{value:.*}", digits as usize)
}

/// Text that cannot break out of a table cell.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let shown: Vec<String> =
            [0.0, 1.0, 12.3456, 12345.678, 1.5e7, 0.000012, 0.01234, f64::INFINITY]
                .into_iter()
                .map(number)
                .collect();
        assert_eq!(shown, ["0", "1.000", "12.35", "12346", "1.500e7", "1.200e-5", "0.01234", "∞"]);
    }
}
