//! What Python gives: keyword arguments by name, each of its type or a `TypeError` that names it.

use pyo3::exceptions::{PyOverflowError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyBytes, PyDict};
use swarm_node::Prompt;
use swarm_os::args::{ComputeArgs, Kv, ModelArgs, ObjectiveArg, QuantArg, RingArgs, SplitArg};

use crate::errors;

/// Keyword arguments.
pub struct Given<'a, 'py>(pub &'a Bound<'py, PyDict>);

/// A value that makes no sense.
pub fn wrong(text: &str) -> PyErr {
    errors::raised("ArgumentError", text)
}

impl<'py> Given<'_, 'py> {
    /// The argument `name`; nothing when it is absent or `None`.
    pub fn get<T>(&self, name: &str) -> PyResult<Option<T>>
    where
        T: for<'a> FromPyObject<'a, 'py>,
    {
        let Some(value) = self.0.get_item(name)?.filter(|value| !value.is_none()) else { return Ok(None) };
        let kind = value.get_type().name()?.to_string();
        value.extract::<T>().map(Some).map_err(|error| {
            let error: PyErr = error.into();
            let py = self.0.py();
            if error.is_instance_of::<PyOverflowError>(py) {
                return wrong(&format!("{name}: {} is out of range", short(&value)));
            }
            PyTypeError::new_err(format!("{name}: {kind} is not what it takes; {}", error.value(py)))
        })
    }

    /// A number from 1 on.
    pub fn count(&self, name: &str) -> PyResult<Option<usize>> {
        match self.get::<usize>(name)? {
            Some(0) => Err(wrong(&format!("{name}: 0 is too small; give a number from 1 on, or None"))),
            number => Ok(number),
        }
    }

    /// A text, or several.
    pub fn texts(&self, name: &str) -> PyResult<Vec<String>> {
        if let Some(value) = self.0.get_item(name)?
            && let Ok(text) = value.extract::<String>()
        {
            return Ok(vec![text]);
        }
        Ok(self.get::<Vec<String>>(name)?.unwrap_or_default())
    }

    /// An amount of memory: bytes, or a text like `8GB`.
    fn amount(&self, name: &str) -> PyResult<Option<String>> {
        match self.0.get_item(name)? {
            Some(value) if value.extract::<u64>().is_ok() => {
                Ok(self.get::<u64>(name)?.map(|bytes| bytes.to_string()))
            }
            _ => self.get(name),
        }
    }

    /// One of a few words.
    fn word<T>(&self, name: &str, words: &[(&str, T)]) -> PyResult<Option<T>>
    where
        T: Copy,
    {
        let Some(word) = self.get::<String>(name)? else { return Ok(None) };
        let found = words.iter().find(|(known, _)| *known == word);
        found.map(|(_, value)| Some(*value)).ok_or_else(|| {
            let known: Vec<&str> = words.iter().map(|(known, _)| *known).collect();
            wrong(&format!("{name}: {word:?} is none of {}", known.join(", ")))
        })
    }

    pub fn compute(&self) -> PyResult<ComputeArgs> {
        Ok(ComputeArgs {
            threads: self.count("threads")?,
            cores: self.get("cores")?,
            memory: self.amount("memory")?,
        })
    }

    pub fn model(&self) -> PyResult<ModelArgs> {
        let quants = [("q8_0", QuantArg::Q8_0), ("q4_0", QuantArg::Q4_0), ("q4_k", QuantArg::Q4_K)];
        Ok(ModelArgs {
            model: self.get("model")?.ok_or_else(|| wrong("model_id: say which model"))?,
            context: self.count("context")?,
            kv: self.word("kv", &[("f16", Kv::F16), ("f32", Kv::F32)])?.unwrap_or(Kv::F16),
            quant: self.word("quant", &quants)?,
            keep_quantized: self.get("keep_quantized")?.unwrap_or(false),
            // A program that names a model wants it, and nobody is there to be asked.
            yes: true,
            compute: self.compute()?,
        })
    }

    pub fn ring(&self) -> PyResult<RingArgs> {
        let splits = [("auto", SplitArg::Auto), ("always", SplitArg::Always), ("never", SplitArg::Never)];
        let objectives = [
            ("latency", ObjectiveArg::Latency),
            ("throughput", ObjectiveArg::Throughput),
            ("fit", ObjectiveArg::Fit),
        ];
        let nodes = self.count("nodes")?;
        // Nodes of one program are there to be used, unless it says something else than what it need not say.
        let split = self.word("split", &splits)?.filter(|split| nodes.is_none() || *split != SplitArg::Auto);
        Ok(RingArgs {
            nodes,
            peer: self.texts("peers")?,
            join: self.get("join")?.or_else(join_code),
            workers: self.count("workers")?,
            interface: self.texts("interfaces")?,
            wait: self.get("wait")?,
            layers: self.get("layers")?,
            split,
            objective: self.word("objective", &objectives)?,
        })
    }
}

/// The pairing code of the environment, as the command takes it.
pub fn join_code() -> Option<String> {
    std::env::var("SWARM_OS_JOIN").ok().filter(|code| !code.is_empty())
}

/// A prompt: a text, a list of messages with `role` and `content`, or a list of token ids. A text is put into the chat
/// template unless `raw`; without either being said, where there is one.
pub fn prompt(
    given: &Bound<'_, PyAny>,
    raw: Option<bool>,
    system: Option<&str>,
    can_chat: bool,
) -> PyResult<Prompt> {
    if let Ok(text) = given.extract::<String>() {
        return Ok(swarm_os::settings::prompt(text, system, raw.unwrap_or(!can_chat)));
    }
    let refused = || {
        PyTypeError::new_err(format!(
            "prompt: {} is not what it takes; give a text, a list of messages like {{\"role\": \"user\", \
             \"content\": \"...\"}}, or a list of token ids",
            given.get_type().name().map_or_else(|_| "this".to_owned(), |name| name.to_string())
        ))
    };
    if given.is_instance_of::<PyBytes>() || given.is_instance_of::<PyByteArray>() {
        // A sequence of numbers to Python, and surely meant as text.
        return Err(refused());
    }
    let items: Vec<Bound<'_, PyAny>> = given.extract().map_err(|_| refused())?;
    if items.is_empty() {
        return Err(wrong("prompt: it is empty; give at least one message or token id"));
    }
    if items[0].is_instance_of::<PyDict>() {
        let mut messages: Vec<_> = system.map(swarm_node::Message::system).into_iter().collect();
        for item in &items {
            let message = item.cast::<PyDict>().map_err(|_| refused())?;
            let part = |name: &str| {
                Given(message).get::<String>(name)?.ok_or_else(|| {
                    wrong(&format!("prompt: a message has no {name:?}; it takes \"role\" and \"content\""))
                })
            };
            messages.push(swarm_node::Message::new(part("role")?, part("content")?));
        }
        return Ok(Prompt::Chat(messages));
    }
    let ids = items.iter().map(|item| item.extract::<u32>().map_err(|_| refused()));
    Ok(Prompt::Ids(ids.collect::<PyResult<_>>()?))
}

/// A value as Python shows it, and no more of it than fits a line.
fn short(value: &Bound<'_, PyAny>) -> String {
    let text = value.repr().map(|text| text.to_string()).unwrap_or_default();
    text.chars().take(40).collect()
}
