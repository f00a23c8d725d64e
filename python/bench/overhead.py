"""What Python costs: tokens/s of a stream against `swarm-os run` in turn, and the microseconds of one piece.

    python python/bench/overhead.py MODEL [--tokens 256] [--rounds 5] [--command swarm-os]

The stream is timed by Python's own clock from the first piece to the last; the command by what it measured from the
first token to the last. The cost of a piece is the time to take one that waits already.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from pathlib import Path
import sys

import swarm_os

PROMPT = "Why is the sky blue?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--command", default=str(Path(sys.executable).with_name("swarm-os")))
    args = parser.parse_args()
    threads = [] if args.threads is None else ["--threads", str(args.threads)]
    run = [args.command, "run", "--json", "--model", args.model, "--max-tokens", str(args.tokens), *threads, PROMPT]

    commands, streams = [], []
    bot = swarm_os.SwarmMaster(args.model, discover=False, threads=args.threads)
    with bot:
        list(bot.generate(PROMPT, stream=True, max_tokens=8))
    for _ in range(args.rounds):
        report = json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
        commands.append(report["decode_tok_per_s"])
        with bot:
            streams.append(stream(bot, args.tokens))
    with bot:
        piece = cost_of_a_piece(bot, args.tokens)
    command, python = statistics.median(commands), statistics.median(streams)
    print(f"command   {command:9.2f} tok/s (median of {args.rounds}: {min(commands):.2f} to {max(commands):.2f})")
    print(f"Python    {python:9.2f} tok/s (median of {args.rounds}: {min(streams):.2f} to {max(streams):.2f})")
    print(f"Python / command {python / command:.4f}")
    print(f"one piece {piece * 1e6:9.2f} us")


def stream(bot: swarm_os.SwarmMaster, tokens: int) -> float:
    """Tokens per second after the first piece, by Python's clock."""
    answer = bot.generate(PROMPT, stream=True, max_tokens=tokens)
    next(answer)
    before, start = len(answer.token_ids), time.perf_counter()
    for _ in answer:
        pass
    seconds = time.perf_counter() - start
    return (len(answer.token_ids) - before) / seconds


def cost_of_a_piece(bot: swarm_os.SwarmMaster, tokens: int) -> float:
    """Seconds to take one piece of an answer that is complete."""
    answer = bot.generate(PROMPT, stream=True, max_tokens=tokens)
    while bot.status()["sessions"]:
        time.sleep(0.01)
    start = time.perf_counter()
    pieces = sum(1 for _ in answer)
    return (time.perf_counter() - start) / pieces


if __name__ == "__main__":
    main()
