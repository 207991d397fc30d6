//! Draws the dashboard in place, below what the terminal already shows, and leaves nothing behind.
//!
//! The cursor stays visible and below the panel, colours are reset within each line, and nothing of the terminal's state is
//! changed: a process that is killed leaves the last picture and a terminal that works.

use std::io::Write;
use std::sync::{Arc, Mutex, Once, PoisonError, TryLockError, Weak};
use std::time::{Duration, Instant};

use refit_methods::method::TrainingEvent;

use super::dashboard::{Line, SMALLEST, Training, View};

/// Between two pictures, unless the terminal changed.
const FRAME: Duration = Duration::from_millis(100);
/// The clock goes on where updates take long.
const TICK: Duration = Duration::from_millis(250);

/// The dashboard that is on the screen now: what Ctrl-C and panics must clear away.
static SHOWN: Mutex<Weak<Mutex<Live>>> = Mutex::new(Weak::new());

/// Rows and columns of the terminal behind standard error, when a panel has room there.
fn size() -> Option<(usize, usize)> {
    let (rows, columns) = console::Term::stderr().size_checked()?;
    let (width, height) = (usize::from(columns), usize::from(rows));
    (width >= SMALLEST.0 && height >= SMALLEST.1).then_some((width, height))
}

/// Whether the terminal behind standard error can redraw in place and has room for a panel.
pub fn fits() -> bool {
    std::env::var_os("TERM").is_none_or(|term| term != "dumb") && size().is_some()
}

/// <https://no-color.org>: any value but the empty one.
fn colours() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// A panel on the screen.
#[derive(Debug)]
pub struct Dashboard(Arc<Mutex<Live>>);

#[derive(Debug)]
struct Live {
    training: Training,
    began: Instant,
    drawn: Option<Instant>,
    /// Widths of the lines on the screen, topmost first.
    lines: Vec<usize>,
    state: Showing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Showing {
    /// On the screen.
    Yes,
    /// Cleared away for another message until the training says more.
    Paused,
    /// For good.
    Over,
}

impl Dashboard {
    /// A panel for a training that begins now, on a terminal that it [`fits`].
    pub fn open(begin: &TrainingEvent) -> Self {
        let mut training = Training::default();
        training.see(begin);
        let live = Live {
            training,
            began: Instant::now(),
            drawn: None,
            lines: Vec::new(),
            state: Showing::Yes,
        };
        let live = Arc::new(Mutex::new(live));
        *lock(&SHOWN) = Arc::downgrade(&live);
        install_panic_hook();
        lock(&live).draw();
        let ticking = Arc::downgrade(&live);
        // Without a thread the clock stands still between updates: not worth failing for.
        let _ = std::thread::Builder::new().name("dashboard".into()).spawn(move || {
            loop {
                std::thread::sleep(TICK);
                let Some(live) = ticking.upgrade() else { return };
                let mut live = lock(&live);
                match live.state {
                    Showing::Yes => live.draw(),
                    Showing::Paused => {}
                    Showing::Over => return,
                }
            }
        });
        Self(live)
    }

    /// Takes in what happened.
    pub fn see(&self, event: &TrainingEvent) {
        let mut live = lock(&self.0);
        live.training.see(event);
        if live.state == Showing::Paused {
            live.state = Showing::Yes;
        }
        if live.state == Showing::Yes && live.drawn.is_none_or(|drawn| drawn.elapsed() >= FRAME) {
            live.draw();
        }
    }

    /// Prints a line above the panel.
    pub fn note(&self, message: &str) {
        let mut live = lock(&self.0);
        live.erase();
        let _ = writeln!(std::io::stderr(), "{message}");
        if live.state == Showing::Yes {
            live.draw();
        }
    }

    /// Clears the panel away.
    pub fn close(&self) {
        let mut live = lock(&self.0);
        live.erase();
        live.state = Showing::Over;
    }
}

impl Drop for Dashboard {
    fn drop(&mut self) {
        self.close();
    }
}

/// Clears the panel away for good and returns true; false where none is shown. With `say`, a line tells where the training stood.
pub fn abandon(say: bool) -> bool {
    let Some(live) = shown() else { return false };
    // Whoever draws is done in a moment; a signal must not wait for more than that.
    for _ in 0..50 {
        if let Some(mut live) = try_lock(&live) {
            let was = live.state;
            if was == Showing::Over {
                return false;
            }
            live.erase();
            live.state = Showing::Over;
            if say {
                let _ = writeln!(std::io::stderr(), "{}", live.training.epitaph());
            }
            return true;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    false
}

/// Clears the panel away so that a panic's message stands alone; a training that goes on all the same shows it again.
fn install_panic_hook() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            // Where the panic came from drawing itself, the lock is held and the panel is lost.
            if let Some(live) = shown()
                && let Some(mut live) = try_lock(&live)
                && live.state == Showing::Yes
            {
                live.erase();
                live.state = Showing::Paused;
            }
            usual(info);
        }));
    });
}

fn shown() -> Option<Arc<Mutex<Live>>> {
    try_lock(&SHOWN)?.upgrade()
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // A thread that panicked while drawing left nothing half-done here.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn try_lock<T>(mutex: &Mutex<T>) -> Option<std::sync::MutexGuard<'_, T>> {
    match mutex.try_lock() {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

impl Live {
    fn draw(&mut self) {
        self.drawn = Some(Instant::now());
        // A terminal that became too small shows nothing until it grows again.
        let Some((width, height)) = size() else { return self.erase() };
        let view = View {
            width,
            height,
            elapsed: self.began.elapsed().as_secs_f64(),
            memory: refit_train::measure::peak_memory(),
        };
        let lines = self.training.lines(&view);
        let picture = picture(&self.lines, &lines, width, colours());
        self.lines = lines.iter().map(Line::width).collect();
        let _ = write_at_once(&picture);
    }

    fn erase(&mut self) {
        if self.lines.is_empty() {
            return;
        }
        let width = console::Term::stderr().size_checked().map_or(usize::MAX, |(_, w)| w.into());
        let _ = write_at_once(&picture(&self.lines, &[], width, false));
        self.lines.clear();
    }
}

/// One write, so that no other output falls between two lines.
fn write_at_once(text: &str) -> std::io::Result<()> {
    let mut err = std::io::stderr().lock();
    err.write_all(text.as_bytes())?;
    err.flush()
}

/// What turns the lines on the screen, of the given widths, into others: back to their first row, each new line over an old one,
/// and nothing below them. Terminals wrap lines anew when they become narrower; the rows that this gives are counted.
fn picture(shown: &[usize], lines: &[Line], width: usize, colours: bool) -> String {
    let rows: usize = shown.iter().map(|line| line.div_ceil(width.max(1)).max(1)).sum();
    let mut text = String::new();
    if rows > 0 {
        text.push_str(&format!("\x1b[{rows}F"));
    }
    for line in lines {
        text.push_str(&if colours { line.ansi() } else { line.plain() });
        text.push_str("\x1b[K\n");
    }
    text.push_str("\x1b[J");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A terminal as far as a picture needs one: rows of text, a cursor, no wrapping.
    #[derive(Default)]
    struct Screen {
        rows: Vec<Vec<char>>,
        at: (usize, usize),
    }

    impl Screen {
        fn show(&mut self, text: &str) {
            let mut rest = text.chars();
            while let Some(c) = rest.next() {
                let (row, column) = &mut self.at;
                match c {
                    '\n' => (*row, *column) = (*row + 1, 0),
                    '\x1b' => {
                        let mut argument = String::new();
                        rest.next();
                        let code = loop {
                            match rest.next().unwrap() {
                                c if c.is_ascii_alphabetic() => break c,
                                c => argument.push(c),
                            }
                        };
                        match code {
                            'F' => (*row, *column) = (*row - argument.parse::<usize>().unwrap(), 0),
                            'K' => {
                                self.rows.resize(self.rows.len().max(*row + 1), Vec::new());
                                self.rows[*row].truncate(*column);
                            }
                            'J' => self.rows.truncate(*row),
                            _ => assert_eq!(code, 'm'),
                        }
                    }
                    c => {
                        let len = self.rows.len().max(*row + 1);
                        self.rows.resize(len, Vec::new());
                        let line = &mut self.rows[*row];
                        line.resize(line.len().max(*column + 1), ' ');
                        line[*column] = c;
                        *column += 1;
                    }
                }
            }
        }
    }

    fn lines(training: &Training, width: usize) -> Vec<Line> {
        training.lines(&View { width, height: 24, elapsed: 3.0, memory: None })
    }

    #[test]
    fn a_picture_replaces_the_last_one_and_is_cleared_without_a_trace() {
        let mut training = Training::default();
        training.see(&TrainingEvent::Begin { updates: 9, parameters: 1, held_out: None });
        let mut screen = Screen::default();
        screen.show("$ refit apply lora\n");
        let mut shown = Vec::new();
        for width in [80, 80, 60, 100] {
            let new = lines(&training, width);
            // As wide as before or wider: nothing wraps.
            screen.show(&picture(&shown, &new, 100, false));
            shown = new.iter().map(Line::width).collect();
            let rows: Vec<String> =
                screen.rows[1..].iter().map(|row| row.iter().collect()).collect();
            assert_eq!(rows, new.iter().map(Line::plain).collect::<Vec<_>>(), "{width}");
        }
        screen.show(&picture(&shown, &[], 100, false));
        assert_eq!((screen.rows.len(), screen.at), (1, (1, 0)));
    }

    #[test]
    fn rows_that_a_narrower_terminal_wraps_are_counted() {
        // 79 columns take two rows of 40 and three of 39; an empty line takes one.
        assert!(picture(&[79, 0, 40], &[], 40, false).starts_with("\x1b[4F"));
        assert!(picture(&[79, 0, 40], &[], 39, false).starts_with("\x1b[6F"));
        assert!(picture(&[79, 0, 40], &[], 80, false).starts_with("\x1b[3F"));
        assert!(picture(&[], &[], 80, false).starts_with("\x1b[J"));
    }

    #[test]
    fn without_colours_there_are_only_movements() {
        let mut training = Training::default();
        training.see(&TrainingEvent::Begin { updates: 9, parameters: 1, held_out: None });
        let text = picture(&[], &lines(&training, 80), 80, false);
        assert!(!text.contains("\x1b[1m") && !text.contains("\x1b[2m") && text.contains("\x1b[K"));
        assert!(picture(&[], &lines(&training, 80), 80, true).contains("\x1b[1m"));
    }
}
