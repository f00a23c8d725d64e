//! `swarm-os chat`: a conversation.

use std::path::{Path, PathBuf};

use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use swarm_node::{Engine, Message, Prompt, Request};

use super::run;
use crate::args::ChatArgs;
use crate::failure::{Code, Failure};
use crate::interrupt::Repeat;
use crate::present::answer;
use crate::present::progress::Progress;
use crate::present::text::{self, AnswerOut};
use crate::settings::{self, Search, Start};

const HELP: &str = "\
/help   this list
/stats  what was measured of the last answer
/nodes  which layers are where
/reset  forget the conversation
/exit   leave (also: exit, Ctrl-D)
Ctrl-C stops an answer; everything else is sent to the model.";

/// Lines the history file keeps.
const HISTORY_LINES: usize = 1000;

pub fn chat(args: &ChatArgs) -> Result<(), Failure> {
    let template = Request { keep: true, ..settings::request(&args.answer, Prompt::Chat(Vec::new()))? };
    let start = Start::new(&args.model, &args.ring, Search::of(&args.look, args.role.is_some()))?;
    let history = settings::state_folder()?.join("history.txt");
    let looked = start.config.search.at_most > 0;
    let progress = Progress::new(start.local.is_none());
    let running = start.go(&progress)?;
    let engine = &running.engine;
    let _shown = run::show(engine);
    if !engine.can_chat() {
        return Err(Failure::usage(format!(
            "{} has no chat template; use a chat model, or `swarm-os run --raw`",
            engine.model_name()
        )));
    }
    let nodes = engine.nodes().len();
    if looked && engine.plan().left_out.is_empty() && nodes == 1 {
        text::note("no worker was found; this computer answers alone");
    } else if looked {
        text::note(&format!("{}; --split always or never decides otherwise", engine.plan().sentence));
    }
    text::say(&format!(
        "{}, context {}, {nodes} node{}\n{}\n/help lists commands, exit leaves",
        text::line(engine.model_name()),
        engine.context(),
        if nodes == 1 { "" } else { "s" },
        answer::nodes(engine)
    ))?;
    let mut console = Console {
        engine,
        progress: &progress,
        template,
        messages: Vec::new(),
        system: args.answer.system.as_deref().map(Message::system),
        last: None,
    };
    console.forget();
    talk(&mut console, &history)
}

/// What the user's line asks for.
#[derive(Debug, PartialEq, Eq)]
enum Line<'a> {
    Empty,
    Help,
    Stats,
    Nodes,
    Reset,
    Exit,
    Unknown(&'a str),
    Say(&'a str),
}

fn read(line: &str) -> Line<'_> {
    match line.trim() {
        "" => Line::Empty,
        "/help" => Line::Help,
        "/stats" => Line::Stats,
        "/nodes" => Line::Nodes,
        "/reset" => Line::Reset,
        "/exit" | "/quit" | "exit" => Line::Exit,
        // A slash alone does not make a command: paths and fractions are ordinary text.
        word if word.starts_with('/') && word[1..].chars().all(|char| char.is_ascii_lowercase()) => {
            Line::Unknown(word)
        }
        text => Line::Say(text),
    }
}

/// Reads lines until the user leaves.
fn talk(console: &mut Console<'_>, history: &Path) -> Result<(), Failure> {
    let failed =
        |error: ReadlineError| Failure::new(Code::Failed, format!("the console cannot be used: {error}"));
    let config = rustyline::Config::builder();
    let config = config.max_history_size(HISTORY_LINES).map_err(failed)?.auto_add_history(true).build();
    let mut editor = DefaultEditor::with_config(config).map_err(failed)?;
    let history = private_file(history);
    if let Some(path) = &history {
        // A history that cannot be read is a new one.
        let _ = editor.load_history(path);
    }
    let left = loop {
        match editor.readline("> ") {
            Ok(line) => match console.line(&line) {
                Ok(true) => {}
                Ok(false) => break Ok(()),
                Err(failure) => break Err(failure),
            },
            Err(ReadlineError::Interrupted) => text::note("Ctrl-C stops an answer; exit or Ctrl-D leaves"),
            Err(ReadlineError::Eof) => break Ok(()),
            Err(error) => break Err(failed(error)),
        }
    };
    if let Some(path) = &history
        && let Err(error) = editor.save_history(path)
    {
        text::note(&format!("the history cannot be kept in {}: {error}", path.display()));
    }
    left
}

/// Makes sure that the history file is there and for its user only.
fn private_file(path: &Path) -> Option<PathBuf> {
    std::fs::create_dir_all(path.parent()?).ok()?;
    let mut options = std::fs::OpenOptions::new();
    options.append(true).create(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path).ok()?;
    Some(path.to_owned())
}

struct Console<'a> {
    engine: &'a Engine,
    progress: &'a Progress,
    /// Sampling and limits of every answer.
    template: Request,
    messages: Vec<Message>,
    system: Option<Message>,
    /// What was measured of the last answer.
    last: Option<String>,
}

impl Console<'_> {
    fn forget(&mut self) {
        self.messages = self.system.iter().cloned().collect();
    }

    /// Does what a line asks; `false` to leave.
    fn line(&mut self, line: &str) -> Result<bool, Failure> {
        match read(line) {
            Line::Empty => {}
            Line::Help => text::say(HELP)?,
            Line::Stats => text::say(self.last.as_deref().unwrap_or("nothing was answered yet"))?,
            Line::Nodes => text::say(&answer::nodes(self.engine))?,
            Line::Reset => {
                self.forget();
                text::say("the conversation is forgotten")?;
            }
            Line::Exit => return Ok(false),
            Line::Unknown(word) => text::say(&format!("{word} is no command; /help lists them"))?,
            Line::Say(text) => self.ask(text)?,
        }
        Ok(true)
    }

    fn ask(&mut self, question: &str) -> Result<(), Failure> {
        if let Err(failure) = self.heal() {
            text::note(&format!("{failure}; ask again when that node is back, or leave and start anew"));
            return Ok(());
        }
        self.messages.push(Message::user(question));
        let request = Request { prompt: Prompt::Chat(self.messages.clone()), ..self.template.clone() };
        let out = AnswerOut::stdout();
        let answered = run::answer(self.engine, request, Repeat::Same, |piece| Ok(out.piece(piece)?));
        let outcome = match answered {
            Ok(outcome) => outcome,
            // A request that is refused (a conversation that has become too long) leaves the console as it was.
            Err(failure) if failure.is_usage() => {
                self.messages.pop();
                text::note(&format!("{failure}; /reset starts a new conversation"));
                return Ok(());
            }
            Err(failure) => return self.survive(failure),
        };
        text::say("")?;
        if let Err(failure) = run::check(self.engine, &outcome) {
            return self.survive(failure);
        }
        self.messages.push(Message::assistant(&outcome.text));
        let telemetry = answer::telemetry(self.engine, &outcome);
        text::say(&telemetry)?;
        self.last = Some(telemetry);
        Ok(())
    }

    /// The ring is placed anew where a node was lost or is back, and its user sees it.
    fn heal(&self) -> Result<(), Failure> {
        let healed = self.engine.heal(&|event| self.progress.event(event));
        self.progress.clear();
        if healed? {
            text::note("the layers were placed anew");
            text::say(&answer::nodes(self.engine))?;
        }
        Ok(())
    }

    /// An answer that ended in an error leaves the conversation as it was before the question.
    fn survive(&mut self, failure: Failure) -> Result<(), Failure> {
        if failure.is_final() {
            return Err(failure);
        }
        self.messages.pop();
        text::note(&failure.to_string());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_and_text() {
        assert_eq!(read("  exit "), Line::Exit);
        assert_eq!(read("/exit"), Line::Exit);
        assert_eq!(read("/resett"), Line::Unknown("/resett"));
        assert_eq!(read("/etc/hosts is what?"), Line::Say("/etc/hosts is what?"));
        assert_eq!(read("exit strategies"), Line::Say("exit strategies"));
        assert_eq!(read(" "), Line::Empty);
    }
}
