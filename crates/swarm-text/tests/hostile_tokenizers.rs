//! Broken and hostile vocabularies are refused; nothing panics, hangs or eats memory.

mod common;

use common::{Gguf, Goldens, fixture, tokenizer_json};
use proptest::prelude::*;
use serde::Deserialize;
use serde_json::{Value, json};
use swarm_text::{EncodeOptions, GgufParts, TEXT_BYTES_MAX, TextError, Tokenizer};

#[derive(Deserialize)]
struct Toy {
    gguf: Gguf,
    tokenizer: Value,
    pre: std::collections::BTreeMap<String, Goldens>,
}

fn toy() -> Toy {
    fixture("byte_level.json")
}

fn sound_json() -> Value {
    let toy = toy();
    tokenizer_json(&toy.tokenizer, &toy.gguf, json!(toy.gguf.merges), &toy.pre["gpt-2"])
}

fn load(file: &Value) -> Result<Tokenizer, TextError> {
    Tokenizer::from_hf_json(file.to_string().as_bytes(), None)
}

fn refused(label: &str, change: impl FnOnce(&mut Value)) -> String {
    let mut file = sound_json();
    change(&mut file);
    match load(&file) {
        Ok(_) => panic!("{label} was accepted"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn parts_that_are_not_known_are_named() {
    for (label, key, value) in [
        ("Precompiled", "normalizer", json!({"type": "Precompiled", "precompiled_charsmap": ""})),
        ("Nmt", "normalizer", json!({"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Nmt"}]})),
        ("BertPreTokenizer", "pre_tokenizer", json!({"type": "BertPreTokenizer"})),
        ("RobertaProcessing", "post_processor", json!({"type": "RobertaProcessing"})),
        ("WordPiece", "decoder", json!({"type": "WordPiece", "prefix": "##", "cleanup": true})),
        ("(none)", "decoder", Value::Null),
        ("Unigram", "model", json!({"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]})),
        ("(no type)", "model", json!({})),
    ] {
        let error = refused(label, |file| file[key] = value);
        assert!(error.contains(label), "{label}: {error}");
    }
    assert!(refused("dropout", |file| file["model"]["dropout"] = json!(0.1)).contains("dropout"));
    assert!(
        refused("prefix", |file| file["model"]["continuing_subword_prefix"] = json!("##")).contains("##")
    );
}

#[test]
fn texts_that_explode_are_refused() {
    let replace =
        |from: &str, to: String| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
    refused("long replacement", |file| file["normalizer"] = replace("a", "b".repeat(100_000)));
    refused("long prefix", |file| {
        file["normalizer"] = json!({"type": "Prepend", "prepend": "b".repeat(100_000)})
    });
    refused("replacement of nothing", |file| file["normalizer"] = replace("", "bbbb".to_owned()));
    refused("chain of replacements", |file| {
        let chain: Vec<Value> = (0..12).map(|_| replace("a", "aaaa".to_owned())).collect();
        file["normalizer"] = json!({"type": "Sequence", "normalizers": chain});
    });
    refused("many parts", |file| {
        let many: Vec<Value> = (0..1000).map(|_| json!({"type": "NFC"})).collect();
        file["normalizer"] = json!({"type": "Sequence", "normalizers": many});
    });
    refused("long regex", |file| {
        let regex = json!({"Regex": "(a|b)".repeat(10_000)});
        file["pre_tokenizer"] =
            json!({"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": false});
    });
    refused("endless template", |file| {
        let single: Vec<Value> =
            (0..1000).map(|_| json!({"SpecialToken": {"id": "x", "type_id": 0}})).collect();
        file["post_processor"] = json!({"type": "TemplateProcessing", "single": single, "pair": [],
            "special_tokens": {"x": {"id": "x", "ids": [1], "tokens": ["x"]}}});
    });
}

#[test]
fn crafted_merges_and_vocabularies_do_not_crash() {
    // A merge longer than any token overruns a buffer in the library, which panics.
    refused("overlong merge", |file| {
        file["model"]["vocab"] = json!({"a": 0, "bb": 1, "<|x|>": 2});
        file["model"]["merges"] = json!([["bb", "<|x|>"]]);
        file["added_tokens"] = json!([]);
    });
    refused("merge of unknown tokens", |file| file["model"]["merges"] = json!([["never", "seen"]]));
    refused("merge of three", |file| file["model"]["merges"] = json!(["a b c"]));
    refused("two tokens with one id", |file| file["model"]["vocab"]["twin"] = json!(300));
    refused("an id far away", |file| file["model"]["vocab"]["far"] = json!(4_000_000_000u32));
    refused("an added token elsewhere", |file| file["added_tokens"][0]["id"] = json!(17));
    refused("negative id", |file| file["model"]["vocab"]["minus"] = json!(-1));
    refused("deep nesting", |file| {
        let mut deep = json!({"type": "NFC"});
        for _ in 0..100 {
            deep = json!({"type": "Sequence", "normalizers": [deep]});
        }
        file["normalizer"] = deep;
    });
    assert!(Tokenizer::from_hf_json(b"", None).is_err());
    assert!(Tokenizer::from_hf_json("[".repeat(1_000_000).as_bytes(), None).is_err());
    assert!(Tokenizer::from_hf_json(&vec![b' '; (64 << 20) + 1], None).is_err());
    assert!(Tokenizer::from_hf_json(sound_json().to_string().as_bytes(), Some(b"{")).is_err());
}

#[test]
fn a_regex_that_backtracks_ends() {
    let mut file = sound_json();
    let regex = json!({"Regex": "((?!x)a+)+b|(?=a)a"});
    file["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": false},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]});
    // Whatever comes of it, it comes soon: the engine gives up on a match after a million steps.
    if let Ok(tokenizer) = load(&file) {
        let _ = tokenizer.encode(&"a".repeat(2_000), EncodeOptions::TEXT);
    }
}

#[test]
fn texts_have_a_limit() {
    let tokenizer = load(&sound_json()).expect("sound");
    let error = tokenizer.encode(&"a".repeat(TEXT_BYTES_MAX + 1), EncodeOptions::TEXT);
    assert!(matches!(error, Err(TextError::TextTooLong { .. })));
}

#[test]
fn broken_metadata_are_refused() {
    let sound = || {
        let mut parts = toy().gguf.parts();
        parts.pre = Some("gpt-2".to_owned());
        parts
    };
    Tokenizer::from_gguf(sound()).expect("sound");
    type Change = fn(&mut GgufParts);
    let cases: [(&str, Change); 12] = [
        ("no tokens", |p| p.tokens.clear()),
        ("strange model", |p| p.model = "rwkv".to_owned()),
        ("strange pre-tokenizer", |p| p.pre = Some("martian".to_owned())),
        ("no pre-tokenizer", |p| p.pre = None),
        ("types missing", |p| p.token_types.truncate(3)),
        ("merge of one", |p| p.merges.push("abc".to_owned())),
        ("merge of nothing", |p| p.merges.push(" ".to_owned())),
        ("merge of strangers", |p| p.merges.push("never seen".to_owned())),
        ("bos outside", |p| p.bos = Some(1_000_000)),
        ("eos outside", |p| p.eos = Some(u32::MAX)),
        ("llama without scores", |p| p.model = "llama".to_owned()),
        ("bos wanted, none named", |p| (p.bos, p.add_bos) = (None, Some(true))),
    ];
    for (label, change) in cases {
        let mut parts = sound();
        change(&mut parts);
        assert!(Tokenizer::from_gguf(parts).is_err(), "{label} was accepted");
    }
    let scored = |score: f32, text: String| GgufParts {
        model: "llama".to_owned(),
        tokens: vec!["a".to_owned(), text],
        scores: vec![0.0, score],
        ..GgufParts::default()
    };
    assert!(Tokenizer::from_gguf(scored(f32::NAN, "aa".to_owned())).is_err());
    assert!(Tokenizer::from_gguf(scored(0.0, "a".repeat(100_000))).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any small vocabulary loads or is refused, and then encodes or fails, without a panic.
    #[test]
    fn any_small_vocabulary_is_handled(
        llama: bool,
        tokens in prop::collection::vec("[ab▁ <>0xĠ\u{1F600}]{0,4}", 0..20),
        types in prop::collection::vec(-1i32..9, 0..20),
        scores in prop::collection::vec(prop_oneof![-9f32..9.0, Just(f32::INFINITY)], 0..20),
        merges in prop::collection::vec("[ab ]{0,5}", 0..4),
        ids in prop::collection::vec(prop::option::of(0u32..24), 3),
        text in "[ab ▁\u{1F600}<>]{0,12}",
    ) {
        let mut parts = GgufParts {
            model: if llama { "llama" } else { "gpt2" }.to_owned(),
            pre: Some("smollm".to_owned()),
            tokens, merges, token_types: types, scores,
            bos: ids[0], eos: ids[1], unk: ids[2],
            ..GgufParts::default()
        };
        // Half of the time make the lengths fit, so that more than the first check is reached.
        if text.len() % 2 == 0 {
            parts.token_types.resize(parts.tokens.len(), 1);
            parts.scores.resize(parts.tokens.len(), -1.0);
        }
        match Tokenizer::from_gguf(parts) {
            Err(error) => prop_assert!(!matches!(error, TextError::Panicked { .. }), "{}", error),
            Ok(tokenizer) => {
                if let Err(error) = tokenizer.encode(&text, EncodeOptions::PROMPT) {
                    prop_assert!(!matches!(error, TextError::Panicked { .. }), "{}", error);
                }
                tokenizer.decode(&[0, 1, 2, 3, 500], false);
            }
        }
    }

    /// `tokenizer.json` with a byte changed or cut off loads or is refused; encoding never takes the process down.
    #[test]
    fn a_damaged_file_is_handled(at in 0.0f64..1.0, byte: u8, cut: bool) {
        let mut file = sound_json().to_string().into_bytes();
        let at = (at * file.len() as f64) as usize;
        if cut { file.truncate(at) } else if let Some(old) = file.get_mut(at) { *old = byte }
        if let Ok(tokenizer) = Tokenizer::from_hf_json(&file, None) {
            let _ = tokenizer.encode("Hello <|im_end|> \u{1F600}", EncodeOptions::PROMPT);
            tokenizer.decode(&[0, 1, 300], true);
        }
    }
}
