//! `swarm-os peers` and `swarm-os forget`: who belongs to this swarm.

use std::time::Duration;

use serde_json::json;
use swarm_link::Remembered;
use swarm_node::pairing::tell_members;

use crate::args::{ForgetArgs, PeersArgs};
use crate::failure::Failure;
use crate::present::text;
use crate::settings;

/// How long to look for members that are there.
const LOOK: u32 = 5;

pub fn peers(args: &PeersArgs) -> Result<(), Failure> {
    let (_, identity) = settings::identity()?;
    let peers = identity.peers();
    if args.json {
        let list: Vec<_> = peers
            .iter()
            .map(|peer| json!({"name": peer.name, "key": text::hex(&peer.key), "paired": peer.paired}))
            .collect();
        return Ok(text::say(&json!({ "peers": list }).to_string())?);
    }
    if peers.is_empty() {
        return Ok(text::say("no other machine is known; `swarm-os pair` shows a code for one")?);
    }
    let mut rows = vec![["name", "key", "how it came"].map(String::from).to_vec()];
    for peer in &peers {
        let how = if peer.paired { "paired" } else { "has the secret" };
        rows.push(vec![text::line(&peer.name), peer.fingerprint(), how.to_owned()]);
    }
    Ok(text::say(&text::table(&rows, &[]))?)
}

pub fn forget(args: &ForgetArgs) -> Result<(), Failure> {
    let (folders, identity) = settings::identity()?;
    let Some(name) = &args.name else {
        let kept = swarm_link::leave_swarm(folders.config())?;
        text::note("this machine has left its swarm: it has a new secret and a new key, and knows nobody");
        if let Some(old) = kept {
            text::note(&format!(
                "the old secret is kept in {}; delete it when it is not needed",
                old.display()
            ));
        }
        text::note("nodes that run already stay in the old swarm until they are started again");
        return Ok(());
    };
    let mut others =
        args.peer.iter().map(|peer| settings::peer_addresses(peer)).collect::<Result<Vec<_>, _>>()?;
    let peer = identity.forget(name)?;
    let mut remembered = Remembered::load(folders.state());
    // A list that cannot be written costs a try of an old address.
    let _ = remembered.forget(&peer.key);
    others.extend(remembered.addresses().into_iter().map(|address| vec![address]));
    let within = Duration::from_secs(u64::from(args.wait.unwrap_or(LOOK)));
    // Nobody to tell: nobody to wait for.
    let rest: Vec<_> = identity.peers().into_iter().filter(|peer| peer.paired).collect();
    let told = if rest.is_empty() { Default::default() } else { tell_members(&identity, &others, within)? };
    let names = |told_now: bool| -> Vec<String> {
        rest.iter()
            .filter(|peer| told.contains(&peer.key) == told_now)
            .map(|peer| text::line(&peer.name))
            .collect()
    };
    let (now, later) = (names(true), names(false));
    if args.json {
        let object = json!({"forgotten": peer.name, "told": now, "not_told": later});
        return Ok(text::say(&object.to_string())?);
    }
    text::say(&format!("{} is forgotten; the swarm has a new secret", text::line(&peer.name)))?;
    if !now.is_empty() {
        text::say(&format!("told now: {}", now.join(", ")))?;
    }
    if !later.is_empty() {
        text::say(&format!("not there, will be told when they next meet this swarm: {}", later.join(", ")))?;
    }
    if identity.peers().iter().any(|peer| !peer.paired) {
        text::say(
            "machines that came by `secret import` need the new one the same way, or `swarm-os forget --all` and a pairing",
        )?;
    }
    Ok(())
}
