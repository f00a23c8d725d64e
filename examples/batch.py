"""Several prompts at the same time share every pass over the weights: python examples/batch.py [MODEL]"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import swarm_os

PROMPTS = [
    "Name three rivers in Europe.",
    "What is the capital of Japan?",
    "Explain in one sentence why the sky is blue.",
    "Write a short sentence about a laptop.",
]

model = sys.argv[1] if len(sys.argv) > 1 else "smol"

with swarm_os.SwarmMaster(model, objective="throughput") as bot:
    start = time.perf_counter()
    # An object may be used by any number of threads; the ring takes four answers at once.
    with ThreadPoolExecutor(max_workers=4) as pool:
        answers = list(pool.map(lambda prompt: bot.generate(prompt, max_tokens=48), PROMPTS))
    seconds = time.perf_counter() - start
    for prompt, answer in zip(PROMPTS, answers):
        print(f"{prompt}\n  {answer.strip()}")
    print(f"{bot.total_tokens} tokens in {seconds:.2f} s: {bot.total_tokens / seconds:.1f} tok/s together")
