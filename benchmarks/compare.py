"""Run two versions of pyps on the same bench, in turn, so that a noisy machine is as noisy to both.

    python benchmarks/compare.py OTHER/bin/pyps THIS/bin/pyps [--rounds 3] [options of pyps bench]

For every row it prints the medians of both and how many times faster the second is.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections import defaultdict

from pyps.measure.reports import BenchReport

NAMES = ("cache_ms", "join_ms", "text_ms", "batch_tokens_s")


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("programs", nargs=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments, options = parser.parse_known_args()
    measured: dict[tuple[int, int, int], dict[str, tuple[list[float], list[float]]]] = defaultdict(
        lambda: {name: ([], []) for name in NAMES}
    )
    for i in range(arguments.rounds):
        for which, program in enumerate(arguments.programs):
            print(f"round {i + 1} of {arguments.rounds}: {program}", file=sys.stderr, flush=True)
            done = subprocess.run([program, "bench", "--json", *options], stdout=subprocess.PIPE, check=False)
            if done.returncode:
                sys.exit(f"{program} bench failed: is it a version without pyps bench?")
            for row in BenchReport.from_dict(json.loads(done.stdout)).rows:
                for name in NAMES:
                    measured[row.branches, row.tokens, row.prompt][name][which].append(getattr(row, name).value)
    print(f"{'branches':>12}{'prompt':>8}  {'':16}{'other':>10}{'this':>10}{'faster':>8}")
    for (branches, tokens, prompt), sides in measured.items():
        for name, times in sides.items():
            other, this = map(statistics.median, times)
            gain = this / other if name.endswith("_s") else other / this
            print(f"{f'{branches} x {tokens}':>12}{prompt:>8}  {name:16}{other:>10.1f}{this:>10.1f}{gain:>8.2f}")


if __name__ == "__main__":
    main()
