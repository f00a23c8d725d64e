"""``python -m swarm_os`` is the command ``swarm-os``."""

import sys
from pathlib import Path

# Run as a file, Python looks for modules beside it first, where none of them is to be found by its short name.
if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]

from swarm_os._command import main  # noqa: E402

if __name__ == "__main__":
    main()
