"""The ordinary computers in a room, as one machine that runs a language model.

``SwarmMaster`` holds a model that answers, on this computer or spread over the workers it finds; ``SwarmWorker``
offers this computer to others. Both are nodes of the ring itself, inside this process: there is no server to start.

    import swarm_os

    with swarm_os.SwarmMaster("TinyLlama/TinyLlama-1.1B-Chat-v1.0") as bot:
        for chunk in bot.generate("Why is the sky blue?", stream=True):
            print(chunk, end="", flush=True)

``AsyncSwarmMaster`` is the same for asyncio. The tokens are, to the bit, those of one machine, for every number of
nodes. A process that is forked after the import cannot use the package (``ForkError``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._native import Generation, __version__
from ._master import Chat, SwarmMaster
from ._worker import SwarmWorker
from .errors import (
    ArgumentError,
    ForkError,
    ModelError,
    NodeLostError,
    NotPairedError,
    NoWorkerError,
    OutOfMemoryError,
    SwarmError,
    SwarmTimeoutError,
)

if TYPE_CHECKING:
    from .aio import AsyncGeneration, AsyncSwarmMaster

__all__ = [
    "ArgumentError",
    "AsyncGeneration",
    "AsyncSwarmMaster",
    "Chat",
    "ForkError",
    "Generation",
    "ModelError",
    "NoWorkerError",
    "NodeLostError",
    "NotPairedError",
    "OutOfMemoryError",
    "SwarmError",
    "SwarmMaster",
    "SwarmTimeoutError",
    "SwarmWorker",
    "__version__",
]


def __getattr__(name: str) -> Any:
    # asyncio takes longer to import than everything else here together.
    if name in ("AsyncGeneration", "AsyncSwarmMaster"):
        from . import aio

        return getattr(aio, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
