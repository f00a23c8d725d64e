"""``AsyncSwarmMaster``: the same for asyncio, also within a loop that runs already, as in a notebook."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from types import TracebackType
from typing import Any, Literal, overload

from ._master import Prompt, SwarmMaster
from ._native import Generation

__all__ = ["AsyncGeneration", "AsyncSwarmMaster"]


class AsyncSwarmMaster:
    """A :class:`SwarmMaster` whose methods are awaited; it takes the same arguments.

        async with AsyncSwarmMaster("smol") as bot:
            async for chunk in bot.generate("Why is the sky blue?", stream=True):
                print(chunk, end="", flush=True)

    Nothing here blocks the loop. A task that is cancelled ends its answer on every node.
    """

    def __init__(self, model_id: Any, **settings: Any) -> None:
        self._master = SwarmMaster(model_id, **settings)

    @property
    def master(self) -> SwarmMaster:
        """The same without ``await``."""
        return self._master

    async def connect(self, timeout: float | None = None) -> AsyncSwarmMaster:
        """As :meth:`SwarmMaster.connect`. A task that is cancelled leaves what was begun to end by itself."""
        await asyncio.to_thread(self._master.connect, timeout)
        return self

    async def close(self) -> None:
        """As :meth:`SwarmMaster.close`."""
        await asyncio.to_thread(self._master.close)

    async def __aenter__(self) -> AsyncSwarmMaster:
        return await self.connect()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @overload
    def generate(self, prompt: Prompt, *, stream: Literal[True], **options: Any) -> AsyncGeneration: ...
    @overload
    def generate(
        self, prompt: Prompt, *, stream: Literal[False] = False, **options: Any
    ) -> Coroutine[Any, Any, str]: ...
    def generate(
        self, prompt: Prompt, *, stream: bool = False, **options: Any
    ) -> AsyncGeneration | Coroutine[Any, Any, str]:
        """As :meth:`SwarmMaster.generate`: a coroutine of the text, or with ``stream`` an async iterator of its
        pieces."""
        answer = AsyncGeneration(lambda: self._master.generate(prompt, stream=True, **options))
        return answer if stream else answer.read()

    @property
    def total_tokens(self) -> int:
        """As :attr:`SwarmMaster.total_tokens`."""
        return self._master.total_tokens

    def stats(self) -> dict[str, Any] | None:
        """As :meth:`SwarmMaster.stats`, which does not wait for anything."""
        return self._master.stats()

    async def plan(self) -> dict[str, Any]:
        """As :meth:`SwarmMaster.plan`."""
        return await asyncio.to_thread(self._master.plan)

    async def verify(self, prompt: Prompt | None = None, **options: Any) -> dict[str, Any]:
        """As :meth:`SwarmMaster.verify`."""
        return await asyncio.to_thread(lambda: self._master.verify(prompt, **options))

    async def logits(self, prompt: Prompt, *, raw: bool | None = None) -> memoryview[float]:
        """As :meth:`SwarmMaster.logits`."""
        return await asyncio.to_thread(lambda: self._master.logits(prompt, raw=raw))

    def tokenize(self, prompt: Prompt, *, special: bool = False) -> list[int]:
        """As :meth:`SwarmMaster.tokenize`."""
        return self._master.tokenize(prompt, special=special)


class AsyncGeneration(AsyncIterator[str]):
    """The pieces of an answer. It begins with the first ``await``; closing or dropping it ends it on every node."""

    def __init__(self, start: Callable[[], Generation]) -> None:
        self._start = start
        self._answer: Generation | None = None
        self._news: asyncio.Queue[str | BaseException | None] = asyncio.Queue()
        self._begun = False
        self._over = False

    async def __anext__(self) -> str:
        if self._over:
            raise StopAsyncIteration
        try:
            if not self._begun:
                self._begun = True
                self._answer = await asyncio.to_thread(self._start)
                read = (self._answer, asyncio.get_running_loop(), self._news)
                threading.Thread(target=_read, args=read, name="answer", daemon=True).start()
            news = await self._news.get()
        except BaseException:
            self._end()
            raise
        if isinstance(news, str):
            return news
        self._over = True
        if news is None:
            raise StopAsyncIteration
        raise news

    async def read(self) -> str:
        """Reads what is left and gives the whole text."""
        async for _ in self:
            pass
        return "" if self._answer is None else self._answer.text

    async def aclose(self) -> None:
        """Ends the answer on every node at once."""
        self._over = True
        if self._answer is not None:
            await asyncio.to_thread(self._answer.close)

    async def __aenter__(self) -> AsyncGeneration:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _end(self) -> None:
        self._over = True
        if self._answer is not None:
            self._answer.cancel()

    def __del__(self) -> None:
        # The thread that reads holds the answer, so it has to be ended.
        if self._answer is not None and not self._over:
            self._answer.cancel()

    @property
    def answer(self) -> Generation | None:
        """What was read so far, and how it ended; ``None`` before the first ``await``."""
        return self._answer


def _read(
    answer: Generation, loop: asyncio.AbstractEventLoop, news: asyncio.Queue[str | BaseException | None]
) -> None:
    """Reads an answer on a thread and hands it to the loop."""
    end: BaseException | None = None
    try:
        for piece in answer:
            loop.call_soon_threadsafe(news.put_nowait, piece)
    except RuntimeError:
        # The loop is closed: nobody waits any more.
        answer.close()
        return
    except BaseException as error:
        end = error
    try:
        loop.call_soon_threadsafe(news.put_nowait, end)
    except RuntimeError:
        pass
