"""Measure what branches on disk save: `make bench-slots`.

One process generates branches and saves them. A fresh one then loads and joins them, and reads their texts, in turn.
Times are in milliseconds; the model's loading is left out on both sides, opening and checking the file is not.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pyps import ForkJoin, Sampling

TASK = "What should somebody know who moves to a small town by the sea?"
BRANCHES, TOKENS, ROUNDS = 4, 512, 5


def write(path: Path, model: str) -> float:
    """Generate the branches, save them, and return the milliseconds that generating took."""
    sampling = Sampling(seed=1, max_tokens=TOKENS, ignore_eos=True)
    with ForkJoin.from_pretrained(model) as fj:
        began = time.perf_counter()
        with fj.fork(TASK, [f"Part {i + 1}." for i in range(BRANCHES)], sampling=sampling) as branches:
            took = time.perf_counter() - began
            fj.save(path, branches)
    return took * 1e3


def read(path: Path, model: str) -> dict[str, float]:
    """Return the milliseconds of loading the file, and of the first token from it and from the texts."""
    one = Sampling(temperature=0, max_tokens=1)
    times: dict[str, list[float]] = {"load": [], "cache": [], "text": []}
    with ForkJoin.from_pretrained(model) as fj:
        for _ in range(ROUNDS):
            began = time.perf_counter()
            with fj.load(path) as branches:
                times["load"].append((time.perf_counter() - began) * 1e3)
                result = fj.run(TASK, join=branches, answer=one, compare=True)
            assert result.compare is not None
            times["cache"].append(times["load"][-1] + result.timing_ms.ttft)
            times["text"].append(result.compare.timing_ms.ttft)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Run both processes and print the times."""
    if len(sys.argv) > 2:
        print(json.dumps(read(Path(sys.argv[2]), sys.argv[1])))
        return
    model = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "branches.pyps")
        generated = write(path, model)
        size = path.stat().st_size / 1e6
        done = subprocess.run([sys.executable, __file__, model, path], capture_output=True, text=True, check=True)
    times = json.loads(done.stdout)
    print(f"{BRANCHES} x {TOKENS} tokens, {size:.0f} MB; medians of {ROUNDS} in a fresh process")
    print(f"generating   {generated:8,.0f} ms")
    print(f"loading      {times['load']:8,.0f} ms: 1/{generated / times['load']:,.0f} of it")
    print(f"first token  {times['cache']:8,.0f} ms from the file, its loading included")
    print(f"             {times['text']:8,.0f} ms from the texts: {times['text'] / times['cache']:.1f} times as long")


if __name__ == "__main__":
    main()
