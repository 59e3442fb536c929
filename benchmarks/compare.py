"""Two versions of pyps on the same bench, in turn, so that a noisy machine is as noisy to both.

    python bench/compare.py OTHER/bin/pyps THIS/bin/pyps [--rounds 3] [options of pyps bench]

Prints, for every row, the medians of each and how many times faster the second is.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections import defaultdict

KEYS = ("cache_ms", "join_ms", "text_ms", "batch_tokens_s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("programs", nargs=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments, options = parser.parse_known_args()
    found: dict[tuple[int, int, int], dict[str, list[list[float]]]] = defaultdict(
        lambda: {key: [[], []] for key in KEYS}
    )
    for i in range(arguments.rounds):
        for which, program in enumerate(arguments.programs):
            print(f"round {i + 1} of {arguments.rounds}: {program}", file=sys.stderr, flush=True)
            done = subprocess.run([program, "bench", "--json", *options], stdout=subprocess.PIPE, check=False)
            if done.returncode:
                sys.exit(f"{program} bench failed: is it from before pyps bench?")
            for row in json.loads(done.stdout)["rows"]:
                for key in KEYS:
                    found[row["branches"], row["tokens"], row["prompt"]][key][which].append(row[key])
    print(f"{'branches':>12}{'prompt':>8}  {'':16}{'other':>10}{'this':>10}{'faster':>8}")
    for (branches, tokens, prompt), values in found.items():
        for key, sides in values.items():
            other, this = map(statistics.median, sides)
            gain = this / other if key.endswith("_s") else other / this
            print(f"{f'{branches} x {tokens}':>12}{prompt:>8}  {key:16}{other:>10.1f}{this:>10.1f}{gain:>8.2f}")


if __name__ == "__main__":
    main()
