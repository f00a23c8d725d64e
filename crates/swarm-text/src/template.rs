//! The chat template: a program from the model's files that turns messages into a prompt.
//!
//! Templates are Jinja as Hugging Face runs it: `trim_blocks`, `lstrip_blocks`, loop controls, Python's string and
//! dictionary methods, `raise_exception`, `strftime_now`, `tojson` with Python's spelling, and `{% generation %}`
//! blocks. They are written by strangers, so there is no loader, no function that reaches outside, and a budget for
//! work and memory (fuel), for output and for time.

mod bounds;
mod json;
mod methods;
mod strftime;

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Error, ErrorKind, Value};
use serde_json::Map;

use crate::bounded::{self, bounded};
use crate::error::{quoted, sentence};
use crate::{Message, SpecialTokens, TEXT_BYTES_MAX, TextError};

/// The largest in use have about 30 KB. Parsing nests at most as deep as a template is long, and a level of the
/// deepest kind was measured at 550 bytes of stack for each byte of source.
const SOURCE_BYTES_MAX: usize = 64 << 10;
const COMPILE_STACK_BYTES: usize = SOURCE_BYTES_MAX * 2048;
/// Fuel of one rendering: an instruction each, or 64 bytes of memory. Real templates were measured to use about 80
/// for each message and 0.08 for each byte.
const FUEL_BASE: u64 = 100_000;
const FUEL_PER_MESSAGE: u64 = 400;
const BYTES_PER_FUEL: u64 = 4;
const FUEL_MAX: u64 = 1_000_000;
/// Values nest at most as deep as fuel allows; a level was measured at 55 bytes of stack for each unit of fuel.
const STACK_BYTES_PER_FUEL: u64 = 256;
/// For the few things that fuel does not see, such as slices of slices of slices. A large chat takes 20 ms.
const LIMIT: Duration = Duration::from_secs(1);
const NAME: &str = "chat";
/// The variable that carries the time.
const NOW: &str = "__now";

/// A compiled chat template. Cloning is cheap; it may be used from any thread.
#[derive(Clone)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    special: SpecialTokens,
}

/// What a rendering depends on besides the messages.
#[derive(Debug, Clone)]
pub struct RenderOptions {
    /// End with the beginning of the assistant's next message.
    pub add_generation_prompt: bool,
    /// What `strftime_now` sees. Templates that print the date give other prompts on other days; pass a fixed time
    /// to repeat one.
    pub now: SystemTime,
    /// Further variables for the template, such as `enable_thinking`. They are not searched for special tokens.
    pub variables: Map<String, serde_json::Value>,
}

impl Default for RenderOptions {
    /// The assistant speaks next; the time is now.
    fn default() -> RenderOptions {
        RenderOptions { add_generation_prompt: true, now: SystemTime::now(), variables: Map::new() }
    }
}

impl ChatTemplate {
    /// Compiles a template. `special` gives it `bos_token`, `eos_token`, `unk_token` and `pad_token`.
    ///
    /// # Errors
    /// A template that is too large or does not compile.
    pub fn new(source: &str, special: &SpecialTokens) -> Result<ChatTemplate, TextError> {
        if source.len() > SOURCE_BYTES_MAX {
            let (bytes, max) = (source.len(), SOURCE_BYTES_MAX);
            return Err(TextError::FileTooLarge { what: "the chat template", bytes, max });
        }
        let source = plain_generation_blocks(source);
        let compile = move || environment(source).map_err(|error| failure(&error));
        let environment = bounded("compile the chat template", COMPILE_STACK_BYTES, LIMIT, compile)??;
        Ok(ChatTemplate { environment: Arc::new(environment), special: special.clone() })
    }

    /// Compiles the template that a `tokenizer_config.json` (or `chat_template.json`) holds under `chat_template`: a
    /// string, or a list of named ones, of which `default` is taken. `None` when there is none.
    ///
    /// # Errors
    /// As [`ChatTemplate::new`]; also a file that is not JSON, and a list without `default`.
    pub fn from_config(config: &[u8], special: &SpecialTokens) -> Result<Option<ChatTemplate>, TextError> {
        let config = crate::hf::object("tokenizer_config.json", Some(config))?;
        match config.get("chat_template") {
            None | Some(serde_json::Value::Null) => Ok(None),
            Some(serde_json::Value::String(source)) => ChatTemplate::new(source, special).map(Some),
            Some(named) => {
                let all: Vec<(&str, &str)> =
                    named.as_array().into_iter().flatten().filter_map(named_template).collect();
                let Some((_, source)) = all.iter().find(|(name, _)| *name == "default") else {
                    let names: Vec<String> = all.iter().take(8).map(|(name, _)| quoted(name)).collect();
                    let why = format!("the model has no template named default, only [{}]", names.join(", "));
                    return Err(TextError::Template { why });
                };
                ChatTemplate::new(source, special).map(Some)
            }
        }
    }

    /// The prompt as text, at the present time and without further variables. Special tokens that messages contain
    /// are in it as they are: see [`ChatTemplate::encode`] for the way that keeps them harmless.
    ///
    /// # Errors
    /// As [`ChatTemplate::render_with`].
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, TextError> {
        self.render_with(messages, &RenderOptions { add_generation_prompt, ..RenderOptions::default() })
    }

    /// The prompt as text.
    ///
    /// # Errors
    /// [`TextError::MessagesRefused`] when the template raises an exception: the messages' fault, by its own rules.
    /// [`TextError::TemplateLimit`] beyond its budget of work, memory or 4 MiB of output. [`TextError::Template`] when
    /// it fails otherwise.
    pub fn render_with(&self, messages: &[Message], options: &RenderOptions) -> Result<String, TextError> {
        let bytes: usize = messages.iter().map(|message| message.role.len() + message.content.len()).sum();
        if bytes > TEXT_BYTES_MAX {
            return Err(TextError::TextTooLong { bytes, max: TEXT_BYTES_MAX });
        }
        let fuel = fuel(messages, bytes, options);
        let mut environment = Environment::clone(&self.environment);
        environment.set_fuel(Some(fuel));
        let context = self.context(messages, options);
        let stack = bounded::STACK_BYTES + usize::try_from(fuel * STACK_BYTES_PER_FUEL).unwrap_or(0);
        bounded("render the chat template", stack, LIMIT, move || render(&environment, context))?
    }

    /// The variables that Hugging Face gives a template.
    fn context(&self, messages: &[Message], options: &RenderOptions) -> Value {
        let mut variables: Vec<(String, Value)> = vec![
            ("messages".to_owned(), Value::from(Serde(messages))),
            ("tools".to_owned(), Value::from(())),
            ("documents".to_owned(), Value::from(())),
            ("add_generation_prompt".to_owned(), Value::from(options.add_generation_prompt)),
        ];
        let SpecialTokens { bos, eos, unk, pad } = &self.special;
        for (name, token) in [("bos_token", bos), ("eos_token", eos), ("unk_token", unk), ("pad_token", pad)]
        {
            if let Some(token) = token {
                variables.push((name.to_owned(), Value::from(token.text.as_str())));
            }
        }
        let further = options.variables.iter().map(|(name, value)| (name.clone(), Value::from(Serde(value))));
        // Last, so that no variable can stand in for it.
        let now = (NOW.to_owned(), Value::from_object(Now(options.now)));
        Value::from_pairs(variables.into_iter().chain(further).chain([now]))
    }
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate").field("special", &self.special).finish_non_exhaustive()
    }
}

fn fuel(messages: &[Message], bytes: usize, options: &RenderOptions) -> u64 {
    let variables: usize = options.variables.values().map(|value| value.to_string().len()).sum();
    let per_message = FUEL_PER_MESSAGE.saturating_mul(messages.len() as u64);
    let per_byte = (bytes.saturating_add(variables) as u64) / BYTES_PER_FUEL;
    FUEL_BASE.saturating_add(per_message).saturating_add(per_byte).min(FUEL_MAX)
}

fn named_template(entry: &serde_json::Value) -> Option<(&str, &str)> {
    Some((entry.get("name")?.as_str()?, entry.get("template")?.as_str()?))
}

/// A host that offers nothing: pure string functions and a clock that it is given.
fn environment(source: String) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
    let source = bounds::bound_operators(source, &syntax);
    environment.set_syntax(syntax);
    bounds::install(&mut environment);
    // Prompts are plain text whatever the template is called.
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(methods::call);
    environment.add_filter("tojson", json::tojson);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_template_owned(NAME, source)?;
    Ok(environment)
}

fn render(environment: &Environment<'_>, context: Value) -> Result<String, TextError> {
    let template = environment.get_template(NAME).map_err(|error| failure(&error))?;
    let mut output = Capped { bytes: Vec::new(), full: false };
    let rendered = template.render_captured_to(context, &mut output).map(drop);
    if output.full {
        return Err(TextError::TemplateLimit { why: format!("writes more than {TEXT_BYTES_MAX} bytes") });
    }
    rendered.map_err(|error| failure(&error))?;
    String::from_utf8(output.bytes)
        .map_err(|_| TextError::Template { why: "it wrote half a character".to_owned() })
}

/// Output that refuses to grow beyond [`TEXT_BYTES_MAX`].
struct Capped {
    bytes: Vec<u8>,
    full: bool,
}

impl io::Write for Capped {
    fn write(&mut self, more: &[u8]) -> io::Result<usize> {
        if self.bytes.len().saturating_add(more.len()) > TEXT_BYTES_MAX {
            self.full = true;
            return Err(io::Error::other("prompt too long"));
        }
        self.bytes.extend_from_slice(more);
        Ok(more.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The time of this rendering, carried to `strftime_now` through the template's variables.
#[derive(Debug)]
struct Now(SystemTime);

impl minijinja::value::Object for Now {}

fn strftime_now(state: &mut minijinja::State, format: &str) -> Result<String, Error> {
    let now = state.lookup(NOW);
    let now = now.as_ref().and_then(|value| value.downcast_object_ref::<Now>());
    let Some(Now(now)) = now else {
        return Err(Error::new(ErrorKind::InvalidOperation, "the time is not available here"));
    };
    strftime::format(*now, format).map_err(|why| Error::new(ErrorKind::InvalidOperation, why))
}

/// What a template says when it refuses the messages; found again in the error's chain.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(message: Value) -> Result<Value, Error> {
    let message = message.as_str().unwrap_or("no reason given").to_owned();
    Err(Error::new(ErrorKind::InvalidOperation, "raised by the template").with_source(Raised(message)))
}

fn failure(error: &Error) -> TextError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(inner) = cause {
        if let Some(Raised(why)) = inner.downcast_ref() {
            return TextError::MessagesRefused { why: sentence(why) };
        }
        if inner.downcast_ref::<Error>().is_some_and(|error| error.kind() == ErrorKind::OutOfFuel) {
            return TextError::TemplateLimit { why: "does more work than any prompt needs".to_owned() };
        }
        cause = inner.source();
    }
    let line = error.line().map_or(String::new(), |line| format!(" (line {line})"));
    TextError::Template { why: format!("{}{line}", sentence(&error.to_string())) }
}

/// Turns `{% generation %}` blocks, which mark the assistant's words for training, into blocks that change nothing.
fn plain_generation_blocks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let Some(len) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let (tag, after) = tag.split_at(len + 2);
        let body = tag.trim_start_matches("{%").trim_end_matches("%}");
        let word = body.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        match word {
            "generation" => out.push_str(&tag.replace(word, "if true")),
            "endgeneration" => out.push_str(&tag.replace(word, "endif")),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests;
