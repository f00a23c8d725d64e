//! `tojson` as Hugging Face's environment has it: Python's `json.dumps(ensure_ascii=False)`, without HTML escapes.

use std::io::{self, Write};

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Value};
use serde::Serialize;
use serde_json::ser::{Formatter, Serializer};

/// `value|tojson(indent=None, ensure_ascii=False, separators=None, sort_keys=False)`.
pub(super) fn tojson(
    state: &mut minijinja::State,
    value: &Value,
    indent: Option<Value>,
    kwargs: Kwargs,
) -> Result<Value, Error> {
    let indent = match indent {
        Some(indent) => Some(indent),
        None => kwargs.get::<Option<Value>>("indent")?,
    };
    let indent = match indent.filter(|value| !value.is_none() && !value.is_undefined()) {
        None => None,
        Some(text) if text.kind() == ValueKind::String => Some(text.as_str().unwrap_or("").to_owned()),
        Some(count) => Some(spaces(&count)?),
    };
    let separators = kwargs.get::<Option<Value>>("separators")?.map(|pair| separators(&pair)).transpose()?;
    let (item, key) = separators.unwrap_or_else(|| {
        let item = if indent.is_some() { "," } else { ", " };
        (item.to_owned(), ": ".to_owned())
    });
    let ensure_ascii = kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sort_keys = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    kwargs.assert_all_used()?;

    let python = Python { indent, item, key, ensure_ascii, depth: 0, has_value: false };
    let text = if sort_keys {
        // Written once to be paid for and read back, because a lazy list may be far larger than its memory.
        let plain = write(state, value, serde_json::ser::CompactFormatter)?;
        let plain: serde_json::Value =
            serde_json::from_str(&plain).map_err(|error| invalid(error.to_string()))?;
        write(state, &sorted(plain), python)?
    } else {
        write(state, value, python)?
    };
    Ok(Value::from(text))
}

/// Two strings. Taken one by one, because a conversion would also make text of whatever else is given.
fn separators(pair: &Value) -> Result<(String, String), Error> {
    let mut texts = Vec::new();
    for text in pair.try_iter()?.take(3) {
        texts.extend(text.as_str().map(str::to_owned));
    }
    <[String; 2]>::try_from(texts)
        .map(|[item, key]| (item, key))
        .map_err(|_| invalid("separators must be two strings".to_owned()))
}

fn invalid(why: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("cannot write as JSON: {why}"))
}

fn write(
    state: &mut minijinja::State,
    value: &impl Serialize,
    formatter: impl Formatter,
) -> Result<String, Error> {
    let mut out = Charged { bytes: Vec::new(), state };
    let written = value.serialize(&mut Serializer::with_formatter(&mut out, formatter));
    match written {
        Ok(()) => String::from_utf8(out.bytes).map_err(|_| invalid("it is not text".to_owned())),
        // The writer fails for want of fuel only; say so again as what it is.
        Err(error) if error.is_io() => Err(Error::from(ErrorKind::OutOfFuel)),
        Err(error) => Err(invalid(error.to_string())),
    }
}

fn spaces(count: &Value) -> Result<String, Error> {
    const INDENT_MAX: usize = 32;
    let count = usize::try_from(count.clone())?;
    if count > INDENT_MAX {
        return Err(Error::new(
            ErrorKind::InvalidOperation,
            format!("indent of {count}, at most {INDENT_MAX}"),
        ));
    }
    Ok(" ".repeat(count))
}

fn sorted(value: serde_json::Value) -> serde_json::Value {
    use serde_json::Value as Json;
    match value {
        Json::Object(map) => {
            let mut entries: Vec<_> = map.into_iter().collect();
            entries.sort_by(|(a, _), (b, _)| a.cmp(b));
            Json::Object(entries.into_iter().map(|(key, value)| (key, sorted(value))).collect())
        }
        Json::Array(items) => Json::Array(items.into_iter().map(sorted).collect()),
        other => other,
    }
}

/// Output that is paid for in fuel while it grows.
struct Charged<'a, 'b, 'c> {
    bytes: Vec<u8>,
    state: &'a mut minijinja::State<'b, 'c>,
}

impl Write for Charged<'_, '_, '_> {
    fn write(&mut self, more: &[u8]) -> io::Result<usize> {
        // One fuel per write and 16 bytes: what the engine charges for its own serialization.
        let fuel = 1 + more.len() as u64 / 16;
        self.state.consume_fuel(fuel).map_err(|_| io::Error::other("out of fuel"))?;
        self.bytes.extend_from_slice(more);
        Ok(more.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Python's spelling of JSON.
struct Python {
    indent: Option<String>,
    item: String,
    key: String,
    ensure_ascii: bool,
    depth: usize,
    has_value: bool,
}

impl Python {
    fn line<W: ?Sized + Write>(&self, writer: &mut W) -> io::Result<()> {
        let Some(indent) = &self.indent else { return Ok(()) };
        writer.write_all(b"\n")?;
        (0..self.depth).try_for_each(|_| writer.write_all(indent.as_bytes()))
    }

    fn open<W: ?Sized + Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.has_value = false;
        writer.write_all(bracket)
    }

    fn close<W: ?Sized + Write>(&mut self, writer: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth = self.depth.saturating_sub(1);
        if self.has_value {
            self.line(writer)?;
        }
        self.has_value = true;
        writer.write_all(bracket)
    }

    fn next<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if !first {
            writer.write_all(self.item.as_bytes())?;
        }
        self.line(writer)
    }
}

impl Formatter for Python {
    fn begin_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"[")
    }

    fn end_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"]")
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.next(writer, first)
    }

    fn end_array_value<W: ?Sized + Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.has_value = true;
        Ok(())
    }

    fn begin_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b"{")
    }

    fn end_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b"}")
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.next(writer, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(self.key.as_bytes())
    }

    fn end_object_value<W: ?Sized + Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.has_value = true;
        Ok(())
    }

    fn write_string_fragment<W: ?Sized + Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        if !self.ensure_ascii || fragment.is_ascii() {
            return writer.write_all(fragment.as_bytes());
        }
        for c in fragment.chars() {
            if c.is_ascii() {
                writer.write_all(c.encode_utf8(&mut [0; 4]).as_bytes())?;
            } else {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    write!(writer, "\\u{unit:04x}")?;
                }
            }
        }
        Ok(())
    }
}
