"""Branches that are kept in memory or in files, and joined later."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from support.caches import read
from support.tiny import HEAD_DIM, write_model

from pyps import ForkJoin, InputError, Sampling
from pyps.cli.main import main
from pyps.engine import native
from pyps.engine.context import Context
from pyps.engine.join import Span, join
from pyps.engine.positions import rotated_layers
from pyps.forkjoin.slots import load_slots, read_slots

TASK = "Which database should a small desktop app use?"
BRANCHES = ["Argue for SQLite.", "Argue for PostgreSQL.", "Argue for DuckDB."]
GREEDY = Sampling(temperature=0, max_tokens=24)
LONG = replace(GREEDY, ignore_eos=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path) -> Path:
    path = tmp_path_factory.mktemp("slots") / "tiny.pyps"
    with ForkJoin.from_pretrained(str(tiny_path), read=0) as fj:
        fj.run(TASK, BRANCHES, sampling=LONG, save=path)
    return path


@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "q8_0/f16", "bf16"])
def test_a_file_joins_as_the_branches_themselves_do(smollm2_path: Path, tmp_path: Path, kv_type: str) -> None:
    """In another process: the same answer, token for token."""
    path = tmp_path / "notes.pyps"
    with ForkJoin.from_pretrained(str(smollm2_path), kv_type=kv_type, read=0) as fj:
        result = fj.run(TASK, BRANCHES, sampling=GREEDY, save=path)
    program = (
        "import sys; from pyps import *\n"
        "with ForkJoin.from_pretrained(sys.argv[1], kv_type=sys.argv[2], read=0) as fj, "
        "fj.load(sys.argv[3]) as branches:\n"
        "    result = fj.run(sys.argv[4], join=branches, sampling=Sampling(temperature=0, max_tokens=24))\n"
        "    print(result.answer, end='')\n"
    )
    arguments = [sys.executable, "-c", program, str(smollm2_path), kv_type, str(path), TASK]
    process = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert process.stdout == result.answer


@pytest.mark.usefixtures("either_kernels")
@pytest.mark.parametrize(
    ("arch", "kv_type"),
    [("llama", "f16"), ("gemma3", "f16"), ("smollm3", "f32"), ("phi3", "f16"), ("gemma3", "f32"),
     ("llama-64", "q8_0/f16"), ("gemma3-64", "q8_0"), ("llama-64", "q4_0")],
)  # fmt: skip
def test_every_cell_survives(tmp_path: Path, arch: str, kv_type: str) -> None:
    """Bytes and positions of all layers, V transposed or not, a sliding window or not."""
    name, _, head_dim = arch.partition("-")
    path, model = tmp_path / "b.pyps", write_model(tmp_path / "m.gguf", name, head_dim=int(head_dim or HEAD_DIM))
    with (
        ForkJoin.from_pretrained(str(model), kv_type=kv_type, read=0) as fj,
        fj.fork(TASK, BRANCHES, sampling=LONG) as forked,
    ):
        fj.save(path, forked)
        with fj.load(path) as loaded:
            assert loaded.results == forked.results
            for a, b in zip(forked.cached, loaded.cached, strict=True):
                assert (a.spans, a.tokens) == (b.spans, b.tokens)
                ((start, end),) = a.spans
                for layer in range(len(rotated_layers(fj.model))):
                    before, _, *old = native.read(forked.ctx.address, a.seq, layer)
                    after, _, *new = native.read(loaded.ctx.address, b.seq, layer)
                    assert after == before[start:end] == list(range(start, end))
                    assert all((x[start:end] == y).all() for x, y in zip(old, new, strict=True))


def test_joined_into_contexts_of_another_type(tmp_path: Path) -> None:
    """Saved in one type, joined in another, with V in another order: as if joined from the file's own type."""
    path = tmp_path / "b.pyps"
    model = str(write_model(tmp_path / "m.gguf", head_dim=64))
    with ForkJoin.from_pretrained(model, kv_type="f32", read=0) as fj:
        fj.run(TASK, BRANCHES, sampling=LONG, save=path)
    for kv_type in ("f16", "q8_0"):
        with ForkJoin.from_pretrained(model, kv_type=kv_type, read=0) as fj, fj.load(path) as branches:
            assert fj.run(TASK, join=branches, sampling=LONG).tokens.joined == 3 * 24


def test_arrays_are_views_of_the_file(saved: Path, tiny_path: Path) -> None:
    slots = read_slots(saved)
    assert len(slots.tokens) == 3 * 24
    k, v = slots.layers[0]
    assert isinstance(k, np.memmap)
    assert isinstance(v, np.memmap)
    assert k.dtype == np.float16
    assert not k.flags.writeable
    with ForkJoin.from_pretrained(str(tiny_path), read=0) as fj, fj.load(saved) as branches:
        got = read(branches.ctx, 1, 0)
        assert (got.k == k[slots.cells(1)].astype(np.float32)).all()
        assert slots.tokens[slots.cells(1)].tolist() == list(branches.cached[1].tokens)


def test_old_and_new_branches_in_one_answer(tiny_path: Path, saved: Path) -> None:
    """Files, branches in memory, an answer with its cache, and new ones; in this order, each as often as one likes."""
    with ForkJoin.from_pretrained(str(tiny_path), read=0) as fj, fj.load(saved) as old:
        first = fj.run(TASK, ["Be short."], join=old, sampling=LONG, keep=True)
        assert [b.name for b in first.branches] == ["branch-1", "branch-2", "branch-3", "branch-4"]
        assert first.tokens.joined == 4 * 24
        assert first.kept is not None
        assert first.kept.results[0].text == first.answer
        assert "kept" not in first.to_dict()
        with fj.fork(TASK, ["Be long."], sampling=LONG) as new, first.kept as answer:
            second = fj.run(TASK, join=[old, answer, new], sampling=LONG, compare=True)
            again = fj.run(TASK, join=[old, answer, new], sampling=LONG)
        assert second.tokens.joined == 5 * 24
        assert second.answer == again.answer
        assert second.compare is not None
        with pytest.raises(InputError, match="closed"):
            fj.run(TASK, join=new, sampling=LONG)


def test_sequential_runs_equal_one_run(tiny_path: Path) -> None:
    """Joined from three contexts or from one: the same cells."""
    with ForkJoin.from_pretrained(str(tiny_path), read=0) as fj:
        at_once = fj.run(TASK, BRANCHES, sampling=LONG)
        seeds = zip(BRANCHES, range(3), strict=True)
        forks = [fj.fork(TASK, [b], sampling=replace(LONG, seed=i)) for b, i in seeds]
        assert fj.run(TASK, join=forks, sampling=LONG).answer == at_once.answer


def test_a_tree(tiny_path: Path) -> None:
    """Four branches, two synthesizers, one: the answers' own caches are what is joined."""
    with ForkJoin.from_pretrained(str(tiny_path), read=0) as fj:
        halves = [fj.run(TASK, pair, sampling=LONG, keep=True) for pair in (["a", "b"], ["c", "d"])]
        answers = [half.kept for half in halves if half.kept]
        top = fj.run(TASK, join=answers, sampling=LONG)
        assert [b.text for b in top.branches] == [half.answer for half in halves]
        assert top.tokens.joined == 2 * 24


def test_refused(tmp_path: Path, tiny_path: Path, saved: Path) -> None:
    other = write_model(tmp_path / "other.gguf", "qwen3")
    with ForkJoin.from_pretrained(str(other), read=0) as fj, pytest.raises(InputError, match="mean nothing to other"):
        fj.load(saved)
    with (
        ForkJoin.from_pretrained(str(tiny_path), read=0) as fj,
        ForkJoin.from_pretrained(str(tiny_path), read=0) as twin,
    ):
        with twin.load(saved) as branches, pytest.raises(InputError, match="another model's"):
            fj.run(TASK, join=branches)
        with pytest.raises(InputError, match="only Branches can be joined"):
            fj.run(TASK, join=["x"])  # type: ignore[list-item]
        with pytest.raises(InputError, match="no folder"):
            fj.run(TASK, BRANCHES, save=tmp_path / "nowhere" / "x.pyps")
        with pytest.raises(InputError, match="is a folder"):
            fj.run(TASK, BRANCHES, save=tmp_path)
        with twin.load(saved) as branches, pytest.raises(InputError, match="no folder"):
            twin.save(tmp_path / "nowhere" / "x.pyps", branches)
        with pytest.raises(InputError, match="no branches to save"):
            fj.save(tmp_path / "x.pyps", [])
        with pytest.raises(InputError, match="use them with mode 'cache'"):
            fj.run(TASK, BRANCHES, mode="text", keep=True)
        with fj.load(saved) as branches, Context(fj.model, 64) as small, pytest.raises(InputError, match="free of"):
            small.prefill(0, [1] * 200)
            join(branches.ctx, small, [Span(i, *c.spans[0], 0) for i, c in enumerate(branches.cached)])
    with pytest.raises(InputError, match="no such branches file"):
        read_slots(tmp_path / "nowhere.pyps")
    with pytest.raises(InputError, match="hash"):
        read_slots(tiny_path)
    assert list(tmp_path.iterdir()) == [other], "nothing is left behind"


def test_a_full_disk_leaves_no_file(tmp_path: Path, tiny_path: Path) -> None:
    program = (
        "import resource, sys; from pyps import *\n"
        "sampling = Sampling(max_tokens=64, seed=1, ignore_eos=True)\n"  # more than the limit, whatever the model says
        "with ForkJoin.from_pretrained(sys.argv[1]) as fj, fj.fork('Go', ['a', 'b'], sampling=sampling) as branches:\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"  # of any one file; writing more fails
        "    fj.save(sys.argv[2], branches)\n"
    )
    arguments = [sys.executable, "-c", program, str(tiny_path), str(tmp_path / "x.pyps")]
    process = subprocess.run(arguments, capture_output=True, text=True)
    assert "MachineError" in process.stderr
    # NumPy's error has no reason; the system's has. It depends on the branches' lengths which of them is met first.
    assert re.search(r"/x\.pyps: cannot be written: (is the disk full\?|File too large)", process.stderr)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kv_type", ["f16", "bf16", "f32", "q8_0", "q4_0"])
def test_values_that_no_model_computes(tmp_path: Path, kv_type: str) -> None:
    """llama.cpp's samplers are not made for logits that are no numbers."""
    path = tmp_path / "x.pyps"
    model = write_model(tmp_path / "m.gguf", head_dim=64)
    with ForkJoin.from_pretrained(str(model), kv_type=kv_type, read=0) as fj:
        fj.run(TASK, ["a"], sampling=LONG, save=path)
    good = path.read_bytes()
    row = read_slots(path).layers[1][0][3].tobytes()
    at = good.index(row)
    size = 4 if kv_type == "f32" else 2  # of quantised rows it is the first block's scale
    values = {"f16": ("7e00", "7c00", "fc00", "7bff"), "bf16": ("7fc0", "ff80", "47ff")}
    for bits in values.get(kv_type, ("7fc00000", "ff800000", "47ffffff") if kv_type == "f32" else values["f16"]):
        body = bytearray(good[:-32])
        body[at : at + size] = bytes.fromhex(bits)[::-1]
        path.write_bytes(bytes(body) + hashlib.sha256(body).digest())
        with pytest.raises(InputError, match="that no model computes"):
            read_slots(path)


def damage(data: bytes, rng: random.Random) -> bytes:
    """Return data with bits turned, bytes set, cut off or doubled, mostly where names, types and sizes are."""
    head = data.find(b"blk.0.k") + 600
    body = bytearray(data[:-32])
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(min(head, len(body)) if rng.random() < 0.9 else len(body))
        kind = rng.randrange(4)
        if kind == 0:
            body[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            body[at : at + 8] = rng.choice([0, 1, 2**31, 2**63, 2**64 - 1, rng.getrandbits(64)]).to_bytes(8, "little")
        elif kind == 2:
            del body[at : at + rng.randint(1, 64)]
        else:
            body = body[:at] if rng.random() < 0.3 else body[:at] + body[at // 2 : at] + body[at:]
        if not body:
            break
    return bytes(body)


def test_ten_thousand_damaged_files(tmp_path: Path) -> None:
    """An exception of ours each time, or branches that can be joined; never a crash."""
    rng = random.Random(1)
    path = tmp_path / "x.pyps"
    refused = loaded = 0
    model = write_model(tmp_path / "m.gguf", n_layers=1)  # a small file is read faster
    with ForkJoin.from_pretrained(str(model), read=0) as fj:
        fj.run(TASK, ["a", "b"], sampling=replace(LONG, max_tokens=5), save=path)
        data = path.read_bytes()
        for i in range(10_000):
            body = damage(data, rng)
            # an attacker writes the right hash
            path.write_bytes(body + (hashlib.sha256(body).digest() if i % 10 else data[-32:]))
            try:
                slots = read_slots(path)
                with load_slots(slots, fj.model) as branches:
                    loaded += 1
                    if loaded % 100 == 0:
                        fj.run(TASK, join=branches, sampling=replace(LONG, max_tokens=2))
            except InputError:
                refused += 1
    assert refused > 5_000
    assert loaded > 300


def test_the_command_line(tmp_path: Path, tiny_path: Path) -> None:
    path, run = tmp_path / "notes.pyps", CliRunner()
    common = ["-m", str(tiny_path), "--max-tokens", "12", "--temperature", "0"]
    process = run.invoke(main, ["run", TASK, "-b", "a", "-b", "b", "--save", str(path), *common])
    assert process.exit_code == 0, process.output
    assert "the branches are kept in" in process.stderr
    shown = run.invoke(main, ["slots", str(path)])
    assert shown.exit_code == 0
    assert shown.stdout.startswith("2 branches of")
    shown_as_json = json.loads(run.invoke(main, ["slots", str(path), "--json"]).stdout)
    assert [b["prompt"] for b in shown_as_json["branches"]] == ["a", "b"]
    joined = run.invoke(main, ["run", TASK, "--join", str(path), "-j", str(path), "-b", "c", "--json", *common])
    assert joined.exit_code == 0, joined.output
    assert len(json.loads(joined.stdout)["branches"]) == 5
    path.write_bytes(path.read_bytes()[:-1])
    broken = run.invoke(main, ["run", TASK, "--join", str(path), *common])
    assert (broken.exit_code, "damaged or cut off" in broken.stderr) == (2, True)
    nothing = run.invoke(main, ["run", TASK, "--join", str(path), "--save", str(path), *common])
    assert nothing.exit_code == 2


def test_stray_bytes_on_the_command_line(tmp_path: Path, tiny_path: Path) -> None:
    """Bytes that are not Unicode are replaced in what is saved, in JSON, and in what is printed."""
    command: list[str | bytes] = [
        sys.executable,
        "-m",
        "pyps.cli",
        "run",
        "Go",
        "-b",
        b"caf\xe9",
        "-m",
        str(tiny_path),
        "--max-tokens",
        "4",
    ]
    path = tmp_path / "x.pyps"
    for more in (["--save", str(path)], ["--json"], []):
        process = subprocess.run(
            [*command, *more], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
        )
        assert process.returncode == 0, process.stderr
    assert read_slots(path).branches[0].prompt == "caf?"
