//! Measures a link on this computer: round trips of 4 KiB messages, and a long stream of 1 MiB ones.
//!
//! `cargo run --release -p swarm-link --example link_bench`

use std::error::Error;
use std::net::{Ipv4Addr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use swarm_link::{Connection, Identity, LinkSettings, Listener, SwarmSecret, dial};

const ROUND_TRIPS: usize = 20_000;
const SMALL_BYTES: usize = 4096;
const LARGE_BYTES: usize = 1 << 20;
const LARGE_MESSAGES: usize = 2000;

fn main() -> Result<(), Box<dyn Error>> {
    let (ours, theirs) = link()?;
    println!("cipher: {:?}", ours.suite);
    let echo = thread::spawn(move || echo(theirs));
    let ours = round_trips(ours)?;
    stream(ours)?;
    echo.join().map_err(|_| "the other end failed")?;
    Ok(())
}

fn link() -> Result<(Connection, Connection), Box<dyn Error>> {
    let one = Identity::ephemeral(SwarmSecret::random()?)?;
    let two = one.another_instance()?;
    let settings = LinkSettings { message_bytes_max: LARGE_BYTES, ..LinkSettings::default() };
    let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let listener = Listener::bind_to(loopback, &two, &settings)?;
    let began = Instant::now();
    let ours = dial(&[listener.address()], &one, &settings, Duration::from_secs(3))?;
    println!("handshake: {:.2} ms", began.elapsed().as_secs_f64() * 1e3);
    Ok((ours, listener.connections().recv_timeout(Duration::from_secs(3))?))
}

/// Returns small messages, swallows large ones but for one short answer at the end.
fn echo(mut end: Connection) {
    let mut message = Vec::new();
    let mut large = 0;
    while end.receiver.receive(&mut message).is_ok() {
        large += usize::from(message.len() == LARGE_BYTES);
        let answer = if message.len() == SMALL_BYTES { message.as_slice() } else { b"done" };
        if (message.len() == SMALL_BYTES || large == LARGE_MESSAGES) && end.sender.send(&[answer]).is_err() {
            return;
        }
    }
}

fn round_trips(mut end: Connection) -> Result<Connection, Box<dyn Error>> {
    let (body, mut answer) = (vec![7; SMALL_BYTES], Vec::new());
    let mut times = Vec::with_capacity(ROUND_TRIPS);
    for _ in 0..ROUND_TRIPS {
        let began = Instant::now();
        end.sender.send(&[&body])?;
        end.receiver.receive(&mut answer)?;
        times.push(began.elapsed());
    }
    times.sort_unstable();
    let at = |share: f64| times.get((times.len() as f64 * share) as usize).copied().unwrap_or_default();
    println!("round trip of {SMALL_BYTES} bytes: p50 {:?}, p99 {:?}", at(0.5), at(0.99));
    Ok(end)
}

fn stream(mut end: Connection) -> Result<(), Box<dyn Error>> {
    let (body, mut answer) = (vec![7; LARGE_BYTES], Vec::new());
    let began = Instant::now();
    for _ in 0..LARGE_MESSAGES {
        end.sender.send(&[&body])?;
    }
    end.receiver.receive(&mut answer)?;
    let megabytes = (LARGE_BYTES * LARGE_MESSAGES) as f64 / 1e6;
    println!(
        "one way, messages of {LARGE_BYTES} bytes: {:.0} MB/s",
        megabytes / began.elapsed().as_secs_f64()
    );
    Ok(())
}
