//! A toy model as a GGUF v3 file, laid out as llama.cpp's converter does.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use serde_json::Value;

use super::{ToyModel, ToyTensor, quantize, vocab};

/// Tensor types a GGUF file may hold, spelled as GGUF spells them.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GgufType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
}

type Quantizer = fn(&[f32], &mut Vec<u8>);

impl GgufType {
    pub const ALL: [GgufType; 13] = [
        GgufType::F32,
        GgufType::F16,
        GgufType::BF16,
        GgufType::Q4_0,
        GgufType::Q4_1,
        GgufType::Q5_0,
        GgufType::Q5_1,
        GgufType::Q8_0,
        GgufType::Q2_K,
        GgufType::Q3_K,
        GgufType::Q4_K,
        GgufType::Q5_K,
        GgufType::Q6_K,
    ];

    /// `(ggml type, general.file_type)`.
    fn codes(self) -> (u32, u32) {
        match self {
            GgufType::F32 => (0, 0),
            GgufType::F16 => (1, 1),
            GgufType::BF16 => (30, 32),
            GgufType::Q4_0 => (2, 2),
            GgufType::Q4_1 => (3, 3),
            GgufType::Q5_0 => (6, 8),
            GgufType::Q5_1 => (7, 9),
            GgufType::Q8_0 => (8, 7),
            GgufType::Q2_K => (10, 10),
            GgufType::Q3_K => (11, 12),
            GgufType::Q4_K => (12, 15),
            GgufType::Q5_K => (13, 17),
            GgufType::Q6_K => (14, 18),
        }
    }

    /// `(values per block, quantizer)` of the block formats.
    fn quantizer(self) -> Option<(usize, Quantizer)> {
        let (small, large) = (quantize::BLOCK, quantize::BLOCK_K);
        match self {
            GgufType::F32 | GgufType::F16 | GgufType::BF16 => None,
            GgufType::Q4_0 => Some((small, quantize::q4_0)),
            GgufType::Q4_1 => Some((small, quantize::q4_1)),
            GgufType::Q5_0 => Some((small, quantize::q5_0)),
            GgufType::Q5_1 => Some((small, quantize::q5_1)),
            GgufType::Q8_0 => Some((small, quantize::q8_0)),
            GgufType::Q2_K => Some((large, quantize::q2_k)),
            GgufType::Q3_K => Some((large, quantize::q3_k)),
            GgufType::Q4_K => Some((large, quantize::q4_k)),
            GgufType::Q5_K => Some((large, quantize::q5_k)),
            GgufType::Q6_K => Some((large, quantize::q6_k)),
        }
    }

    /// Encodes rows of a matrix; `values.len()` is a multiple of the block length.
    pub fn encode(self, values: &[f32]) -> Vec<u8> {
        let Some((block, quantizer)) = self.quantizer() else {
            return match self {
                GgufType::F16 => values.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect(),
                GgufType::BF16 => {
                    values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect()
                }
                _ => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            };
        };
        assert!(
            values.len().is_multiple_of(block),
            "{} values are not whole blocks of {self:?}",
            values.len()
        );
        let mut out = Vec::new();
        values.chunks(block).for_each(|block| quantizer(block, &mut out));
        out
    }

    /// Bytes of `values` encoded values.
    fn bytes(self, values: usize) -> usize {
        let block = self.quantizer().map_or(1, |(block, _)| block);
        values / block * self.encode(&vec![0.0; block]).len()
    }

    /// The type a tensor of `shape` gets: itself, or Q8_0 where its blocks do not fit the rows,
    /// as llama.cpp falls back too. Vectors are always F32.
    fn for_shape(self, shape: &[usize]) -> GgufType {
        let (&[_, cols], quantizer) = (shape, self.quantizer()) else { return GgufType::F32 };
        match quantizer {
            Some((block, _)) if !cols.is_multiple_of(block) => GgufType::Q8_0,
            _ => self,
        }
    }
}

/// One tensor of the file before its values are made.
struct Planned {
    /// Hugging Face name, except for `rope_freqs.weight`.
    name: String,
    shape: Vec<usize>,
    kind: GgufType,
}

/// Values encoded at a time: whole blocks of every type.
const VALUES_AT_ONCE: usize = 1 << 16;

impl ToyModel {
    /// Writes one GGUF file: metadata, vocabulary, tensors. Matrices have type `matrices` (the
    /// embedding and the head too), norms and biases are F32. In files of architecture `llama`
    /// the rows of q and k are permuted to the interleaved rotary layout, as the converter does.
    ///
    /// Holds one tensor at a time, as f32.
    ///
    /// # Errors
    /// When GGUF has no way to say what the model is: a window from a later layer on.
    pub fn write_gguf(&self, path: &Path, matrices: GgufType) -> io::Result<()> {
        self.write_gguf_mixed(path, matrices, |_| matrices)
    }

    /// As [`ToyModel::write_gguf`], in the mixture that llama.cpp calls Q4_K_M: the head, and v
    /// and down projections of half the layers, are Q6_K.
    ///
    /// # Errors
    /// As [`ToyModel::write_gguf`].
    pub fn write_gguf_q4_k_m(&self, path: &Path) -> io::Result<()> {
        let layers = self.layers();
        let more_bits = |name: &str| {
            let layer: Option<usize> = name.split('.').nth(2).and_then(|layer| layer.parse().ok());
            let finer = layer.is_some_and(|layer| {
                let eighth = layers / 8;
                layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2
            });
            name.starts_with("lm_head") || (finer && (name.contains("v_proj") || name.contains("down_proj")))
        };
        let kind = |name: &str| if more_bits(name) { GgufType::Q6_K } else { GgufType::Q4_K };
        self.write_gguf_mixed(path, GgufType::Q4_K, kind)
    }

    /// `file_type` is what the metadata says, `kind` the type of each matrix by its Hugging Face name.
    fn write_gguf_mixed(
        &self,
        path: &Path,
        file_type: GgufType,
        kind: impl Fn(&str) -> GgufType,
    ) -> io::Result<()> {
        if self.flag("use_sliding_window") {
            return Err(io::Error::other(format!(
                "{}: GGUF cannot express a window of only some layers",
                self.name
            )));
        }
        let factors = self.rope_factors();
        self.write_planned(
            path,
            self.gguf_metadata(file_type),
            self.plan(kind, factors.as_ref()),
            factors.as_ref(),
        )
    }

    /// The same model over `files` files beside each other, as llama.cpp splits them: `STEM-00001-of-0000N.gguf`.
    ///
    /// # Errors
    /// As [`ToyModel::write_gguf`].
    pub fn write_gguf_split(
        &self,
        folder: &Path,
        stem: &str,
        matrices: GgufType,
        files: u16,
    ) -> io::Result<()> {
        let factors = self.rope_factors();
        let mut plan = self.plan(|_| matrices, factors.as_ref());
        let (tensors, each) = (plan.len(), plan.len().div_ceil(usize::from(files)));
        for number in 0..files {
            let rest = plan.split_off(each.min(plan.len()));
            let mut metadata = if number == 0 { self.gguf_metadata(matrices) } else { Metadata::default() };
            metadata.u16("split.no", number);
            metadata.u16("split.count", files);
            metadata.u32("split.tensors.count", tensors as u32);
            let path = folder.join(format!("{stem}-{:05}-of-{files:05}.gguf", number + 1));
            self.write_planned(&path, metadata, std::mem::replace(&mut plan, rest), factors.as_ref())?;
        }
        Ok(())
    }

    /// All tensors and the type of each.
    fn plan(&self, kind: impl Fn(&str) -> GgufType, factors: Option<&Vec<f32>>) -> Vec<Planned> {
        let mut shapes = self.shapes();
        if let Some(factors) = factors {
            shapes.insert(0, (ROPE_FACTORS.to_owned(), vec![factors.len()]));
        }
        let plan = shapes.into_iter().map(|(name, shape)| {
            let kind = kind(&name).for_shape(&shape);
            Planned { name, shape, kind }
        });
        plan.collect()
    }

    /// One file of the tensors in `plan`.
    fn write_planned(
        &self,
        path: &Path,
        metadata: Metadata,
        plan: Vec<Planned>,
        factors: Option<&Vec<f32>>,
    ) -> io::Result<()> {
        let mut head = b"GGUF".to_vec();
        head.extend(3u32.to_le_bytes());
        head.extend((plan.len() as u64).to_le_bytes());
        head.extend(metadata.count.to_le_bytes());
        head.extend(metadata.bytes);
        let mut offset = 0;
        for Planned { name, shape, kind } in &plan {
            push_text(&mut head, &gguf_name(name));
            head.extend((shape.len() as u32).to_le_bytes());
            shape.iter().rev().for_each(|&axis| head.extend((axis as u64).to_le_bytes()));
            head.extend(kind.codes().0.to_le_bytes());
            head.extend((offset as u64).to_le_bytes());
            offset += kind.bytes(shape.iter().product()).next_multiple_of(ALIGNMENT);
        }
        pad(&mut head);
        let mut file = BufWriter::new(File::create(path)?);
        file.write_all(&head)?;
        for Planned { name, shape, kind } in plan {
            let values = match factors {
                Some(factors) if name == ROPE_FACTORS => factors.clone(),
                _ => self.gguf_values(name, shape),
            };
            for values in values.chunks(VALUES_AT_ONCE) {
                file.write_all(&kind.encode(values))?;
            }
            let bytes = kind.bytes(values.len());
            file.write_all(&[0; ALIGNMENT][..bytes.next_multiple_of(ALIGNMENT) - bytes])?;
        }
        file.flush()
    }

    /// Values of the tensor with this Hugging Face name, q and k permuted where the architecture wants it.
    fn gguf_values(&self, name: String, shape: Vec<usize>) -> Vec<f32> {
        let permuted = self.gguf_architecture() == "llama";
        let tensor = self.make(name, shape);
        if permuted && tensor.name.contains("q_proj") {
            interleave(&tensor, self.heads())
        } else if permuted && tensor.name.contains("k_proj") {
            interleave(&tensor, self.kv_heads())
        } else {
            tensor.values
        }
    }

    fn gguf_architecture(&self) -> &str {
        match self.model_type() {
            "mistral" => "llama",
            other => other,
        }
    }

    /// The `rope_freqs.weight` of Llama 3 files: what each frequency is divided by.
    fn rope_factors(&self) -> Option<Vec<f32>> {
        let rope = self.config.get("rope_scaling").filter(|rope| rope["rope_type"] == "llama3")?;
        let number = |key: &str| rope[key].as_f64().unwrap_or_else(|| panic!("{} has no {key}", self.name));
        let (factor, low, high) = (number("factor"), number("low_freq_factor"), number("high_freq_factor"));
        let context = number("original_max_position_embeddings");
        let (theta, head_dim) = (self.config["rope_theta"].as_f64()?, self.head_dim());
        let factor_of = |i: usize| {
            let wavelength = std::f64::consts::TAU * theta.powf(2.0 * i as f64 / head_dim as f64);
            if wavelength < context / high {
                1.0
            } else if wavelength > context / low {
                factor as f32
            } else {
                let smooth = (context / wavelength - low) / (high - low);
                (1.0 / ((1.0 - smooth) / factor + smooth)) as f32
            }
        };
        Some((0..head_dim / 2).map(factor_of).collect())
    }

    fn gguf_metadata(&self, matrices: GgufType) -> Metadata {
        let arch = self.gguf_architecture().to_owned();
        let mut metadata = Metadata::default();
        metadata.text("general.architecture", &arch);
        metadata.text("general.name", &format!("toy {}", self.name));
        metadata.u32("general.file_type", matrices.codes().1);
        metadata.u32("general.quantization_version", 2);
        for (key, size) in [
            ("block_count", "num_hidden_layers"),
            ("context_length", "max_position_embeddings"),
            ("embedding_length", "hidden_size"),
            ("feed_forward_length", "intermediate_size"),
            ("attention.head_count", "num_attention_heads"),
            ("attention.head_count_kv", "num_key_value_heads"),
            ("vocab_size", "vocab_size"),
        ] {
            metadata.u32(&format!("{arch}.{key}"), self.size(size) as u32);
        }
        let eps = self.config["rms_norm_eps"].as_f64().expect("a spec has rms_norm_eps");
        metadata.f32(&format!("{arch}.attention.layer_norm_rms_epsilon"), eps as f32);
        if self.config.get("head_dim").is_some() {
            metadata.u32(&format!("{arch}.attention.key_length"), self.head_dim() as u32);
            metadata.u32(&format!("{arch}.attention.value_length"), self.head_dim() as u32);
        }
        if self.model_type() == "mistral" {
            metadata.u32(&format!("{arch}.attention.sliding_window"), self.size("sliding_window") as u32);
        }
        self.rope_metadata(&arch, &mut metadata);
        vocab_metadata(self.vocab_size(), &mut metadata);
        metadata
    }

    fn rope_metadata(&self, arch: &str, metadata: &mut Metadata) {
        let null = Value::Null;
        let rope =
            ["rope_scaling", "rope_parameters"].iter().find_map(|key| self.config.get(*key)).unwrap_or(&null);
        let theta = self.config["rope_theta"].as_f64().or_else(|| rope["rope_theta"].as_f64());
        metadata.f32(&format!("{arch}.rope.freq_base"), theta.expect("a spec has rope_theta") as f32);
        if arch == "llama" {
            metadata.u32("llama.rope.dimension_count", self.head_dim() as u32);
        }
        let kind = rope["rope_type"].as_str().or_else(|| rope["type"].as_str());
        if let Some(kind @ ("linear" | "yarn")) = kind {
            metadata.text(&format!("{arch}.rope.scaling.type"), kind);
            let factor = rope["factor"].as_f64().expect("rope scaling has a factor");
            metadata.f32(&format!("{arch}.rope.scaling.factor"), factor as f32);
            if let Some(context) = rope["original_max_position_embeddings"].as_u64() {
                metadata.u32(&format!("{arch}.rope.scaling.original_context_length"), context as u32);
            }
        }
    }
}

/// The toy vocabulary, padded with unused entries to the `size` of the embedding.
fn vocab_metadata(size: usize, metadata: &mut Metadata) {
    const NORMAL: i32 = 1;
    const CONTROL: i32 = 3;
    const UNUSED: i32 = 5;
    let mut tokens = vocab::tokens();
    let mut types = vec![NORMAL; tokens.len()];
    types[vocab::BOS as usize..].fill(CONTROL);
    for id in tokens.len()..size {
        tokens.push(format!("<pad{id}>"));
        types.push(UNUSED);
    }
    let merges: Vec<String> = vocab::MERGES.iter().map(|(left, right)| format!("{left} {right}")).collect();
    metadata.text("tokenizer.ggml.model", "gpt2");
    metadata.text("tokenizer.ggml.pre", "gpt-2");
    metadata.texts("tokenizer.ggml.tokens", &tokens);
    metadata.i32s("tokenizer.ggml.token_type", &types);
    metadata.texts("tokenizer.ggml.merges", &merges);
    metadata.u32("tokenizer.ggml.bos_token_id", vocab::BOS);
    metadata.u32("tokenizer.ggml.eos_token_id", vocab::EOS);
    metadata.u32("tokenizer.ggml.eot_token_id", vocab::IM_END);
    metadata.bool("tokenizer.ggml.add_bos_token", false);
    metadata.text("tokenizer.chat_template", vocab::CHAT_TEMPLATE);
}

fn gguf_name(name: &str) -> String {
    let mut name = name.replace("model.layers.", "blk.");
    for (hf, gguf) in [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("post_attention_layernorm", "ffn_norm"),
        ("input_layernorm", "attn_norm"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ] {
        name = name.replace(hf, gguf);
    }
    name
}

/// Rows of each head from the half-split order to the interleaved one: row `2 j + t` is row
/// `t * head_dim / 2 + j`.
fn interleave(tensor: &ToyTensor, heads: usize) -> Vec<f32> {
    let cols = if tensor.shape.len() == 1 { 1 } else { tensor.cols() };
    let head_dim = tensor.values.len() / cols / heads;
    let row = |row: usize| &tensor.values[row * cols..(row + 1) * cols];
    (0..heads * head_dim)
        .flat_map(|r| {
            let (head, within) = (r / head_dim, r % head_dim);
            row(head * head_dim + (within % 2) * (head_dim / 2) + within / 2)
        })
        .copied()
        .collect()
}

const ALIGNMENT: usize = 32;
const ROPE_FACTORS: &str = "rope_freqs.weight";

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
}

fn push_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

/// GGUF key-value pairs, encoded as they are added.
#[derive(Default)]
struct Metadata {
    count: u64,
    bytes: Vec<u8>,
}

impl Metadata {
    fn key(&mut self, key: &str, kind: u32) {
        self.count += 1;
        push_text(&mut self.bytes, key);
        self.bytes.extend(kind.to_le_bytes());
    }

    fn u32(&mut self, key: &str, value: u32) {
        self.key(key, 4);
        self.bytes.extend(value.to_le_bytes());
    }

    fn u16(&mut self, key: &str, value: u16) {
        self.key(key, 2);
        self.bytes.extend(value.to_le_bytes());
    }

    fn f32(&mut self, key: &str, value: f32) {
        self.key(key, 6);
        self.bytes.extend(value.to_le_bytes());
    }

    fn bool(&mut self, key: &str, value: bool) {
        self.key(key, 7);
        self.bytes.push(u8::from(value));
    }

    fn text(&mut self, key: &str, value: &str) {
        self.key(key, 8);
        push_text(&mut self.bytes, value);
    }

    fn array(&mut self, key: &str, kind: u32, count: usize) {
        self.key(key, 9);
        self.bytes.extend(kind.to_le_bytes());
        self.bytes.extend((count as u64).to_le_bytes());
    }

    fn texts(&mut self, key: &str, values: &[String]) {
        self.array(key, 8, values.len());
        values.iter().for_each(|value| push_text(&mut self.bytes, value));
    }

    fn i32s(&mut self, key: &str, values: &[i32]) {
        self.array(key, 5, values.len());
        values.iter().for_each(|value| self.bytes.extend(value.to_le_bytes()));
    }
}

#[cfg(test)]
mod tests {
    use super::super::{spec, tinyllama};
    use super::*;

    #[test]
    fn planned_bytes_are_those_that_encoding_gives() {
        for kind in GgufType::ALL {
            assert_eq!(kind.bytes(512), kind.encode(&[0.25; 512]).len(), "{kind:?}");
        }
    }

    #[test]
    fn a_larger_vocabulary_is_padded_with_unused_entries() {
        let mut small = Metadata::default();
        let mut padded = Metadata::default();
        vocab_metadata(vocab::VOCAB_SIZE, &mut small);
        vocab_metadata(tinyllama(1).vocab_size(), &mut padded);
        assert_eq!(small.count, padded.count);
        let has = |text: &str| padded.bytes.windows(text.len()).any(|part| part == text.as_bytes());
        assert!(has("<pad264>") && has("<pad31999>") && !has("<pad32000>"));
    }

    #[test]
    fn the_mixture_has_a_finer_head() {
        let folder = tempfile::tempdir().unwrap();
        let (plain, mixed) = (folder.path().join("plain.gguf"), folder.path().join("mixed.gguf"));
        let model = spec("llama_k").with_config("tie_word_embeddings", false.into());
        model.write_gguf(&plain, GgufType::Q4_K).unwrap();
        model.write_gguf_q4_k_m(&mixed).unwrap();
        let padded = |kind: GgufType, values: usize| kind.bytes(values).next_multiple_of(ALIGNMENT);
        let finer = |rows: usize, cols: usize| {
            padded(GgufType::Q6_K, rows * cols) - padded(GgufType::Q4_K, rows * cols)
        };
        let (hidden, kv_rows) = (256, 64);
        // Of two layers the last is in the finer half.
        let grown = finer(model.vocab_size(), hidden) + finer(kv_rows, hidden) + finer(hidden, 512);
        let bytes = |path: &Path| std::fs::metadata(path).unwrap().len() as usize;
        assert_eq!(bytes(&mixed) - bytes(&plain), grown);
    }
}
