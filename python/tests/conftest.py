"""Homes, models and worker processes. Every test has a home of its own, so that no test sees another's nodes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "crates/swarm-testkit/goldens"
#: Long enough for a busy computer.
SOON = 60.0

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell starts what runs in its background like that, and children would not hear Ctrl-C either.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _environment(home: Path) -> dict[str, str]:
    """This test's home, and nothing of what the tester's own environment says; no test asks the public Hub."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SWARM_OS_", "HF_"))}
    environment.update(
        SWARM_OS_HOME=str(home / "home"),
        SWARM_OS_MODELS=str(home / "models"),
        SWARM_OS_CACHE=str(home / "store"),
        HF_HUB_CACHE=str(home / "hub"),
        HF_HUB_OFFLINE="1",
    )
    return environment


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in list(os.environ):
        if name.startswith(("SWARM_OS_", "HF_")):
            monkeypatch.delenv(name)
    for name, value in _environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    return tmp_path


def _toys() -> Path:
    given = os.environ.get("SWARM_OS_TOYS")
    if given:
        return Path(given)
    folder = ROOT / "target/python/toys"
    slow = ["hidden_size=512", "intermediate_size=1024", "layers=8", "max_position_embeddings=2048"]
    for name, spec, shape in [("llama", "llama", []), ("qwen3", "qwen3", []), ("slow", "llama", slow)]:
        if not (folder / name / "config.json").exists():
            make = ["cargo", "run", "-q", "-p", "swarm-testkit", "--example", "toy", "--", spec, "hf-f32"]
            subprocess.run([*make, str(folder / name), *shape], cwd=ROOT, check=True)
    return folder


TOYS = _toys()


@pytest.fixture
def toy() -> str:
    """A model of four layers that answers at once."""
    return str(TOYS / "llama")


@pytest.fixture
def slow() -> str:
    """A model of eight layers that takes some milliseconds a token."""
    return str(TOYS / "slow")


class Process:
    """A child whose lines can be waited for. Killed with all it started when its test ends."""

    def __init__(self, words: list[str], home: Path) -> None:
        self.child = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=_environment(home),
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._news: Queue[str | None] = Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            self._news.put(line.rstrip("\n"))
        self._news.put(None)

    def expect(self, text: str) -> str:
        """The next line with ``text`` in it."""
        while True:
            try:
                line = self._news.get(timeout=SOON)
            except Empty:
                line = None
            if line is None:
                raise AssertionError(f"{text!r} did not come; there was:\n" + "\n".join(self.lines))
            self.lines.append(line)
            if text in line:
                return line

    def wait(self) -> int:
        """Its exit code, with all its lines read."""
        code = self.child.wait(timeout=SOON)
        self._reader.join(timeout=SOON)
        while True:
            line = self._news.get(timeout=SOON)
            if line is None:
                return code
            self.lines.append(line)

    def interrupt(self) -> None:
        self.child.send_signal(signal.SIGINT)

    def kill(self) -> None:
        try:
            os.killpg(self.child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.child.wait()


@pytest.fixture
def start(home: Path) -> Iterator[Callable[..., Process]]:
    """Starts a program of this environment: ``start("swarm-os", "models")`` or ``start("python", "-c", ...)``."""
    started: list[Process] = []

    def begin(program: str, *args: str) -> Process:
        beside = Path(sys.executable).with_name(program)
        words = [sys.executable if program == "python" else str(beside), *args]
        started.append(Process(words, home))
        return started[-1]

    yield begin
    for process in started:
        process.kill()


@pytest.fixture
def worker(start: Callable[..., Process]) -> Callable[..., tuple[Process, str]]:
    """Starts a worker process of this computer, and gives it with its address."""

    def begin(name: str, model: str) -> tuple[Process, str]:
        args = ["worker", "--local", "--json", "--threads", "1", "--name", name, "--model", model]
        process = start("swarm-os", *args)
        waiting: dict[str, Any] = json.loads(process.expect('"waiting"'))
        return process, f"127.0.0.1:{waiting['port']}"

    return begin
