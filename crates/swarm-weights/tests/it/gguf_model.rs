//! GGUF metadata to a configuration, option by option, on toy models.

use swarm_weights::{Checkpoint, Family, RopeScaling, TokenizerFiles, WeightsError};

use crate::writer::{Gguf, HEAD_DIM, Meta, Toy, VOCAB};

fn open(gguf: &Gguf) -> Result<Checkpoint, WeightsError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("toy.Q8_0.gguf");
    std::fs::write(&path, gguf.bytes()).unwrap();
    Checkpoint::open(&path)
}

/// The error and its causes, as a user would see them.
fn refused(gguf: &Gguf) -> String {
    let error = open(gguf).expect_err("must be refused");
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

fn llama() -> Gguf {
    Toy::new(Family::Llama).gguf()
}

#[test]
fn sizes_come_from_the_metadata_and_have_defaults() {
    let checkpoint = open(&llama()).unwrap();
    let config = checkpoint.config();
    assert_eq!((config.family, config.head_dim, config.vocab_size), (Family::Llama, HEAD_DIM, VOCAB));
    assert_eq!((config.rope.theta, config.rms_norm_eps), (10_000.0, 1e-5));
    assert_eq!((checkpoint.name(), checkpoint.eos_token_ids()), ("toy.Q8_0", vec![2]));

    let mut gguf = llama();
    gguf.keys.retain(|(key, _)| !key.starts_with(b"llama.rope"));
    assert_eq!(open(&gguf).unwrap().config(), config);
    gguf.set("llama.attention.head_count_kv", Meta::I32s(vec![2, 2, 2]));
    assert_eq!(open(&gguf).unwrap().config(), config);
    gguf.set("llama.attention.head_count_kv", Meta::I32s(vec![2, 4, 2]));
    assert!(refused(&gguf).contains("one per layer"));
}

#[test]
fn missing_keys_are_named() {
    for key in [
        "general.architecture",
        "llama.block_count",
        "llama.context_length",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.attention.layer_norm_rms_epsilon",
    ] {
        let mut gguf = llama();
        gguf.keys.retain(|(k, _)| k != key.as_bytes());
        let text = refused(&gguf);
        assert!(text.contains(key) && text.contains("missing"), "{text}");
    }
}

#[test]
fn options_that_are_not_built_are_named() {
    let cases: [(&str, Meta, &str); 16] = [
        ("general.architecture", Meta::Str("gemma3".into()), "\"gemma3\""),
        ("llama.expert_count", Meta::U32(8), "llama.expert_count"),
        ("llama.logit_scale", Meta::F32(0.5), "llama.logit_scale"),
        ("llama.attention.causal", Meta::Bool(0), "llama.attention.causal"),
        ("llama.attention.clamp_kqv", Meta::F32(8.0), "clamp_kqv"),
        ("llama.rope.dimension_sections", Meta::I32s(vec![1, 2]), "dimension_sections"),
        ("llama.something_new", Meta::Str("on".into()), "llama.something_new"),
        ("llama.tensor_data_layout", Meta::Str("sideways".into()), "tensor_data_layout"),
        ("llama.attention.value_length", Meta::U32(4), "value_length"),
        ("llama.rope.scaling.type", Meta::Str("longrope".into()), "\"longrope\""),
        ("llama.block_count", Meta::U32(4), "model.layers.3.input_layernorm.weight"),
        ("llama.block_count", Meta::U32(2), "\"blk.2.attn_norm.weight\" of toy.Q8_0 is not part of"),
        ("llama.block_count", Meta::U64(1 << 40), "num_hidden_layers"),
        ("llama.attention.head_count", Meta::I32(-4), "negative"),
        ("tokenizer.ggml.token_type", Meta::I32s(vec![1]), "token_type"),
        ("split.count", Meta::U16(3), "part 1 of 3"),
    ];
    for (key, value, word) in cases {
        let mut gguf = llama();
        gguf.set(key, value);
        let text = refused(&gguf);
        assert!(text.contains(word), "{word:?} is not in {text:?}");
    }
}

#[test]
fn options_that_are_off_do_not_matter() {
    let mut gguf = llama();
    gguf.set("llama.expert_count", Meta::U32(0));
    gguf.set("llama.logit_scale", Meta::F32(0.0));
    gguf.set("llama.attention.causal", Meta::Bool(1));
    gguf.set("llama.use_parallel_residual", Meta::Bool(0));
    gguf.set("llama.tensor_data_layout", Meta::Str("Meta AI original pth".into()));
    gguf.set("llama.rope.scaling.finetuned", Meta::Bool(1));
    gguf.set("llama.rope.scaling.type", Meta::Str("none".into()));
    gguf.set("llama.attention.sliding_window", Meta::U32(0));
    gguf.set("llama.vocab_size", Meta::U32(19));
    gguf.set("general.file_type", Meta::U32(7));
    assert_eq!(open(&gguf).unwrap().config(), open(&llama()).unwrap().config());
}

#[test]
fn rope_scaling_is_read() {
    let scaling = |keys: &[(&str, Meta)]| {
        let mut gguf = llama();
        keys.iter().for_each(|(key, value)| gguf.set(&format!("llama.rope.{key}"), value.clone()));
        open(&gguf).unwrap().config().rope.scaling.clone()
    };
    let kind = |kind: &str| ("scaling.type", Meta::Str(kind.into()));
    let factor = ("scaling.factor", Meta::F32(4.0));
    assert_eq!(scaling(&[kind("linear"), factor.clone()]), RopeScaling::Linear { factor: 4.0 });
    assert_eq!(scaling(std::slice::from_ref(&factor)), RopeScaling::Linear { factor: 4.0 });
    assert_eq!(scaling(&[("scale_linear", Meta::F32(2.0))]), RopeScaling::Linear { factor: 2.0 });
    let yarn = |original: usize, attention: Option<f64>, fast: f64| RopeScaling::Yarn {
        factor: 4.0,
        original_max_position_embeddings: original,
        beta_fast: fast,
        beta_slow: 1.0,
        attention_factor: attention,
        mscale: None,
        mscale_all_dim: None,
        truncate: true,
    };
    assert_eq!(scaling(&[kind("yarn"), factor.clone()]), yarn(64, None, 32.0));
    let original = ("scaling.original_context_length", Meta::U32(16));
    let attention = ("scaling.yarn_attn_factor", Meta::F32(1.5));
    let fast = ("scaling.yarn_beta_fast", Meta::F32(16.0));
    assert_eq!(
        scaling(&[kind("yarn"), factor.clone(), original, attention, fast]),
        yarn(16, Some(1.5), 16.0)
    );
    let times = ("scaling.attn_factor", Meta::F32(2.0));
    let usual = 2.0 * (1.0 + 0.1 * 4.0_f64.ln());
    assert_eq!(scaling(&[kind("yarn"), factor, times]), yarn(64, Some(usual), 32.0));
}

fn with_factors(gguf: Gguf, factors: &[f32], kind: u32) -> Gguf {
    let data = factors.iter().flat_map(|factor| factor.to_le_bytes()).collect();
    gguf.tensor("rope_freqs.weight", &[factors.len() as u64], kind, data)
}

#[test]
fn rope_factors_are_a_tensor() {
    let factors = [1.0, 1.0, 4.0, 8.0];
    let checkpoint = open(&with_factors(llama(), &factors, 0)).unwrap();
    assert_eq!(checkpoint.config().rope.scaling, RopeScaling::Factors(factors.to_vec()));
    assert!(checkpoint.tensor("rope_freqs.weight").is_none());

    let too_few = refused(&with_factors(llama(), &factors[..3], 0));
    assert!(too_few.contains("number of rope_freqs is 3"), "{too_few}");
    assert!(refused(&with_factors(llama(), &[1.0, f32::NAN, 1.0, 1.0], 0)).contains("rope_freqs is NaN"));
    assert!(refused(&with_factors(llama(), &[1.0, 0.0], 1)).contains("F16"));
    let mut both = llama();
    both.set("llama.rope.scaling.factor", Meta::F32(2.0));
    assert!(refused(&with_factors(both, &factors, 0)).contains("rope_freqs.weight together with"));
}

#[test]
fn a_window_applies_to_every_layer() {
    let mut gguf = llama();
    gguf.set("llama.attention.sliding_window", Meta::U32(12));
    assert_eq!(open(&gguf).unwrap().config().layer_windows, [Some(12); 3]);
}

#[test]
fn biases_and_norms_follow_the_tensors() {
    let biased = Toy { biased: true, ..Toy::new(Family::Llama) };
    let checkpoint = open(&biased.gguf()).unwrap();
    let config = checkpoint.config();
    assert!(config.attention_bias && config.o_proj_bias && config.mlp_bias && !config.qk_norm);

    let mut one_missing = biased.gguf();
    one_missing.tensors.retain(|tensor| tensor.name != b"blk.1.attn_k.bias");
    assert!(refused(&one_missing).contains("no tensor \"model.layers.1.self_attn.k_proj.bias\""));

    let mut norms = llama();
    norms = norms.tensor("blk.0.attn_q_norm.weight", &[8], 0, vec![0; 32]);
    assert!(refused(&norms).contains("\"blk.0.attn_q_norm.weight\""), "a norm a llama model does not have");

    assert!(open(&Toy::new(Family::Qwen2).gguf()).unwrap().config().attention_bias);
    assert!(open(&Toy::new(Family::Qwen3).gguf()).unwrap().config().qk_norm);
}

#[test]
fn vectors_are_floats_and_shapes_are_held() {
    let mut quantized = llama();
    let bias = quantized.entry("output_norm.weight");
    (bias.kind, bias.dims, bias.data) = (2, vec![32], vec![0; 18]);
    assert!(refused(&quantized).contains("shape [32], the configuration asks for [16]"));

    let mut turned = llama();
    turned.entry("blk.0.ffn_up.weight").dims = vec![24, 16];
    let text = refused(&turned);
    assert!(
        text.contains("mlp.up_proj.weight") && text.contains("[16, 24]") && text.contains("[24, 16]"),
        "{text}"
    );

    let mut padded = llama();
    padded.entry("blk.0.ffn_up.weight").dims = vec![16, 24, 1, 1];
    open(&padded).unwrap();
    padded.entry("blk.0.ffn_up.weight").dims = vec![16, 12, 2];
    assert!(refused(&padded).contains("[2, 12, 16]"));
}

#[test]
fn the_vocabulary_is_handed_over() {
    let mut gguf = llama();
    gguf.set("tokenizer.ggml.pre", Meta::Str("smollm".into()));
    gguf.set("tokenizer.ggml.merges", Meta::Strs(vec!["t 0".into()]));
    gguf.set("tokenizer.ggml.token_type", Meta::I32s(vec![1; VOCAB]));
    gguf.set("tokenizer.ggml.scores", Meta::F32s(vec![-1.0; VOCAB]));
    gguf.set("tokenizer.ggml.bos_token_id", Meta::U32(1));
    gguf.set("tokenizer.ggml.eot_token_id", Meta::U32(5));
    gguf.set("tokenizer.ggml.unknown_token_id", Meta::U32(u32::MAX));
    gguf.set("tokenizer.ggml.add_bos_token", Meta::Bool(0));
    gguf.set("tokenizer.chat_template", Meta::Str("{{ x }}".into()));
    let checkpoint = open(&gguf).unwrap();
    let TokenizerFiles::Gguf(vocab) = checkpoint.tokenizer() else { panic!("{:?}", checkpoint.tokenizer()) };
    assert_eq!((vocab.model.as_str(), vocab.pre.as_deref()), ("gpt2", Some("smollm")));
    assert_eq!((vocab.tokens.len(), vocab.tokens[3].as_str(), vocab.scores.len()), (VOCAB, "t3", VOCAB));
    assert_eq!((vocab.bos, vocab.eos, vocab.eot, vocab.unk), (Some(1), Some(2), Some(5), None));
    assert_eq!(
        (vocab.add_bos, vocab.add_eos, vocab.merges.as_slice()),
        (Some(false), None, &["t 0".into()][..])
    );
    assert_eq!(vocab.chat_template.as_deref(), Some("{{ x }}"));
    assert_eq!(checkpoint.eos_token_ids(), [2, 5]);

    gguf.keys.retain(|(key, _)| key != b"tokenizer.ggml.tokens");
    let none = open(&gguf).unwrap();
    assert!(
        matches!(none.tokenizer(), TokenizerFiles::Missing { why } if why.contains("tokenizer.ggml.tokens"))
    );
    gguf.set("tokenizer.ggml.tokens", Meta::Strs(vec!["t".into(); VOCAB + 1]));
    assert!(refused(&gguf).contains("number of tokenizer.ggml.tokens is 21"));
}
