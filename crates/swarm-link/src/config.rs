//! Where this user's identity and memory are kept.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use etcetera::app_strategy::{AppStrategy, AppStrategyArgs, choose_app_strategy};

use crate::error::IdentityError;

/// The environment variable that puts every file of this node in one folder.
const HOME_VARIABLE: &str = "SWARM_OS_HOME";

/// The folders of this user: one for what must be kept (identity, secret), one for what may be lost.
///
/// `SWARM_OS_HOME` names one folder for both. Without it they are the platform's own: on Linux and macOS
/// `$XDG_CONFIG_HOME/swarm-os` and `$XDG_STATE_HOME/swarm-os`, by default `~/.config` and `~/.local/state`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigDir {
    config: PathBuf,
    state: PathBuf,
}

impl ConfigDir {
    /// Finds the folders. Nothing is created or read.
    ///
    /// # Errors
    /// [`IdentityError::NoHome`] when the user has no home folder and `SWARM_OS_HOME` is not set.
    pub fn locate() -> Result<Self, IdentityError> {
        Self::choose(std::env::var_os(HOME_VARIABLE))
    }

    fn choose(home: Option<OsString>) -> Result<Self, IdentityError> {
        if let Some(home) = home.filter(|home| !home.is_empty()) {
            // Made absolute once, so that a later change of folder does not move the identity.
            let home = std::path::absolute(&home)
                .map_err(|source| IdentityError::Read { path: PathBuf::from(home), source })?;
            return Ok(Self::at(&home));
        }
        let strategy = choose_app_strategy(AppStrategyArgs {
            top_level_domain: "org".into(),
            author: "swarm-os".into(),
            app_name: "swarm-os".into(),
        })
        .map_err(|_| IdentityError::NoHome)?;
        let config = strategy.config_dir();
        let state = strategy.state_dir().unwrap_or_else(|| strategy.data_dir().join("state"));
        Ok(Self { config, state })
    }

    /// Both folders at one place, as `SWARM_OS_HOME` does.
    #[must_use]
    pub fn at(home: &Path) -> Self {
        Self { config: home.to_path_buf(), state: home.join("state") }
    }

    /// For [`crate::Identity::load_or_create`].
    #[must_use]
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// For [`crate::Remembered`] and other things that may be lost.
    #[must_use]
    pub fn state(&self) -> &Path {
        &self.state
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variable_wins_and_an_empty_one_is_none() {
        let chosen = ConfigDir::choose(Some("some/where".into())).unwrap();
        assert!(chosen.config().is_absolute() && chosen.config().ends_with("some/where"));
        assert_eq!(chosen.state(), chosen.config().join("state"));
        let platform = ConfigDir::choose(None).unwrap();
        assert_eq!(ConfigDir::choose(Some("".into())).unwrap(), platform);
        assert!(platform.config().ends_with("swarm-os"), "{platform:?}");
        assert_ne!(platform.config(), platform.state());
    }
}
