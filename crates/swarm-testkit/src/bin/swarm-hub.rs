//! A Hub on this computer, to try things with: see `swarm_testkit::hub`.
#![forbid(unsafe_code)]

use std::io::Read;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;

use anyhow::{Context, Result};
use swarm_testkit::Hub;

const USAGE: &str = "swarm-hub PORT ORG/NAME=FOLDER...
Serves the files of each folder as a repository. Prints what HF_ENDPOINT is to be; ends when standard input does, and
says then how many bytes it sent.";

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let port = args.next().and_then(|port| port.parse::<u16>().ok()).context(USAGE)?;
    let front = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
    let hub = Hub::with(front, TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?)?;
    for word in args {
        let (id, folder) = word.split_once('=').context(USAGE)?;
        let commit = hub.add(id, Path::new(folder)).with_context(|| format!("cannot read {folder}"))?;
        eprintln!("{id} at {commit}");
    }
    println!("HF_ENDPOINT={}", hub.endpoint());
    let mut sink = [0; 64];
    while matches!(std::io::stdin().read(&mut sink), Ok(count) if count > 0) {}
    let log = hub.log();
    let bytes: u64 = log.iter().map(|served| served.bytes).sum();
    println!("{} answers, {bytes} bytes, {} of weights more than once", log.len(), hub.bytes_again());
    Ok(())
}
