//! `swarm-os secret`: the swarm's secret, to another computer and back.

use crate::args::SecretCommand;
use crate::failure::Failure;
use crate::present::text;
use crate::settings;

pub fn secret(command: &SecretCommand) -> Result<(), Failure> {
    match command {
        SecretCommand::Export => {
            let (_, identity) = settings::identity()?;
            // Somebody else will have it: a pairing must not replace it.
            identity.settle()?;
            Ok(text::say(&identity.export_secret())?)
        }
        SecretCommand::Import { secret } => {
            let typed = secret.as_deref().unwrap_or("-");
            let secret = settings::prompt_text(typed)?;
            let folders = swarm_link::ConfigDir::locate()?;
            let kept = swarm_link::import_secret(folders.config(), secret.trim())?;
            match kept {
                Some(old) => {
                    text::note(&format!("the secret is in place; the old one is kept in {}", old.display()))
                }
                None => text::note("the secret is in place"),
            }
            text::note("nodes that run use it from the next connection on");
            Ok(())
        }
    }
}
