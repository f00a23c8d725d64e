//! The ranges of control message fields.

use crate::control::{Control, ControlError, Hello, Origin, Prepare, Stats};
use crate::examine::{validate_examine, validate_examined};
use crate::frame::TIME_US_MAX;
use crate::inventory::validate_listed;
use crate::measure::{validate_measure, validate_measured};
use crate::supply::{SOURCES_MAX, validate_model, validate_source, validate_supply};

/// Longest control message.
pub const CONTROL_BYTES_MAX: usize = 256 * 1024;
/// Longest node name.
pub const NAME_CHARS_MAX: usize = 64;
/// Longest build, numerics id.
pub const TAG_CHARS_MAX: usize = 64;
/// Longest model name.
pub const MODEL_CHARS_MAX: usize = 512;
/// Longest list of models in a hello.
pub const MODELS_MAX: usize = 64;
/// Longest reason of a refusal or release.
pub const REASON_CHARS_MAX: usize = 4096;
/// Longest list of addresses of the next stage.
pub const ADDRESSES_MAX: usize = 16;

/// Byte counts above this are no machine of this world, and sums of them do not overflow.
pub(crate) const BYTES_MAX: u64 = 1 << 50;
pub(crate) const LAYERS_MAX: u32 = 1 << 12;
const CORES_MAX: u32 = 1 << 14;
const SESSIONS_MAX: u32 = 1 << 12;

/// The names of all kinds, so that an unknown one is told apart from a malformed one.
pub const CONTROL_KINDS: [&str; 25] = [
    "hello",
    "welcome",
    "prepare",
    "loading",
    "ready",
    "start",
    "started",
    "refused",
    "ping",
    "pong",
    "stats_request",
    "stats",
    "release",
    "bye",
    "measure",
    "measured",
    "probe",
    "examine",
    "examined",
    "supply",
    "fetch",
    "wanting",
    "resolve",
    "list",
    "listed",
];

pub(crate) fn invalid(field: &'static str, why: impl Into<String>) -> ControlError {
    ControlError::Invalid { field, why: why.into() }
}

pub(crate) fn at_most(field: &'static str, value: u64, max: u64) -> Result<(), ControlError> {
    if value > max { Err(invalid(field, format!("{value} is above {max}"))) } else { Ok(()) }
}

pub(crate) fn between(field: &'static str, value: u64, min: u64, max: u64) -> Result<(), ControlError> {
    if value < min {
        Err(invalid(field, format!("{value} is below {min}")))
    } else {
        at_most(field, value, max)
    }
}

pub(crate) fn text(field: &'static str, text: &str, max: usize) -> Result<(), ControlError> {
    if text.chars().nth(max).is_some() {
        return Err(invalid(field, format!("longer than {max} characters")));
    }
    Ok(())
}

impl Control {
    /// Checks every number and length. [`Control::decode`] and [`Control::encode`] call it.
    ///
    /// # Errors
    /// [`ControlError::Invalid`] naming the first field outside its range.
    pub fn validate(&self) -> Result<(), ControlError> {
        match self {
            Self::Hello(hello) | Self::Welcome(hello) => validate_hello(hello),
            Self::Prepare(prepare) => validate_prepare(prepare),
            Self::Loading(loading) => {
                at_most("bytes_total", loading.bytes_total, BYTES_MAX)?;
                at_most("bytes_done", loading.bytes_done, loading.bytes_total)
            }
            Self::Ready(ready) => {
                at_most("bytes_loaded", ready.bytes_loaded, BYTES_MAX)?;
                at_most("weight_bytes_per_token", ready.weight_bytes_per_token, BYTES_MAX)
            }
            Self::Refused(refused) => text("reason", &refused.reason, REASON_CHARS_MAX),
            Self::Release { reason } => text("reason", reason, REASON_CHARS_MAX),
            Self::Ping(ping) => at_most("sent_us", ping.sent_us, TIME_US_MAX),
            Self::Pong(pong) => {
                at_most("sent_us", pong.sent_us, TIME_US_MAX)?;
                at_most("node_us", pong.node_us, TIME_US_MAX)
            }
            Self::Stats(stats) => validate_stats(stats),
            Self::Measure(measure) => validate_measure(measure),
            Self::Measured(measured) => validate_measured(measured),
            Self::Examine(examine) => validate_examine(examine),
            Self::Examined(examined) => validate_examined(examined),
            Self::Supply(supply) => validate_supply(supply),
            Self::Fetch(model) => validate_model(model),
            Self::Resolve { model } => text("model", model, MODEL_CHARS_MAX),
            Self::Listed(listed) => validate_listed(listed),
            Self::Start { .. }
            | Self::Started { .. }
            | Self::Wanting { .. }
            | Self::StatsRequest { .. }
            | Self::Probe
            | Self::List
            | Self::Bye => Ok(()),
        }
    }
}

pub(crate) fn validate_hello(hello: &Hello) -> Result<(), ControlError> {
    text("build", &hello.build, TAG_CHARS_MAX)?;
    text("numerics", &hello.numerics, TAG_CHARS_MAX)?;
    text("name", &hello.name, NAME_CHARS_MAX)?;
    at_most("memory_bytes_available", hello.memory_bytes_available, BYTES_MAX)?;
    between("cores", hello.cores.into(), 1, CORES_MAX.into())?;
    // NaN fails the comparison, and JSON has no word for infinity.
    if hello.read_gb_s.is_some_and(|speed| !(speed > 0.0 && speed <= 1e6)) {
        return Err(invalid("read_gb_s", "must be above 0 and at most 1000000"));
    }
    let models = hello.models.as_deref().unwrap_or_default();
    at_most("models", models.len() as u64, MODELS_MAX as u64)?;
    models.iter().try_for_each(|model| text("models", model, MODEL_CHARS_MAX))
}

pub(crate) fn validate_origin(origin: &Origin) -> Result<(), ControlError> {
    text("origin.repository", &origin.repository, MODEL_CHARS_MAX)?;
    text("origin.commit", &origin.commit, TAG_CHARS_MAX)?;
    text("origin.file", origin.file.as_deref().unwrap_or_default(), MODEL_CHARS_MAX)
}

fn validate_prepare(prepare: &Prepare) -> Result<(), ControlError> {
    text("model", &prepare.model, MODEL_CHARS_MAX)?;
    prepare.origin.iter().try_for_each(validate_origin)?;
    text("numerics", &prepare.numerics, TAG_CHARS_MAX)?;
    at_most("sources", prepare.sources.len() as u64, SOURCES_MAX as u64)?;
    prepare.sources.iter().try_for_each(validate_source)?;
    between("layers_total", prepare.layers_total.into(), 1, LAYERS_MAX.into())?;
    let layers = prepare.layers;
    if layers.start >= layers.end || layers.end > prepare.layers_total {
        let why = format!("{}..{} is no range within 0..{}", layers.start, layers.end, prepare.layers_total);
        return Err(invalid("layers", why));
    }
    if prepare.tail != (layers.end == prepare.layers_total) {
        return Err(invalid("tail", "the tail, and only the tail, holds the last layer"));
    }
    match (&prepare.next, prepare.tail) {
        (None, true) => {}
        (Some(next), false) => {
            between("next.addresses", next.addresses.len() as u64, 1, ADDRESSES_MAX as u64)?;
        }
        (Some(_), true) => return Err(invalid("next", "the tail has no next stage")),
        (None, false) => return Err(invalid("next", "a stage before the tail needs a next stage")),
    }
    prepare.limits.validate().map_err(|error| invalid("limits", error.to_string()))?;
    between("context", prepare.context.into(), 1, prepare.limits.context_max.into())?;
    between("sessions_max", prepare.sessions_max.into(), 1, SESSIONS_MAX.into())?;
    match prepare.threads {
        Some(threads) => between("threads", threads.into(), 1, CORES_MAX.into()),
        None => Ok(()),
    }
}

fn validate_stats(stats: &Stats) -> Result<(), ControlError> {
    for (field, value) in [("weight_bytes", stats.weight_bytes), ("kv_bytes", stats.kv_bytes)] {
        at_most(field, value, BYTES_MAX)?;
    }
    for (field, value) in [
        ("queue_us_p50", stats.queue_us_p50),
        ("queue_us_p99", stats.queue_us_p99),
        ("compute_us_p50", stats.compute_us_p50),
        ("compute_us_p99", stats.compute_us_p99),
    ] {
        at_most(field, value, TIME_US_MAX)?;
    }
    Ok(())
}
