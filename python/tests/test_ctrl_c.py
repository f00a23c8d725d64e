"""Ctrl-C in a Python process: the answer ends everywhere, and the object is as good as before."""

from __future__ import annotations

import time

import pytest

PROGRAM = """
import sys, swarm_os
bot = swarm_os.SwarmMaster({model!r}, {settings}, discover=False, threads=1).connect()
print("ready", flush=True)
try:
    {act}
    print("not interrupted")
except KeyboardInterrupt:
    print("interrupted", flush=True)
import time
until = time.monotonic() + 5
while bot.status()["sessions"] and time.monotonic() < until:
    time.sleep(0.01)
print("sessions", bot.status()["sessions"])
print("goes on", len(bot.generate("x", max_tokens=3)) > 0)
bot.close()
"""

ACTS = {
    "whole": 'bot.generate("x", max_tokens=1500)',
    "stream": 'list(bot.generate("x", max_tokens=1500, stream=True))',
    "logits": 'for _ in range(100): bot.logits([1] * 1000)',
}


def interrupted(process):
    """Ctrl-C is heard long before what goes on would end by itself."""
    began = time.monotonic()
    process.interrupt()
    assert process.wait() == 0, process.lines
    assert time.monotonic() - began < 4


@pytest.mark.parametrize("act", ACTS)
def test_it_ends_what_takes_long(start, slow, act):
    process = start("python", "-c", PROGRAM.format(model=slow, settings='split="never"', act=ACTS[act]))
    process.expect("ready")
    time.sleep(0.7)
    interrupted(process)
    assert process.lines[-3:] == ["interrupted", "sessions 0", "goes on True"]


def test_it_ends_an_answer_of_a_ring(start, slow, worker):
    _, peer = worker("den", slow)
    settings = f'peers={peer!r}, split="always"'
    process = start("python", "-c", PROGRAM.format(model=slow, settings=settings, act=ACTS["stream"]))
    process.expect("ready")
    time.sleep(0.7)
    interrupted(process)
    assert process.lines[-3:] == ["interrupted", "sessions 0", "goes on True"]


def test_it_ends_a_connect_that_waits(start, toy):
    program = f"""
import swarm_os
try:
    print("looking", flush=True)
    swarm_os.SwarmMaster({toy!r}, workers=1, wait=600).connect()
except KeyboardInterrupt:
    print("interrupted")
"""
    process = start("python", "-c", program)
    process.expect("looking")
    time.sleep(0.5)
    interrupted(process)
    assert process.lines[-1] == "interrupted"
