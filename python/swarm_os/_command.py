"""The command ``swarm-os``, as pip installs it."""

from __future__ import annotations

import sys
from pathlib import Path

from . import _native


def again() -> list[str]:
    """What starts the command another time: workers of ``--nodes`` are processes of their own."""
    return [sys.executable, str(Path(__file__).with_name("__main__.py"))]


def main() -> None:
    """Runs the command line of this process and ends it with the command's exit code."""
    sys.exit(_native.command(["swarm-os", *sys.argv[1:]], again()))
