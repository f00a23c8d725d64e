//! Opened models: what a stage reads, that both formats give the same tensors, identity, bad folders.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use serde_json::json;
use swarm_weights::{
    Checkpoint, EMBED, Family, FileSource, Format, HEAD, MmapSource, NORM, Source, SourceError,
    TokenizerFiles, WeightsError,
};

use crate::writer::{Noting, Stored, Toy, safetensors};

const FAMILIES: [Family; 4] = [Family::Llama, Family::Mistral, Family::Qwen2, Family::Qwen3];

fn every_toy() -> Vec<Toy> {
    let mut toys = Vec::new();
    for family in FAMILIES {
        for tied in [false, true] {
            toys.push(Toy { tied, ..Toy::new(family) });
        }
    }
    toys.push(Toy { biased: true, ..Toy::new(Family::Llama) });
    toys
}

fn chain(error: &WeightsError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

fn refused(folder: &Path) -> String {
    chain(&Checkpoint::open(folder).expect_err("must be refused"))
}

#[test]
fn both_formats_give_the_same_tensors() {
    for toy in every_toy() {
        let folder = tempfile::tempdir().unwrap();
        toy.write_folder(folder.path());
        let gguf_path = folder.path().join("other").join("toy.gguf");
        std::fs::create_dir(folder.path().join("other")).unwrap();
        std::fs::write(&gguf_path, toy.gguf().bytes()).unwrap();
        let hf = Checkpoint::open(folder.path()).unwrap();
        let gguf = Checkpoint::open_with(gguf_path.parent().unwrap(), &MmapSource::opener).unwrap();
        assert_eq!((hf.format(), gguf.format()), (Format::Safetensors, Format::Gguf));

        let mut config = gguf.config().clone();
        if toy.family == Family::Mistral {
            config.family = Family::Mistral; // GGUF files call it llama
        }
        assert_eq!(&config, hf.config(), "{toy:?}");
        for (name, _, shape, data) in toy.tensors() {
            let tensor = hf.read(&name).unwrap();
            assert_eq!(tensor.bytes, data, "{name}");
            assert_eq!(gguf.read(&name).unwrap(), tensor, "{name} of {toy:?}");
            let info = gguf.tensor(&name).unwrap();
            assert_eq!((info.rows * info.cols) as u64, shape.iter().product::<u64>());
        }
        assert_eq!(hf.tensors().count(), toy.tensors().len());
        assert!(matches!(hf.read("absent"), Err(WeightsError::NoSuchTensor { .. })));
    }
}

#[test]
fn stored_frequencies_and_a_tied_head_are_left_alone() {
    let toy = Toy { tied: true, ..Toy::new(Family::Llama) };
    let folder = tempfile::tempdir().unwrap();
    toy.write_folder(folder.path());
    let plain = Checkpoint::open(folder.path()).unwrap().fingerprint().unwrap();
    let mut tensors = toy.tensors();
    tensors.push(("model.layers.0.self_attn.rotary_emb.inv_freq".into(), "I64", vec![4], vec![0; 32]));
    tensors.push((HEAD.into(), "F32", vec![1], vec![0; 4]));
    std::fs::write(folder.path().join("model.safetensors"), safetensors(&tensors)).unwrap();
    let more = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(more.fingerprint().unwrap(), plain);
    assert!(more.tensor(HEAD).is_none());

    // The pair may be stored under the head's name alone.
    tensors.retain(|(name, ..)| name != HEAD && !name.ends_with("inv_freq"));
    tensors.iter_mut().find(|(name, ..)| name == EMBED).unwrap().0 = HEAD.into();
    std::fs::write(folder.path().join("model.safetensors"), safetensors(&tensors)).unwrap();
    let renamed = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(renamed.fingerprint().unwrap(), plain);
}

/// Splits `tensors` over two files with an index.
fn write_sharded(toy: &Toy, folder: &Path) {
    std::fs::write(folder.join("config.json"), toy.config().to_string()).unwrap();
    let tensors = toy.tensors();
    let (first, second) = tensors.split_at(tensors.len() / 2);
    let mut map = serde_json::Map::new();
    for (number, part) in [first, second].into_iter().enumerate() {
        let file = format!("model-0000{}-of-00002.safetensors", number + 1);
        std::fs::write(folder.join(&file), safetensors(part)).unwrap();
        part.iter().for_each(|(name, ..)| drop(map.insert(name.clone(), json!(file))));
    }
    let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
    std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

#[test]
fn an_indexed_checkpoint_is_the_single_file_in_parts() {
    let toy = Toy::new(Family::Qwen3);
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    toy.write_folder(one.path());
    write_sharded(&toy, two.path());
    let (one, sharded) = (Checkpoint::open(one.path()).unwrap(), Checkpoint::open(two.path()).unwrap());
    assert_eq!(one.fingerprint().unwrap(), sharded.fingerprint().unwrap());
    for (name, .., data) in toy.tensors() {
        assert_eq!(sharded.read(&name).unwrap().bytes, data);
    }
}

#[test]
fn a_broken_index_is_named() {
    let toy = Toy::new(Family::Llama);
    let folder = tempfile::tempdir().unwrap();
    write_sharded(&toy, folder.path());
    let index = folder.path().join("model.safetensors.index.json");
    let text = std::fs::read_to_string(&index).unwrap();
    for file in
        ["../model.safetensors", "/etc/passwd", "a\\b.safetensors", "..", "weights.bin", "C:x.safetensors"]
    {
        let file = serde_json::to_string(file).unwrap();
        std::fs::write(&index, text.replace("\"model-00001-of-00002.safetensors\"", &file)).unwrap();
        assert!(refused(folder.path()).contains("not a plain .safetensors file name"), "{file}");
    }
    std::fs::write(&index, text.replace("00001-of", "00002-of")).unwrap();
    assert!(refused(folder.path()).contains("which does not have it"));
    std::fs::write(&index, text.replace("00001-of", "00003-of")).unwrap();
    assert!(refused(folder.path()).contains("model-00003-of-00002.safetensors"));
    std::fs::write(&index, text.replace(NORM, EMBED)).unwrap();
    assert!(refused(folder.path()).contains("occurs twice"));
    std::fs::write(&index, "{}").unwrap();
    assert!(refused(folder.path()).contains("weight_map"));
}

#[test]
fn folders_that_are_no_models_say_why() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    assert!(refused(&path.join("absent")).contains("absent"));
    assert!(refused(path).contains("neither config.json nor a .gguf file"));
    std::fs::write(path.join("a.gguf"), b"GGUF").unwrap();
    assert!(refused(path).contains("ends at byte 4"));
    std::fs::write(path.join("b.GGUF"), b"").unwrap();
    assert!(refused(path).contains("name one of a.gguf, b.GGUF"));
    std::fs::write(path.join("config.json"), b"[").unwrap();
    assert!(refused(path).contains("not valid JSON"));
    std::fs::write(path.join("config.json"), b"[]").unwrap();
    assert!(refused(path).contains("not an object"));
    std::fs::write(path.join("config.json"), vec![b' '; 2 << 20]).unwrap();
    assert!(refused(path).contains("more than the 1048576"));
    std::fs::write(path.join("config.json"), Toy::new(Family::Llama).config().to_string()).unwrap();
    assert!(refused(path).contains("neither model.safetensors nor"));
    std::fs::write(path.join("pytorch_model.bin"), b"").unwrap();
    assert!(refused(path).contains("convert them to safetensors"));
    std::fs::write(path.join("x.safetensors"), b"").unwrap();
    assert!(refused(&path.join("x.safetensors")).contains("give the folder"));
}

#[test]
fn tensors_are_held_against_the_configuration() {
    let toy = Toy::new(Family::Llama);
    let folder = tempfile::tempdir().unwrap();
    let q = "model.layers.1.self_attn.q_proj.weight";
    let refused_with = |change: &dyn Fn(&mut Vec<Stored>)| {
        let mut tensors = toy.tensors();
        change(&mut tensors);
        toy.write_folder(folder.path());
        std::fs::write(folder.path().join("model.safetensors"), safetensors(&tensors)).unwrap();
        refused(folder.path())
    };
    let text = refused_with(&|tensors| tensors.retain(|(name, ..)| name != q));
    assert!(text.contains("no tensor \"model.layers.1.self_attn.q_proj.weight\""), "{text}");
    let text = refused_with(&|tensors| {
        let tensor = tensors.iter_mut().find(|(name, ..)| name == q).unwrap();
        tensor.2.reverse();
    });
    assert!(text.contains("[16, 32], the configuration asks for [32, 16]"), "{text}");
    let text = refused_with(&|tensors| {
        let tensor = tensors.iter_mut().find(|(name, ..)| name == q).unwrap();
        (tensor.1, tensor.3) = ("F64", vec![0; 32 * 16 * 8]);
    });
    assert!(text.contains(q) && text.contains("F64"), "{text}");
    let text = refused_with(&|tensors| tensors.push(("model.extra".into(), "F32", vec![1], vec![0; 4])));
    assert!(text.contains("\"model.extra\""), "{text}");
}

/// Opens with notes, runs `work`, and returns what was read during it.
fn reads_of(path: &Path, work: impl Fn(&Checkpoint)) -> (u64, Vec<Range<u64>>) {
    let reads = Arc::new(Mutex::new(Vec::new()));
    let opener = |path: &Path| {
        let source: Arc<dyn Source> =
            Arc::new(Noting { inner: FileSource::open(path)?, reads: Arc::clone(&reads) });
        Ok(source)
    };
    let checkpoint = Checkpoint::open_with(path, &opener).unwrap();
    let opening = reads.lock().unwrap().drain(..).map(|range| range.end - range.start).sum();
    work(&checkpoint);
    let reads = std::mem::take(&mut *reads.lock().unwrap());
    (opening, reads)
}

/// Ranges of rows, and single rows, are what reading the whole tensor gives, and read nothing else.
#[test]
fn rows_are_read_by_range() {
    for toy in every_toy() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("toy.gguf");
        std::fs::write(&path, toy.gguf().bytes()).unwrap();
        let (_, reads) = reads_of(&path, |checkpoint| {
            for info in checkpoint.tensors() {
                let whole = checkpoint.read(&info.name).unwrap().bytes;
                let (unit, row_bytes) = (checkpoint.row_unit(info), whole.len() / info.rows);
                for start in (0..=info.rows).step_by(unit) {
                    for end in (start..=info.rows).step_by(unit) {
                        let mut out = vec![0xa5; (end - start) * row_bytes];
                        checkpoint.read_rows(info, start..end, &mut out).unwrap();
                        assert!(
                            out == whole[start * row_bytes..end * row_bytes],
                            "{} {start}..{end}",
                            info.name
                        );
                    }
                }
                let mut short = vec![0; row_bytes];
                for wrong in [info.rows..info.rows + 1, 0..0, 0..info.rows + 1] {
                    let refused = checkpoint.read_rows(info, wrong, &mut short);
                    assert!(matches!(refused, Err(WeightsError::Rows { .. })), "{}", info.name);
                }
                if unit > 1 {
                    assert!(checkpoint.read_rows(info, 0..1, &mut short).is_err(), "{}", info.name);
                    assert!(checkpoint.rows(&info.name).is_err());
                } else if let Ok(rows) = checkpoint.rows(&info.name) {
                    for row in 0..info.rows {
                        rows.read(row, &mut short).unwrap();
                        assert!(short == whole[row * row_bytes..][..row_bytes]);
                    }
                    assert!(rows.read(info.rows, &mut short).is_err());
                    assert!(rows.read(0, &mut short[1..]).is_err());
                }
            }
            assert!(checkpoint.rows(EMBED).is_ok());
        });
        let end = std::fs::metadata(&path).unwrap().len();
        assert!(reads.iter().all(|range| range.end <= end));
    }
}

/// A stage reads its own tensors, each byte once, and nothing else; opening reads headers only.
#[test]
fn a_stage_reads_only_its_own_bytes() {
    for toy in every_toy() {
        let folder = tempfile::tempdir().unwrap();
        toy.write_folder(folder.path());
        let file_len = std::fs::metadata(folder.path().join("model.safetensors")).unwrap().len();
        let data_len: u64 = toy.tensors().iter().map(|(.., data)| data.len() as u64).sum();
        for layers in [0..1, 1..2, 2..3, 0..2, 1..3, 0..3] {
            let mut own = BTreeSet::new();
            let (opening, mut reads) = reads_of(folder.path(), |checkpoint| {
                for info in checkpoint.stage_tensors(layers.clone()) {
                    assert_eq!(checkpoint.read(&info.name).unwrap().bytes.len() as u64, info.bytes);
                }
            });
            assert_eq!(opening, file_len - data_len, "opening reads the header and no tensor");
            let plain = Checkpoint::open(folder.path()).unwrap();
            for info in plain.stage_tensors(layers.clone()) {
                assert!(own.insert(info.name.clone()), "{} is listed twice", info.name);
            }
            let layer_bytes: u64 = layers.clone().map(|layer| plain.layer_bytes(layer)).sum();
            let ends =
                [(layers.contains(&0), plain.embed_bytes()), (layers.contains(&2), plain.head_bytes())];
            let mut want =
                layer_bytes + ends.iter().filter(|(on, _)| *on).map(|(_, bytes)| bytes).sum::<u64>();
            if toy.tied && layers == (0..3) {
                want -= plain.embed_bytes(); // both ends are here, and the matrix is read once
            }
            assert_eq!(reads.iter().map(|range| range.end - range.start).sum::<u64>(), want);
            reads.sort_by_key(|range| range.start);
            assert!(reads.windows(2).all(|pair| pair[0].end <= pair[1].start), "a byte was read twice");
        }
    }
}

#[test]
fn a_fingerprint_samples_eight_kib_of_each_tensor() {
    let folder = tempfile::tempdir().unwrap();
    let mut toy = Toy::new(Family::Llama);
    toy.layers = 1;
    toy.write_folder(folder.path());
    let (_, reads) = reads_of(folder.path(), |checkpoint| {
        let first = checkpoint.fingerprint().unwrap();
        assert_eq!(checkpoint.fingerprint().unwrap(), first);
    });
    assert_eq!(reads.len(), 2 * toy.tensors().len(), "each tensor twice, and only once");
    assert!(reads.iter().all(|range| range.end - range.start <= 4096));
}

#[test]
fn a_fingerprint_tells_models_apart() {
    let folder = tempfile::tempdir().unwrap();
    let mut seen = BTreeSet::new();
    let mut note = |change: &dyn Fn(&mut Vec<u8>), config: serde_json::Value| {
        let mut tensors = Toy::new(Family::Llama).tensors();
        change(&mut tensors[5].3);
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        std::fs::write(folder.path().join("model.safetensors"), safetensors(&tensors)).unwrap();
        seen.insert(Checkpoint::open(folder.path()).unwrap().fingerprint().unwrap())
    };
    let config = Toy::new(Family::Llama).config();
    assert!(note(&|_| {}, config.clone()));
    assert!(!note(&|_| {}, config.clone()), "the same again");
    assert!(note(&|data| data[0] ^= 1, config.clone()));
    assert!(note(&|data| *data.last_mut().unwrap() ^= 1, config.clone()));
    for (key, value) in [
        ("rope_theta", json!(20000.0)),
        ("rms_norm_eps", json!(1e-6)),
        ("max_position_embeddings", json!(65)),
    ] {
        let mut other = config.clone();
        other[key] = value;
        assert!(note(&|_| {}, other), "{key}");
    }
    let mut other = config.clone();
    other["rope_scaling"] = json!({"type": "linear", "factor": 2.0});
    assert!(note(&|_| {}, other));
    let mut harmless = config;
    harmless["torch_dtype"] = json!("float32");
    assert!(!note(&|_| {}, harmless));
}

#[test]
fn end_tokens_come_from_both_files() {
    let toy = Toy::new(Family::Llama);
    let folder = tempfile::tempdir().unwrap();
    toy.write_folder(folder.path());
    let ids = || Checkpoint::open(folder.path()).unwrap().eos_token_ids();
    assert_eq!(ids(), [2]);
    let generation = folder.path().join("generation_config.json");
    std::fs::write(&generation, r#"{"eos_token_id": [7, 2, 99999]}"#).unwrap();
    assert_eq!(ids(), [7, 2]);
    std::fs::write(&generation, r#"{"eos_token_id": null}"#).unwrap();
    assert_eq!(ids(), [2]);
    std::fs::write(&generation, r#"{"eos_token_id": [-1]}"#).unwrap();
    let text = refused(folder.path());
    assert!(text.contains("generation_config.json") && text.contains("eos_token_id is [-1]"), "{text}");
}

#[test]
fn tokenizer_files_are_handed_over() {
    let toy = Toy::new(Family::Llama);
    let folder = tempfile::tempdir().unwrap();
    toy.write_folder(folder.path());
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    let tokenizer = || Checkpoint::open(folder.path()).unwrap().tokenizer().clone();
    assert!(matches!(tokenizer(), TokenizerFiles::Missing { why } if why.contains("no tokenizer.json")));
    write("tokenizer.model", "");
    assert!(matches!(tokenizer(), TokenizerFiles::Missing { why } if why.contains("converted")));
    write("tokenizer.json", "{}");
    write("tokenizer_config.json", "{\"a\":1}");
    let TokenizerFiles::Hf { tokenizer_json, tokenizer_config, chat_template, .. } = tokenizer() else {
        panic!()
    };
    assert_eq!(
        (tokenizer_json.as_slice(), tokenizer_config.as_deref()),
        (&b"{}"[..], Some(&b"{\"a\":1}"[..]))
    );
    assert_eq!(chat_template, None);
    write("chat_template.json", r#"{"chat_template": "old"}"#);
    assert!(matches!(tokenizer(), TokenizerFiles::Hf { chat_template: Some(text), .. } if text == "old"));
    write("chat_template.jinja", "new");
    assert!(matches!(tokenizer(), TokenizerFiles::Hf { chat_template: Some(text), .. } if text == "new"));
}

#[test]
fn a_file_cut_short_after_opening_is_an_error() {
    let toy = Toy::new(Family::Llama);
    let folder = tempfile::tempdir().unwrap();
    toy.write_folder(folder.path());
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let file = std::fs::File::options().write(true).open(folder.path().join("model.safetensors")).unwrap();
    let last = toy.tensors().last().unwrap().0.clone();
    file.set_len(file.metadata().unwrap().len() - 1).unwrap();
    let error = checkpoint.read(&last).unwrap_err();
    assert!(matches!(error, WeightsError::Source(SourceError::Shrunk { .. })), "{error}");
    assert!(refused(folder.path()).contains("fetch it again"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// For every cut: each tensor on exactly one stage, but for a tied embedding, on both ends.
    #[test]
    fn every_cut_covers_every_tensor_once(
        layers in 1_usize..7,
        tied in any::<bool>(),
        family in prop::sample::select(FAMILIES.to_vec()),
        marks in prop::collection::btree_set(1_usize..7, 0..4),
    ) {
        let toy = Toy { layers, tied, ..Toy::new(family) };
        let folder = tempfile::tempdir().unwrap();
        toy.write_folder(folder.path());
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let mut cuts: Vec<usize> = marks.into_iter().filter(|&mark| mark < layers).collect();
        cuts.insert(0, 0);
        cuts.push(layers);
        let mut listed = Vec::new();
        for pair in cuts.windows(2) {
            listed.extend(checkpoint.stage_tensors(pair[0]..pair[1]).into_iter().map(|info| info.name.clone()));
        }
        let mut want: Vec<String> = toy.tensors().into_iter().map(|(name, ..)| name).collect();
        if tied && cuts.len() > 2 {
            want.push(EMBED.into());
        }
        listed.sort();
        want.sort();
        prop_assert_eq!(listed, want);
    }

    /// Whatever happens to a GGUF file's bytes, opening and reading it ends in a value or an error.
    #[test]
    fn damaged_models_never_panic(
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5),
        family in prop::sample::select(FAMILIES.to_vec()),
    ) {
        let gguf = Toy { layers: 1, ..Toy::new(family) }.gguf();
        let (mut bytes, header_len) = (gguf.bytes(), gguf.header().len());
        for (index, byte) in flips {
            bytes[index.index(header_len)] = byte;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.gguf");
        std::fs::write(&path, &bytes).unwrap();
        if let Ok(checkpoint) = Checkpoint::open(&path) {
            for info in checkpoint.tensors() {
                prop_assert_eq!(checkpoint.read(&info.name).unwrap().bytes.len() as u64, info.bytes);
            }
            checkpoint.fingerprint().unwrap();
        }
    }
}
