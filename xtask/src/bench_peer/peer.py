"""llama.cpp's side of `cargo xtask bench-peer`.

usage: pin CORES COMMAND...                        run COMMAND on these cores only
       about                                       what llama.cpp is this, as JSON
       run MODEL THREADS CORES PROMPT GEN SESSIONS one measured round, as JSON

A round is what `swarm-os bench` measures: every session's prompt, then GEN - 1 steps of one token for every
session in one batch (the first token comes out of the prompt). No sampling. Before it, a round that is not
counted touches all memory. Everything that is not said is llama.cpp's own default, so its attention kernel
(flash attention where it thinks it better) and weights mapped and repacked as it likes.
"""

import json
import os
import resource
import sys
import time


def pin(cores):
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def numbers(text):
    return [int(part) for part in text.split(",")]


def about():
    import llama_cpp

    print(json.dumps({
        "llama_cpp_python": llama_cpp.__version__,
        "system": llama_cpp.llama_print_system_info().decode(),
        "pinned": hasattr(os, "sched_setaffinity"),
    }))


def peak_rss_bytes():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def run(path, threads, prompt, gen, sessions):
    import llama_cpp as api

    quiet = api.llama_log_callback(lambda level, text, data: None)
    api.llama_log_set(quiet, None)
    api.llama_backend_init()
    model_options = api.llama_model_default_params()
    model_options.n_gpu_layers = 0
    model = api.llama_model_load_from_file(path.encode(), model_options)
    if not model:
        sys.exit(f"llama.cpp cannot load {path}")
    options = api.llama_context_default_params()
    options.n_ctx = -(-(prompt + gen) // 256) * 256 * sessions
    options.n_batch = options.n_ubatch = 512
    options.n_seq_max = sessions
    options.n_threads = options.n_threads_batch = threads
    context = api.llama_init_from_model(model, options)
    if not context:
        sys.exit(f"llama.cpp cannot make a context for {path}")
    vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    batch = api.llama_batch_init(512, 0, 1)

    def decode(rows):
        """`rows`: (token, position, session, whether its logits are wanted)."""
        batch.n_tokens = len(rows)
        for i, (token, position, session, wanted) in enumerate(rows):
            batch.token[i] = token % vocabulary
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = session
            batch.logits[i] = wanted
        status = api.llama_decode(context, batch)
        if status != 0:
            sys.exit(f"llama_decode gave {status}")
        # Waits for the result, as the logits do.
        api.llama_synchronize(context)

    def one_round(steps):
        api.llama_memory_clear(api.llama_get_memory(context), True)
        start = time.perf_counter()
        for session in range(sessions):
            for first in range(0, prompt, 512):
                last = min(first + 512, prompt)
                decode([(p * 37 + session + 11, p, session, p == prompt - 1) for p in range(first, last)])
        prefilled = time.perf_counter()
        for step in range(steps):
            decode([(step * 13 + s + 5, prompt + step, s, True) for s in range(sessions)])
        end = time.perf_counter()
        return sessions * prompt / (prefilled - start), sessions * steps / (end - prefilled)

    one_round(4)
    prefill, decoded = one_round(gen - 1)
    print(json.dumps({
        "prefill_tok_per_s": prefill,
        "decode_tok_per_s": decoded,
        "peak_rss_bytes": peak_rss_bytes(),
    }))


def main():
    match sys.argv[1:]:
        case ["pin", cores, *command]:
            pin(numbers(cores))
            os.execv(command[0], command)
        case ["about"]:
            about()
        case ["run", path, threads, cores, prompt, gen, sessions]:
            pin(numbers(cores))
            run(path, int(threads), int(prompt), int(gen), int(sessions))
        case _:
            sys.exit(__doc__)


main()
