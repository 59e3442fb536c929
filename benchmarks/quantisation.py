"""Measure which type the default model should have: its speed on this machine, and what is left of the model.

    python benchmarks/quantisation.py

The package ships Q4_1. Every candidate is made from it; the loss is measured against it, on this repository's README.
"""

import statistics
import tempfile
import time
from pathlib import Path

import llama_cpp
import numpy as np

from pyps.engine.context import Context, Token
from pyps.engine.find import requantise, shipped_smollm2
from pyps.engine.logits import log_softmax
from pyps.engine.model import Model

N = 512  # tokens, prefilled and compared


def log_probabilities(model: Model, tokens: list[int]) -> np.ndarray:
    """Return the log-probabilities after each token, [tokens, vocabulary]."""
    with Context(model, N, n_logits=N) as ctx:
        ctx.decode([Token(t, i, 0, logits=True) for i, t in enumerate(tokens)])
        logits = np.stack([ctx.logits(i) for i in range(len(tokens))]).astype(np.float64)
    return log_softmax(logits)


def tokens_per_second(model: Model, tokens: list[int]) -> tuple[float, float]:
    """Return the rates of reading the tokens, and of four branches decoding in one batch after 256 tokens each.

    Both are medians of five rounds.
    """
    prefill, decode = [], []
    with Context(model, N, 4) as ctx:
        for _ in range(6):
            ctx.clear()
            began = time.perf_counter()
            ctx.prefill(0, tokens)
            ctx.synchronize()
            prefill.append(len(tokens) / (time.perf_counter() - began))
            ctx.clear()
            for seq in range(4):
                ctx.prefill(seq, tokens[:256])
            began = time.perf_counter()
            for i in range(16):
                ctx.decode([Token(tokens[i], 256 + i, seq, logits=True) for seq in range(4)])
            ctx.synchronize()
            decode.append(4 * 16 / (time.perf_counter() - began))
    return statistics.median(prefill[1:]), statistics.median(decode[1:])


def main() -> None:
    """Print a row for each type."""
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    print(f"{'type':<6}{'MB':>6}{'prefill t/s':>13}{'4-way decode t/s':>18}{'KL to Q4_1':>12}{'same argmax':>13}")
    with tempfile.TemporaryDirectory() as folder:
        paths = {"Q4_1": shipped_smollm2(Path(folder))}
        for name, ftype in (
            ("Q4_0", llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0),
            ("Q5_K", llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_K_M),
            ("Q8_0", llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0),
        ):
            paths[name] = Path(folder) / f"{name}.gguf"
            requantise(paths["Q4_1"], paths[name], ftype)
        reference = None
        for name, path in paths.items():
            model = Model.load(path)
            tokens = model.tokenize(text)[:N]
            logs = log_probabilities(model, tokens)
            reference = logs if reference is None else reference
            kl = (np.exp(reference) * (reference - logs)).sum(axis=1).mean()
            same = (logs.argmax(axis=1) == reference.argmax(axis=1)).mean()
            prefill, decode = tokens_per_second(model, tokens)
            size = path.stat().st_size / 1e6
            print(f"{name:<6}{size:>6.0f}{prefill:>13.0f}{decode:>18.0f}{kl:>12.4f}{same:>12.1%}")
            model.close()


if __name__ == "__main__":
    main()
