//! The dashboard of a training on a real terminal: what it shows, and that nothing of it is left, however the run ends.

#![cfg(unix)]

mod common;

use std::io::Read;
use std::os::fd::{FromRawFd, OwnedFd};
use std::process::{Child, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use common::Place;

/// A pseudo-terminal with refit's standard error on it.
struct Terminal {
    master: std::fs::File,
    screen: vt100::Parser,
    bytes: Receiver<Vec<u8>>,
    /// Everything that was written.
    raw: Vec<u8>,
    child: Child,
}

const LINE: &str = "$ refit apply";

impl Terminal {
    /// Runs refit with standard error on a terminal of `rows` x `columns` that shows one line already.
    fn run(
        place: &Place,
        args: &[&str],
        (rows, columns): (u16, u16),
        env: &[(&str, &str)],
    ) -> Self {
        let (mut master, mut slave) = (0, 0);
        let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        let (name, settings) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: both places are written before they are read, and the size outlives the call.
        let opened = unsafe {
            libc::openpty(&mut master, &mut slave, name, settings, &raw const size as *mut _)
        };
        assert_eq!(opened, 0, "no pseudo-terminal: {}", std::io::Error::last_os_error());
        // SAFETY: `openpty` gave these descriptors to nobody else.
        let (master, slave) =
            unsafe { (std::fs::File::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) };
        let mut command = place.command();
        command.args(args).stdout(Stdio::null()).stdin(Stdio::null()).stderr(slave);
        command.env("TERM", "xterm-256color").env_remove("NO_COLOR").envs(env.iter().copied());
        let child = command.spawn().unwrap();
        // The parent's copy of the slave's end goes with the command; the master then ends with the child.
        drop(command);
        let (sender, bytes) = mpsc::channel();
        let mut reader = master.try_clone().unwrap();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(len @ 1..) = reader.read(&mut buffer) {
                if sender.send(buffer[..len].to_vec()).is_err() {
                    return;
                }
            }
        });
        let mut screen = vt100::Parser::new(rows, columns, 0);
        screen.process(format!("{LINE}\r\n").as_bytes());
        Self { master, screen, bytes, raw: Vec::new(), child }
    }

    fn text(&self) -> String {
        self.screen.screen().contents()
    }

    /// Takes in what is written until `enough` says so (true) or the run is over (false).
    fn until(&mut self, enough: impl Fn(&str) -> bool) -> bool {
        let deadline = Instant::now() + Duration::from_secs(120);
        while Instant::now() < deadline {
            match self.bytes.recv_timeout(Duration::from_millis(100)) {
                Ok(bytes) => {
                    self.screen.process(&bytes);
                    self.raw.extend(bytes);
                    if enough(&self.text()) {
                        return true;
                    }
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => return false,
            }
        }
        panic!("nothing for two minutes:\n{}", self.text());
    }

    fn signal(&self, signal: i32) {
        // SAFETY: sends a signal to a child that has not been waited for.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, signal) }, 0);
    }

    fn resize(&mut self, rows: u16, columns: u16) {
        use std::os::fd::AsRawFd;
        let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: the descriptor is open and the size outlives the call.
        let set =
            unsafe { libc::ioctl(self.master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
        assert_eq!(set, 0);
        self.screen.screen_mut().set_size(rows, columns);
    }

    /// The run's exit code and the lines that it left below the first one.
    fn end(&mut self) -> (i32, Vec<String>) {
        self.until(|_| false);
        let code = self.child.wait().unwrap().code().unwrap_or(-1);
        let text = self.text();
        let mut lines = text.lines().map(str::to_owned);
        assert_eq!(lines.next().as_deref(), Some(LINE), "what stood above is gone:\n{text}");
        let (row, column) = self.screen.screen().cursor_position();
        let left: Vec<String> = lines.filter(|line| !line.trim().is_empty()).collect();
        assert_eq!(column, 0, "the cursor is in the middle of row {row}:\n{text}");
        assert!(!self.screen.screen().hide_cursor(), "the cursor is hidden");
        (code, left)
    }
}

const TRAIN: [&str; 16] = [
    "apply",
    "lora",
    "builtin:tiny",
    "--data",
    "builtin:kjv-calib",
    "--rank",
    "2",
    "--batch",
    "1",
    "--max-length",
    "32",
    "--checkpoint-every",
    "5",
    "-o",
    "out",
    "--steps",
];

fn training(steps: &'static str, more: &[&'static str]) -> Vec<&'static str> {
    [&TRAIN[..], &[steps], more].concat()
}

#[test]
fn a_training_shows_a_panel_and_takes_it_away() {
    let place = Place::new();
    let args = training("200", &["--text", "builtin:kjv"]);
    let mut terminal = Terminal::run(&place, &args, (24, 80), &[]);
    assert!(terminal.until(|text| text.contains("/200")
        && text.contains("checkpoint      ")
        && text.contains("ppl before")));
    assert!(
        terminal.until(|text| text.chars().any(|c| ('\u{2801}'..='\u{28ff}').contains(&c))),
        "{}",
        terminal.text()
    );
    let text = terminal.text();
    for part in ["training", "smoothed", "gradient", "rate", "tokens/s", "left", "memory"] {
        assert!(text.contains(part), "{part} is missing:\n{text}");
    }
    assert!(text.starts_with(LINE), "{text}");
    assert!(String::from_utf8_lossy(&terminal.raw).contains("\x1b[36m"), "no colours");
    assert_eq!(terminal.end(), (0, vec![]));
}

#[test]
fn ctrl_c_leaves_two_lines_and_errors_one() {
    let place = Place::new();
    let mut terminal = Terminal::run(&place, &training("5000", &[]), (24, 80), &[]);
    assert!(terminal.until(|text| text.contains("checkpoint")
        && !text.contains(" 0/5000")
        && text.contains("/5000")));
    terminal.signal(libc::SIGINT);
    let (code, left) = terminal.end();
    assert_eq!(code, 4);
    assert!(
        left[0].starts_with("training stopped at update ") && left[0].contains("of 5000"),
        "{left:?}"
    );
    assert!(left[1].starts_with("error: interrupted"), "{left:?}");
    assert!(!left.concat().contains(['━', '─', '│']), "{left:?}");

    let place = Place::new();
    let wild = training(
        "5000",
        &["--optimizer", "sgd", "--learning-rate", "1e6", "--clip", "0", "--warmup", "0"],
    );
    let mut terminal = Terminal::run(&place, &wild, (24, 80), &[]);
    let (code, left) = terminal.end();
    assert_ne!(code, 0);
    assert!(left[0].starts_with("error: "), "{left:?}");
    assert!(!left.concat().contains(['━', '│']), "{left:?}");
}

#[test]
fn small_terminals_get_a_bar_and_no_color_is_heard() {
    let place = Place::new();
    let mut terminal =
        Terminal::run(&place, &training("120", &["--force"]), (24, 40), &[("NO_COLOR", "1")]);
    assert!(terminal.until(|text| text.contains("/120") && text.contains("smoothed")));
    assert!(terminal.text().lines().all(|line| line.chars().count() < 40), "{}", terminal.text());
    assert_eq!(terminal.end(), (0, vec![]));
    let raw = String::from_utf8_lossy(&terminal.raw).into_owned();
    for looks in ["\x1b[1m", "\x1b[2m", "\x1b[36m", "\x1b[0m"] {
        assert!(!raw.contains(looks), "{looks:?} under NO_COLOR");
    }
    for (size, env) in
        [((24, 39), ("NO_COLOR", "1")), ((9, 80), ("NO_COLOR", "1")), ((24, 80), ("TERM", "dumb"))]
    {
        let mut terminal = Terminal::run(&place, &training("120", &["--force"]), size, &[env]);
        assert!(
            !terminal.until(|text| text.contains("smoothed")),
            "{size:?} {env:?}:\n{}",
            terminal.text()
        );
        assert_eq!(terminal.child.wait().unwrap().code(), Some(0), "{}", terminal.text());
    }
}

#[test]
fn a_terminal_that_changes_its_size_ends_clean() {
    let place = Place::new();
    let mut terminal = Terminal::run(&place, &training("400", &[]), (24, 100), &[]);
    for (rows, columns) in [(24, 120), (30, 97), (24, 100)] {
        assert!(terminal.until(|text| text.contains("smoothed")), "{}", terminal.text());
        terminal.resize(rows, columns);
    }
    assert_eq!(terminal.end(), (0, vec![]));
}

#[test]
fn quiet_says_nothing() {
    let place = Place::new();
    let mut terminal = Terminal::run(&place, &training("30", &["--quiet"]), (24, 80), &[]);
    assert_eq!(terminal.end(), (0, vec![]));
    assert!(terminal.raw.is_empty());
}
