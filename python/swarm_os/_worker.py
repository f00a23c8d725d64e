"""``SwarmWorker``: offers this computer to the room."""

from __future__ import annotations

import atexit
import sys
import threading
import weakref
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from . import _native
from ._master import _texts
from ._progress import Event, Listener, finish
from .errors import SwarmError

#: Between two looks whether it was stopped, in seconds.
_LOOK = 0.2


class SwarmWorker:
    """A worker: waits in the room and computes the layers that a coordinator gives it, inside this process.

    ``start()`` (or a ``with`` block) begins, and returns; ``serve_forever()`` stays until ``stop()`` or Ctrl-C and
    prints what the command ``swarm-os worker`` prints. Needs no model: it fetches the layers it is given, or uses the
    same files if it has them. A worker that is dropped stops.

    :param name: what people call this node; by default the computer's name.
    :param port: the port to listen on, 0 for any; by default that of last time where it is free, else any.
    :param bind: the one address to listen on and to be announced with; by default all.
    :param interfaces: be announced on these network interfaces only.
    :param model: serve this model only; by default any.
    :param join: the pairing code of another computer, to be in its swarm; by default the environment's
        ``SWARM_OS_JOIN``.
    :param threads: compute threads; all cores by default.
    :param cores: the cores to pin them to.
    :param memory: most memory to use, in bytes or as ``"8GB"``; by default what is free.
    :param keep_quantized: keep on the disk what a coordinator has quantized here; the next start reads it.
    :param local: listen on this computer only, and announce nothing.
    :param on_event: called with a dictionary for everything that happens, on a thread of its own: the objects that
        ``swarm-os worker --json`` prints, with what a person would read as ``words``. Without it, ``start()`` tells
        on standard error only what a person must see, which is the pairing code.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        port: int | None = None,
        bind: str | None = None,
        interfaces: str | Iterable[str] = (),
        model: str | None = None,
        join: str | None = None,
        threads: int | None = None,
        cores: Iterable[int] | None = None,
        memory: int | str | None = None,
        keep_quantized: bool = False,
        local: bool = False,
        on_event: Listener | None = None,
    ) -> None:
        self._worker: _native.Worker | None = None
        self._listener: threading.Thread | None = None
        if on_event is not None and not callable(on_event):
            raise TypeError(f"on_event: {type(on_event).__name__} cannot be called")
        self._on_event = on_event
        self._lock = threading.RLock()
        self._settings: dict[str, Any] = {
            "name": name,
            "port": port,
            "bind": bind,
            "interfaces": _texts("interfaces", interfaces),
            "model": model,
            "join": join,
            "threads": threads,
            "cores": None if cores is None else list(cores),
            "memory": memory,
            "keep_quantized": keep_quantized,
            "local": local,
        }
        _native.check_worker(self._settings)

    def start(self) -> SwarmWorker:
        """Measures this computer (about a second), listens, and is announced. Does nothing when it runs already.

        :raises SwarmError: the port is taken, no machine shows the code, or the model cannot be used.
        """
        return self._begin(self._on_event or _must_see)

    def _begin(self, tell: Listener) -> SwarmWorker:
        with self._lock:
            if self._worker is None:
                worker: _native.Worker = finish(_native.start_worker(self._settings), tell, "start()")
                self._worker = worker
                steps = tell is not _must_see
                self._listener = threading.Thread(
                    target=_listen, args=(worker, tell, steps), name="worker events", daemon=True
                )
                self._listener.start()
                # Its thread has to be gone before the interpreter is.
                atexit.register(_stop, weakref.ref(self))
            return self

    def serve_forever(self) -> None:
        """Starts if need be, and returns when ``stop()`` was called or Ctrl-C was pressed."""
        self._begin(self._on_event or _say)
        listener = self._listener
        try:
            while listener is not None and listener.is_alive():
                listener.join(_LOOK)
        except KeyboardInterrupt:
            pass
        finally:
            self.stop()

    def stop(self) -> None:
        """Ends it; a coordinator that uses it is told goodbye. May be called more than once, and from any thread."""
        with self._lock:
            worker, listener, self._worker, self._listener = self._worker, self._listener, None, None
        if worker is not None:
            worker.stop()
        if listener is not None and listener is not threading.current_thread():
            listener.join()

    def __enter__(self) -> SwarmWorker:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __del__(self) -> None:
        worker = getattr(self, "_worker", None)
        if worker is not None:
            try:
                worker.stop()
            except SwarmError:
                # In a fork there is nothing to stop.
                pass

    def _running(self) -> _native.Worker:
        worker = self._worker
        if worker is None:
            raise SwarmError("the worker does not run; call start() first")
        return worker

    def status(self) -> dict[str, Any]:
        """What it is doing: its name, port, memory on offer, and the stage that it serves, in numbers."""
        return self._running().status()

    @property
    def is_running(self) -> bool:
        """It was started and not stopped."""
        return self._worker is not None

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._running().port

    def __repr__(self) -> str:
        worker = self._worker
        state = "stopped" if worker is None else f"port {worker.port}"
        return f"<SwarmWorker {self._settings['name'] or 'of this computer'!r}: {state}>"


def _listen(worker: _native.Worker, tell: Listener, steps: bool) -> None:
    """Tells what happens until the worker was stopped."""
    while not worker.stopped:
        for event in worker.events(_LOOK, steps):
            try:
                tell(event)
            except Exception:
                # Somebody's own function fails: that is shown, and the worker goes on.
                sys.excepthook(*sys.exc_info())


def _say(event: Event) -> None:
    """As the command: everything, on standard output."""
    if event.get("words"):
        print(event["words"], flush=True)


def _must_see(event: Event) -> None:
    """What a person has to type elsewhere."""
    if event["event"] in ("pairing_code", "wrong_code", "discovery_unavailable"):
        print(event["words"], file=sys.stderr, flush=True)


def _stop(worker: weakref.ref[SwarmWorker]) -> None:
    running = worker()
    if running is not None:
        running.stop()
