"""Logits against those that transformers computes for the toy models."""

from __future__ import annotations

import array
import json

import pytest
from conftest import GOLDENS, TOYS

import swarm_os


def golden(name):
    entry = json.loads((GOLDENS / "index.json").read_text())["goldens"][name]
    want = array.array("f")
    want.frombytes((GOLDENS / f"{name}.bin").read_bytes())
    return entry["ids"], entry["vocab"], want


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_they_are_those_of_transformers(name):
    ids, vocab, want = golden(name)
    with swarm_os.SwarmMaster(TOYS / name, discover=False, threads=1, kv="f32") as bot:
        logits = bot.logits(ids)
    assert logits.shape == (len(ids), vocab) and logits.format == "f" and logits.contiguous
    got = array.array("f", logits.cast("B").cast("f"))
    largest = max(abs(value) for value in want)
    assert max(abs(a - b) for a, b in zip(got, want)) <= 1e-5 * largest


def test_numpy_reads_them_where_they_are(toy):
    numpy = pytest.importorskip("numpy")
    with swarm_os.SwarmMaster(toy, discover=False, threads=1) as bot:
        ids = bot.tokenize("hello the world")
        logits = bot.logits(ids)
        rows = numpy.asarray(logits)
        assert rows.dtype == numpy.float32 and rows.shape == logits.shape
        assert numpy.shares_memory(rows, numpy.frombuffer(logits.obj, numpy.uint8))
        # The most likely token is the one that is generated.
        answer = bot.generate(ids, max_tokens=1, stream=True)
        answer.read()
        assert answer.token_ids == [int(rows[-1].argmax())]


def test_of_a_ring_they_are_the_same_bits(toy, worker):
    _, peer = worker("den", toy)
    ids = list(range(70))
    with swarm_os.SwarmMaster(toy, discover=False, threads=1) as one:
        want = bytes(one.logits(ids))
    with swarm_os.SwarmMaster(toy, peers=peer, discover=False, split="always", threads=1) as ring:
        assert bytes(ring.logits(ids)) == want == bytes(ring.logits(ids))
        assert ring.generate("x", max_tokens=2) is not None
