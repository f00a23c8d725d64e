"""``SwarmMaster``: a model that answers, on this computer or spread over several."""

from __future__ import annotations

import math
import os
import random
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, overload

from . import _native
from ._native import Generation
from ._progress import Listener, finish
from .errors import ArgumentError, SwarmError

#: A text, a conversation, or token ids.
Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]
#: ``"0..11,11..22"``, ``[(0, 11), (11, 22)]``, or by the nodes' names ``{"here": (0, 11), "den": (11, 22)}``.
Layers = str | Iterable["tuple[int, int] | range"] | Mapping[str, "tuple[int, int] | range"]

#: How long the command looks for workers, in seconds: when nobody is needed, and when somebody is.
_WAIT_OPTIONAL, _WAIT_REQUIRED = 3, 30
#: What an answer of a conversation takes.
_OPTIONS = {
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
}
_QUESTION = "Why is the sky blue?"


class SwarmMaster:
    """A model that answers: the coordinator of a ring, which is a node itself and holds the first layers.

    ``connect()`` (or a ``with`` block) finds workers, places the layers and loads them; ``generate()`` answers. Any
    number of threads may use one object, and a process may hold several. An object that is dropped closes itself.

    :param model_id: a repository (``org/name``, ``org/name@revision``, ``org/name:Q4_K_M``), a folder with
        ``config.json`` and safetensors, a ``.gguf`` file, or a preset: ``smol``, ``tiny``, ``qwen``. What is not on
        this computer is fetched, and of that only the layers that each node computes.
    :param layers: the layers of each node, this one first, as half-open ranges: ``"0..11,11..22"``,
        ``[(0, 11), (11, 22)]`` or ``{"here": (0, 11), "den": (11, 22)}``. By default by memory and measured speed.
    :param split: ``"auto"`` shares the layers where it gains or must be, ``"always"`` with every node found,
        ``"never"`` not at all.
    :param objective: what the placement is best at: ``"latency"`` (one user), ``"throughput"``, or ``"fit"``.
    :param context: positions of a session; by default the model's own maximum, at most 4096.
    :param quant: ``"q8_0"``, ``"q4_0"`` or ``"q4_k"``: float weights become that while they are loaded, the same bits on
        every node. By default they are computed with as they are stored.
    :param keep_quantized: keep that form on the disk, here and at the nodes of this computer; the next start reads it.
    :param wire: only ``"f32"``: rows travel as the next layer reads them, so that nothing is lost.
    :param kv: how keys and values are kept: ``"f16"``, or ``"f32"`` at twice the memory.
    :param join: the code that an unpaired worker shows; by default the environment's ``SWARM_OS_JOIN``.
    :param peers: addresses ``HOST:PORT`` of workers that discovery does not reach.
    :param discover: look for workers on the local network, and where they were last reached.
    :param workers: fewer workers than this are a ``NoWorkerError``; without it, this computer may answer alone.
    :param interfaces: look on these network interfaces only.
    :param wait: how long to look for workers, in seconds; 3 by default, or 30 where somebody is needed.
    :param nodes: so many nodes on this computer, which share the layers: all but one are processes that end with this
        object.
    :param threads: compute threads of this node; all cores by default.
    :param cores: the cores to pin them to.
    :param memory: most memory to use here, in bytes or as ``"8GB"``; by default what is free.
    :param progress: called with a dictionary for everything that happens while layers are placed and loaded
        (``event`` is ``searching``, ``found``, ``unusable``, ``discovery_unavailable``, ``note``, ``placed`` or
        ``loading``). Without it, a bar is shown if tqdm is installed and standard error is a terminal.
    :raises TypeError: an argument of a wrong type.
    :raises ArgumentError: (a ``ValueError``) a value that makes no sense.
    """

    def __init__(
        self,
        model_id: str | os.PathLike[str],
        *,
        layers: Layers | None = None,
        split: str = "auto",
        objective: str | None = None,
        context: int | None = None,
        quant: str | None = None,
        keep_quantized: bool = False,
        wire: str = "f32",
        kv: str = "f16",
        join: str | None = None,
        peers: str | Iterable[str] = (),
        discover: bool = True,
        workers: int | None = None,
        interfaces: str | Iterable[str] = (),
        wait: int | None = None,
        nodes: int | None = None,
        threads: int | None = None,
        cores: Iterable[int] | None = None,
        memory: int | str | None = None,
        progress: Listener | None = None,
    ) -> None:
        self._engine: _native.Engine | None = None
        self._whole: _native.Engine | None = None
        self._tokens = 0
        self._lock = threading.RLock()
        if not isinstance(model_id, (str, os.PathLike)):
            raise TypeError(f"model_id: {type(model_id).__name__} is not what it takes; give a name or a path")
        if progress is not None and not callable(progress):
            raise TypeError(f"progress: {type(progress).__name__} cannot be called")
        if wire != "f32":
            raise ArgumentError(f'wire: {wire!r} would lose something; rows travel as "f32"')
        self._progress = progress
        self._settings: dict[str, Any] = {
            "model": os.fspath(model_id),
            "layers": None if layers is None else _layers(layers),
            "split": split,
            "objective": objective,
            "context": context,
            "quant": quant,
            "keep_quantized": keep_quantized,
            "kv": kv,
            "join": join,
            "peers": _texts("peers", peers),
            "discover": discover,
            "workers": workers,
            "interfaces": _texts("interfaces", interfaces),
            "wait": wait,
            "nodes": nodes,
            "threads": threads,
            "cores": None if cores is None else list(cores),
            "memory": memory,
        }
        _native.check(self._settings)

    def connect(self, timeout: float | None = None) -> SwarmMaster:
        """Finds workers, places the layers, and loads them everywhere. Does nothing when that was done already.

        :param timeout: seconds for all of it. Without one, workers are looked for as long as ``wait`` says, and
            loading takes as long as it takes.
        :raises NoWorkerError: fewer workers than required were found (``NotPairedError``: only strangers).
        :raises ModelError: the model is not to be had or cannot be used.
        :raises OutOfMemoryError: the layers do not fit.
        :raises SwarmTimeoutError: it was not done in time.

        Ctrl-C ends the wait. What was begun then ends by itself, and workers may be busy until it has.
        """
        with self._lock:
            if self._engine is None:
                task = _native.connect(self._timed(timeout))
                self._engine = finish(task, self._progress, "connect()", timeout)
            return self

    def _timed(self, timeout: float | None) -> dict[str, Any]:
        """The settings, with no longer a search than there is time."""
        from ._command import again

        settings = {**self._settings, "again": again()}
        if timeout is not None:
            if not timeout > 0:
                raise ArgumentError(f"timeout: {timeout!r} is too small; give a number of seconds, or None")
            needed = any(settings[name] for name in ("workers", "join", "peers", "layers"))
            wait = settings["wait"] or (_WAIT_REQUIRED if needed else _WAIT_OPTIONAL)
            settings["wait"] = min(wait, math.ceil(timeout))
        return settings

    def close(self) -> None:
        """Lets the workers go and frees what was loaded here. Answers on their way end with a ``SwarmError``. May be
        called more than once; ``connect()`` starts anew."""
        with self._lock:
            engine, whole, self._engine, self._whole = self._engine, self._whole, None, None
        for each in (whole, engine):
            if each is not None:
                self._tokens += each.tokens
                each.close()

    def __enter__(self) -> SwarmMaster:
        return self.connect()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _connected(self) -> _native.Engine:
        engine = self._engine
        if engine is None:
            raise SwarmError("not connected; call connect() first")
        return engine

    @overload
    def generate(
        self,
        prompt: Prompt,
        *,
        stream: Literal[False] = False,
        max_tokens: int = 512,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = 0,
        stop: str | Iterable[str] = (),
        system: str | None = None,
        raw: bool | None = None,
    ) -> str: ...
    @overload
    def generate(
        self,
        prompt: Prompt,
        *,
        stream: Literal[True],
        max_tokens: int = 512,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = 0,
        stop: str | Iterable[str] = (),
        system: str | None = None,
        raw: bool | None = None,
    ) -> Generation: ...
    @overload
    def generate(
        self,
        prompt: Prompt,
        *,
        stream: bool,
        max_tokens: int = 512,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = 0,
        stop: str | Iterable[str] = (),
        system: str | None = None,
        raw: bool | None = None,
    ) -> str | Generation: ...
    def generate(
        self,
        prompt: Prompt,
        *,
        stream: bool = False,
        max_tokens: int = 512,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = 0,
        stop: str | Iterable[str] = (),
        system: str | None = None,
        raw: bool | None = None,
    ) -> str | Generation:
        """Answers a prompt.

        :param prompt: a text, a conversation (``[{"role": "user", "content": "..."}, ...]``), or token ids.
        :param stream: give an iterator of pieces of text as they come, instead of the whole text. Closing it, or
            dropping it, ends the answer on every node at once.
        :param max_tokens: tokens of the answer at most.
        :param temperature: 0 takes the most likely token, higher is more varied.
        :param top_k: choose among so many most likely tokens, 0 for all.
        :param top_p: choose among the most likely tokens that together reach this probability.
        :param min_p: leave out tokens less likely than this share of the most likely one.
        :param repetition_penalty: above 1, makes tokens that came already less likely.
        :param seed: equal seeds give equal answers, on any number of nodes; ``None`` takes another one every time.
        :param stop: texts that end the answer and are not part of it.
        :param system: what the model is told first.
        :param raw: continue a text as it is, without the chat template; by default where the model has none.
        :returns: the text; with ``stream``, a :class:`Generation`.
        :raises ArgumentError: a prompt or parameters that can never be answered.
        :raises NodeLostError: a node was lost meanwhile. The next answer is computed by those that are left.

        Ctrl-C ends the answer everywhere and leaves the object as it was. Costs one prefill of the prompt; a
        conversation by :meth:`chat` costs less.
        """
        options = {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "seed": _seed(seed),
            "stop": _texts("stop", stop),
            "system": system,
            "raw": raw,
        }
        answer = self._start(prompt, options)
        return answer if stream else answer.read()

    def _start(self, prompt: Prompt, options: Mapping[str, Any]) -> Generation:
        engine = self._connected()
        if engine.fault is not None:
            finish(engine.heal(), self._progress, "placing the layers anew")
        return engine.generate(prompt, **options)

    def _answer(self, prompt: Prompt, options: Mapping[str, Any]) -> Generation:
        """An answer whose keys and values stay for the next one."""
        known = {"stop": _texts("stop", options.get("stop", ())), "seed": _seed(options.get("seed", 0)), "keep": True}
        strange = sorted(set(options) - _OPTIONS)
        if strange:
            raise TypeError(f"say() got an unexpected keyword argument {strange[0]!r}")
        return self._start(prompt, {**options, **known})

    def chat(self, system: str | None = None, **options: Any) -> Chat:
        """A conversation, with what every answer of it takes: keywords of :meth:`generate`,
        except for ``raw`` and ``system``."""
        return Chat(self, system, options)

    @property
    def total_tokens(self) -> int:
        """Tokens of all answers that were handed out by this object."""
        engine = self._engine
        return self._tokens + (engine.tokens if engine is not None else 0)

    def stats(self) -> dict[str, Any] | None:
        """What was measured of the answer that ended last, as ``swarm-os run --json`` shows it; ``None`` before the
        first. Times are in milliseconds: ``ttft_ms`` to the first token; ``waterfall`` where the time of a token goes,
        by node (wire, receive, queue, compute, serialize), which sums to ``wall_ms`` within 5 %."""
        return self._connected().last()

    def plan(self) -> dict[str, Any]:
        """Which layers are where, why, and what that was compared with, as ``swarm-os plan --json`` shows it. Before
        ``connect()``: which would be; workers are looked for, and nothing is loaded."""
        engine = self._engine
        if engine is not None:
            return engine.plan()
        plan: dict[str, Any] = finish(_native.plan(self._timed(None)), self._progress, "plan()")
        return plan

    def status(self) -> dict[str, Any]:
        """What the ring is doing: its nodes with their state, layers, memory and times, in milliseconds and bytes."""
        return self._connected().status()

    def nodes(self) -> list[dict[str, Any]]:
        """The nodes of the ring, this one first: name, layers as ``[start, end]``, bytes, round trip, state."""
        return self._connected().nodes()

    def verify(self, prompt: Prompt | None = None, *, max_tokens: int = 64, raw: bool | None = None) -> dict[str, Any]:
        """Proves that the ring gives the same tokens and logits as one node: answers a prompt on both, greedily, and
        gives the receipt of ``swarm-os verify --json``; ``equal`` is the verdict.

        Loads the whole model on this node meanwhile, beside what is loaded already.

        :raises ArgumentError: there is no ring: all layers are on this node.
        :raises OutOfMemoryError: the whole model does not fit here.
        """
        asked = _QUESTION if prompt is None else prompt
        receipt: dict[str, Any] = finish(
            self._connected().verify(asked, max_tokens, raw), self._progress, "verify()"
        )
        return receipt

    def tokenize(self, prompt: Prompt, *, special: bool = False) -> list[int]:
        """The token ids of a text as it is, or of a conversation in the chat template.

        :param special: recognise special tokens that are written in a text, and add what the model wants before one.
        """
        engine = self._connected()
        if isinstance(prompt, str) and not special:
            return engine.encode(prompt)
        return engine.tokenize(prompt, raw=True)

    def detokenize(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of token ids. Bytes that are no whole character become U+FFFD."""
        return self._connected().detokenize(ids, skip_special)

    def logits(self, prompt: Prompt, *, raw: bool | None = None) -> memoryview[float]:
        """The logits after every position of a prompt: f32 of shape ``[tokens, vocab]``, row-major, native byte order.

        ``numpy.asarray(bot.logits(...))`` is an array of that shape over the same memory: nothing is copied, and NumPy
        is not needed for ``memoryview`` itself. (The engine writes the rows into this memory once, from the buffers
        it computes in, 32 rows at a time.) Costs one prefill, and a pass over the head for every position.

        Computed on this node. Where the layers are spread, the whole model is loaded here at the first call, beside
        what is loaded already, and kept until ``close()``: the logits are the same bits.

        :raises OutOfMemoryError: the whole model does not fit here.
        """
        engine = self._connected()
        with self._lock:
            if len(engine.nodes()) > 1:
                if self._whole is None:
                    self._whole = finish(engine.alone(), self._progress, "logits()")
                engine = self._whole
        memory, rows, columns = engine.logits(prompt, raw)
        return memoryview(memory).cast("f", (rows, columns))

    @property
    def model(self) -> str:
        """The model's name."""
        return self._connected().model

    @property
    def context(self) -> int:
        """Positions a session may have."""
        return self._connected().context

    def __repr__(self) -> str:
        state = "closed" if self._engine is None else f"{len(self.nodes())} nodes"
        return f"<SwarmMaster {self._settings['model']!r}: {state}>"


class Chat:
    """A conversation: ``say()`` asks with all that was said before. Made by :meth:`SwarmMaster.chat`.

    ``messages`` is what was said so far, and may be changed. The keys and values of an answer stay on every node until
    another answer begins that does not go on from them, so a turn costs a prefill of what was said since the last one;
    ``stats()["prompt_tokens_kept"]`` says how much was there. The tokens are the same either way.
    """

    messages: list[dict[str, str]]

    def __init__(self, master: SwarmMaster, system: str | None, options: dict[str, Any]) -> None:
        self._master = master
        self._system = system
        self._options = options
        self.reset()

    def reset(self) -> None:
        """Forgets what was said, but not what the model was told first."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    @overload
    def say(self, text: str, *, stream: Literal[False] = False, **options: Any) -> str: ...
    @overload
    def say(self, text: str, *, stream: Literal[True], **options: Any) -> Reply: ...
    @overload
    def say(self, text: str, *, stream: bool, **options: Any) -> str | Reply: ...
    def say(self, text: str, *, stream: bool = False, **options: Any) -> str | Reply:
        """Says something and gives the answer: the text, or with ``stream`` an iterator of its pieces.

        An answer that was ended early is part of the conversation as far as it came; one that ended in an error leaves
        the conversation as it was. Further keywords are those of :meth:`SwarmMaster.generate`.
        """
        if not isinstance(text, str):
            raise TypeError(f"text: {type(text).__name__} is not what it takes; give a str")
        asked = [*self.messages, {"role": "user", "content": text}]
        answer = self._master._answer(asked, {**self._options, **options})
        reply = Reply(self, asked, answer)
        return reply if stream else "".join(reply)

    __call__ = say


class Reply(Iterator[str]):
    """The pieces of an answer in a conversation, which has it once they were read, or once it was closed."""

    def __init__(self, chat: Chat, asked: list[dict[str, str]], answer: Generation) -> None:
        self._chat = chat
        self._asked = asked
        self._answer = answer
        self._noted = False

    def __next__(self) -> str:
        try:
            return next(self._answer)
        except StopIteration:
            self._note()
            raise

    def close(self) -> None:
        """Ends the answer on every node at once."""
        self._answer.close()
        self._note()

    def __enter__(self) -> Reply:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _note(self) -> None:
        if not self._noted:
            self._noted = True
            said = {"role": "assistant", "content": self._answer.text}
            self._chat.messages = [*self._asked, said]


def _seed(seed: int | None) -> int:
    """The seed, or another one every time."""
    return random.getrandbits(63) if seed is None else seed


def _texts(name: str, given: str | Iterable[str]) -> list[str]:
    """One text or several, as a list."""
    if isinstance(given, str):
        return [given]
    try:
        texts = list(given)
    except TypeError:
        raise TypeError(f"{name}: {type(given).__name__} is not what it takes; give a str or several") from None
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{name}: {type(text).__name__} is not what it takes; give a str or several")
    return texts


def _layers(given: Layers) -> str:
    """Layers of nodes as the command takes them."""

    def ends(layers: tuple[int, int] | range) -> str:
        try:
            start, end = (layers.start, layers.stop) if isinstance(layers, range) else layers
        except (TypeError, ValueError):
            raise TypeError(f"layers: {layers!r} is no range; give (start, end)") from None
        if not isinstance(start, int) or not isinstance(end, int):
            raise TypeError(f"layers: {layers!r} is no range of whole numbers")
        return f"{start}..{end}"

    if isinstance(given, str):
        return given
    if isinstance(given, Mapping):
        return ",".join(f"{name}={ends(layers)}" for name, layers in given.items())
    try:
        return ",".join(ends(layers) for layers in given)
    except TypeError as error:
        if str(error).startswith("layers:"):
            raise
        raise TypeError(f"layers: {type(given).__name__} is not what it takes; give a list of (start, end)") from None
