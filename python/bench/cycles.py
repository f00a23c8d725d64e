"""What is left of masters that were created, connected, used and closed: memory, threads and files (Linux).

    python python/bench/cycles.py MODEL [--cycles 1000] [--peer HOST:PORT] [--drop]
"""

from __future__ import annotations

import argparse
import gc
import os
import time

import swarm_os


def rss_kb() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--peer", action="append", default=[])
    parser.add_argument("--drop", action="store_true", help="drop every object instead of closing it")
    args = parser.parse_args()
    split = "always" if args.peer else "never"
    every, first, start = max(args.cycles // 10, 1), None, time.perf_counter()
    for cycle in range(1, args.cycles + 1):
        bot = swarm_os.SwarmMaster(args.model, peers=args.peer, discover=False, split=split, threads=1).connect()
        answer = bot.generate("x", stream=True, max_tokens=4)
        next(answer)
        if not args.drop:
            bot.close()
        del answer, bot
        if cycle % every == 0:
            gc.collect()
            now = rss_kb()
            first = first or now
            tasks, files = len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
            print(f"{cycle:6} cycles: {now} kB ({now / first - 1:+.1%}), {tasks} threads, {files} files", flush=True)
    print(f"{(time.perf_counter() - start) / args.cycles * 1e3:.1f} ms per cycle")


if __name__ == "__main__":
    main()
