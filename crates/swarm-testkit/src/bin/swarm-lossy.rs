//! A bad link between two processes: see `swarm_testkit::lossy`.
#![forbid(unsafe_code)]

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use swarm_testkit::lossy::{HELP, Relay, Settings};

const USAGE: &str = "\
swarm-lossy --to HOST:PORT [--listen HOST:PORT] [--delay-ms N] [--jitter-ms N] [--rate BYTES_PER_S] [--seed N]
            [--control PORT]
Relays every connection to HOST:PORT. Prints where it listens; ends when standard input does.
Commands, on standard input and on the control port of the loopback interface, one a line, one line of answer each:";

struct Options {
    to: String,
    listen: String,
    control: Option<u16>,
    settings: Settings,
}

fn options(args: impl Iterator<Item = String>) -> Result<Options> {
    let mut options = Options {
        to: String::new(),
        listen: "127.0.0.1:0".into(),
        control: None,
        settings: Settings::default(),
    };
    let mut args = args;
    while let Some(name) = args.next() {
        let value = args.next().with_context(|| format!("{name} needs a value\n{USAGE}\n{HELP}"))?;
        let number = || value.parse::<u64>().with_context(|| format!("{name} {value:?} is no number"));
        match name.as_str() {
            "--to" => options.to = value,
            "--listen" => options.listen = value,
            "--delay-ms" => options.settings.delay = Duration::from_millis(number()?),
            "--jitter-ms" => options.settings.jitter = Duration::from_millis(number()?),
            "--rate" => options.settings.rate = Some(number()?.max(1)),
            "--seed" => options.settings.seed = number()?,
            "--control" => options.control = Some(u16::try_from(number()?).context("no such port")?),
            _ => bail!("no option {name}\n{USAGE}\n{HELP}"),
        }
    }
    if options.to.is_empty() {
        bail!("{USAGE}\n{HELP}");
    }
    Ok(options)
}

fn answer(relay: &Relay, line: &str) -> String {
    relay.command(line).unwrap_or_else(|error| format!("error: {error:#}").replace('\n', "; "))
}

fn converse(relay: &Relay, stream: TcpStream) -> Result<()> {
    let mut out = stream.try_clone()?;
    for line in BufReader::new(stream).lines() {
        writeln!(out, "{}", answer(relay, &line?))?;
    }
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("swarm-lossy: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let options = options(std::env::args().skip(1))?;
    let relay = Arc::new(Relay::start(&options.listen, &options.to, options.settings)?);
    println!("listening {}", relay.address());
    if let Some(port) = options.control {
        let listener = TcpListener::bind(("127.0.0.1", port)).context("cannot open the control port")?;
        println!("control {}", listener.local_addr()?);
        let relay = Arc::clone(&relay);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let relay = Arc::clone(&relay);
                std::thread::spawn(move || drop(converse(&relay, stream)));
            }
        });
    }
    for line in std::io::stdin().lines() {
        println!("{}", answer(&relay, &line?));
    }
    Ok(())
}
