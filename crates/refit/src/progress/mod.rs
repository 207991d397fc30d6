//! Progress on standard error: bars on a terminal, a dashboard for trainings, plain lines elsewhere, nothing when quiet.

mod curve;
mod dashboard;
mod panel;

use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use refit_methods::method::TrainingEvent;

use panel::Dashboard;
pub use panel::abandon;

/// As the standard one, except that a reader who closed standard error does not end the program.
macro_rules! eprintln {
    ($($what:tt)*) => {{
        let _ = writeln!(std::io::stderr(), $($what)*);
    }};
}

/// How progress is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// A bar that redraws itself.
    Bar,
    /// For stages of two seconds and more: a line when that is known, every ten seconds, and at the end.
    Lines,
    /// Nothing.
    Quiet,
}

impl Style {
    /// What suits this process: `--quiet` wins, then whether standard error is a terminal.
    pub fn choose(quiet: bool) -> Self {
        match (quiet, std::io::stderr().is_terminal()) {
            (true, _) => Self::Quiet,
            (false, true) => Self::Bar,
            (false, false) => Self::Lines,
        }
    }
}

/// Shows the stages of a piece of work; shared between threads.
#[derive(Debug)]
pub struct Progress {
    style: Style,
    stage: Mutex<Option<Stage>>,
}

#[derive(Debug)]
struct Stage {
    name: String,
    bar: ProgressBar,
    began: Instant,
    said: Option<Instant>,
    bytes: bool,
    status: String,
    /// In place of the bar.
    dashboard: Option<Dashboard>,
}

/// Stages shorter than this are not worth a line.
const WORTH: Duration = Duration::from_secs(2);
/// Between two lines about the same stage.
const EVERY: Duration = Duration::from_secs(10);

impl Progress {
    /// Progress in the given style.
    pub fn new(style: Style) -> Self {
        Self { style, stage: Mutex::new(None) }
    }

    /// A stage begins that counts to `total`; 0 when that is not known.
    pub fn begin(&self, name: &str, total: u64, unit: &str) {
        self.end();
        if self.style == Style::Quiet {
            return;
        }
        let bar = ProgressBar::with_draw_target((total > 0).then_some(total), self.target());
        let bytes = unit == "bytes";
        let count = if bytes {
            "{bytes}/{total_bytes} {bytes_per_sec}".to_owned()
        } else {
            format!("{{pos}}/{{len}} {unit}")
        };
        let template = match total {
            0 => "{prefix:28} {spinner} {elapsed}".to_owned(),
            _ => format!("{{prefix:28}} {{bar:28.cyan/blue.dim}} {count} {{eta}} {{msg:.dim}}"),
        };
        if let Ok(style) = ProgressStyle::with_template(&template) {
            bar.set_style(style.progress_chars("━╸─"));
        }
        bar.set_prefix(name.to_owned());
        if self.style == Style::Bar {
            bar.enable_steady_tick(Duration::from_millis(200));
        }
        let (name, began) = (name.to_owned(), Instant::now());
        let status = String::new();
        *self.lock() = Some(Stage { name, bar, began, said: None, bytes, status, dashboard: None });
    }

    /// `by` more are done.
    pub fn advance(&self, by: u64) {
        if let Some(stage) = self.lock().as_mut() {
            stage.bar.inc(by);
            let due = match stage.said {
                Some(said) => said.elapsed() >= EVERY,
                None => stage.began.elapsed() >= WORTH,
            };
            if self.style == Style::Lines && due {
                stage.said = Some(Instant::now());
                let share = match stage.bar.length() {
                    Some(total) if total > 0 => {
                        format!(" {:.0} %", 100.0 * stage.bar.position() as f64 / total as f64)
                    }
                    _ if stage.bytes => {
                        format!(" {}", crate::report::number::bytes(stage.bar.position()))
                    }
                    _ => format!(" {}", stage.bar.position()),
                };
                let status = match stage.status.as_str() {
                    "" => String::new(),
                    words => format!(", {words}"),
                };
                eprintln!("{} ...{share}{status}", stage.name);
            }
        }
    }

    /// Sets how much is done, for sources that count for themselves.
    pub fn set(&self, position: u64, total: Option<u64>) {
        let by = match self.lock().as_ref() {
            Some(stage) => {
                if let Some(total) = total {
                    stage.bar.set_length(total);
                }
                position.saturating_sub(stage.bar.position())
            }
            None => 0,
        };
        self.advance(by);
    }

    /// The stage is a training, and this happened in it. A terminal with room for it shows a dashboard.
    pub fn training(&self, event: &TrainingEvent) {
        let mut stage = self.lock();
        let Some(stage) = stage.as_mut() else { return };
        if let TrainingEvent::Begin { .. } = event
            && self.style == Style::Bar
        {
            if panel::fits() {
                stage.bar.finish_and_clear();
                let target = ProgressDrawTarget::hidden();
                stage.bar = ProgressBar::with_draw_target(stage.bar.length(), target);
                stage.dashboard = Some(Dashboard::open(event));
            }
            return;
        }
        if let Some(dashboard) = &stage.dashboard {
            dashboard.see(event);
        }
        if let TrainingEvent::Update { loss, rate, items, unit, seconds, .. } = event {
            let speed = *items as f64 / seconds.max(1e-9);
            stage.status = format!("loss {loss:.3}, rate {rate:.1e}, {speed:.0} {unit}/s");
            stage.bar.set_message(stage.status.clone());
        }
    }

    /// The stage is over.
    pub fn end(&self) {
        if let Some(stage) = self.lock().take() {
            stage.bar.finish_and_clear();
            if let Some(dashboard) = &stage.dashboard {
                dashboard.close();
            }
            let took = stage.began.elapsed();
            if self.style == Style::Lines && took >= WORTH {
                eprintln!(
                    "{} done in {}",
                    stage.name,
                    crate::report::number::seconds(took.as_secs_f64())
                );
            }
        }
    }

    /// A line worth showing now.
    pub fn note(&self, message: &str) {
        if self.style == Style::Quiet {
            return;
        }
        match self.lock().as_ref() {
            Some(Stage { dashboard: Some(dashboard), .. }) => dashboard.note(message),
            Some(stage) if self.style == Style::Bar => stage.bar.suspend(|| eprintln!("{message}")),
            _ => eprintln!("{message}"),
        }
    }

    fn target(&self) -> ProgressDrawTarget {
        match self.style {
            Style::Bar => ProgressDrawTarget::stderr(),
            _ => ProgressDrawTarget::hidden(),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Stage>> {
        // A thread that panicked while showing progress left nothing half-done here.
        self.stage.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
