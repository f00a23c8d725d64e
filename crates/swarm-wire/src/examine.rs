//! What `doctor` asks a node about the way between the two.

use serde::{Deserialize, Serialize};

use crate::control::{ControlError, Hello};
use crate::control_check::{TAG_CHARS_MAX, at_most, between, invalid, text, validate_hello};

/// Most bytes that an answer is padded with.
pub const PADDING_BYTES_MAX: usize = 128 * 1024;

/// First message of whoever dials only to look, and all that follow: how is it from where you are?
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Examine {
    /// Repeated in the answer.
    pub id: u64,
    /// Try to open a connection to this port, at the address that this question comes from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reach: Option<u16>,
    /// Do you hear the announcement of the instance of this name?
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hear: Option<String>,
    /// Make the answer so many bytes longer, which measures the way back.
    #[serde(default)]
    pub padding_bytes: u32,
}

/// The answer to an [`Examine`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Examined {
    /// From the question.
    pub id: u64,
    /// Who answers.
    pub hello: Hello,
    /// Whether the port was reached; absent: not asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reaches: Option<bool>,
    /// Whether the announcement is heard; absent: not asked, or this node does not listen for any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hears: Option<bool>,
    /// Zeros.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub padding: String,
}

pub(crate) fn validate_examine(examine: &Examine) -> Result<(), ControlError> {
    if let Some(port) = examine.reach {
        between("reach", port.into(), 1, u16::MAX.into())?;
    }
    if let Some(instance) = &examine.hear {
        text("hear", instance, TAG_CHARS_MAX)?;
    }
    at_most("padding_bytes", examine.padding_bytes.into(), PADDING_BYTES_MAX as u64)
}

pub(crate) fn validate_examined(examined: &Examined) -> Result<(), ControlError> {
    validate_hello(&examined.hello)?;
    at_most("padding", examined.padding.len() as u64, PADDING_BYTES_MAX as u64)?;
    if examined.padding.bytes().any(|byte| byte != b'0') {
        return Err(invalid("padding", "something else than zeros"));
    }
    Ok(())
}
