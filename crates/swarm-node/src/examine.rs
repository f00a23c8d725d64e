//! Answers to `doctor`: how the way between two nodes looks from this end.

use std::net::{SocketAddr, TcpStream};

use swarm_link::{Connection, InstanceId};
use swarm_wire::{Control, Examine, Examined, Hello};

use crate::control;
use crate::deadlines::{EXAMINE_ANSWER, EXAMINE_REACH};

/// Questions answered on one connection; whoever wants more dials again.
const QUESTIONS_MAX: usize = 64;

/// Answers `first` and what follows it, until the other side leaves, is silent for too long or has asked enough.
///
/// What a member can cause here: dials to ports of its own address, one at a time, and answers of 128 KiB.
pub(crate) fn serve_examine(
    connection: Connection,
    first: Examine,
    hello: impl Fn() -> Hello,
    hears: impl Fn(InstanceId) -> Option<bool>,
) {
    let (peer, sender, mut receiver, _closer) = control::split(connection);
    let mut question = first;
    for _ in 0..QUESTIONS_MAX {
        let answer = Examined {
            id: question.id,
            hello: hello(),
            reaches: question.reach.map(|port| reaches(peer.address, port)),
            hears: question.hear.as_deref().and_then(InstanceId::parse).and_then(&hears),
            padding: "0".repeat(question.padding_bytes as usize),
        };
        if sender.send(&Control::Examined(Box::new(answer))).is_err() {
            return;
        }
        match receiver.receive(Some(EXAMINE_ANSWER)) {
            Ok(Control::Examine(next)) => question = next,
            _ => return,
        }
    }
}

/// Whether somebody takes a connection at `port` of `address`.
fn reaches(mut address: SocketAddr, port: u16) -> bool {
    address.set_port(port);
    TcpStream::connect_timeout(&address, EXAMINE_REACH).is_ok()
}
