//! How fast a node gets a model from another one on this computer, encryption, digests and the store's list included,
//! beside a plain TCP copy of the same file in the same run.
//!
//! `cargo run --release -p swarm-node --example supply_speed -- MODEL.gguf [FOLDER]`; copies go to FOLDER, by default the
//! system's temporary one, and are removed.

use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use swarm_link::{Connection, Identity, LinkSettings, Listener, SwarmSecret, dial};
use swarm_weights::hub::HubSettings;
use swarm_weights::{Checkpoint, FetchControl, Store};

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

const ROUNDS: usize = 5;
const BUFFER_BYTES: usize = 256 << 10;

fn main() -> Outcome<()> {
    let mut args = std::env::args_os().skip(1);
    let path = args.next().ok_or("which model?")?;
    let folder = args.next().map_or_else(std::env::temp_dir, Into::into);
    let model = Arc::new(Checkpoint::open(Path::new(&path))?);
    let bytes = std::fs::metadata(&path)?.len();
    println!("{:.2} GB", bytes as f64 / 1e9);
    // Once for the page cache.
    std::io::copy(&mut File::open(&path)?, &mut std::io::sink())?;
    let (mut plain, mut peer) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let (copied, supplied) = (copy(Path::new(&path), &folder)?, supply(&model, &folder)?);
        let ratio = copied.as_secs_f64() / supplied.as_secs_f64() * 100.0;
        let (copied_rate, supplied_rate) = (rate(bytes, copied), rate(bytes, supplied));
        println!(
            "round {round}: plain TCP {copied_rate:.0} MB/s, peer {supplied_rate:.0} MB/s, {ratio:.0} %"
        );
        plain.push(copied);
        peer.push(supplied);
    }
    let (plain, peer) = (median(plain), median(peer));
    let ratio = plain.as_secs_f64() / peer.as_secs_f64() * 100.0;
    let (plain_rate, peer_rate) = (rate(bytes, plain), rate(bytes, peer));
    println!("median: plain TCP {plain_rate:.0} MB/s, peer {peer_rate:.0} MB/s, {ratio:.0} %");
    Ok(())
}

fn rate(bytes: u64, time: Duration) -> f64 {
    bytes as f64 / 1e6 / time.as_secs_f64()
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

/// File to socket to file, one thread at each end.
fn copy(path: &Path, folder: &Path) -> Outcome<Duration> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    let target = tempfile::tempdir_in(folder)?;
    let began = Instant::now();
    std::thread::scope(|scope| -> Outcome<()> {
        let sender = scope.spawn(move || pour(&mut File::open(path)?, &mut TcpStream::connect(address)?));
        let (mut socket, _) = listener.accept()?;
        let mut options = OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).open(target.path().join("copy"))?;
        pour(&mut socket, &mut file)?;
        sender.join().map_err(|_| "the sender panicked")?
    })?;
    Ok(began.elapsed())
}

fn pour(from: &mut impl Read, to: &mut impl Write) -> Outcome<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(()),
            count => to.write_all(buffer.get(..count).unwrap_or_default())?,
        }
    }
}

fn link() -> Outcome<(Connection, Connection)> {
    let one = Identity::ephemeral(SwarmSecret::random()?)?;
    let two = one.another_instance()?;
    let settings = LinkSettings::default();
    let listener = Listener::bind_to(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), &two, &settings)?;
    let ours = dial(&[listener.address()], &one, &settings, Duration::from_secs(3))?;
    Ok((ours, listener.connections().recv_timeout(Duration::from_secs(3))?))
}

/// The whole model over an encrypted link into an empty store.
fn supply(model: &Arc<Checkpoint>, folder: &Path) -> Outcome<Duration> {
    let target = tempfile::tempdir_in(folder)?;
    let settings = HubSettings { offline: true, ..HubSettings::new("http://localhost:1") };
    let store = Arc::new(Store::new(target.path().join("store"), target.path().join("hub"), settings));
    let (giving, taking) = link()?;
    let source = model.clone();
    let began = Instant::now();
    let giver = std::thread::spawn(move || swarm_node::serve_model(giving, &source));
    let (catalogue, supplier) = swarm_node::take_model(taking)?;
    let adopted = store.adopt(&catalogue, supplier)?;
    let copy = Checkpoint::open_with(&adopted.path, &|path| store.open_file(path))?;
    let layers = 0..copy.config().num_hidden_layers;
    copy.fetch(layers, &mut FetchControl { progress: &mut |_| {}, abort: &AtomicBool::new(false) })?;
    let time = began.elapsed();
    drop((copy, adopted));
    giver.join().map_err(|_| "the giver panicked")??;
    Ok(time)
}
