"""What happens while something starts: to the user's own function, or to a bar where there is a terminal."""

from __future__ import annotations

import importlib
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

from . import _native
from .errors import SwarmTimeoutError

Event = dict[str, Any]
Listener = Callable[[Event], object]

#: Between two looks for Ctrl-C, in seconds.
_LOOK = 0.05


def finish(task: _native.Task, listener: Listener | None, what: str, timeout: float | None = None) -> Any:
    """Waits for ``task`` and gives its result; Ctrl-C and ``timeout`` (seconds) leave it to end by itself."""
    until = None if timeout is None else time.monotonic() + timeout
    bars = None if listener is not None else _bars()
    tell = bars if listener is None else listener
    try:
        while True:
            left = _LOOK if until is None else min(_LOOK, max(0.0, until - time.monotonic()))
            done = task.wait(left)
            for event in task.events():
                if listener is None and event["event"] == "note":
                    warnings.warn(event["text"], stacklevel=3)
                if tell is not None:
                    tell(event)
            if done:
                return task.result()
            if until is not None and time.monotonic() >= until:
                raise SwarmTimeoutError(
                    f"{what} was not done within {timeout:g} s; give it more time, or a smaller model"
                )
    finally:
        if bars is not None:
            bars.close()


def _bars() -> _Bars | None:
    """Bars where tqdm is installed and standard error is a terminal."""
    try:
        if not sys.stderr.isatty():
            return None
        return _Bars(importlib.import_module("tqdm").tqdm)
    except (ImportError, AttributeError, ValueError):
        return None


class _Bars:
    """One bar of bytes for each node and source."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._bars: dict[tuple[int, str], Any] = {}
        self._names: list[str] = []

    def __call__(self, event: Event) -> None:
        if event["event"] == "placed":
            self._names = [f"{s['name']} layers {s['layers'][0]}..{s['layers'][1]}" for s in event["stages"]]
        if event["event"] != "loading":
            return
        node, source = event["node"], event["from"]
        bar = self._bars.get((node, source))
        if bar is None:
            name = self._names[node] if node < len(self._names) else f"node {node}"
            bar = self._bar(total=event["bytes_total"], desc=name, unit="B", unit_scale=True, leave=False)
            self._bars[node, source] = bar
        bar.update(event["bytes_done"] - bar.n)

    def close(self) -> None:
        for bar in self._bars.values():
            bar.close()
