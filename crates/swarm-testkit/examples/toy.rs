//! Writes a toy model to a path, for a look with other tools:
//! `cargo run -p swarm-testkit --example toy -- llama q4_k llama.gguf`
//! (types: hf-f32, hf-f16, hf-bf16, hf-f32-sharded, a GGUF tensor type, or the mixture q4_k_m). Further arguments
//! change the shape: `hidden_size=2048 layers=4`. The spec `tinyllama` has the shape of TinyLlama-1.1B already, for
//! benchmarks; make it with `--release`.

use std::path::Path;

use swarm_testkit::toy::{self, GgufType, Storage};

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [name, kind, path, shape @ ..] = args.as_slice() else {
        anyhow::bail!("usage: toy SPEC TYPE PATH [KEY=NUMBER]...")
    };
    let mut model = match name.as_str() {
        "tinyllama" => toy::tinyllama(22),
        name => toy::spec(name),
    };
    let path = Path::new(path);
    for part in shape {
        let Some((key, value)) = part.split_once('=') else { anyhow::bail!("`{part}` is not KEY=NUMBER") };
        let value: usize = value.parse()?;
        model = if key == "layers" { model.with_layers(value) } else { model.with_config(key, value.into()) };
    }
    match kind.as_str() {
        "hf-f32" => model.write_hf(path, Storage::F32)?,
        "hf-f16" => model.write_hf(path, Storage::F16)?,
        "hf-bf16" => model.write_hf(path, Storage::BF16)?,
        "hf-f32-sharded" => model.write_hf(path, Storage::F32.sharded(3))?,
        "q4_k_m" => model.write_gguf_q4_k_m(path)?,
        kind => {
            let found = GgufType::ALL.into_iter().find(|t| format!("{t:?}").eq_ignore_ascii_case(kind));
            let Some(found) = found else { anyhow::bail!("no tensor type {kind}") };
            model.write_gguf(path, found)?;
        }
    }
    Ok(())
}
