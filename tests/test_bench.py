"""pyps bench: both sides do what they say, rows keep their contract, impossible sizes are said. No time is judged."""

import json
import signal
from pathlib import Path

import gguf
import pytest
from support.tiny import mapper_metadata, write_adapter, write_model
from test_cli import pyps, start, wait_for

from pyps.adapters.adapter import Adapter
from pyps.engine import native
from pyps.engine.context import cell_bytes
from pyps.engine.model import Model
from pyps.errors import InputError
from pyps.forkjoin import synthesis
from pyps.forkjoin.reading import JOIN_ONLY
from pyps.forkjoin.synthesis import ContextOptions
from pyps.measure.bench import Case, _Sides, measure
from pyps.measure.bounds import Rates, least_ms, measure_rates
from pyps.measure.reports import BenchReport
from pyps.measure.shapes import Shape, write_shape

F32 = ContextOptions(kv_type="f32")
KEYS = ["text_ms", "cache_ms", "join_ms", "floor_ms", "kshift_ms", "ratio"]
SMALL = ["--branches", "2,3", "--tokens", "8", "--prompt", "4,5", "--task", "6", "--repeat", "2"]


@pytest.mark.parametrize("layout", ["shared", "paper"])
def test_what_is_timed_is_what_a_run_does(tiny: Model, tmp_path: Path, layout: str) -> None:
    """After a round, the sides hold the cells they should, and cache and floor have seen the same."""
    adapter = Adapter(write_adapter(tmp_path / "a.gguf", mapper=mapper_metadata(1)), tiny)
    case = Case(branches=3, tokens=8, prompt=5, task=6)
    with _Sides(tiny, adapter, layout, case, F32, JOIN_ONLY) as sides:
        tokens: list[int] = []
        logits = []
        first_token = sides._first_token

        def spy(ctx, prompt):  # type: ignore[no-untyped-def]
            first_token(ctx, prompt)
            tokens.append(len(prompt))
            logits.append(ctx.logits())

        sides._first_token = spy  # type: ignore[method-assign]
        for _ in range(2):
            sides.step(keep=True)
        synthesizer = 5 if layout == "shared" else 6 + 5
        text = 3 * 8 + 5
        first_round = [synthesizer] * 2 + [text] * 7 + [synthesizer]  # cache, floor, text in all settings, K-shift
        assert tokens == [*first_round, synthesizer, synthesizer, text, synthesizer]
        assert logits[0] == pytest.approx(logits[1], abs=1e-5), "the floor reads the same cells"
        assert logits[10] == pytest.approx(logits[0], abs=1e-5), "nothing is left over from the first round"
        assert logits[13] == pytest.approx(logits[9], abs=1e-4), "nor of the K-shift: keys went back"
        assert logits[9] != pytest.approx(logits[0], abs=1e-2), "it has neither mapper nor LoRA"
        position = (6 if layout == "shared" else 0) + 8
        assert sides.synthesizer.decoder.end(0) == position + synthesizer, "spans overlap"
        assert sides._best_text().end(0) == 6 + text
        n_open = sum(ctx._pointer is not None for ctx in [*sides._contexts, sides.synthesizer.decoder])
        assert n_open == 4, "branches, synthesizer, the best for texts, and the unified one: others are closed"
    adapter.close()


def test_a_long_prompt_is_read_apart(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `pyps run` does it (synthesis.py): the same first token as without."""
    seen = []
    for least in (4, 1000):
        monkeypatch.setattr(synthesis, "_LONG_PROMPT", least)
        with _Sides(tiny, None, "paper", Case(2, 8, 4, 6), F32, JOIN_ONLY) as sides:
            assert (sides.synthesizer.reader is sides.synthesizer.decoder) == (least == 1000)
            sides.step(keep=True)
            assert sides.synthesizer.decoder.end(0) == 8 + 6 + 4
            assert sides.synthesizer.decoder.n_cells(0) == 2 * 8 + 6 + 4
            sides.synthesizer.decoder.remove(0, 17)
            sides.synthesizer.decoder.prefill(0, sides._synthesizer_prompt[-1:])
            seen.append(sides.synthesizer.decoder.logits())
    assert seen[0] == pytest.approx(seen[1], abs=1e-3)


def test_bounds(tiny: Model, tiny_path: Path) -> None:
    """What is counted is what the file has; more of anything takes longer."""
    tensors = {t.name: t for t in gguf.GGUFReader(tiny_path).tensors}
    layers = [t for name, t in tensors.items() if name.startswith("blk.") and len(t.shape) > 1]
    output = tensors.get("output.weight", tensors["token_embd.weight"])
    elements, logits, n_bytes = native.work(tiny.address)
    assert elements == sum(t.n_elements for t in layers) > 0
    assert logits == output.n_elements
    assert n_bytes == sum(t.n_bytes for t in [*layers, output])

    rates = measure_rates(tiny)
    assert rates
    assert rates.read_gb_s > 0.1
    assert rates.compute_gflop_s > 0.01
    slow_memory, slow_cores = Rates(1e-6, 1e9), Rates(1e9, 1e-6)
    for rate in (slow_memory, slow_cores):
        least = [least_ms(tiny, rate, "f16", *size) for size in ((1, 10), (1, 20), (1, 20, 3))]
        assert 0 < least[0] < least[1] < least[2]
    assert least_ms(tiny, slow_cores, "f16", 8, 10) > 2 * least_ms(tiny, slow_cores, "f16", 1, 10)
    assert (
        least_ms(tiny, slow_memory, "f16", 8, 10)
        == least_ms(tiny, slow_memory, "f16", 1, 10)
        == pytest.approx(n_bytes + 10 * cell_bytes(tiny, "f16"))
    )


def test_k_shift_and_join_agree(tiny: Model) -> None:
    """Without an adapter llama.cpp's own pieces give the same logits: the comparison is of like with like."""
    with _Sides(tiny, None, "shared", Case(2, 8, 4, 6), F32, JOIN_ONLY) as sides:
        seen = []
        first_token = sides._first_token

        def spy(ctx, prompt):  # type: ignore[no-untyped-def]
            first_token(ctx, prompt)
            seen.append(ctx.logits())

        sides._first_token = spy  # type: ignore[method-assign]
        sides.step(keep=True)
        assert seen[-1] == pytest.approx(seen[0], abs=1e-4)


def test_rows(tiny_path: Path, tmp_path: Path) -> None:
    picture = tmp_path / "b.png"
    done = pyps("bench", "--model", str(tiny_path), *SMALL, "--read", "0", "--json", "--plot", str(picture))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    rows = found["rows"]
    assert [(r["branches"], r["tokens"], r["prompt"]) for r in rows] == [(2, 8, 4), (2, 8, 5), (3, 8, 4), (3, 8, 5)]
    for row in rows:
        assert row["layout"] == "shared"
        for key in KEYS:
            low, high = row[f"{key}_spread"]
            assert 0 < low <= row[key] <= high
        assert row["join_ms"] < row["cache_ms"]
        assert row["ratio_spread"][0] <= row["ratio"] <= row["ratio_spread"][1]
        assert row["floor_bound_ms"] > 0
        assert row["batch_bound_tokens_s"] > 0
        assert row["batch_tokens_s"] > 0
        assert row["text_setting"].startswith("flash attention")
    assert found["machine"]["threads"] >= 1
    assert found["cell_bytes"] == 4 * 32 * 2 * 2
    assert found["peak_mb"] > found["model_mb"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert BenchReport.from_dict(found).to_dict() == found
    before = found | {"machine": {k: v for k, v in found["machine"].items() if not k.startswith(("read", "compute"))}}
    assert BenchReport.from_dict(before).machine.read_gb_s is None


def test_more_tokens_than_the_model_was_trained_on(tiny_path: Path) -> None:
    arguments = ["--branches", "1", "--tokens", "2100", "--prompt", "4", "--repeat", "1", "--json"]
    done = pyps("bench", "--model", str(tiny_path), *arguments)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["peak_mb"] is None
    assert found["rows"][0]["ratio"] > 0


def test_the_table_fits_a_terminal(tiny_path: Path) -> None:
    done = pyps("bench", "--model", str(tiny_path), *SMALL, "--layout", "paper")
    assert done.returncode == 0, done.stderr
    assert "Time to first token" in done.stdout
    assert "K-shift" in done.stdout
    assert "…" not in done.stdout
    assert "paper layout" in done.stdout
    assert "tokens/s" in done.stdout


def test_ctrl_c_keeps_what_is_done(tiny_path: Path) -> None:
    process = start("bench", "--model", str(tiny_path), *SMALL[:-1], "1000")
    wait_for(process, "2 x 8 tokens, prompt 4")
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped after" in errors
    assert "Traceback" not in errors + output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--branches", "x"], "Invalid value for '--branches': 'x' is not a list of whole numbers"),
        (["--branches", ""], "Invalid value for '--branches': '' is not a list of whole numbers"),
        (["--branches", "0"], "branches must be 1 to 128, not 0"),
        (["--branches", "300"], "branches must be 1 to 128, not 300"),
        (["--tokens", "-4"], "tokens must be 1 to"),
        (["--tokens", "99999999999"], "tokens must be 1 to"),
        (["--prompt", "0"], "prompt must be 1 to"),
        (["--task", "0"], "task must be 1 to"),
        (["--threads", "0"], "threads must be between"),
        (["--kv-type", "q8_0"], "cannot have q8_0 keys"),
        (["--branches", "128", "--tokens", "1000000"], "this machine has"),
        (["--plot", "nowhere/x.png"], "there is no folder nowhere"),
        (["--shape", "7b"], "'7b' is not one of"),
    ],
)
def test_mistakes(tiny_path: Path, arguments: list[str], message: str) -> None:
    done = pyps("bench", "--model", str(tiny_path), "--repeat", "1", "--tokens", "8", *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_models_that_cannot_be_joined(tmp_path: Path) -> None:
    model = Model.load(write_model(tmp_path / "m.gguf", "mamba"))
    with pytest.raises(Exception, match="cannot be joined"):
        next(measure(model, None, "shared", [Case(2, 8, 4, 6)], repeat=1))
    model.close()


def test_shapes(tmp_path: Path, smollm2_path: Path) -> None:
    path = tmp_path / "s.gguf"
    done: list[float] = []
    shape = Shape(layers=2, channels=128, feed_forward=256, heads=4, kv_heads=2, head_dim=32)
    write_shape(path, shape, smollm2_path, lambda what, fraction: done.append(fraction or 0.0))
    assert done[-1] == 1.0
    assert done == sorted(done)
    model = Model.load(path)
    assert (model.n_layer, model.n_embd, model.n_embd_kv, model.n_vocab) == (2, 128, 64, 49152)
    assert model.tokenize("Some text.") == Model.load(smollm2_path).tokenize("Some text.")
    (row,) = measure(model, None, "shared", [Case(2, 8, 4, 6)], repeat=1)
    assert row.ratio.value > 0
    model.close()
    up = next(t for t in gguf.GGUFReader(path).tensors if "ffn_up" in t.name)
    values = gguf.dequantize(up.data, up.tensor_type)
    assert 0.5 < values.std() * 128**0.5 < 2, "outputs are about as large as inputs"
    with pytest.raises(InputError, match="cannot be written"):
        write_shape(tmp_path / "no" / "s.gguf", shape, smollm2_path)
