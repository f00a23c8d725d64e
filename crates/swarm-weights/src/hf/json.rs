//! Typed reads from a JSON object: a wrong type is an error that names the key, `null` is absence.

use serde_json::{Map, Value};

use crate::config::ConfigError;

/// A JSON object whose keys are read one by one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Object<'a> {
    map: &'a Map<String, Value>,
}

impl<'a> Object<'a> {
    /// `key` is what the value is called in an error.
    pub fn new(key: &str, value: &'a Value) -> Result<Self, ConfigError> {
        match value {
            Value::Object(map) => Ok(Self { map }),
            other => Err(type_error(key, "an object", other)),
        }
    }

    /// The value under `key`, unless it is `null`.
    pub fn value(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub fn object(&self, key: &str) -> Result<Option<Object<'a>>, ConfigError> {
        self.value(key).map(|value| Object::new(key, value)).transpose()
    }

    pub fn size(&self, key: &str) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
        size.map(Some).ok_or_else(|| type_error(key, "a whole number from 0 on", value))
    }

    pub fn float(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        value.as_f64().map(Some).ok_or_else(|| type_error(key, "a number", value))
    }

    pub fn bool(&self, key: &str) -> Result<Option<bool>, ConfigError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| type_error(key, "true or false", value))
    }

    pub fn string(&self, key: &str) -> Result<Option<&'a str>, ConfigError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| type_error(key, "a string", value))
    }

    pub fn strings(&self, key: &str) -> Result<Option<Vec<&'a str>>, ConfigError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        let strings = value.as_array().and_then(|list| list.iter().map(Value::as_str).collect());
        strings.map(Some).ok_or_else(|| type_error(key, "a list of strings", value))
    }

    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// The first key whose value is itself an object.
    pub fn first_object_key(&self) -> Option<&'a str> {
        self.map.iter().find(|(_, value)| value.is_object()).map(|(key, _)| key.as_str())
    }

    /// The key is there, with the value `null`.
    pub fn is_null(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(serde_json::Value::is_null)
    }

    pub fn required_size(&self, key: &str) -> Result<usize, ConfigError> {
        self.size(key)?.ok_or_else(|| ConfigError::Missing { key: key.to_owned() })
    }

    pub fn required_float(&self, key: &str) -> Result<f64, ConfigError> {
        self.float(key)?.ok_or_else(|| ConfigError::Missing { key: key.to_owned() })
    }
}

pub(crate) fn type_error(key: &str, want: &'static str, got: &Value) -> ConfigError {
    ConfigError::Type { key: key.to_owned(), want, got: short(got) }
}

/// A value for an error message, cut to a line. A file may say anything: control characters go.
pub(crate) fn short(value: &Value) -> String {
    let text = value.to_string().replace(char::is_control, "?");
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", text.get(..end).unwrap_or_default()),
        None => text,
    }
}
