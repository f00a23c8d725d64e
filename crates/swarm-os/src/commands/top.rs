//! `swarm-os top`: what `status` says, on the whole screen and live.

use std::io::{self, IsTerminal};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Color, Style, Stylize};
use ratatui::text::Line;
use ratatui::widgets::Paragraph;
use serde_json::Value;

use super::status::{RIGHT, headline, rows};
use crate::failure::{Code, Failure};
use crate::interrupt::{self, Repeat};
use crate::live;
use crate::present::text;

/// Between two looks at the processes.
const EVERY: Duration = Duration::from_millis(500);
/// Longest wait for a key before the screen is drawn again.
const KEY: Duration = Duration::from_millis(100);

pub fn top() -> Result<(), Failure> {
    if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        return Err(Failure::usage("top needs a terminal; `swarm-os status` prints what it would show"));
    }
    // What cannot be looked at is said before the screen is taken.
    let first = live::look()?;
    let news = watch()?;
    let signalled = Arc::new(AtomicBool::new(false));
    let flag = signalled.clone();
    let _during = interrupt::during(Repeat::End, move || flag.store(true, Ordering::Relaxed));
    let failed =
        |error: io::Error| Failure::new(Code::Failed, format!("the terminal cannot be used: {error}"));
    // A panic restores the terminal as well: this sets a hook that does it before the panic is told.
    let mut terminal = ratatui::try_init().map_err(failed)?;
    let _screen = Screen;
    let mut view = View { processes: first, scroll: 0 };
    while !signalled.load(Ordering::Relaxed) {
        loop {
            match news.try_recv() {
                Ok(processes) => view.processes = processes,
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return Err(failed(io::ErrorKind::BrokenPipe.into())),
            }
        }
        terminal.draw(|frame| view.draw(frame)).map_err(failed)?;
        if let Some(key) = key().map_err(failed)?
            && view.press(key)
        {
            break;
        }
    }
    Ok(())
}

/// Gives the terminal back when dropped.
struct Screen;

impl Drop for Screen {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

/// Looks at the processes on a thread of its own: one that is stopped answers late, and keys must not wait for it.
fn watch() -> Result<Receiver<Vec<Value>>, Failure> {
    let (sink, news) = mpsc::channel();
    // Only to wait for: nobody tells it anything.
    let (pause, never) = (std::sync::Condvar::new(), Mutex::new(()));
    let look = move || {
        while let Ok(processes) = live::look() {
            if sink.send(processes).is_err() {
                return;
            }
            let guard = never.lock().unwrap_or_else(PoisonError::into_inner);
            drop(pause.wait_timeout(guard, EVERY));
        }
    };
    let spawned = thread::Builder::new().name("look".into()).spawn(look);
    spawned.map_err(|error| Failure::new(Code::Failed, format!("a thread cannot be started: {error}")))?;
    Ok(news)
}

/// A key that was pressed, if one is within a moment.
fn key() -> io::Result<Option<KeyEvent>> {
    if !event::poll(KEY)? {
        return Ok(None);
    }
    Ok(match event::read()? {
        Event::Key(key) if key.kind == KeyEventKind::Press => Some(key),
        _ => None,
    })
}

/// What is shown, and from which line on.
struct View {
    processes: Vec<Value>,
    scroll: u16,
}

impl View {
    /// True when the key means to leave.
    fn press(&mut self, key: KeyEvent) -> bool {
        match key.code {
            KeyCode::Char('c') => return key.modifiers.contains(KeyModifiers::CONTROL),
            KeyCode::Char('q') | KeyCode::Esc => return true,
            KeyCode::Down => self.scroll = self.scroll.saturating_add(1),
            KeyCode::Up => self.scroll = self.scroll.saturating_sub(1),
            KeyCode::Home => self.scroll = 0,
            _ => {}
        }
        false
    }

    fn draw(&mut self, frame: &mut Frame<'_>) {
        let [head, body] = Layout::vertical([Constraint::Length(2), Constraint::Min(0)]).areas(frame.area());
        let lines = lines(&self.processes);
        // Never beyond the last line.
        let hidden = lines.len().saturating_sub(usize::from(body.height));
        self.scroll = self.scroll.min(u16::try_from(hidden).unwrap_or(u16::MAX));
        let below = hidden.saturating_sub(usize::from(self.scroll));
        let more = if hidden == 0 { String::new() } else { format!(", arrows scroll ({below} lines below)") };
        frame.render_widget(Paragraph::new(Line::from(format!("swarm-os top: q leaves{more}")).dim()), head);
        frame.render_widget(Paragraph::new(lines).scroll((self.scroll, 0)), body);
    }
}

/// The screen, line by line.
fn lines(processes: &[Value]) -> Vec<Line<'static>> {
    if processes.is_empty() {
        return vec![Line::from(
            "nothing of swarm-os runs here; `swarm-os worker` or `swarm-os chat` starts it",
        )];
    }
    let mut lines = Vec::new();
    for process in processes {
        let down = !process["fault"].is_null();
        let style = Style::new().bold().fg(colour(if down { "lost" } else { "up" }));
        lines.push(Line::styled(headline(process), style));
        let nodes = process["nodes"].as_array().into_iter().flatten();
        let states = nodes.map(|node| Style::new().fg(colour(node["state"].as_str().unwrap_or_default())));
        // The heading has no state.
        let styles = std::iter::once(Style::new().dim()).chain(states);
        let table = text::table(&rows(process), RIGHT);
        lines.extend(table.lines().zip(styles).map(|(line, style)| Line::styled(line.to_owned(), style)));
        lines.push(Line::default());
    }
    lines
}

fn colour(state: &str) -> Color {
    match state {
        "lost" => Color::Red,
        "suspect" => Color::Yellow,
        _ => Color::Reset,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use serde_json::json;

    fn processes() -> Vec<Value> {
        let node = |name: &str, layers: [u32; 2], state: &str| {
            json!({"name": name, "layers": layers, "state": state, "memory_bytes": 612_000_000,
                "weight_bytes": 600_000_000, "kv_bytes": 1_500_000, "round_trip_ms": 0.5,
                "compute_ms_p50": 2.25, "hop_ms_p50": 0.08, "hop_ms_p99": 0.31})
        };
        vec![
            json!({"role": "coordinator", "process": 7, "model": "m\u{1b}[2J", "fault": null, "sessions": 1,
                "tokens": 12, "tok_per_s": 3.5, "lap_ms_p50": 4.0, "lap_ms_p99": 5.0, "links_refused": {},
                "nodes": [node("here-1a2b", [0, 9], "up"), node("there-3c4d", [9, 18], "suspect"),
                    node("den-5e6f", [18, 30], "lost")]}),
            json!({"role": "coordinator", "process": 9, "model": "small", "fault": "the ring was lost",
                "sessions": 0, "tokens": 0, "tok_per_s": null, "lap_ms_p50": null, "lap_ms_p99": null,
                "links_refused": {"order": 2}, "nodes": []}),
            json!({"role": "worker", "process": 8, "name": "w", "port": 9, "memory_bytes": 2_000_000_000u64,
                "kept_bytes": 600_000_000, "links_refused": {}, "stage": null}),
        ]
    }

    fn screen(view: &mut View, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(110, height)).unwrap();
        terminal.draw(|frame| view.draw(frame)).unwrap();
        let screen = terminal.backend().to_string();
        let lines: Vec<&str> = screen.lines().map(|line| line.trim_matches('"').trim_end()).collect();
        lines.join("\n")
    }

    const SCREEN: &str = r"swarm-os top: q leaves

coordinator of m\u{1b}[2J (process 7): 1 session, 3.5 tok/s, 12 tokens, lap 4.00 ms (p99 5.00)
node        state    layers    memory  KV rows  compute      hop      p99  round trip
here-1a2b   up         0..9  612.0 MB   1.5 MB  2.25 ms  0.08 ms  0.31 ms     0.50 ms
there-3c4d  suspect   9..18  612.0 MB   1.5 MB  2.25 ms  0.08 ms  0.31 ms     0.50 ms
den-5e6f    lost     18..30  612.0 MB   1.5 MB  2.25 ms  0.08 ms  0.31 ms     0.50 ms

coordinator of small (process 9): down: the ring was lost, 0 tokens, lap - (p99 -), links refused: 2 order
node  state  layers  memory  KV rows  compute  hop  p99  round trip

worker w (process 8, port 9): waits, offers 2.00 GB, keeps 600.0 MB of weights

";

    #[test]
    fn the_screen_shows_every_process() {
        assert_eq!(screen(&mut View { processes: processes(), scroll: 0 }, 14), SCREEN);
        let nothing = screen(&mut View { processes: Vec::new(), scroll: 3 }, 4);
        assert!(nothing.contains("nothing of swarm-os runs here"), "{nothing}");
    }

    #[test]
    fn who_is_silent_is_yellow_and_who_is_lost_is_red() {
        let lines = lines(&processes());
        let of = |text: &str| lines.iter().find(|line| line.to_string().contains(text)).unwrap().style.fg;
        let colours = ["here-", "there-", "den-5e6f", "the ring was lost"].map(of);
        let want = [Color::Reset, Color::Yellow, Color::Red, Color::Red];
        assert_eq!(colours, want.map(Some));
    }

    #[test]
    fn a_small_screen_scrolls_to_the_last_line_and_no_further() {
        let mut view = View { processes: processes(), scroll: 0 };
        let first = screen(&mut view, 5);
        assert!(first.contains("coordinator of m") && !first.contains("worker w"), "{first}");
        for _ in 0..100 {
            assert!(!view.press(KeyCode::Down.into()));
        }
        let last = screen(&mut view, 5);
        assert!(last.contains("worker w") && last.contains("(0 lines below)"), "{last}");
        assert!(!view.press(KeyCode::Home.into()));
        assert_eq!(screen(&mut view, 5), first);
    }

    #[test]
    fn keys_that_leave() {
        let mut view = View { processes: Vec::new(), scroll: 0 };
        assert!(view.press(KeyCode::Char('q').into()) && view.press(KeyCode::Esc.into()));
        assert!(view.press(KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL)));
        assert!(!view.press(KeyCode::Char('c').into()) && !view.press(KeyCode::Char('x').into()));
    }
}
