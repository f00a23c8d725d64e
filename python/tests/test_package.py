"""The package as it is installed: its types, its command, how long it takes to import, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import swarm_os

HERE = Path(__file__).parent


def test_types(tmp_path):
    """The stubs are those of the module, the package is strictly typed, and so is a program that uses it."""
    quiet = {"cwd": tmp_path, "capture_output": True, "text": True}
    checks = [
        [sys.executable, "-m", "mypy.stubtest", "swarm_os", "--ignore-disjoint-bases"],
        [sys.executable, "-m", "mypy", "--strict", "--package", "swarm_os"],
        [sys.executable, "-m", "mypy", "--strict", str(HERE / "typed.py")],
    ]
    for check in checks:
        done = subprocess.run(check, **quiet)
        assert done.returncode == 0, f"{check}\n{done.stdout}\n{done.stderr}"


def test_every_name_has_words():
    for name in swarm_os.__all__:
        if name != "__version__":
            assert getattr(swarm_os, name).__doc__, name


def test_the_command(start, toy):
    version = start("swarm-os", "--version")
    assert version.wait() == 0 and swarm_os.__version__ in version.lines[0]
    assert start("swarm-os", "run", "--model", "/nowhere", "x").wait() == 2
    # Its workers are started as the command is.
    for program, first in (("swarm-os", ()), ("python", ("-m", "swarm_os"))):
        asked = start(program, *first, "run", "--json", "--nodes", "2", "--max-tokens", "5", "--model", toy, "x")
        assert asked.wait() == 0, asked.lines
        assert len(json.loads(asked.lines[-1])["nodes"]) == 2


def test_ctrl_c_ends_the_command(start, slow):
    asked = start("swarm-os", "run", "--model", slow, "--max-tokens", "1500", "--nodes", "1", "x")
    # Its first line may never come, so this is how long starting takes.
    time.sleep(1.5)
    asked.interrupt()
    assert asked.wait() == 130, asked.lines


def test_status_sees_a_python_process(start, toy):
    with swarm_os.SwarmMaster(toy, discover=False), swarm_os.SwarmWorker("den", local=True, model=toy):
        status = start("swarm-os", "status", "--json")
        assert status.wait() == 0
        roles = sorted(process["role"] for process in json.loads(status.lines[-1])["processes"])
        assert roles == ["coordinator", "worker"]


def test_the_import_is_quick_and_starts_nothing():
    program = """
import threading, time
start = time.perf_counter()
import swarm_os
took = time.perf_counter() - start
import os, sys
assert threading.active_count() == 1 and "asyncio" not in sys.modules and "tqdm" not in sys.modules
print(took)
"""
    took = min(float(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout) for _ in range(5))
    # 100 ms is the promise; a busy computer is no reason to fail.
    assert took < 0.3, took


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_is_refused(start, toy):
    program = f"""
import os, swarm_os
bot = swarm_os.SwarmMaster({toy!r}, discover=False, threads=1).connect()
answer = bot.generate("x", stream=True, max_tokens=200)
next(answer)
child = os.fork()
if child == 0:
    for act in (lambda: swarm_os.SwarmMaster("smol"), bot.connect, lambda: bot.generate("x"), lambda: next(answer), bot.status, swarm_os.SwarmWorker):
        try:
            result = act()
            assert result is bot, result
        except swarm_os.ForkError as error:
            assert "forked" in str(error) and "spawn" in str(error)
    del answer
    bot = None
    print("refused", flush=True)
    raise SystemExit(7)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 7, status
# The parent goes on as if nothing had been.
assert len(list(answer)) > 10
bot.close()
print("done")
"""
    process = start("python", "-W", "ignore", "-c", program)
    assert process.wait() == 0, process.lines
    assert process.lines[-2:] == ["refused", "done"]
