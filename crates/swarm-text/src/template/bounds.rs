//! Bounds on turning lists and dictionaries into text.
//!
//! The engine charges fuel for such text after it was made. A list that contains another one twice, forty times over,
//! is small, but its text fills any memory; and text that is being made cannot be stopped. So every way from a
//! container to text goes through here: printing (a formatter), filters (wrapped: they take plain values only), and
//! the operator `~`, whose operands are sent through a filter by a change of the template's source, since operators
//! cannot be replaced. Strings, numbers and booleans pass unchanged.

use std::fmt::{self, Write};

use minijinja::machinery::{Token, tokenize};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Value, ValueOrKwargs};
use minijinja::{Environment, Error, ErrorKind, Output, State, escape_formatter};

/// Longest text of a list or dictionary outside `tojson`, which has bounds of its own.
const CONTAINER_TEXT_BYTES_MAX: usize = 64 << 10;

const TEXT: &str = "__text";
const SINGLE: &str = "__single";

/// Filters that make text of whatever they are given.
const TEXT_FILTERS: &[&str] =
    &["upper", "lower", "title", "capitalize", "trim", "replace", "indent", "format", "escape", "e", "safe"];

/// Puts the bounds into an environment whose templates go through [`bound_operators`].
pub(super) fn install(environment: &mut Environment<'_>) {
    environment.set_formatter(print);
    environment.add_filter(TEXT, |state: &mut State, value: &Value| plain(state, value));
    environment.add_filter("string", |state: &mut State, value: &Value| match plain(state, value)? {
        text if text.as_str().is_some() => Ok::<_, Error>(text),
        single => Ok(Value::from(single.to_string())),
    });
    environment.add_filter(SINGLE, |value: Value| match is_container(&value) {
        true => Err(Error::new(ErrorKind::InvalidOperation, "lists cannot be repeated in a chat template")),
        false => Ok(value),
    });
    for &name in TEXT_FILTERS {
        environment.add_filter(name, move |state: &mut State, args: Rest<ValueOrKwargs>| {
            plain_only(name, state, &args.into_values())
        });
    }
    environment.add_filter("join", join);
    environment.remove_filter("pprint");
    environment.remove_test("startingwith");
    environment.remove_test("endingwith");
    environment.remove_global("debug");
}

fn is_container(value: &Value) -> bool {
    value.as_object().is_some() && value.as_str().is_none()
}

fn print(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    if !is_container(value) {
        return escape_formatter(out, state, value);
    }
    let text = container_text(state, value)?;
    out.write_str(&text).map_err(|_| Error::from(ErrorKind::WriteFailure))
}

/// A plain value as it is, a container as text.
fn plain(state: &State, value: &Value) -> Result<Value, Error> {
    if is_container(value) { container_text(state, value).map(Value::from) } else { Ok(value.clone()) }
}

fn container_text(state: &State, value: &Value) -> Result<String, Error> {
    let mut text = Capped(String::new());
    if write!(text, "{value}").is_err() {
        return Err(Error::new(ErrorKind::OutOfFuel, "the text of a list or dictionary is too long"));
    }
    state.consume_fuel(text.0.len() as u64 / 4)?;
    Ok(text.0)
}

struct Capped(String);

impl Write for Capped {
    fn write_str(&mut self, more: &str) -> fmt::Result {
        if self.0.len().saturating_add(more.len()) > CONTAINER_TEXT_BYTES_MAX {
            return Err(fmt::Error);
        }
        self.0.push_str(more);
        Ok(())
    }
}

/// The engine's own filter `name`, for plain arguments, on the fuel that is left.
fn plain_only(name: &str, state: &mut State, args: &[Value]) -> Result<Value, Error> {
    if let Some(container) = args.iter().find(|value| is_container(value) && !value.is_kwargs()) {
        let why = format!("filter {name} takes text, not a {}", container.kind());
        return Err(Error::new(ErrorKind::InvalidOperation, why));
    }
    if name == "format" && args.iter().any(Value::is_kwargs) {
        return Err(Error::new(ErrorKind::InvalidOperation, "filter format takes no named arguments here"));
    }
    let mut engine = Environment::new();
    engine.set_fuel(state.fuel_levels().map(|(_, remaining)| remaining));
    let mut inner = engine.empty_state();
    let filtered = inner.apply_filter(name, args)?;
    state.consume_fuel(inner.fuel_levels().map_or(0, |(used, _)| used))?;
    Ok(filtered)
}

/// `items|join(separator='', attribute=None)`, of plain items.
fn join(
    state: &mut State,
    items: &Value,
    separator: Option<&str>,
    attribute: Option<&str>,
    kwargs: Kwargs,
) -> Result<Value, Error> {
    let attribute = match attribute {
        Some(attribute) => Some(attribute),
        None => kwargs.get("attribute")?,
    };
    kwargs.assert_all_used()?;
    let separator = separator.unwrap_or("");
    let mut joined = String::new();
    if items.is_undefined() || items.is_none() {
        return Ok(Value::from(joined));
    }
    for (index, item) in items.try_iter()?.enumerate() {
        let item = match attribute {
            Some(attribute) => item.get_attr(attribute)?,
            None => item,
        };
        let text = plain(state, &item)?;
        let before = joined.len();
        if index > 0 {
            joined.push_str(separator);
        }
        match text.as_str() {
            Some(text) => joined.push_str(text),
            None => joined.push_str(&text.to_string()),
        }
        state.consume_fuel(1 + (joined.len() - before) as u64 / 64)?;
    }
    Ok(Value::from(joined))
}

/// Sends both operands of every `~` through [`TEXT`], and the left operand of every `*` through [`SINGLE`] (a list
/// times a number would otherwise be an operand of `~` that no filter can be put behind).
///
/// A filter binds to the operand right before it. What stands right before `~` is the last factor of its left side;
/// with no lists among factors, a product is plain if its last factor is. The right side ends where an operator that
/// binds less begins; that place gets the filter too. A source that the engine's lexer refuses is left alone: the
/// engine will refuse it again.
pub(super) fn bound_operators(source: String, syntax: &SyntaxConfig) -> String {
    let Ok(tokens) = tokenize(&source, false, syntax.clone()).collect::<Result<Vec<_>, _>>() else {
        return source;
    };
    let mut insertions: Vec<(usize, &str)> = Vec::new();
    // For each open bracket: is there an operand of `~` that has not ended?
    let mut open = vec![false];
    for (at, (token, _)) in tokens.iter().enumerate() {
        let before = at.checked_sub(1).and_then(|previous| tokens.get(previous));
        let before_that = at.checked_sub(2).and_then(|previous| tokens.get(previous)).map(|(token, _)| token);
        let (previous, end) = match before {
            Some((previous, span)) => (Some(previous), span.end_offset as usize),
            None => (None, 0),
        };
        let follows_operand = previous.is_some_and(|previous| ends_operand(previous, before_that));
        let next = tokens.get(at + 1).map(|(next, _)| next);
        let tilde = matches!(token, Token::Tilde);
        let ended = open.last() == Some(&true) && follows_operand && ends_concatenation(token, next);
        if follows_operand && (tilde || ended) {
            insertions.push((end, TEXT));
        }
        if follows_operand && matches!(token, Token::Mul) {
            insertions.push((end, SINGLE));
        }
        match token {
            Token::ParenOpen | Token::BracketOpen | Token::BraceOpen => open.push(false),
            Token::ParenClose | Token::BracketClose | Token::BraceClose if open.len() > 1 => {
                open.pop();
            }
            Token::VariableStart | Token::BlockStart => open = vec![false],
            _ => {
                if let Some(open) = open.last_mut().filter(|_| tilde || ended) {
                    *open = tilde;
                }
            }
        }
    }
    insert(&source, &insertions)
}

fn insert(source: &str, insertions: &[(usize, &str)]) -> String {
    let mut out = String::with_capacity(source.len() + insertions.len() * 12);
    let mut at = 0;
    for &(place, filter) in insertions {
        out.push_str(source.get(at..place).unwrap_or(""));
        out.push('|');
        out.push_str(filter);
        out.push(' ');
        at = place;
    }
    out.push_str(source.get(at..).unwrap_or(""));
    out
}

const OPERATOR_WORDS: &[&str] = &["and", "or", "not", "in", "is", "if", "else"];

/// Whether an operand may end with `token`.
fn ends_operand(token: &Token<'_>, before: Option<&Token<'_>>) -> bool {
    match token {
        Token::Ident(word) => matches!(before, Some(Token::Dot)) || !OPERATOR_WORDS.contains(word),
        Token::Str(_) | Token::String(_) | Token::Int(_) | Token::Int128(_) | Token::Float(_) => true,
        Token::ParenClose | Token::BracketClose | Token::BraceClose => true,
        _ => false,
    }
}

/// Whether `token`, standing after an operand, ends the right side of a `~` before it.
fn ends_concatenation(token: &Token<'_>, next: Option<&Token<'_>>) -> bool {
    match token {
        Token::Ident("not") => matches!(next, Some(Token::Ident("in"))),
        Token::Ident(word) => {
            ["and", "or", "in", "if", "else", "recursive", "ignore", "with", "without", "as", "import"]
                .contains(word)
        }
        Token::Tilde | Token::Plus | Token::Minus | Token::Comma | Token::Colon | Token::Assign => true,
        Token::Eq | Token::Ne | Token::Gt | Token::Gte | Token::Lt | Token::Lte => true,
        Token::ParenClose | Token::BracketClose | Token::BraceClose => true,
        Token::VariableEnd | Token::BlockEnd => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewritten(source: &str) -> String {
        bound_operators(source.to_owned(), &SyntaxConfig::default()).replace(' ', "")
    }

    #[test]
    fn operands_of_concatenations_are_bounded() {
        for (source, want) in [
            ("a ~ b {{ a + b }}", "a~b{{a+b}}"),
            ("{{ a ~ b }}", "{{a|__text~b|__text}}"),
            ("{{- a~b ~c -}}", "{{-a|__text~b|__text~c|__text-}}"),
            ("{{ a + b ~ c.d[1] + e }}", "{{a+b|__text~c.d[1]|__text+e}}"),
            ("{{ x * y ~ -z * w }}", "{{x|__single*y|__text~-z|__single*w|__text}}"),
            (
                "{{ f(a ~ b, c ~ d) ~ [e ~ f] }}",
                "{{f(a|__text~b|__text,c|__text~d|__text)|__text~[e|__text~f|__text]|__text}}",
            ),
            ("{{ {'a': b ~ c, 'd': e} ~ f }}", "{{{'a':b|__text~c|__text,'d':e}|__text~f|__text}}"),
            (
                "{{ a ~ b if c ~ d else e ~ f }}",
                "{{a|__text~b|__textifc|__text~d|__textelsee|__text~f|__text}}",
            ),
            ("{{ a ~ b is string }}", "{{a|__text~bisstring|__text}}"),
            ("{{ a ~ b not in c }}", "{{a|__text~b|__textnotinc}}"),
            ("{{ a ~ b|trim ~ 'x' 'y' }}", "{{a|__text~b|trim|__text~'x''y'|__text}}"),
            ("{% set x = a ~ b.if %}", "{%setx=a|__text~b.if|__text%}"),
            ("{% for x in a ~ b recursive %}", "{%forxina|__text~b|__textrecursive%}"),
            ("{{ '~' ~ \"%} ~ }}\" }}", "{{'~'|__text~\"%}~}}\"|__text}}"),
            ("{{ f(*a) ~ b }}", "{{f(*a)|__text~b|__text}}"),
            ("{{ a[b ~ c:d ~ e] }}", "{{a[b|__text~c|__text:d|__text~e|__text]}}"),
            ("{{ a ~ b == c ~ d and e }}", "{{a|__text~b|__text==c|__text~d|__textande}}"),
            ("{{ f(x=a ~ b) }}", "{{f(x=a|__text~b|__text)}}"),
            ("{% raw %}{{ a ~ b }}{% endraw %}{# a ~ b #}", "{%raw%}{{a~b}}{%endraw%}{#a~b#}"),
            ("{{ unfinished ~ 'x", "{{unfinished~'x"),
        ] {
            assert_eq!(rewritten(source), want, "{source}");
        }
    }
}
