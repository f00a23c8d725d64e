"""What Python costs: tokens/s of a stream against `swarm-os run` in turn, and the microseconds of one piece.

    python python/bench/overhead.py MODEL [--tokens 128] [--rounds 16] [--threads N] [--command swarm-os]

The stream is timed by Python's own clock from the first piece to the last; the command by what it measured from the
first token to the last. The cost of a piece is the time to take one that waits already.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import swarm_os

PROMPT = "Why is the sky blue?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--command", default=str(Path(sys.executable).with_name("swarm-os")))
    args = parser.parse_args()
    threads = [] if args.threads is None else ["--threads", str(args.threads)]
    run = [args.command, "run", "--json", "--model", args.model, "--max-tokens", str(args.tokens), *threads, PROMPT]

    commands, streams = [], []
    with swarm_os.SwarmMaster(args.model, discover=False, threads=args.threads) as bot:
        stream(bot, args.tokens)
        for _ in range(args.rounds):
            report = json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
            commands.append(report["decode_tok_per_s"])
            streams.append(stream(bot, args.tokens))
        piece = cost_of_a_piece(bot, args.tokens)
    for name, of in (("median", statistics.median), ("fastest quarter", fastest_quarter)):
        command, python = of(commands), of(streams)
        print(f"{name}: command {command:.2f} tok/s, Python {python:.2f} tok/s, ratio {python / command:.4f}")
    print(f"slowest and fastest: command {min(commands):.2f} to {max(commands):.2f}, ", end="")
    print(f"Python {min(streams):.2f} to {max(streams):.2f}")
    print(f"one piece: {piece * 1e6:.2f} us")


def fastest_quarter(speeds: list[float]) -> float:
    """The mean of the fastest quarter: what is left when other programs are quiet."""
    quarter = sorted(speeds)[-max(len(speeds) // 4, 1) :]
    return statistics.fmean(quarter)


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
