"""A master and its answers, against real workers as processes."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import swarm_os

QUESTION = "What is the future of AMD Architecture?"


def alone(model: str, **settings):
    settings = {"discover": False, "threads": 1, **settings}
    return swarm_os.SwarmMaster(model, **settings)


def shared(model: str, *peers: str, **settings):
    settings = {"discover": False, "threads": 1, "split": "always", "peers": peers, **settings}
    return swarm_os.SwarmMaster(model, **settings)


def test_the_program_of_the_readme(start, toy, worker):
    """As it stands, with another model and a worker that it is told of."""
    process, peer = worker("den", toy)
    program = f"""
import swarm_os, time
bot = swarm_os.SwarmMaster(model_id={toy!r}, peers={peer!r}, discover=False, split="always")
try:
    bot.connect()
    start = time.perf_counter()
    for chunk in bot.generate("{QUESTION}", stream=True):
        print(chunk, end="", flush=True)
    print(bot.total_tokens / (time.perf_counter() - start))
finally:
    bot.close()
"""
    asked = start("python", "-c", program)
    assert asked.wait() == 0, asked.lines
    speed = re.search(r"(\d+\.\d+)$", asked.lines[-1])
    assert speed and float(speed.group()) > 0
    process.expect('"left"')


def test_a_ring_gives_the_tokens_of_one_node(toy, worker):
    (_, first), (_, second) = worker("den", toy), worker("kitchen", toy)
    with alone(toy) as one, shared(toy, first, second) as ring:
        assert [node["layers"] for node in ring.nodes()][0][0] == 0
        assert len(ring.nodes()) == 3
        for options in ({}, {"temperature": 0.9, "top_k": 20, "seed": 7}):
            assert one.generate(QUESTION, max_tokens=48, **options) == ring.generate(
                QUESTION, max_tokens=48, **options
            )
        stats = ring.stats()
        waterfall = stats["waterfall"]
        assert len(waterfall["nodes"]) == 3 and stats["completion_tokens"] == 48
        assert waterfall["sum_ms"] > 0
        receipt = ring.verify(max_tokens=8)
        assert receipt["equal"] is True and receipt["tokens"] > 0
        with pytest.raises(swarm_os.ArgumentError, match="no ring to compare"):
            one.verify()


def test_pieces_add_up_and_tokens_are_counted(toy):
    with alone(toy) as bot:
        answer = bot.generate(QUESTION, stream=True, max_tokens=30)
        pieces = list(answer)
        assert all(pieces) and all(isinstance(piece, str) for piece in pieces)
        assert "".join(pieces) == answer.text == bot.generate(QUESTION, max_tokens=30)
        assert answer.finish_reason == "length" and len(answer.token_ids) == 30
        assert bot.total_tokens == 60
        assert next(answer, None) is None
    assert bot.total_tokens == 60


def test_prompts_of_every_kind(toy):
    with alone(toy) as bot:
        text = bot.generate("hello", max_tokens=8)
        messages = [{"role": "user", "content": "hello"}]
        assert bot.generate(messages, max_tokens=8) == text
        assert bot.generate(bot.tokenize(messages), max_tokens=8) == text
        raw = bot.generate("hello", max_tokens=8, raw=True)
        assert bot.generate(bot.tokenize("hello"), max_tokens=8) == raw
        told = [{"role": "system", "content": "be short"}, *messages]
        assert bot.generate(told, max_tokens=8) == bot.generate("hello", system="be short", max_tokens=8)
        assert bot.detokenize(bot.tokenize("hé the 日")) == "hé the 日"


def test_a_stop_text_ends_the_answer(toy):
    with alone(toy) as bot:
        text = bot.generate(QUESTION, max_tokens=30)
        stop = text[10]
        answer = bot.generate(QUESTION, max_tokens=30, stop=stop, stream=True)
        assert answer.read() == text[: text.index(stop)]
        assert answer.finish_reason == "stop"


def test_seeds(toy):
    with alone(toy) as bot:
        options = {"temperature": 2.0, "max_tokens": 24}
        one, two = (bot.generate("x", seed=seed, **options) for seed in (1, 2))
        assert one == bot.generate("x", seed=1, **options) and one != two
        assert bot.generate("x", seed=None, **options) != bot.generate("x", seed=None, **options)


def test_closing_an_answer_stops_the_ring_at_once(slow, worker):
    _, peer = worker("den", slow)
    with shared(slow, peer) as bot:
        for end in ("close", "with", "drop"):
            answer = bot.generate(QUESTION, stream=True, max_tokens=1500)
            assert next(answer)
            began = time.monotonic()
            if end == "close":
                answer.close()
                assert answer.finish_reason == "cancelled"
                assert next(answer, None) is None
            elif end == "with":
                with answer:
                    pass
            else:
                del answer
                gc.collect()
            while bot.status()["sessions"] > 0:
                assert time.monotonic() - began < 2
                time.sleep(0.005)
            assert time.monotonic() - began < 2
        # The ring is as good as before.
        assert bot.generate("x", max_tokens=3)


def test_a_worker_that_is_killed_is_named_with_its_layers(slow, worker):
    (process, peer), (_, other) = worker("den", slow), worker("kitchen", slow)
    with shared(slow, peer, other) as bot:
        held = {node["name"].split("-")[0]: (node["name"], tuple(node["layers"])) for node in bot.nodes()}
        name, layers = held["den"]
        answer = bot.generate(QUESTION, stream=True, max_tokens=1500)
        assert next(answer)
        process.kill()
        with pytest.raises(swarm_os.NodeLostError) as caught:
            list(answer)
        assert caught.value.node == name and caught.value.layers == layers
        assert name in str(caught.value) and f"layers {layers[0]}..{layers[1]}" in str(caught.value)
        assert isinstance(caught.value, swarm_os.SwarmError)
        assert answer.finish_reason == "error"
        # Those who are left answer the next prompt, with the same tokens.
        with alone(slow) as one:
            assert bot.generate(QUESTION, max_tokens=8) == one.generate(QUESTION, max_tokens=8)
        assert len(bot.nodes()) == 2


def test_two_masters(toy, worker):
    _, peer = worker("den", toy)
    with alone(toy) as one, shared(toy, peer) as two:
        answers = [bot.generate(QUESTION, stream=True, max_tokens=20) for bot in (one, two, one, two)]
        texts = {"".join(answer) for answer in answers}
        assert len(texts) == 1
    # The worker serves one coordinator at a time, and then the next.
    with shared(toy, peer) as three:
        assert len(three.nodes()) == 2


def test_a_worker_that_is_taken_is_said_to_be(toy, worker):
    _, peer = worker("den", toy)
    with shared(toy, peer):
        with pytest.raises(swarm_os.SwarmError, match="serves another coordinator"):
            shared(toy, peer, workers=1).connect()


def test_threads_share_a_master(toy):
    with alone(toy) as bot:
        want = bot.generate(QUESTION, max_tokens=40)
        got, ticks = [], 0
        threads = [threading.Thread(target=lambda: got.append(bot.generate(QUESTION, max_tokens=40))) for _ in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            ticks += 1
            time.sleep(0.001)
        assert got == [want] * 4 and ticks > 0


def test_other_threads_run_while_the_engine_works(slow):
    with alone(slow) as bot:
        ticks = []
        done = threading.Event()

        def count():
            while not done.is_set():
                ticks.append(time.monotonic())
                time.sleep(0.002)

        thread = threading.Thread(target=count)
        thread.start()
        began = time.monotonic()
        bot.generate("x" * 600, max_tokens=10)
        took = time.monotonic() - began
        done.set()
        thread.join()
        longest = max(after - before for before, after in zip(ticks, ticks[1:]))
        assert longest < max(took / 2, 0.2), (longest, took)


def test_an_answer_is_closed_from_another_thread(slow):
    with alone(slow) as bot:
        answer = bot.generate(QUESTION, stream=True, max_tokens=1500)
        threading.Timer(0.2, answer.close).start()
        began = time.monotonic()
        assert len(list(answer)) < 1500
        assert time.monotonic() - began < 20 and answer.finish_reason == "cancelled"


def test_a_conversation(toy):
    with alone(toy) as bot:
        chat = bot.chat(system="be short", max_tokens=12)
        first = chat.say("hello")
        with chat.say("and?", stream=True) as reply:
            second = "".join(reply)
        said = [message["content"] for message in chat.messages]
        assert said == ["be short", "hello", first, "and?", second]
        told = chat.messages[:-1]
        assert bot.generate(told, max_tokens=12) == second
        reply = chat("more", stream=True)
        piece = next(reply)
        reply.close()
        assert chat.messages[-1]["content"].startswith(piece)
        with pytest.raises(swarm_os.ArgumentError, match="does not fit"):
            chat.say("x" * 2000)
        assert chat.messages[-1]["role"] == "assistant"
        chat.reset()
        assert chat.messages == [{"role": "system", "content": "be short"}]


def test_a_conversation_keeps_its_rows(toy, worker):
    _, peer = worker("den", toy)
    with shared(toy, peer) as ring, alone(toy) as one:
        chat = ring.chat(max_tokens=12)
        chat.say("hello")
        assert ring.stats()["prompt_tokens_kept"] == 0
        for text in ("and?", "why?"):
            told = [*chat.messages, {"role": "user", "content": text}]
            assert chat.say(text) == one.generate(told, max_tokens=12)
            stats = ring.stats()
            assert 0 < stats["prompt_tokens_kept"] < stats["prompt_tokens"]
        # Another answer sends them away, and the conversation goes on all the same.
        ring.generate("something else", max_tokens=2)
        told = [*chat.messages, {"role": "user", "content": "so?"}]
        assert chat.say("so?") == one.generate(told, max_tokens=12)
        assert ring.stats()["prompt_tokens_kept"] < 5


def test_a_closed_master_says_so_and_connects_again(slow):
    bot = alone(slow)
    with pytest.raises(swarm_os.SwarmError, match=r"call connect\(\) first"):
        bot.generate("x")
    bot.connect()
    answer = bot.generate(QUESTION, stream=True, max_tokens=1500)
    next(answer)
    bot.close()
    bot.close()
    with pytest.raises(swarm_os.SwarmError):
        list(answer)
    assert bot.connect() is bot and bot.generate("x", max_tokens=2)
    bot.close()


def test_plan_before_and_after_connecting(toy, worker):
    _, peer = worker("den", toy)
    bot = shared(toy, peer)
    before = bot.plan()
    with bot:
        after = bot.plan()
    for plan in (before, after):
        assert len(plan["stages"]) == 2 and plan["model"] and plan["sentence"]


def test_what_happens_meanwhile_is_told(toy, worker):
    _, peer = worker("den", toy)
    events = []
    with shared(toy, peer, progress=events.append):
        pass
    kinds = {event["event"] for event in events}
    assert {"searching", "found", "placed", "loading"} <= kinds
    loaded = [event for event in events if event["event"] == "loading" and event["node"] == 0]
    assert loaded[-1]["bytes_done"] == loaded[-1]["bytes_total"] > 0


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals here")
def test_a_bar_is_shown_on_a_terminal(toy):
    pytest.importorskip("tqdm")
    import fcntl
    import struct
    import termios

    program = f"import swarm_os; swarm_os.SwarmMaster({toy!r}, discover=False).connect()"
    terminal, its_end = os.openpty()
    # A terminal without a width shows nothing.
    fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    asked = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.DEVNULL, stderr=its_end)
    os.close(its_end)
    shown = b""
    try:
        while part := os.read(terminal, 4096):
            shown += part
    except OSError:
        # How the end of a terminal looks on Linux.
        pass
    os.close(terminal)
    assert asked.wait(60) == 0 and b"layers 0..4" in shown, shown


def test_nodes_on_this_computer(toy):
    with swarm_os.SwarmMaster(toy, nodes=2, threads=1) as bot:
        assert len(bot.nodes()) == 2
        assert bot.verify(max_tokens=4)["equal"]


def test_nobody_there(toy):
    with pytest.raises(swarm_os.NoWorkerError, match="no worker was found"):
        swarm_os.SwarmMaster(toy, peers="127.0.0.1:9", discover=False, wait=1).connect()


def test_time_is_up(slow):
    bot = swarm_os.SwarmMaster(slow, discover=False, threads=1)
    with pytest.raises(swarm_os.SwarmTimeoutError, match="not done within"):
        bot.connect(timeout=1e-6)
    assert issubclass(swarm_os.SwarmTimeoutError, TimeoutError)
    with bot:
        assert bot.generate("x", max_tokens=1) is not None


def test_a_model_that_does_not_fit(slow):
    with pytest.raises(swarm_os.OutOfMemoryError, match="memory") as caught:
        alone(slow, memory="10MB").connect()
    assert isinstance(caught.value, MemoryError)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_dropped_objects_leave_nothing(toy, worker):
    """Some cycles here; docs/python.md has a thousand, with their memory."""
    _, peer = worker("den", toy)

    def cycle():
        bot = shared(toy, peer).connect()
        answer = bot.generate("x", stream=True, max_tokens=100)
        next(answer)
        # Neither is closed.

    def held():
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    cycle()
    before, until = held(), time.monotonic() + 20
    for _ in range(10):
        cycle()
    gc.collect()
    while any(now > then for now, then in zip(held(), before)) and time.monotonic() < until:
        time.sleep(0.05)
    assert all(now <= then for now, then in zip(held(), before)), (before, held())
    assert not list(Path(os.environ["SWARM_OS_HOME"]).rglob(f"{os.getpid()}*.sock"))


def test_repr(toy):
    bot = alone(toy)
    assert "closed" in repr(bot)
    with bot:
        assert "1 nodes" in repr(bot) and bot.context == 512 and bot.model
