//! Tokenizers and chat templates: programs by strangers, which may be refused but never take the process along.

use std::time::{Duration, UNIX_EPOCH};

use swarm_testkit::toy::{Storage, spec};
use swarm_text::{ChatTemplate, EncodeOptions, Message, RenderOptions, SpecialTokens, TextError, Tokenizer};

use super::{Shape, Target, chain, outcome};

pub const TOKENIZER: Target = Target {
    name: "tokenizer",
    shape: Shape::Json,
    words: &[
        "type",
        "BPE",
        "Unigram",
        "WordPiece",
        "vocab",
        "merges",
        "added_tokens",
        "normalizer",
        "pre_tokenizer",
        "Sequence",
        "Split",
        "Regex",
        "ByteLevel",
        "Metaspace",
        "Replace",
        "Prepend",
        "NFC",
        "Lowercase",
        "pattern",
        "decoder",
        "post_processor",
        "TemplateProcessing",
        "single",
        "special_tokens",
        "byte_fallback",
        "unk_token",
        "(a+)+$",
        "\\p{L}+",
        "(?=x)",
        "[^\\s]{1,9999}",
        "\u{120}",
    ],
    seeds: tokenizer_seeds,
    run: tokenizer,
    runs: 2_000,
};

pub const TEMPLATE: Target = Target {
    name: "template",
    shape: Shape::Text,
    words: &[
        "{{ ",
        " }}",
        "{% ",
        " %}",
        "for m in messages",
        "endfor",
        "if ",
        "endif",
        "set x = ",
        "namespace(l=[])",
        "messages",
        "m['content']",
        "m.role",
        "bos_token",
        "add_generation_prompt",
        "raise_exception('no')",
        "range(99999999)",
        "~",
        " * 99999999",
        "|tojson",
        "|trim",
        "|length",
        "[::-1]",
        "[1:]",
        "macro f(x)",
        "endmacro",
        "f(f)",
        "strftime_now('%Y')",
        "'a'.join(",
        "(((((((((((((((((",
        "{#",
        "-%}",
        "loop.index0",
        "break",
        "is defined",
    ],
    seeds: template_seeds,
    run: template,
    runs: 4_000,
};

fn toy_file(name: &str) -> Vec<u8> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    spec("llama").write_hf(folder.path(), Storage::F32).expect("a toy model can be written");
    std::fs::read(folder.path().join(name)).expect("and read")
}

fn tokenizer_seeds() -> Vec<Vec<u8>> {
    // Small enough that a change hits something that matters.
    let small = r#"{"version":"1.0","added_tokens":[{"id":5,"content":"<s>","special":true,"single_word":false,"lstrip":false,"rstrip":false,"normalized":false}],"normalizer":{"type":"Sequence","normalizers":[{"type":"NFC"},{"type":"Replace","pattern":{"String":" "},"content":"_"}]},"pre_tokenizer":{"type":"Split","pattern":{"Regex":"\\p{L}+|[^\\p{L}]"},"behavior":"Isolated","invert":false},"post_processor":{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"<s>","type_id":0}},{"Sequence":{"id":"A","type_id":0}}],"pair":[],"special_tokens":{"<s>":{"id":"<s>","ids":[5],"tokens":["<s>"]}}},"decoder":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":false,"use_regex":false},"model":{"type":"BPE","dropout":null,"unk_token":null,"continuing_subword_prefix":null,"end_of_word_suffix":null,"fuse_unk":false,"byte_fallback":false,"vocab":{"a":0,"b":1,"ab":2,"_":3,"aba":4},"merges":["a b","ab a"]}}"#;
    vec![toy_file("tokenizer.json"), small.as_bytes().to_vec()]
}

fn tokenizer(bytes: &[u8]) -> u64 {
    let tokenizer = match Tokenizer::from_hf_json(bytes, None) {
        Ok(tokenizer) => tokenizer,
        Err(error) => return judge(&error),
    };
    let mut seen = outcome("loaded") ^ tokenizer.vocab_size() as u64;
    for text in ["", "ab aba <s> \u{0}\u{10ffff} é", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "\n\n  \t"]
    {
        match tokenizer.encode(text, EncodeOptions::PROMPT) {
            Ok(ids) => {
                assert!(
                    ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()),
                    "an id beyond the vocabulary"
                );
                let _ = tokenizer.decode(&ids, false);
                seen ^= ids.len() as u64;
            }
            Err(error) => seen ^= judge(&error),
        }
    }
    for id in [0, 1, u32::MAX] {
        let _ = (tokenizer.token_bytes(id), tokenizer.is_special(id), tokenizer.decode(&[id], true));
    }
    seen
}

/// A panic inside a library is contained and refused, which is what was promised; a missed deadline is not.
fn judge(error: &TextError) -> u64 {
    assert!(!matches!(error, TextError::TimedOut { .. }), "{error}");
    outcome(&chain(error))
}

fn template_seeds() -> Vec<Vec<u8>> {
    let config: serde_json::Value =
        serde_json::from_slice(&toy_file("tokenizer_config.json")).expect("it is JSON");
    let toy = config["chat_template"].as_str().expect("the toy model has a template").to_owned();
    let long = "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles') }}{% endif %}{{ '[' + m['role']|upper + '] ' + (s if loop.first else '') + m['content']|trim }}{% endfor %}{% if add_generation_prompt %}[A]{% endif %}";
    let tools = "{%- macro show(x, depth=0) -%}{%- for k, v in x|items -%}{{ k }}:{{ v|tojson }};{%- endfor -%}{%- endmacro -%}{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ show(m) }}{{ ns.n }}{% endfor %}{{ strftime_now('%d %b %Y') }}";
    [toy.as_str(), long, tools].map(|text| text.as_bytes().to_vec()).to_vec()
}

fn template(bytes: &[u8]) -> u64 {
    let source = String::from_utf8_lossy(bytes);
    let template = match ChatTemplate::new(&source, &SpecialTokens::default()) {
        Ok(template) => template,
        Err(error) => return judge_template(&error),
    };
    let chat = [Message::system("s"), Message::user("Hi {{ 1 }} <|im_end|>"), Message::assistant("Ho")];
    let options =
        RenderOptions { now: UNIX_EPOCH + Duration::from_secs(1_700_000_000), ..RenderOptions::default() };
    match template.render_with(&chat, &options) {
        Ok(prompt) => outcome(&prompt),
        Err(error) => judge_template(&error),
    }
}

/// The template engine itself does not panic.
fn judge_template(error: &TextError) -> u64 {
    assert!(!matches!(error, TextError::Panicked { .. }), "{error}");
    judge(error)
}
