"""What can go wrong. The texts are those of the command ``swarm-os``: what happened, to what, what to do."""

from __future__ import annotations

__all__ = [
    "ArgumentError",
    "ForkError",
    "ModelError",
    "NoWorkerError",
    "NodeLostError",
    "NotPairedError",
    "OutOfMemoryError",
    "SwarmError",
    "SwarmTimeoutError",
]


class SwarmError(Exception):
    """Anything that this package raises, except for arguments of a wrong type (``TypeError``)."""


class ArgumentError(SwarmError, ValueError):
    """What was asked for makes no sense, or not with this model and these nodes."""


class NoWorkerError(SwarmError):
    """Fewer workers than required were found."""


class NotPairedError(NoWorkerError):
    """Only workers that share no secret with this computer were found; ``join=`` takes the code that one shows."""


class NodeLostError(SwarmError):
    """A node left the ring, or a link of the ring broke. The next answer is computed by the nodes that are left.

    ``node`` is its name and ``layers`` the half-open range of layers that it held, where they are known.
    """

    node: str | None
    layers: tuple[int, int] | None

    def __init__(self, message: str, node: str | None = None, layers: tuple[int, int] | None = None) -> None:
        super().__init__(message)
        self.node = node
        self.layers = layers


class ModelError(SwarmError):
    """The model, or a part of it, is not to be had or cannot be used."""


class OutOfMemoryError(SwarmError, MemoryError):
    """The layers do not fit into the memory that there is; the text says how much is missing where."""


class SwarmTimeoutError(SwarmError, TimeoutError):
    """It was not done within the time that was given."""


class ForkError(SwarmError):
    """This process was forked from one that had imported the package, and a fork has no engine."""
