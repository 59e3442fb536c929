"""Do a thousand forks, joins and generations in one process: memory must stay where it is, and no cell may be lost.

    python benchmarks/soak.py [--rounds 1000]

Each round forks three branches from a prefix, lets them write, joins them into a long-lived synthesizer, answers, and
forgets all of it; every tenth round is followed by a whole `ForkJoin.run`, contexts and all. It exits with 1 if the
resident size is more than 1 % above what it was after the first hundred rounds, or if cells are left over.
"""

import argparse
import os
import sys
import time
from collections import deque
from pathlib import Path

from pyps import ForkJoin, Sampling
from pyps.engine.context import Context
from pyps.engine.generate import Generation, generate
from pyps.engine.join import Span, join

SETTLED = 100  # rounds after which nothing should grow any more


def resident_mb() -> float:
    """Return the megabytes that this process has resident."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def one_round(branches: Context, synthesizer: Context, i: int) -> None:
    """Fork, generate, join and answer once, and leave both contexts empty."""
    model = branches.model
    branches.prefill(0, model.tokenize("Here are three short notes on rivers."))
    end = branches.end(0)
    for seq in (1, 2):
        branches.copy(0, seq)
    join(branches, synthesizer, [Span(0, 0, end, 0)])
    sampling = Sampling(max_tokens=4 + i % 5, seed=i)
    notes = [Generation(branches, seq, model.tokenize(f" Note {seq}:"), sampling) for seq in range(3)]
    deque(generate(branches, notes), maxlen=0)
    join(branches, synthesizer, [Span(g.seq, g.start, g.end, end) for g in notes if g.tokens])
    answer = Generation(synthesizer, 0, model.tokenize(" So:"), sampling)
    deque(generate(synthesizer, [answer]), maxlen=0)
    branches.clear()
    synthesizer.clear()


def main() -> None:
    """Do the rounds, and exit with 1 if memory grew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1000)
    rounds = parser.parse_args().rounds
    began = time.monotonic()
    settled = 0.0
    with (
        ForkJoin.from_pretrained("smollm2") as fj,
        Context(fj.model, 256, 3) as branches,
        Context(fj.model, 512) as synthesizer,
    ):
        for i in range(rounds):
            one_round(branches, synthesizer, i)
            if i % 10 == 9:
                fj.run("Name a river.", ["Short.", "Long."], sampling=Sampling(max_tokens=4, seed=i))
            if i + 1 == SETTLED:
                settled = resident_mb()
            if (i + 1) % 100 == 0:
                print(f"{i + 1} rounds, {time.monotonic() - began:.0f} s: {resident_mb():.1f} MB", flush=True)
        growth = resident_mb() / settled - 1 if settled else 0.0
        # nothing is left over: the whole of each context can be filled again
        branches.prefill(2, [1] * branches.n_ctx)
        synthesizer.prefill(0, [1] * synthesizer.n_ctx)
    print(f"growth after the first {SETTLED} rounds: {growth:+.2%}")
    sys.exit(growth > 0.01)


if __name__ == "__main__":
    main()
