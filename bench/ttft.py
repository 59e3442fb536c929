"""Time to first token after the branches are done: from their caches, and from their pasted texts.

    python bench/ttft.py [--branches 4] [--tokens 256] [--repeat 5] [--layout shared] [--model smollm2] [--json]

Both sides in one process, alternating, on the same branches; medians with the spread. The cache side is `pyps run` as
it is. The text side is measured at several settings of llama.cpp, and the best of them is what the ratio is against;
its shared prefix is in the cache already. Peak memory is that of a process that does the cache side alone.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

from pyps import ForkJoin, Sampling
from pyps.context import Context
from pyps.layout import DEFAULT_SYNTHESIZE, Layout
from pyps.models import find_model

TASK = "Which database should a small desktop app use? Think of speed, safety, size, and how easy it is to ship."
ARGUMENTS = ["SQLite", "PostgreSQL", "DuckDB", "MySQL", "Redis", "plain files", "LMDB", "MongoDB"]


def instructions(n: int) -> list[str]:
    return [f"Argue for {ARGUMENTS[i % len(ARGUMENTS)]}." for i in range(n)]


def run_cache_side(fj: ForkJoin, branches: int, tokens: int, seed: int):  # type: ignore[no-untyped-def]
    sampling = Sampling(max_tokens=tokens, seed=seed, ignore_eos=True)
    return fj.run(TASK, instructions(branches), sampling=sampling, answer=Sampling(max_tokens=1, seed=0))


def text_side_ms(fj: ForkJoin, result, flash_attn: bool) -> float:  # type: ignore[no-untyped-def]
    """From the pasted texts to the first token's logits, the prefix being there."""
    layout = Layout(fj.model, fj.layout, TASK, None, DEFAULT_SYNTHESIZE)
    prefix = layout.prompts([""]).prefix
    tail = layout.pasted([b.name for b in result.branches], [b.text for b in result.branches])
    with Context(fj.model, len(prefix) + len(tail), flash_attn=flash_attn) as ctx:
        ctx.prefill(0, prefix)
        began = time.perf_counter()
        ctx.prefill(0, tail)
        ctx.logits()
        return (time.perf_counter() - began) * 1e3


def cache_bytes(fj: ForkJoin, branches: int, tokens: int) -> int:
    """K and V of the branches' and the synthesizer's context, at the sizes the job gives them (f16)."""
    prompts = Layout(fj.model, fj.layout, TASK, None, DEFAULT_SYNTHESIZE).prompts(instructions(branches))
    branch = len(prompts.prefix) + max(map(len, prompts.branches)) + tokens
    synthesizer = prompts.branch_point + branches * tokens + len(prompts.synthesizer) + 1
    cells = branches * (-(-branch // 256) * 256) + -(-synthesizer // 256) * 256
    return cells * 2 * fj.model.n_layer * fj.model.n_embd_kv * 2


def peak_memory(arguments: argparse.Namespace) -> dict[str, float]:
    """Runs this script again for one cache-side job and reports its peak resident size, in MB."""
    command = [sys.executable, __file__, "--memory", "--model", arguments.model, "--layout", arguments.layout]
    command += ["--branches", str(arguments.branches), "--tokens", str(arguments.tokens)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--branches", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of each branch")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--layout", default="shared", choices=["shared", "paper"])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    n, tokens = arguments.branches, arguments.tokens
    path = find_model(arguments.model)

    with ForkJoin.from_pretrained(arguments.model, layout=arguments.layout) as fj:
        if arguments.memory:
            run_cache_side(fj, n, tokens, seed=1)
            scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, kilobytes elsewhere
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
            model, caches = path.stat().st_size, cache_bytes(fj, n, tokens)
            print(json.dumps({"peak": peak / 1e6, "model_file": model / 1e6, "caches": caches / 1e6}))
            return

        cache: list[float] = []
        joins: list[float] = []
        text: dict[str, list[float]] = {"flash attention on": [], "flash attention off": []}
        for i in range(arguments.repeat + 1):
            result = run_cache_side(fj, n, tokens, seed=i)
            times = {name: text_side_ms(fj, result, name.endswith("on")) for name in text}
            if i == 0:
                continue  # warms up both sides
            cache.append(result.timing_ms.ttft)
            joins.append(result.timing_ms.join)
            for name, ms in times.items():
                text[name].append(ms)
            print(".", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        joined, prefilled = result.tokens.joined, result.tokens.prefilled

    best = min(text, key=lambda name: statistics.median(text[name]))
    memory = peak_memory(arguments)
    row = {
        "branches": n,
        "tokens": tokens,
        "layout": arguments.layout,
        "joined": joined,
        "prefilled": prefilled,
        "cache_ms": statistics.median(cache),
        "join_ms": statistics.median(joins),
        "text_ms": statistics.median(text[best]),
        "text_setting": best,
        "ratio": statistics.median(text[best]) / statistics.median(cache),
        "memory_mb": memory,
        "memory_bound_mb": 2 * memory["model_file"] + memory["caches"] + 300,
    }
    if arguments.json:
        print(json.dumps(row, indent=2))
        return

    def line(name: str, values: list[float]) -> None:
        print(f"  {name:<28}{statistics.median(values):9.1f}   ({min(values):.1f} to {max(values):.1f})")

    print(f"{path.name}, {n} branches x {tokens} tokens, {arguments.layout} layout, {arguments.repeat} runs")
    print(f"  {'time to first token':<28}{'median ms':>9}   (spread)")
    line("cache", cache)
    line("  of it the join", joins)
    for name, values in text.items():
        line(f"text, {name}", values)
    print(f"  text / cache: {row['ratio']:.1f}   ({joined} tokens joined, {prefilled} prefilled)")
    print(
        f"  peak resident size, cache side alone: {memory['peak']:.0f} MB; twice the model file + caches + 300 MB: "
        f"2 x {memory['model_file']:.0f} + {memory['caches']:.0f} + 300 = {row['memory_bound_mb']:.0f} MB"
    )


if __name__ == "__main__":
    main()
