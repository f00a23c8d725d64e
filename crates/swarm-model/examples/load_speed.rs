//! How long a whole model takes from a cold disk into a ready stage, beside reading the same bytes cold, and how much
//! memory it took meanwhile. Linux: the file is put out of the page cache by `dd`, and the peak is the process's own.
//!
//! ```text
//! cargo run --release -p swarm-model --example load_speed -- MODEL [q8_0|q4_0|q4_k] [THREADS] [ROUNDS]
//! ```
//!
//! A round is: out of the cache, read front to back with one thread; out of the cache, load. Run it alone.

use std::error::Error;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use swarm_kernels::Quant;
use swarm_model::{LoadOptions, Stage};
use swarm_weights::{Checkpoint, QuantizedStore};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let Some(model) = args.first() else {
        return Err("usage: load_speed MODEL [q8_0|q4_0|q4_k|-] [THREADS] [ROUNDS]".into());
    };
    let quant = args.get(1).and_then(|name| Quant::from_name(name));
    let number = |at: usize, usual: usize| args.get(at).map_or(Ok(usual), |text| text.parse());
    let (threads, rounds) = (number(2, 2)?, number(3, 5)?);
    println!("read cold   loaded   ratio   GB/s  weights MB  beyond them MB");
    let mut ratios = Vec::new();
    for _ in 0..rounds {
        let files: Vec<String> = Checkpoint::open(Path::new(model))?.files().map(str::to_owned).collect();
        // What was quantized before is read in place of the originals, where it was kept.
        files.iter().try_for_each(|file| forget(file))?;
        let started = Instant::now();
        let bytes = files.iter().map(|file| read(file)).sum::<Result<u64, _>>()?;
        let cold = started.elapsed().as_secs_f64();
        files.iter().try_for_each(|file| forget(file))?;
        let started = Instant::now();
        let checkpoint = Checkpoint::open(Path::new(model))?.quantized(quant);
        let quantized = QuantizedStore::of_user(&checkpoint, false)?.map(Arc::new);
        let options = LoadOptions { threads, quantized, context: Some(512), ..LoadOptions::default() };
        let layers = checkpoint.config().num_hidden_layers;
        let before = peak()?;
        let stage = Stage::load(&checkpoint, 0..layers, &options, &mut |_| {})?;
        let loaded = started.elapsed().as_secs_f64();
        let weights = stage.weight_bytes() as u64;
        let beyond = peak()?.saturating_sub(weights);
        drop(stage);
        println!(
            "{cold:8.2} s {loaded:7.2} s {:7.2} {:6.2} {:11.0} {:9.0} ({:.0} before)",
            loaded / cold,
            bytes as f64 / loaded / 1e9,
            weights as f64 / 1e6,
            beyond as f64 / 1e6,
            before as f64 / 1e6,
        );
        ratios.push(loaded / cold);
        // The peak starts anew.
        std::fs::write("/proc/self/clear_refs", "5")?;
    }
    ratios.sort_by(f64::total_cmp);
    println!("median ratio {:.2}", ratios.get(rounds / 2).copied().unwrap_or(f64::NAN));
    Ok(())
}

/// Puts a file out of the page cache.
fn forget(file: &str) -> Result<(), Box<dyn Error>> {
    let mut dd = Command::new("dd");
    dd.args([format!("if={file}").as_str(), "iflag=nocache", "count=0"]).stderr(Stdio::null());
    if dd.status()?.success() { Ok(()) } else { Err(format!("dd cannot drop {file}").into()) }
}

fn read(file: &str) -> std::io::Result<u64> {
    let (mut file, mut buffer, mut bytes) = (File::open(file)?, vec![0; 1 << 20], 0);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(bytes),
            count => bytes += count as u64,
        }
    }
}

/// The most that was resident.
fn peak() -> Result<u64, Box<dyn Error>> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).ok_or("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").trim().parse::<u64>()? * 1024)
}
