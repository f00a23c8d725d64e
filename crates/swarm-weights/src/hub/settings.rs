//! What the environment says about the Hub, in the words of its own tools.

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// Where the Hub is when nobody says otherwise.
const ENDPOINT: &str = "https://huggingface.co";
/// A token is some forty characters.
const TOKEN_BYTES_MAX: usize = 4096;

/// A secret that no message shows.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// Nothing when `text` could not be sent in a header.
    pub fn new(text: &str) -> Option<Self> {
        let text = text.trim();
        let sound = !text.is_empty()
            && text.len() <= TOKEN_BYTES_MAX
            && text.bytes().all(|byte| byte.is_ascii_graphic());
        sound.then(|| Self(text.to_owned()))
    }

    pub(super) fn bearer(&self) -> String {
        format!("Bearer {}", self.0)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(not shown)")
    }
}

/// How often and how patiently a request is made again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    /// Failures in a row, without a byte between them, that end it.
    pub failures_max: u32,
    /// The first wait; each one after it is twice as long.
    pub first: Duration,
    /// The longest wait of one's own choice, and the longest that a server may ask for.
    pub longest: Duration,
    pub longest_asked: Duration,
    /// No byte for so long is a failure.
    pub idle: Duration,
    /// The same for a connection and for the head of an answer.
    pub connect: Duration,
}

impl Default for Retry {
    fn default() -> Self {
        Self {
            failures_max: 6,
            first: Duration::from_millis(500),
            longest: Duration::from_secs(20),
            longest_asked: Duration::from_secs(300),
            idle: Duration::from_secs(30),
            connect: Duration::from_secs(15),
        }
    }
}

/// Everything a client of the Hub is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubSettings {
    /// Scheme, host and port, perhaps a path; no slash at the end.
    pub endpoint: String,
    pub token: Option<Token>,
    /// Ask nothing of any server.
    pub offline: bool,
    /// Requests at the same time.
    pub connections: usize,
    pub retry: Retry,
}

impl HubSettings {
    /// For the Hub at `endpoint`, without a token.
    pub fn new(endpoint: &str) -> Self {
        Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: None,
            offline: false,
            connections: 8,
            retry: Retry::default(),
        }
    }

    /// `HF_ENDPOINT`, `HF_TOKEN` (else the file that `HF_TOKEN_PATH` names, else `token` in `hf_home`),
    /// `HF_HUB_OFFLINE`. `env` looks a variable up; an empty one counts as not set.
    pub(crate) fn from_env(env: &dyn Fn(&str) -> Option<OsString>, hf_home: &std::path::Path) -> Self {
        let text = |key: &str| {
            env(key).map(|value| value.to_string_lossy().trim().to_owned()).filter(|value| !value.is_empty())
        };
        let file = || {
            let path = text("HF_TOKEN_PATH").map_or_else(|| hf_home.join("token"), PathBuf::from);
            let bytes = crate::hf::read_optional(&path, TOKEN_BYTES_MAX as u64).ok()??;
            String::from_utf8(bytes).ok()
        };
        let token = text("HF_TOKEN").or_else(|| text("HUGGING_FACE_HUB_TOKEN")).or_else(file);
        let offline = text("HF_HUB_OFFLINE").or_else(|| text("TRANSFORMERS_OFFLINE"));
        let offline = offline
            .is_some_and(|value| matches!(value.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE"));
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned());
        Self { token: token.and_then(|token| Token::new(&token)), offline, ..Self::new(&endpoint) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(set: &[(&str, &str)], home: &std::path::Path) -> HubSettings {
        let env = |key: &str| set.iter().find(|(k, _)| *k == key).map(|(_, value)| OsString::from(value));
        HubSettings::from_env(&env, home)
    }

    #[test]
    fn the_environment_is_read_as_other_tools_do() {
        let home = tempfile::tempdir().unwrap();
        let plain = settings(&[("HF_TOKEN", " "), ("HF_HUB_OFFLINE", "0")], home.path());
        assert_eq!(plain, HubSettings::new(ENDPOINT));
        let set = [("HF_ENDPOINT", "http://mirror:8080/"), ("HF_TOKEN", "hf_abc"), ("HF_HUB_OFFLINE", "1")];
        let told = settings(&set, home.path());
        assert_eq!((told.endpoint.as_str(), told.offline), ("http://mirror:8080", true));
        assert_eq!(told.token, Token::new("hf_abc"));
        std::fs::write(home.path().join("token"), "hf_file\n").unwrap();
        assert_eq!(settings(&[], home.path()).token, Token::new("hf_file"));
    }

    #[test]
    fn a_token_is_never_shown() {
        let settings = HubSettings { token: Token::new("hf_secret"), ..HubSettings::new(ENDPOINT) };
        assert!(!format!("{settings:?}").contains("secret"));
        assert_eq!(Token::new("two\nlines"), None);
    }
}
