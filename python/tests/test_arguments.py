"""Wrong arguments: each a TypeError or a ValueError that says which, what is wrong with it, and what it takes."""

from __future__ import annotations

import pytest

import swarm_os


@pytest.fixture
def bot(toy):
    with swarm_os.SwarmMaster(toy, discover=False, threads=1) as bot:
        yield bot


@pytest.mark.parametrize(
    ("settings", "error", "name"),
    [
        ({"model_id": 3}, TypeError, "model_id"),
        ({"model_id": None}, TypeError, "model_id"),
        ({"layers": 7}, TypeError, "layers"),
        ({"layers": [1, 2]}, TypeError, "layers"),
        ({"layers": [(0, 1.5)]}, TypeError, "layers"),
        ({"layers": "0-2,2-4"}, ValueError, "layers"),
        ({"split": "maybe"}, ValueError, "split"),
        ({"split": 1}, TypeError, "split"),
        ({"objective": "speed"}, ValueError, "objective"),
        ({"context": 0}, ValueError, "context"),
        ({"context": -1}, ValueError, "context"),
        ({"context": "4096"}, TypeError, "context"),
        ({"quant": "q8"}, ValueError, "quant"),
        ({"quant": 8}, TypeError, "quant"),
        ({"wire": "f16"}, ValueError, "wire"),
        ({"kv": "f8"}, ValueError, "kv"),
        ({"join": 12345678}, TypeError, "join"),
        ({"join": "12"}, ValueError, "join"),
        ({"peers": 5}, TypeError, "peers"),
        ({"peers": [5]}, TypeError, "peers"),
        ({"discover": "yes"}, TypeError, "discover"),
        ({"workers": 0}, ValueError, "workers"),
        ({"nodes": 0}, ValueError, "nodes"),
        ({"threads": 0}, ValueError, "threads"),
        ({"threads": "2"}, TypeError, "threads"),
        ({"threads": 2**70}, ValueError, "threads"),
        ({"cores": ["a"]}, TypeError, "cores"),
        ({"memory": "8XB"}, ValueError, "memory"),
        ({"memory": 1.5}, TypeError, "memory"),
        ({"progress": 3}, TypeError, "progress"),
        ({"bogus": 1}, TypeError, "bogus"),
    ],
)
def test_of_a_master(toy, settings, error, name):
    with pytest.raises(error, match=name) as caught:
        swarm_os.SwarmMaster(**{"model_id": toy, **settings})
    if error is ValueError:
        assert isinstance(caught.value, swarm_os.ArgumentError)


@pytest.mark.parametrize(
    ("settings", "error", "name"),
    [
        ({"name": 3}, TypeError, "name"),
        ({"port": -1}, ValueError, "port"),
        ({"port": 70000}, ValueError, "port"),
        ({"bind": "here"}, ValueError, "bind"),
        ({"interfaces": 3}, TypeError, "interfaces"),
        ({"threads": 0}, ValueError, "threads"),
        ({"local": True, "bind": "127.0.0.1"}, ValueError, "local"),
        ({"on_event": 3}, TypeError, "on_event"),
    ],
)
def test_of_a_worker(settings, error, name):
    with pytest.raises(error, match=name):
        swarm_os.SwarmWorker(**settings)


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"max_tokens": 0}, ValueError, "max_tokens"),
        ({"max_tokens": 2.5}, TypeError, "max_tokens"),
        ({"temperature": "hot"}, TypeError, "temperature"),
        ({"temperature": -1}, ValueError, "temperature"),
        ({"temperature": float("nan")}, ValueError, "temperature"),
        ({"top_k": -1}, ValueError, "top_k"),
        ({"top_p": 1.5}, ValueError, "top_p"),
        ({"min_p": -0.1}, ValueError, "min_p"),
        ({"repetition_penalty": 0}, ValueError, "repetition_penalty"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": "x"}, TypeError, "seed"),
        ({"stop": 3}, TypeError, "stop"),
        ({"stop": [3]}, TypeError, "stop"),
        ({"stop": ""}, ValueError, "stop"),
        ({"system": 3}, TypeError, "system"),
        ({"raw": "no"}, TypeError, "raw"),
        ({"bogus": 3}, TypeError, "bogus"),
    ],
)
def test_of_an_answer(bot, options, error, name):
    with pytest.raises(error, match=name):
        bot.generate("x", **options)


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        (3, TypeError),
        (None, TypeError),
        (b"x", TypeError),
        ([1.5], TypeError),
        ([], ValueError),
        ([{"role": "user"}], ValueError),
        ([{"role": "user", "content": 3}], TypeError),
        ([264], ValueError),
        ([1] * 600, ValueError),
    ],
)
def test_of_a_prompt(bot, prompt, error):
    for ask in (bot.generate, bot.logits):
        with pytest.raises(error):
            ask(prompt)


def test_of_ids(bot):
    with pytest.raises(ValueError, match="vocabulary"):
        bot.detokenize([99999])
    with pytest.raises(TypeError):
        bot.detokenize("text")


def test_of_a_timeout(toy):
    for timeout in (0, -1):
        with pytest.raises(ValueError, match="timeout"):
            swarm_os.SwarmMaster(toy, discover=False).connect(timeout)


def test_a_model_that_is_not_there(home):
    for name in (str(home / "nowhere"), "nobody", "org/nothing"):
        with pytest.raises(swarm_os.ModelError) as caught:
            swarm_os.SwarmMaster(name, discover=False).connect()
        assert name in str(caught.value)
