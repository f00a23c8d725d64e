//! The relay does to bytes what it says, and nothing else.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use swarm_testkit::lossy::{Relay, Settings};
use swarm_testkit::{Proc, wait_for};

const SOON: Duration = Duration::from_secs(20);

/// A server that sends back what it gets, and a connection to it through a relay.
fn echo(settings: Settings) -> (Relay, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let relay = Relay::to(&listener.local_addr().unwrap().to_string(), settings).unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut buffer = [0; 4096];
        while let Ok(len) = stream.read(&mut buffer) {
            if len == 0 || stream.write_all(&buffer[..len]).is_err() {
                return;
            }
        }
    });
    let near = TcpStream::connect(relay.address()).unwrap();
    near.set_read_timeout(Some(SOON)).unwrap();
    near.set_nodelay(true).unwrap();
    (relay, near)
}

/// Sends `text` round and returns what came back and how long it took.
fn round(stream: &mut TcpStream, text: &[u8]) -> (Vec<u8>, Duration) {
    let began = Instant::now();
    stream.write_all(text).unwrap();
    let mut back = vec![0; text.len()];
    stream.read_exact(&mut back).unwrap();
    (back, began.elapsed())
}

fn late(stream: &mut TcpStream, within: Duration) -> bool {
    stream.set_read_timeout(Some(within)).unwrap();
    let silent = stream.read(&mut [0; 1]).is_err_and(|error| error.kind() == ErrorKind::WouldBlock);
    stream.set_read_timeout(Some(SOON)).unwrap();
    silent
}

#[test]
fn bytes_come_whole_and_the_end_too() {
    let (relay, mut stream) = echo(Settings::default());
    let text: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
    let mut writing = stream.try_clone().unwrap();
    let sent = text.clone();
    let writer = std::thread::spawn(move || {
        writing.write_all(&sent).unwrap();
        writing.shutdown(std::net::Shutdown::Write).unwrap();
    });
    let mut back = Vec::new();
    stream.read_to_end(&mut back).unwrap();
    writer.join().unwrap();
    assert!(back == text);
    assert_eq!(relay.command("status").unwrap().split_once(" up").unwrap().1, " 3000000 down 3000000");
}

#[test]
fn delay_and_rate_hold_in_both_directions() {
    let delay = Duration::from_millis(30);
    let (relay, mut stream) =
        echo(Settings { delay, jitter: Duration::from_millis(5), ..Settings::default() });
    let (back, took) = round(&mut stream, b"hello");
    assert_eq!(back, b"hello");
    assert!(took >= 2 * delay && took < 2 * delay + Duration::from_secs(2), "{took:?}");
    relay.command("delay 0").unwrap();
    relay.command("rate 100000").unwrap();
    let (back, took) = round(&mut stream, &[7; 20_000]);
    assert_eq!(back, [7; 20_000]);
    assert!(took >= Duration::from_millis(200), "{took:?}");
}

#[test]
fn a_cut_holds_one_direction_until_it_is_healed() {
    let (relay, mut stream) = echo(Settings::default());
    round(&mut stream, b"a");
    relay.command("cut down").unwrap();
    stream.write_all(b"b").unwrap();
    wait_for(SOON, "the byte to go up", || relay.command("status").unwrap().contains("up 2 ")).unwrap();
    assert!(late(&mut stream, Duration::from_millis(100)));
    relay.command("heal").unwrap();
    let mut back = [0; 1];
    stream.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"b");
    let began = Instant::now();
    relay.command("stall 150").unwrap();
    round(&mut stream, b"c");
    assert!(began.elapsed() >= Duration::from_millis(150));
}

#[test]
fn the_newest_connection_is_cut_and_the_others_are_not() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let relay = Relay::to(&listener.local_addr().unwrap().to_string(), Settings::default()).unwrap();
    let pair = || {
        let near = TcpStream::connect(relay.address()).unwrap();
        let far = listener.accept().unwrap().0;
        far.set_read_timeout(Some(SOON)).unwrap();
        (near, far)
    };
    let (mut old, mut newest) = (pair(), pair());
    for (near, far) in [&mut old, &mut newest] {
        // A connection counts once it carries bytes.
        near.write_all(b"a").unwrap();
        far.read_exact(&mut [0; 1]).unwrap();
    }
    relay.command("cut up newest").unwrap();
    let mut later = pair();
    for (near, _) in [&mut newest, &mut old, &mut later] {
        near.write_all(b"b").unwrap();
    }
    for (_, far) in [&mut old, &mut later] {
        far.read_exact(&mut [0; 1]).unwrap();
    }
    assert!(late(&mut newest.1, Duration::from_millis(100)));
    relay.command("heal").unwrap();
    newest.1.read_exact(&mut [0; 1]).unwrap();
}

#[test]
fn damage_is_one_bit_of_a_piece() {
    let (relay, mut stream) = echo(Settings { seed: 9, ..Settings::default() });
    relay.command("corrupt 1 up").unwrap();
    let (back, _) = round(&mut stream, &[0; 64]);
    assert_eq!(back.iter().map(|byte| byte.count_ones()).sum::<u32>(), 1, "{back:?}");
    assert_eq!(round(&mut stream, &[0; 64]).0, [0; 64]);
}

#[test]
fn a_reset_is_a_reset() {
    let (relay, mut stream) = echo(Settings::default());
    round(&mut stream, b"a");
    relay.command("reset").unwrap();
    let error = stream.read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    wait_for(SOON, "the link to end", || relay.command("status").unwrap().starts_with("connections 0"))
        .unwrap();
}

#[test]
fn the_command_takes_orders_on_standard_input_and_on_its_port() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let target = listener.local_addr().unwrap().to_string();
    let mut command = Command::new(env!("CARGO_BIN_EXE_swarm-lossy"));
    let mut lossy =
        Proc::spawn(command.args(["--to", &target, "--control", "0", "--delay-ms", "1"])).unwrap();
    let listening = lossy.expect(SOON, "listening").unwrap();
    let control = lossy.expect(SOON, "control").unwrap();
    let mut near = TcpStream::connect(listening.split_once(' ').unwrap().1).unwrap();
    near.write_all(b"x").unwrap();
    let (mut far, _) = listener.accept().unwrap();
    far.read_exact(&mut [0; 1]).unwrap();
    lossy.say("cut up").unwrap();
    lossy.expect(SOON, "ok").unwrap();
    lossy.say("nonsense").unwrap();
    lossy.expect(SOON, "error: no such command").unwrap();
    let mut control = TcpStream::connect(control.split_once(' ').unwrap().1).unwrap();
    control.write_all(b"status\n").unwrap();
    let mut answer = [0; 13];
    control.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"connections 1");
    assert!(lossy.finish(SOON).unwrap().status.success());
}
