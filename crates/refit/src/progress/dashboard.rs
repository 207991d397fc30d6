//! What a training shows of itself in a terminal: from its state to lines of text, and no terminal needed for that.

use refit_methods::method::TrainingEvent;

use super::curve::{self, Smooth};
use crate::report::number;

/// Narrower or lower terminals get a bar.
pub const SMALLEST: (usize, usize) = (40, 10);
/// Wider than this the panel does not get: lines of text that long are hard to read, and shrinking a window then rarely wraps it.
const WIDEST: usize = 96;
/// Most rows of the plot.
const PLOT: usize = 5;
/// Columns of a cell with a name and a number, and between two of them.
const CELL: (usize, usize) = (18, 3);
/// Columns left of the plot, for the numbers at its edges.
const GUTTER: usize = 7;

/// How a stretch of text is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ink {
    /// As it is.
    Plain,
    /// Less than the rest.
    Dim,
    /// More than the rest.
    Bold,
    /// In the colour of the curve.
    Curve,
}

/// A line of the panel. All its characters are one column wide.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Line(Vec<(Ink, String)>);

impl Line {
    fn push(&mut self, ink: Ink, text: impl Into<String>) {
        let text = text.into();
        match self.0.last_mut() {
            Some((last, before)) if *last == ink => before.push_str(&text),
            _ => self.0.push((ink, text)),
        }
    }

    /// What fits into that many columns, without the spaces at its end: some terminals keep those when they wrap a line anew,
    /// and some do not.
    fn clip(mut self, columns: usize) -> Self {
        let mut left = columns;
        for (_, text) in &mut self.0 {
            *text = text.chars().take(left).collect();
            left -= text.chars().count();
        }
        while let Some((_, text)) = self.0.last_mut() {
            text.truncate(text.trim_end_matches(' ').len());
            if !text.is_empty() {
                break;
            }
            self.0.pop();
        }
        self
    }

    /// Columns that it takes.
    pub fn width(&self) -> usize {
        self.0.iter().map(|(_, text)| text.chars().count()).sum()
    }

    /// The text alone.
    pub fn plain(&self) -> String {
        self.0.iter().map(|(_, text)| text.as_str()).collect()
    }

    /// The text with escape sequences for its looks.
    pub fn ansi(&self) -> String {
        let paint = |(ink, text): &(Ink, String)| match ink {
            Ink::Plain => text.clone(),
            Ink::Dim => format!("\x1b[2m{text}\x1b[0m"),
            Ink::Bold => format!("\x1b[1m{text}\x1b[0m"),
            Ink::Curve => format!("\x1b[36m{text}\x1b[0m"),
        };
        self.0.iter().map(paint).collect()
    }
}

/// Where a panel is shown, and what only the moment knows.
#[derive(Clone, Copy, Debug)]
pub struct View {
    /// Columns of the terminal.
    pub width: usize,
    /// Rows of the terminal.
    pub height: usize,
    /// Seconds since the training began in this process.
    pub elapsed: f64,
    /// Largest resident memory of the process, in bytes.
    pub memory: Option<u64>,
}

/// A training under way, as far as its events have told.
#[derive(Clone, Debug, Default)]
pub struct Training {
    updates: u64,
    parameters: u64,
    held_out: Option<f64>,
    /// Updates that an earlier process made.
    before: u64,
    /// Raw and smoothed loss of each update of this process.
    losses: Vec<(f64, f64)>,
    smooth: Smooth,
    rate: f64,
    grad_norm: f64,
    items: Smooth,
    seconds: Smooth,
    items_per_second: f64,
    unit: &'static str,
    checkpoint: Option<u64>,
}

impl Training {
    /// Takes an event in.
    pub fn see(&mut self, event: &TrainingEvent) {
        match *event {
            TrainingEvent::Begin { updates, parameters, held_out } => {
                *self = Self { updates, parameters, held_out, ..Self::default() };
            }
            TrainingEvent::Update { update, loss, rate, grad_norm, items, unit, seconds } => {
                if self.losses.is_empty() {
                    self.before = update.saturating_sub(1);
                    self.checkpoint = self.checkpoint.or((self.before > 0).then_some(self.before));
                }
                self.losses.push((loss, self.smooth.push(loss)));
                (self.rate, self.grad_norm) = (rate, grad_norm);
                let (items, seconds) = (self.items.push(items as f64), self.seconds.push(seconds));
                self.items_per_second = items / seconds.max(1e-9);
                self.unit = unit;
            }
            TrainingEvent::Checkpoint { update } => self.checkpoint = Some(update),
        }
    }

    /// Updates made, those of earlier processes counted.
    fn done(&self) -> u64 {
        self.before + self.losses.len() as u64
    }

    /// Where it stopped, in a line for the scrollback.
    pub fn epitaph(&self) -> String {
        let mut words = format!("training stopped at update {} of {}", self.done(), self.updates);
        if let Some((_, smooth)) = self.losses.last() {
            words.push_str(&format!(", loss {}", number::plain(*smooth)));
        }
        match self.checkpoint {
            Some(at) => words.push_str(&format!(", last checkpoint at {at}")),
            None => words.push_str(", no checkpoint yet"),
        }
        words
    }

    /// The panel: at most `view.height - 1` lines of less than `view.width` columns.
    pub fn lines(&self, view: &View) -> Vec<Line> {
        let width = view.width.saturating_sub(1).min(WIDEST);
        let most = view.height.saturating_sub(1);
        let mut lines = vec![self.title(width)];
        let cells = self.cells(view);
        let columns = ((width + CELL.1) / (CELL.0 + CELL.1)).clamp(1, cells.len());
        let facts = cells.len().div_ceil(columns);
        let room = most.saturating_sub(1 + facts);
        lines.extend(self.plot(width, room.min(PLOT)));
        // Names go down the columns, so that what belongs together stands together.
        let wide = (width + CELL.1) / columns - CELL.1;
        for row in 0..facts {
            let mut line = Line::default();
            for (i, (name, value)) in cells.iter().skip(row).step_by(facts).enumerate() {
                let gap = if i == 0 { 0 } else { CELL.1 };
                let wide = wide.min(CELL.0 + 6);
                let space = wide.saturating_sub(name.chars().count() + value.chars().count());
                line.push(Ink::Plain, " ".repeat(gap));
                line.push(Ink::Dim, name.clone());
                line.push(Ink::Plain, " ".repeat(space.max(1)));
                line.push(if name == "loss" { Ink::Bold } else { Ink::Plain }, value.clone());
            }
            lines.push(line);
        }
        lines.truncate(most);
        lines.into_iter().map(|line| line.clip(width)).collect()
    }

    /// Name, bar, updates and share.
    fn title(&self, width: usize) -> Line {
        let done = self.done();
        let share = done as f64 / self.updates.max(1) as f64;
        let counted = format!(" {done}/{} {:>3.0} %", self.updates, 100.0 * share);
        let name = "training ";
        let bar = width.saturating_sub(name.len() + counted.chars().count());
        let full = ((bar as f64 * share) as usize).min(bar);
        let mut line = Line::default();
        line.push(Ink::Bold, name);
        line.push(Ink::Curve, "━".repeat(full));
        line.push(Ink::Dim, "─".repeat(bar - full));
        line.push(Ink::Plain, counted);
        line
    }

    /// The loss over the whole run, with its range at the left.
    fn plot(&self, width: usize, rows: usize) -> Vec<Line> {
        let span = self.updates.saturating_sub(self.before + 1).max(1) as f64;
        let points: Vec<(f64, f64, f64)> = self
            .losses
            .iter()
            .enumerate()
            .map(|(i, (raw, smooth))| (i as f64 / span, *raw, *smooth))
            .collect();
        let Some(plot) = curve::plot(&points, width.saturating_sub(GUTTER), rows) else {
            // The place is kept, so that nothing jumps at the first update.
            return vec![Line::default(); rows];
        };
        let last = plot.cells.len() - 1;
        let rows = plot.cells.iter().enumerate().map(|(row, cells)| {
            let edge = match row {
                0 => short(plot.high),
                row if row == last => short(plot.low),
                _ => String::new(),
            };
            let mut line = Line::default();
            line.push(Ink::Dim, format!("{edge:>5} │"));
            for cell in cells {
                line.push(if cell.strong { Ink::Curve } else { Ink::Dim }, cell.glyph);
            }
            line
        });
        rows.collect()
    }

    /// Names and numbers, column by column.
    fn cells(&self, view: &View) -> Vec<(String, String)> {
        let dash = || "–".to_owned();
        let last = self.losses.last();
        let of = |value: f64, text: fn(f64) -> String| last.map_or_else(dash, |_| text(value));
        let made = self.losses.len() as f64;
        let left = self.updates.saturating_sub(self.done()) as f64;
        let remaining = last.map_or_else(dash, |_| clock(view.elapsed / made * left));
        let cell = |name: &str, value: String| (name.to_owned(), value);
        let speed = format!("{}/s", if self.unit.is_empty() { "tokens" } else { self.unit });
        let mut cells = vec![
            cell("loss", of(last.map_or(0.0, |l| l.0), number::plain)),
            cell("smoothed", of(last.map_or(0.0, |l| l.1), number::plain)),
            cell("gradient", of(self.grad_norm, number::plain)),
            cell("rate", of(self.rate, |rate| format!("{rate:.1e}"))),
            cell(&speed, of(self.items_per_second, |n| number::count(n.round() as u64))),
            cell("elapsed", clock(view.elapsed)),
            cell("left", remaining),
            cell("checkpoint", self.checkpoint.map_or_else(dash, |at| at.to_string())),
            cell("memory", view.memory.map_or_else(dash, number::bytes)),
            cell("trains", number::parameters(self.parameters)),
        ];
        // Only where a text was held out: what the model made of it at the start.
        cells.extend(self.held_out.map(|p| cell("ppl before", number::plain(p))));
        cells
    }
}

/// A number in at most five columns, where it is of usual size.
fn short(value: f64) -> String {
    match value.abs() {
        v if v < 10.0 => format!("{value:.2}"),
        v if v < 100.0 => format!("{value:.1}"),
        v if v < 99_999.0 => format!("{value:.0}"),
        _ => format!("{value:.0e}"),
    }
}

/// Seconds as `0:07`, `12:30` or `3:05:00`.
fn clock(seconds: f64) -> String {
    let all = seconds.clamp(0.0, 359_999.0).round() as u64;
    let (hours, minutes, seconds) = (all / 3600, all / 60 % 60, all % 60);
    match hours {
        0 => format!("{minutes}:{seconds:02}"),
        _ => format!("{hours}:{minutes:02}:{seconds:02}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(width: usize, height: usize) -> View {
        View { width, height, elapsed: 41.0, memory: Some(512_000_000) }
    }

    fn update(update: u64, loss: f64) -> TrainingEvent {
        TrainingEvent::Update {
            update,
            loss,
            rate: 1.4e-4,
            grad_norm: 0.84,
            items: 500,
            unit: "tokens",
            seconds: 0.25,
        }
    }

    fn training(made: u64) -> Training {
        let mut training = Training::default();
        training.see(&TrainingEvent::Begin {
            updates: 400,
            parameters: 1_234_567,
            held_out: Some(23.456),
        });
        for i in 1..=made {
            training.see(&update(i, 2.0 + 3.0 / i as f64));
            if i % 100 == 0 {
                training.see(&TrainingEvent::Checkpoint { update: i });
            }
        }
        training
    }

    fn text(training: &Training, width: usize, height: usize) -> Vec<String> {
        training.lines(&view(width, height)).iter().map(Line::plain).collect()
    }

    #[test]
    fn everything_worth_knowing_is_there() {
        let all = text(&training(137), 80, 24).join("\n");
        for part in [
            "137/400",
            "34 %",
            "loss",
            "2.022",
            "smoothed",
            "rate",
            "1.4e-4",
            "gradient",
            "0.840",
            "2,000",
            "0:41",
            "1:19",
            "512 MB",
            "checkpoint",
            "100",
            "ppl before",
            "23.46",
            "1.23 M",
        ] {
            assert!(all.contains(part), "{part} is missing:\n{all}");
        }
        assert!(all.chars().any(|c| ('\u{2801}'..='\u{28ff}').contains(&c)), "no plot:\n{all}");
    }

    #[test]
    fn no_line_reaches_the_edge_and_no_panel_fills_the_screen() {
        for made in [0, 1, 2, 137, 400] {
            let training = training(made);
            for width in [SMALLEST.0, 41, 47, 60, 63, 64, 80, 100, 300] {
                for height in [SMALLEST.1, 11, 13, 24, 60] {
                    let lines = text(&training, width, height);
                    assert!(lines.len() < height, "{width} x {height}: {} lines", lines.len());
                    for line in &lines {
                        let wide = line.chars().count();
                        assert!(wide < width && wide <= WIDEST, "{width}: `{line}` is {wide}");
                        assert!(line.chars().all(|c| !c.is_control()), "{line:?}");
                        assert!(!line.ends_with(' '), "{line:?}");
                    }
                    // The panel keeps its height while it runs, so that nothing jumps.
                    assert_eq!(lines.len(), text(&self::training(0), width, height).len());
                }
            }
        }
    }

    #[test]
    fn the_smallest_terminal_still_shows_the_numbers_that_matter() {
        let all = text(&training(137), SMALLEST.0, SMALLEST.1).join("\n");
        for part in
            ["137/400", "loss", "2.022", "rate", "left", "1:19", "checkpoint", "512 MB", "23.46"]
        {
            assert!(all.contains(part), "{part} is missing:\n{all}");
        }
    }

    #[test]
    fn before_the_first_update_nothing_is_made_up() {
        let all = text(&training(0), 80, 24).join("\n");
        assert!(all.contains("0/400") && all.contains('–') && !all.contains("NaN"), "{all}");
        assert!(!all.contains("inf"), "{all}");
    }

    #[test]
    fn a_resumed_run_counts_what_was_done_before() {
        let mut training = Training::default();
        training.see(&TrainingEvent::Begin { updates: 400, parameters: 1, held_out: None });
        training.see(&update(201, 2.5));
        let all = text(&training, 80, 24).join("\n");
        assert!(all.contains("201/400") && all.contains("50 %"), "{all}");
        assert!(all.contains("200"), "the checkpoint that it goes on from:\n{all}");
        assert!(!all.contains("ppl"), "{all}");
        // 41 s for one update, 199 are left: earlier processes' updates cost this one nothing.
        assert!(all.contains(&clock(41.0 * 199.0)), "{all}");
        assert!(training.epitaph().contains("update 201 of 400"), "{}", training.epitaph());
        assert!(training.epitaph().contains("checkpoint at 200"), "{}", training.epitaph());
    }

    #[test]
    fn looks_are_escape_sequences_around_the_same_text() {
        let strip = |text: &str| {
            let mut out = String::new();
            let mut rest = text;
            while let Some(at) = rest.find('\x1b') {
                out.push_str(&rest[..at]);
                rest = rest[at..].split_once('m').unwrap().1;
            }
            out + rest
        };
        for line in training(137).lines(&view(80, 24)) {
            assert_eq!(strip(&line.ansi()), line.plain());
        }
    }

    #[test]
    fn a_loss_that_is_no_number_breaks_nothing() {
        let mut training = training(3);
        training.see(&update(4, f64::NAN));
        training.see(&update(5, f64::INFINITY));
        let all = text(&training, 60, 20).join("\n");
        assert!(all.contains("not finite"), "{all}");
    }

    #[test]
    fn times_are_read_at_a_glance() {
        assert_eq!([7.4, 750.0, 11_100.0].map(clock), ["0:07", "12:30", "3:05:00"]);
        assert_eq!([4.213, 99.6, 12_345.0].map(short), ["4.21", "99.6", "12345"]);
    }
}
