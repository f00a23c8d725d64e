//! A tiny byte-level BPE vocabulary of 264 entries: 256 bytes, four merges, four specials.

use serde_json::{Value, json};

pub const VOCAB_SIZE: usize = 264;
/// Ids of the special tokens `<s>`, `</s>`, `<|im_start|>`, `<|im_end|>`.
pub const BOS: u32 = 260;
pub const EOS: u32 = 261;
pub const IM_START: u32 = 262;
pub const IM_END: u32 = 263;

pub(super) const SPECIALS: [(&str, u32); 4] =
    [("<s>", BOS), ("</s>", EOS), ("<|im_start|>", IM_START), ("<|im_end|>", IM_END)];

/// Merges in order of rank; each makes the next id from 256 on. `Ġ` stands for a space.
pub(super) const MERGES: [(&str, &str); 4] = [("h", "e"), ("Ġ", "t"), ("i", "n"), ("Ġt", "he")];

pub const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// The character GPT-2's byte-level alphabet gives to a byte: itself where printable, else the
/// next free one from U+0100 on.
fn byte_char(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if printable(byte) {
        return char::from(byte);
    }
    let place = (0..byte).filter(|&b| !printable(b)).count() as u32;
    char::from_u32(0x100 + place).expect("below the surrogates")
}

/// All tokens, by id.
pub(super) fn tokens() -> Vec<String> {
    let bytes = (0..=255).map(|byte| byte_char(byte).to_string());
    let merged = MERGES.iter().map(|(left, right)| format!("{left}{right}"));
    let specials = SPECIALS.iter().map(|(text, _)| (*text).to_owned());
    bytes.chain(merged).chain(specials).collect()
}

pub(super) fn tokenizer_json() -> Value {
    let vocab: serde_json::Map<String, Value> =
        tokens().into_iter().take(BOS as usize).enumerate().map(|(id, token)| (token, id.into())).collect();
    let added: Vec<Value> = SPECIALS
        .iter()
        .map(|(text, id)| {
            json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        })
        .collect();
    let merges: Vec<Value> = MERGES.iter().map(|(left, right)| json!([left, right])).collect();
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": added, "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocab, "merges": merges},
    })
}

pub(super) fn tokenizer_config() -> Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, "add_bos_token": false,
        "bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": false,
    })
}

pub(super) fn generation_config() -> Value {
    json!({"bos_token_id": BOS, "eos_token_id": [EOS, IM_END]})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_distinct_and_their_number_is_the_vocabulary() {
        let mut tokens = tokens();
        assert_eq!(tokens.len(), VOCAB_SIZE);
        assert_eq!(tokens[BOS as usize], "<s>");
        assert_eq!(tokens[usize::from(b' ')], "Ġ");
        tokens.sort();
        tokens.dedup();
        assert_eq!(tokens.len(), VOCAB_SIZE);
    }
}
