//! Toy vocabularies of both kinds: `tokenizer.json` and GGUF metadata give equal ids, and both give those of Hugging
//! Face's library in Python, whose regex engine is another one.

mod common;

use std::collections::BTreeMap;

use common::{Decoding, Gguf, Goldens, check_decode, check_encode, fixture, load, tokenizer_json};
use proptest::prelude::*;
use serde::Deserialize;
use serde_json::{Value, json};
use swarm_text::{Detokenizer, EncodeOptions, Tokenizer};

#[derive(Deserialize)]
struct ByteLevel {
    gguf: Gguf,
    tokenizer: Value,
    texts: Vec<String>,
    pre: BTreeMap<String, Goldens>,
    decode: Vec<Decoding>,
}

#[derive(Deserialize)]
struct Llama {
    gguf: Gguf,
    tokenizer: Value,
    texts: Vec<String>,
    merges: Vec<(String, String)>,
    styles: BTreeMap<String, Goldens>,
}

fn byte_level_json(fixture: &ByteLevel, goldens: &Goldens) -> Value {
    tokenizer_json(&fixture.tokenizer, &fixture.gguf, json!(fixture.gguf.merges), goldens)
}

fn llama_json(fixture: &Llama, style: &str) -> Value {
    tokenizer_json(&fixture.tokenizer, &fixture.gguf, json!(fixture.merges), &fixture.styles[style])
}

#[test]
fn byte_level_ids_are_equal_from_both_sources() {
    let fixture: ByteLevel = fixture("byte_level.json");
    assert!(fixture.pre.len() >= 7);
    for (name, goldens) in &fixture.pre {
        let mut parts = fixture.gguf.parts();
        parts.pre = Some(name.clone());
        let from_gguf = Tokenizer::from_gguf(parts).expect("sound metadata");
        check_encode(&format!("gguf, {name}"), &from_gguf, &fixture.texts, goldens);
        check_decode(&format!("gguf, {name}"), &from_gguf, &fixture.decode);
        let from_json = load(&byte_level_json(&fixture, goldens));
        check_encode(&format!("json, {name}"), &from_json, &fixture.texts, goldens);
        check_decode(&format!("json, {name}"), &from_json, &fixture.decode);
    }
}

#[test]
fn llama_ids_are_equal_from_both_sources() {
    let fixture: Llama = fixture("llama.json");
    for (style, add_space_prefix) in [("prefix", None), ("no_prefix", Some(false))] {
        let mut parts = fixture.gguf.parts();
        parts.add_space_prefix = add_space_prefix;
        let from_gguf = Tokenizer::from_gguf(parts).expect("sound metadata");
        let goldens = &fixture.styles[style];
        check_encode(&format!("gguf, {style}"), &from_gguf, &fixture.texts, goldens);
        check_decode(&format!("gguf, {style}"), &from_gguf, &goldens.decode);
    }
    for (style, goldens) in &fixture.styles {
        let from_json = load(&llama_json(&fixture, style));
        check_encode(&format!("json, {style}"), &from_json, &fixture.texts, goldens);
        check_decode(&format!("json, {style}"), &from_json, &goldens.decode);
    }
}

fn toys() -> Vec<(&'static str, Tokenizer)> {
    let (bytes, llama): (ByteLevel, Llama) = (fixture("byte_level.json"), fixture("llama.json"));
    vec![
        ("byte-level", load(&byte_level_json(&bytes, &bytes.pre["llama-bpe"]))),
        ("llama", Tokenizer::from_gguf(llama.gguf.parts()).expect("sound metadata")),
        ("llama without prefix", load(&llama_json(&llama, "no_prefix"))),
    ]
}

#[test]
fn special_tokens_are_known_by_role() {
    let (bytes, llama): (ByteLevel, Llama) = (fixture("byte_level.json"), fixture("llama.json"));
    let mut parts = bytes.gguf.parts();
    parts.pre = Some("smollm".to_owned());
    parts.end_ids = vec![7];
    let tokenizer = Tokenizer::from_gguf(parts.clone()).expect("sound");
    assert_eq!(tokenizer.bos(), Some(1));
    // 0 <|endoftext|> and 2 <|im_end|> are known by their texts, 7 by the metadata.
    assert_eq!(tokenizer.end_of_turn().iter().copied().collect::<Vec<_>>(), [0, 2, 7]);
    assert_eq!(tokenizer.vocab_size(), bytes.gguf.tokens.len());
    assert_eq!(tokenizer.token_bytes(4), Some(&b"\t\t"[..]));
    assert_eq!(tokenizer.token_bytes(u32::MAX), None);
    assert!(tokenizer.is_special(1) && !tokenizer.is_special(4));

    parts.add_bos = Some(true);
    parts.add_eos = Some(true);
    let tokenizer = Tokenizer::from_gguf(parts).expect("sound");
    assert_eq!(tokenizer.encode("", EncodeOptions::PROMPT).expect("it encodes"), [1, 2]);

    // Without ids in the metadata a llama vocabulary has its customary ones.
    let mut parts = llama.gguf.parts();
    (parts.bos, parts.eos, parts.unk) = (None, None, None);
    let tokenizer = Tokenizer::from_gguf(parts).expect("sound");
    assert_eq!(tokenizer.special_tokens().eos.as_ref().map(|eos| eos.text.as_str()), Some("</s>"));
    assert_eq!(tokenizer.encode("", EncodeOptions::PROMPT).expect("it encodes"), [1]);
    assert!(tokenizer.end_of_turn().contains(&2));

    let config =
        json!({"bos_token": {"content": "<s>", "lstrip": false}, "eos_token": "</s>", "pad_token": null});
    let file = llama_json(&llama, "first").to_string();
    let tokenizer =
        Tokenizer::from_hf_json(file.as_bytes(), Some(config.to_string().as_bytes())).expect("sound");
    assert_eq!(tokenizer.bos(), Some(1));
    assert_eq!(tokenizer.special_tokens().pad, None);
    assert!(tokenizer.end_of_turn().contains(&2));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Any text survives, because every byte has a token. Texts may contain the special tokens' characters.
    #[test]
    fn encoding_then_decoding_gives_the_text_back(text in "(\\PC|[ \t\n]|<s>|</s>|\u{1F468}\u{200D}|e\u{301}| ){0,24}") {
        for (label, tokenizer) in toys() {
            let ids = tokenizer.encode(&text, EncodeOptions::TEXT).expect("it encodes");
            prop_assert!(!ids.iter().any(|&id| tokenizer.is_special(id)), "{}: a special token out of {:?}", label, text);
            prop_assert_eq!(tokenizer.decode(&ids, true), text.replace('\u{2581}', if label == "byte-level" { "\u{2581}" } else { " " }), "{}", label);
        }
    }

    #[test]
    fn streaming_equals_decoding_all(picks in prop::collection::vec(any::<u32>(), 0..40), skip_special: bool) {
        for (_, tokenizer) in toys() {
            // A few ids outside the vocabulary as well.
            let ids: Vec<u32> = picks.iter().map(|pick| pick % (tokenizer.vocab_size() as u32 + 3)).collect();
            let whole = tokenizer.decode(&ids, skip_special);
            let mut stream = Detokenizer::new(&tokenizer, skip_special);
            let mut text = String::new();
            for &id in &ids {
                text.push_str(&stream.push(id));
                prop_assert!(whole.starts_with(&text));
            }
            text.push_str(&stream.finish());
            prop_assert_eq!(text, whole);
        }
    }
}

#[test]
fn an_emoji_of_four_byte_tokens_is_never_halved() {
    for (label, tokenizer) in toys() {
        let text = "\u{1F468}\u{200D}\u{1F469}\u{200D}\u{1F467} \u{E9}\u{4E2D}";
        let ids = tokenizer.encode(text, EncodeOptions::TEXT).expect("it encodes");
        assert!(ids.len() > text.chars().count(), "{label}: characters must be split for this test");
        let mut stream = Detokenizer::new(&tokenizer, true);
        let pushed: Vec<String> = ids.iter().map(|&id| stream.push(id)).collect();
        assert!(pushed.iter().all(|part| !part.contains('\u{FFFD}')), "{label}: {pushed:?}");
        assert_eq!(pushed.concat() + &stream.finish(), text, "{label}");
    }
}
