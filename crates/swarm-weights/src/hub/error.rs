//! What can go wrong between this computer and the Hub. No text holds a token or a signed URL.

/// Why something did not come from the Hub.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    #[error("{what} is not on this computer, and HF_HUB_OFFLINE forbids to fetch it")]
    Offline { what: String },
    #[error("{host} cannot be reached for {what}: {why}")]
    Unreachable { host: String, what: String, why: String },
    #[error("{what} is not at {host}; check its name and its revision")]
    NotFound { host: String, what: String },
    #[error("{host} does not give out {what} (status {status}); {hint}")]
    Denied { host: String, what: String, status: u16, hint: &'static str },
    #[error("{host} answered {status} for {what}")]
    Status { host: String, what: String, status: u16 },
    #[error("{host} is busy ({status}) and asks for {seconds} s of patience for {what}; try again later")]
    Busy { host: String, what: String, status: u16, seconds: u64 },
    #[error("{what} changed at {host}: {why}; nothing of it is used, start again for the new version")]
    Changed { host: String, what: String, why: String },
    #[error("{host} sent something else for {what}: {why}")]
    Wrong { host: String, what: String, why: String },
    #[error("the connection to {host} ended early in {what}: {why}")]
    Cut { host: String, what: String, why: String },
    #[error("it failed {failures} times in a row")]
    GaveUp { failures: u32, source: Box<HubError> },
    #[error("it was called off")]
    Aborted,
    #[error("what came cannot be kept: {0}")]
    Sink(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl HubError {
    /// Nobody could be asked, as opposed to an answer that says no.
    pub fn is_unreachable(&self) -> bool {
        match self {
            Self::Offline { .. } | Self::Unreachable { .. } | Self::Cut { .. } => true,
            Self::GaveUp { source, .. } => source.is_unreachable(),
            _ => false,
        }
    }

    /// Another try may have another outcome.
    pub(super) fn may_pass(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Cut { .. } | Self::Wrong { .. } | Self::Busy { .. } => true,
            Self::Status { status, .. } => matches!(status, 403 | 408 | 425 | 429 | 500..=599),
            _ => false,
        }
    }
}
