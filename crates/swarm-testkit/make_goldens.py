#!/usr/bin/env python3
"""Makes the goldens of the toy models and of the block formats.

    python3 -m venv .venv && .venv/bin/pip install torch transformers gguf numpy
    .venv/bin/python crates/swarm-testkit/make_goldens.py

Reads goldens/specs.json (the Rust side reads the same file) and writes
goldens/<spec>.bin (f32 logits [positions, vocab], little endian), goldens/index.json,
goldens/quants.bin and goldens/quants.json. The files are committed; run this again only
when a spec or the weight formula changes.
"""

import copy
import json
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

GOLDENS = Path(__file__).resolve().parent / "goldens"
GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)
BYTE_LEVEL_IDS = 260  # ids below this are ordinary text tokens, see src/toy/vocab.rs


# ---- The weight formula. Its twin is src/toy/formula.rs; goldens/index.json holds a digest of
# ---- every model's weights, and a Rust test compares.


def mix(x):
    """The finaliser of splitmix64, over a uint64 array."""
    with np.errstate(over="ignore"):
        x = x ^ (x >> np.uint64(30))
        x = x * np.uint64(0xBF58476D1CE4E5B9)
        x = x ^ (x >> np.uint64(27))
        x = x * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def fnv1a(text):
    state = 0xCBF29CE484222325
    for byte in text.encode():
        state = ((state ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return np.uint64(state)


def stream(seed, name, count):
    """`count` integers in -128..=127 that depend on nothing but seed, name and index."""
    with np.errstate(over="ignore"):
        base = mix(np.array([fnv1a(name) ^ (np.uint64(seed) * GOLDEN_RATIO)], dtype=np.uint64))
        steps = (np.arange(count, dtype=np.uint64) + np.uint64(1)) * GOLDEN_RATIO
        return (mix(base + steps) >> np.uint64(56)).astype(np.int64) - 128


def shift(name, cols):
    """Binary places of a matrix or bias: values are k * 2^-shift, so exact in f16 and bf16."""
    if "embed_tokens" in name:
        return 7
    places = 8 if "lm_head" in name else 9
    if name.endswith("bias"):
        return places
    return places + (1 if cols >= 256 else 0) + (2 if cols >= 1024 else 0)


def weights(seed, name, shape):
    count = int(np.prod(shape))
    k = stream(seed, name, count)
    if "norm" in name:
        values = 1.0 + (k >> 1) / 128.0
    else:
        values = k / float(1 << shift(name, shape[-1]))
    return values.astype(np.float32).reshape(shape)


def digest(tensors):
    """A sum over f32 bit patterns, each times its odd place, times the name's hash."""
    total = np.uint64(0)
    with np.errstate(over="ignore"):
        for name, values in tensors.items():
            bits = values.reshape(-1).view(np.uint32).astype(np.uint64)
            places = np.arange(bits.size, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
            total += (bits * places).sum(dtype=np.uint64) * (fnv1a(name) | np.uint64(1))
    return f"{int(total):016x}"


# ---- Logits of every toy model.


def build(spec):
    raw = copy.deepcopy(spec["config"])
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tensors = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensors[name] = weights(spec["seed"], name, tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(tensors[name]))
    return model, tensors


def logits_of(model, ids):
    """[positions, vocab], once as one prefill and once token by token; they must agree."""
    with torch.no_grad():
        whole = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
        rows, cache = [], None
        for position, token in enumerate(ids):
            step = model(
                torch.tensor([[token]]),
                past_key_values=cache,
                use_cache=True,
                position_ids=torch.tensor([[position]]),
            )
            cache = step.past_key_values
            rows.append(step.logits[0, -1].numpy())
    steps = np.stack(rows)
    error = np.abs(whole - steps).max() / np.abs(whole).max()
    assert error < 5e-6, f"prefill and decode differ by {error}"
    assert (whole.argmax(-1) == steps.argmax(-1)).all()
    return whole


def without(spec, *keys):
    other = copy.deepcopy(spec)
    for key in keys:
        other["config"].pop(key, None)
    return other


def feature_effect(spec, ids, logits):
    """How far the logits move when the spec's own feature is left out: a golden that does not
    notice the feature proves nothing."""
    config = spec["config"]
    if "rope_scaling" in config:
        other = without(spec, "rope_scaling")
    elif "rope_parameters" in config:
        other = without(spec, "rope_parameters")
        other["config"]["rope_theta"] = config["rope_parameters"]["rope_theta"]
    elif config["model_type"] == "mistral" or config.get("use_sliding_window"):
        other = copy.deepcopy(spec)
        other["config"]["sliding_window"] = 512
    else:
        return None
    moved = logits_of(build(other)[0], ids)
    return float(np.abs(moved - logits).max() / np.abs(logits).max())


def golden(spec):
    seeds = stream(spec["seed"], "ids", spec["positions"]) + 128
    offsets = stream(spec["seed"], "ids high", spec["positions"]) + 128
    ids = [int(x) for x in (seeds + 256 * offsets) % BYTE_LEVEL_IDS]
    model, tensors = build(spec)
    logits = logits_of(model, ids)
    top = np.sort(logits, axis=-1)[:, -2:]
    gap = float((top[:, 1] - top[:, 0]).min() / np.abs(logits).max())
    assert gap > 3e-4, f"{spec['name']}: the two best logits are too close ({gap}); choose another seed"
    effect = feature_effect(spec, ids, logits)
    assert effect is None or effect > 0.02, f"{spec['name']}: leaving the feature out moves logits by only {effect}"
    (GOLDENS / f"{spec['name']}.bin").write_bytes(logits.astype("<f4").tobytes())
    print(
        f"{spec['name']:13} max |logit| {np.abs(logits).max():8.3f}  std {logits.std():7.3f}  "
        f"smallest top gap {gap:.5f}  feature effect {effect}  distinct argmax {len(set(logits.argmax(-1).tolist()))}"
    )
    return {"ids": ids, "vocab": int(logits.shape[1]), "weights_digest": digest(tensors)}


# ---- Block formats: random bytes with sane scales, and extremes, as the gguf package reads them.

QUANTS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
BLOCKS = 4
# Byte offsets of the f16 scales inside a block.
SCALES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}  # fmt: skip


def quant_block(name, index, size):
    """Block 0 and 1: random bytes. Block 2: all bits set. Block 3: all bits clear. Scales are
    f16: ordinary, negative, subnormal, zero."""
    raw = (stream(99, f"{name} {index}", size) + 128).astype(np.uint8)
    if index >= 2:
        raw[:] = 0xFF if index == 2 else 0x00
    scale = np.float16([0.0113, -0.37, 3.0e-6, 0.0][index])
    for place, offset in enumerate(SCALES[name]):
        value = np.float16(scale * (1 + place)) if index != 3 else np.float16(0.25 * place)
        raw[offset : offset + 2] = np.frombuffer(value.tobytes(), dtype=np.uint8)
    return raw


def float_values(name):
    values = [0.0, -0.0, 1.0, -1.5, 0.333251953125, 65504.0, -65504.0, 6.103515625e-05, 5.960464477539063e-08, 3.0e-6]
    values += [float(x) / 37.0 for x in stream(99, name, 54)]
    values = np.array(values, dtype=np.float32)
    if name == "F32":
        return values.view(np.uint8)
    if name == "F16":
        return values.astype(np.float16).view(np.uint8)
    return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)


def quants():
    blob, entries = b"", []
    for name in QUANTS:
        kind = gguf.GGMLQuantizationType[name]
        _, size = gguf.GGML_QUANT_SIZES[kind]
        if name in SCALES:
            raw = np.concatenate([quant_block(name, index, size) for index in range(BLOCKS)])
        else:
            raw = float_values(name)
        values = gguf.quants.dequantize(raw, kind).reshape(-1).astype("<f4")
        assert np.isfinite(values).all()
        entries.append({"dtype": name, "bytes": int(raw.size), "values": int(values.size)})
        blob += raw.tobytes() + values.tobytes()
    (GOLDENS / "quants.bin").write_bytes(blob)
    (GOLDENS / "quants.json").write_text(json.dumps(entries, indent=1) + "\n")


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    specs = json.loads((GOLDENS / "specs.json").read_text())
    index = {
        "made_with": {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__, "numpy": np.__version__},
        "goldens": {spec["name"]: golden(spec) for spec in specs},
    }
    lines = [f' {json.dumps(name)}: {json.dumps(entry)}' for name, entry in index["goldens"].items()]
    text = '{"made_with": ' + json.dumps(index["made_with"]) + ',\n"goldens": {\n' + ",\n".join(lines) + "\n}}\n"
    assert json.loads(text) == index
    (GOLDENS / "index.json").write_text(text)
    quants()
    total = sum(path.stat().st_size for path in GOLDENS.iterdir())
    print(f"goldens: {total} bytes in all")
    assert total < 700_000


if __name__ == "__main__":
    main()
