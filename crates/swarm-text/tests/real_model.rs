//! The real vocabulary of SmolLM2-135M-Instruct. These tests need the model file and fail without it.

mod common;

use std::path::PathBuf;

use common::{Goldens, check_encode, fixture};
use serde::Deserialize;
use swarm_text::{ChatTemplate, Detokenizer, EncodeOptions, Message, RenderOptions, Tokenizer};
use swarm_weights::Checkpoint;

const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

fn checkpoint() -> Checkpoint {
    let path = std::env::var_os("SWARM_OS_TEST_MODEL")
        .map(PathBuf::from)
        .unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../models").join(FILE));
    assert!(
        path.exists(),
        "the test model is not at {}: run `cargo xtask fetch`, or set SWARM_OS_TEST_MODEL to {FILE}",
        path.display()
    );
    Checkpoint::open(&path).expect("the test model opens")
}

#[derive(Deserialize)]
struct SmolLm2 {
    vocab_size: usize,
    texts: Vec<String>,
    #[serde(flatten)]
    goldens: Goldens,
}

#[test]
fn ids_are_those_of_hugging_face_and_text_comes_back() {
    let tokenizer = Tokenizer::from_checkpoint(&checkpoint()).expect("the tokenizer loads");
    let fixture: SmolLm2 = fixture("smollm2.json");
    assert_eq!(tokenizer.vocab_size(), fixture.vocab_size);
    check_encode("SmolLM2", &tokenizer, &fixture.texts, &fixture.goldens);
    for text in &fixture.texts {
        let ids = tokenizer.encode(text, EncodeOptions::TEXT).expect("it encodes");
        assert_eq!(&tokenizer.decode(&ids, true), text);
        let mut stream = Detokenizer::new(&tokenizer, true);
        let pushed: String = ids.iter().map(|&id| stream.push(id)).collect();
        assert_eq!(&(pushed + &stream.finish()), text);
    }
}

#[test]
fn a_chat_becomes_the_models_prompt() {
    let checkpoint = checkpoint();
    let tokenizer = Tokenizer::from_checkpoint(&checkpoint).expect("the tokenizer loads");
    let template =
        ChatTemplate::from_checkpoint(&checkpoint, &tokenizer).expect("it compiles").expect("it has one");
    let chat = [Message::system("Be brief."), Message::user("Where is <|im_end|> Paris?")];
    let prompt = template.render(&chat, true).expect("it renders");
    assert_eq!(
        prompt,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhere is <|im_end|> Paris?<|im_end|>\n\
         <|im_start|>assistant\n"
    );
    let ids = template.encode(&tokenizer, &chat, &RenderOptions::default()).expect("it encodes");
    assert_eq!(tokenizer.decode(&ids, false), prompt);
    let special: Vec<u32> = ids.iter().copied().filter(|&id| tokenizer.is_special(id)).collect();
    assert_eq!(special, [1, 2, 1, 2, 1]);
    assert_eq!(tokenizer.bos(), Some(1));
    assert_eq!(tokenizer.end_of_turn().iter().copied().collect::<Vec<_>>(), [0, 2]);
}
