#!/usr/bin/env python3
"""Writes the fixtures and goldens of this crate's tests with Hugging Face's own libraries.

  fixtures/byte_level.json   a toy byte-level BPE: its tokenizer.json, the same as GGUF metadata, and goldens under
                             every pre-tokenizer rule that GGUF files can name
  fixtures/llama.json        a toy SentencePiece-style BPE (scores, byte fallback), likewise
  fixtures/smollm2.json      goldens of the real SmolLM2 vocabulary (only with --smollm2 FILE.gguf)
  fixtures/prompts.json      what Hugging Face's Jinja environment renders from fixtures/templates/*.jinja

usage: make_goldens.py [--smollm2 SmolLM2-135M-Instruct.Q4_1.gguf]
needs: tokenizers, transformers, jinja2; for --smollm2 also gguf
"""
import argparse, collections, datetime, glob, json, os, random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fixtures")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6

TEXTS = [
    "",
    " ",
    "a",
    "Hello world",
    " Hello  world ",
    "hello hello hello",
    "The quick brown fox jumps over the lazy dog.",
    "I'm sure we'll see they've DON'T, it's 'quoted' 'S 'LL",
    "Zwölf große Boxkämpfer jagen Viktor quer über den Sylter Deich",
    "Příliš žluťoučký kůň úpěl ďábelské ódy",
    "Съешь же ещё этих мягких французских булок",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "敏捷的棕色狐狸跳过懒狗。今天天气很好",
    "いろはにほへと ちりぬるを カタカナ",
    "키스의 고유조건은 입술끼리 만나야 하고",
    "نص حكيم له سر قاطع",
    "דג סקרן שט בים",
    "ऋषियों को सताने वाले दुष्ट राक्षसों",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "e\u0301 and \u00e9, A\u030a and \u00c5, \u1100\u1161\u11a8 and \uac01, \ufb01 \u2460 \u00bd",
    "\U0001f600\U0001f3f4\u200d\u2620\ufe0f \U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f44d\U0001f3fd \U0001f1e9\U0001f1ea",
    "\U0001d518\U0001d52b\U0001d526\U0001d520\U0001d52c\U0001d521\U0001d522 \U00020000\U0001f9ff",
    "def f(x):\n    return x**2 + 1  # comment\n\n\tif y != 3:\n\t\tpass\n",
    "for (int i = 0; i < 10; ++i) { a[i] += b[i] << 2; }\r\n",
    "{\"key\": [1, 2.5, -3e10, true, null], \"a/b\": \"c\\n\"}",
    "0 1 12 123 1234 12345 3.14159 1,000,000 2024-07-26 0x1F ½ ² Ⅷ ٣",
    "line one\nline two\r\nline three\n\n\n   indented\t\ttabs   \n  \n",
    "trailing spaces     ",
    "     leading spaces",
    "a  b   c    d     e",
    "\u00a0non\u2009breaking\u3000wide\u200bzero\ufeff",
    "\u2581already\u2581marked \u2581 \u2581\u2581x",
    "price: $9.99! (50% off) <b>bold</b> a+b=c ^_^ ~tilde~ |pipe| `tick` @at #hash & \\",
    "https://example.org/path?q=1&r=%20#frag user@example.org",
    "<0x41> <0xE2> <|not_special|> < s > </ s>",
    "\x00\x01\x7f\x1b[0m control",
    "camelCaseWord UPPER_CASE lower-case MiXeD",
    "word" * 12,
]
SPECIAL_TEXTS = [
    "{0}",
    "before{1}after",
    " {0} {1} ",
    "{0}{0}{1}",
    "a {0}\n\n{1}b",
    "tool <tool>call</tool>{1}\t\tend",
    "{0}x" * 3,
    "almost {1}".replace("{1}", "{1}"[:-1]) + " {1}",
]


def texts(specials):
    return TEXTS + [t.replace("{0}", specials[0]).replace("{1}", specials[1]).replace("{1", specials[1][:-1]) for t in SPECIAL_TEXTS]


def goldens(tokenizer, samples):
    """What is added around a text, and rows of [ids, ids with special tokens in it taken literally or null if equal], one per text."""
    rows = []
    for text in samples:
        plain = tokenizer.encode(text, add_special_tokens=False).ids
        tokenizer.encode_special_tokens = True
        literal = tokenizer.encode(text, add_special_tokens=False).ids
        tokenizer.encode_special_tokens = False
        rows.append([plain, None if literal == plain else literal])
    probe, full = tokenizer.encode("a", add_special_tokens=False).ids, tokenizer.encode("a").ids
    assert full[len(full) - len(probe):] == probe, "only prefixes are made here"
    return {"prefix": full[:len(full) - len(probe)], "rows": rows}


def decodings(tokenizer, ids_rows):
    """[ids, text without special tokens, text with them]"""
    return [[ids, tokenizer.decode(ids, skip_special_tokens=True), tokenizer.decode(ids, skip_special_tokens=False)] for ids in ids_rows]


# ---------------------------------------------------------------- byte-level
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
          r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def split(regex):
    return pre_tokenizers.Split(Regex(regex), "isolated")


def byte_level(use_regex):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


# name in tokenizer.ggml.pre -> (normalizer, pre-tokenizer, ignore_merges, bos is added by default)
PRE = {
    "gpt-2": (None, byte_level(True), False, False),
    "smollm": (None, pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level(True)]), False, False),
    "llama-bpe": (None, pre_tokenizers.Sequence([split(LLAMA3), byte_level(False)]), True, True),
    "qwen2": (normalizers.NFC(), pre_tokenizers.Sequence([split(QWEN2), byte_level(False)]), False, False),
    "tekken": (None, pre_tokenizers.Sequence([split(TEKKEN), byte_level(False)]), True, True),
    "deepseek-coder": (None, pre_tokenizers.Sequence([split(r"[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split("[一-龥ࠀ-一가-퟿]+"),
                                                      pre_tokenizers.Digits(individual_digits=True), byte_level(False)]), False, False),
    "default": (None, pre_tokenizers.Sequence([split(r"[\p{P}\$\+<=>\^~\|]+"), split(GPT2), split(r"\p{N}+"), split("[0-9][0-9][0-9]"), byte_level(False)]), False, False),
}


def make_byte_level():
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>", "\t\t"]
    types = [CONTROL, CONTROL, CONTROL, USER_DEFINED, USER_DEFINED]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = byte_level(True)
    trainer = trainers.BpeTrainer(vocab_size=440, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    trained.train_from_iterator(TEXTS, trainer)
    model = json.loads(trained.to_str())["model"]
    learnt = sorted(model["vocab"], key=model["vocab"].get)
    # Words that no merge leads to: only ignore_merges finds them.
    orphans = ["\u0120orphan", "\u0120jumps", "world"]
    learnt += [word for word in orphans if word not in learnt]
    tokens, types = tokens + learnt, types + [NORMAL] * len(learnt)
    merges = [tuple(m) for m in model["merges"]]
    vocab = {t: i for i, t in enumerate(tokens)}
    out = {"gguf": {"model": "gpt2", "tokens": tokens, "token_types": types, "merges": [" ".join(m) for m in merges], "bos": 1, "eos": 2, "unk": 0}, "texts": texts(["<|im_start|>", "<|im_end|>"]), "pre": {}}
    rng = random.Random(7)
    for name, (normalizer, pre, ignore_merges, add_bos) in PRE.items():
        t = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges))
        if normalizer:
            t.normalizer = normalizer
        t.pre_tokenizer = pre
        t.decoder = decoders.ByteLevel()
        if add_bos:
            t.post_processor = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
        t.add_tokens([AddedToken(x, special=k == CONTROL, normalized=False) for x, k in zip(tokens, types) if k != NORMAL])
        j = json.loads(t.to_str())
        if not out.get("tokenizer"):
            out["tokenizer"] = j
        rows = goldens(t, out["texts"])
        parts = {k: j[k] for k in ("normalizer", "pre_tokenizer", "post_processor")}
        out["pre"][name] = {"parts": parts, "ignore_merges": ignore_merges, **rows}
        if name == "gpt-2":
            noise = [[rng.randrange(len(tokens)) for _ in range(rng.randrange(1, 12))] for _ in range(40)]
            # bytes of characters, cut anywhere
            noise += [[vocab[c] for c in "ðŁĺĢâĤ¬Ã©"[a:b]] for a in range(4) for b in range(a + 1, 9)]
            picked = [row[0] for row in rows["rows"] if row[0]][::4]
            out["decode"] = decodings(t, picked + noise)
    # One vocabulary, written once.
    out["tokenizer"]["model"]["vocab"] = "tokens"
    out["tokenizer"]["model"]["merges"] = "merges"
    write("byte_level.json", out)


# ---------------------------------------------------------------- SentencePiece-style
def make_llama():
    from transformers.convert_slow_tokenizer import generate_merges

    words = [("\u2581" + t.replace(" ", "\u2581")) for t in TEXTS]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    # The trainer's own limit on characters breaks ties at random.
    counts = collections.Counter("".join(words))
    common = sorted(sorted(counts), key=lambda c: -counts[c])[:50]
    words = ["".join(c for c in word if c in common) for word in words]
    trained.train_from_iterator(words, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    learnt = sorted(model["vocab"], key=model["vocab"].get)
    pieces, chars = [p for p in learnt if len(p) > 1], [p for p in learnt if len(p) == 1]
    pieces += ["\u2581\u2581", "\u2581\u2581\u2581\u2581"]
    tokens = ["<unk>", "<s>", "</s>"] + ["<0x%02X>" % b for b in range(256)] + pieces + chars + ["<tool>"]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * (len(pieces) + len(chars)) + [USER_DEFINED]
    # Like the trainer of SentencePiece: learnt pieces in order, then characters. Some ties, so that their order counts.
    scores = [0.0] * 259 + [-float(i - i % 3 if i % 10 < 6 else i) for i in range(len(pieces) + len(chars))] + [0.0]
    vocab = {t: i for i, t in enumerate(tokens)}
    merges = generate_merges(vocab, {t: s for t, s, k in zip(tokens, scores, types) if k in (NORMAL, USER_DEFINED)})
    out = {"gguf": {"model": "llama", "tokens": tokens, "token_types": types, "scores": scores, "bos": 1, "eos": 2, "unk": 0}, "merges": [list(m) for m in merges], "texts": texts(["<s>", "</s>"]), "styles": {}}
    mark = normalizers.Replace(" ", "\u2581")
    plain = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(" ", 1, 0)]
    styles = {
        "prefix": (normalizers.Sequence([normalizers.Prepend("\u2581"), mark]), None, decoders.Sequence(plain + strip)),
        "no_prefix": (mark, None, decoders.Sequence(plain)),
        # As newer converters write it: only the very first word gets the mark.
        "first": (None, pre_tokenizers.Metaspace("\u2581", prepend_scheme="first", split=False), decoders.Sequence(plain + strip)),
    }
    rng = random.Random(7)
    for name, (normalizer, pre, decoder) in styles.items():
        t = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        if normalizer:
            t.normalizer = normalizer
        if pre:
            t.pre_tokenizer = pre
        t.decoder = decoder
        t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        t.add_tokens([AddedToken(x, special=k != USER_DEFINED, normalized=False) for x, k in zip(tokens, types) if k in (UNKNOWN, CONTROL, USER_DEFINED)])
        j = json.loads(t.to_str())
        if not out.get("tokenizer"):
            out["tokenizer"] = j
        rows = goldens(t, out["texts"])
        # Random, but always whole characters: the library writes more replacement characters than there are broken ones.
        noise = [[i if i > 2 + 256 or i < 3 else 3 + rng.randrange(0x20, 0x7F) for i in (rng.randrange(len(tokens)) for _ in range(rng.randrange(1, 12)))] for _ in range(20)]
        parts = {k: j[k] for k in ("normalizer", "pre_tokenizer", "decoder", "post_processor")}
        out["styles"][name] = {"parts": parts, **rows, "decode": decodings(t, [row[0] for row in rows["rows"] if row[0]][::4] + noise)}
    out["tokenizer"]["model"]["vocab"] = "tokens"
    out["tokenizer"]["model"]["merges"] = "merges"
    write("llama.json", out)


# ---------------------------------------------------------------- the real SmolLM2
def make_smollm2(path):
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    tokens, types, merges = (fields["tokenizer.ggml." + k].contents() for k in ("tokens", "token_type", "merges"))
    t = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[tuple(m.split(" ")) for m in merges]))
    t.pre_tokenizer = PRE["smollm"][1]
    t.decoder = decoders.ByteLevel()
    t.add_tokens([AddedToken(x, special=True, normalized=False) for x, k in zip(tokens, types) if k == CONTROL])
    samples = texts(["<|im_start|>", "<|im_end|>"])
    write("smollm2.json", {"vocab_size": len(tokens), "texts": samples, **goldens(t, samples)})


# ---------------------------------------------------------------- chat templates
def conversation(*turns):
    return [{"role": role, "content": content} for role, content in turns]


CHATS = {
    "user": conversation(("user", "Hi there")),
    "system": conversation(("system", "Be brief."), ("user", "Hi")),
    "long": conversation(("system", " Be brief.\n"), ("user", "One?"), ("assistant", "Two."), ("user", "Three?"), ("assistant", "<think>\nHm.\n</think>\n\nFour."), ("user", "  Five?\n\n")),
    "odd": conversation(("user", "{{ 7 * 7 }} {% raw %} 'quotes' \"double\" \\n <b>&amp;</b> \U0001f600 \u00e9\n")),
    "two_users": conversation(("user", "a"), ("user", "b")),
    "assistant_last": conversation(("user", "a"), ("assistant", "b")),
    "strange_role": conversation(("user", "a"), ("assistant", "b"), ("user", "c"), ("critic", "d")),
}
TOKENS = {
    "tinyllama": {"bos_token": "<s>", "eos_token": "</s>"},
    "mistral": {"bos_token": "<s>", "eos_token": "</s>"},
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "qwen2.5": {"eos_token": "<|im_end|>"},
    "qwen3": {"eos_token": "<|im_end|>"},
    "smollm2": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
    "features": {},
}
VARIABLES = {"qwen3": [{}, {"enable_thinking": False}], "qwen2.5": [{}, {"tools": [{"type": "function", "function": {"name": "f", "x": [1, None, "\u00e9<>"]}}]}]}
NOW = datetime.datetime(2026, 3, 5, 14, 7, 9)


def make_prompts():
    from transformers.utils.chat_template_utils import _cached_compile_jinja_template

    out = []
    for path in sorted(glob.glob(os.path.join(HERE, "templates", "*.jinja"))):
        name = os.path.basename(path)[:-len(".jinja")]
        template = _cached_compile_jinja_template(open(path, encoding="utf-8").read())
        template.environment.globals["strftime_now"] = NOW.strftime
        for chat, messages in CHATS.items():
            if name == "features" and chat not in ("long", "odd"):
                continue
            for variables in VARIABLES.get(name, [{}]):
                for add_generation_prompt in (True, False):
                    if not add_generation_prompt and (chat not in ("long", "assistant_last") or name == "features"):
                        continue
                    row = {"template": name, "chat": chat, "variables": variables, "add_generation_prompt": add_generation_prompt}
                    try:
                        args = {"tools": None, "documents": None, **TOKENS[name], **variables}
                        row["prompt"] = template.render(messages=messages, add_generation_prompt=add_generation_prompt, **args)
                    except Exception as error:
                        row["refused"] = str(error)
                    out.append(row)
    write("prompts.json", {"now": int(NOW.replace(tzinfo=datetime.timezone.utc).timestamp()), "tokens": TOKENS, "chats": CHATS, "rows": out})


def write(name, value):
    path = os.path.join(HERE, name)
    with open(path, "w", encoding="utf-8") as f:
        json.dump(value, f, ensure_ascii=False, separators=(",", ":"))
        f.write("\n")
    print("%-20s %6d bytes" % (name, os.path.getsize(path)))


parser = argparse.ArgumentParser()
parser.add_argument("--smollm2")
arguments = parser.parse_args()
make_byte_level()
make_llama()
make_prompts()
if arguments.smollm2:
    make_smollm2(arguments.smollm2)
