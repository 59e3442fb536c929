"""pyps eval: its measures are what training's forward pass computes, and the command shows all modes."""

import json
import signal
from pathlib import Path

import pytest
from support.tiny import mapper_metadata, write_adapter
from test_cli import pyps, start, wait_for
from test_train_synthesis import twin

from pyps.adapters.adapter import Adapter
from pyps.data.example import read_examples
from pyps.data.tokens import add_answers, lay_out
from pyps.engine.model import Model
from pyps.forkjoin import synthesis
from pyps.measure.evaluate import evaluate, interval, modes_of, summarise

EXAMPLES = [
    {"task": "Who?", "branches": [{"text": "Ann."}, {"text": "Not Bob."}], "family": "f", "answer": ["x"]},
    {"task": "Where is it?", "branches": [{"prompt": "Look.", "text": "In Rome."}], "family": "g"},
    {"task": "Why?", "branches": [{}, {"prompt": "Guess."}], "family": "g"},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(e) + "\n" for e in EXAMPLES))
    return path


@pytest.mark.parametrize("layout", ["shared", "paper"])
def test_measures_are_those_of_pytorch(tmp_path: Path, data: Path, layout: str) -> None:
    _, synthesis, path, adapter_path = twin("llama", tmp_path)
    model = Model.load(path)
    adapter = Adapter(adapter_path, model)
    examples = read_examples([data])
    outcomes = list(evaluate(model, adapter, examples, layout, kv_type="f32"))
    names = [mode.name for mode in modes_of(adapter, None)]
    assert [o.mode for o in outcomes] == names * 3
    for i, example in enumerate(examples):
        mine = {o.mode: o for o in outcomes[len(names) * i : len(names) * (i + 1)]}
        tokens = add_answers(model, lay_out(model, layout, [example], seed=i))
        student, teacher, _, _ = (t.detach() for t in synthesis(tokens))
        kl = (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1)
        assert mine["cache, adapter"].kl == pytest.approx(float(kl.mean()), rel=1e-2)
        assert mine["cache, adapter"].kl_first == pytest.approx(float(kl[0]), rel=1e-2)
        same = (student.argmax(-1) == teacher.argmax(-1)).float().mean()
        assert mine["cache, adapter"].agreement == pytest.approx(float(same))
        assert mine["text"].kl == 0
        assert mine["text"].agreement == 1
        different = len(names) - (len(example.branches) == 1)  # one branch is the same backwards
        assert len({round(o.kl, 6) for o in mine.values()}) == different, "every mode is another computation"
        assert (mine["text"].right is None) == (not example.answer)
    model.close()


def test_answers_longer_than_a_batch(data: Path, tiny: Model) -> None:
    outcomes = list(evaluate(tiny, None, read_examples([data])[:1], "shared", max_tokens=600))
    assert len(tiny.tokenize(outcomes[0].answer)) > 512, "or this shows nothing"
    assert [o.mode for o in outcomes] == ["text", "text, backwards", "cache"]
    assert outcomes[2].kl > 0


def test_outputs_that_do_not_fit_one_after_the_other(tmp_path: Path, data: Path, tiny: Model) -> None:
    """They are joined at the branch point, as a run does it: with an adapter that asks for the other."""
    branches = [{"text": "Yes." + " \n" * n} for n in (400, 401, 402)]
    data.write_text(json.dumps({"task": "Is it?", "branches": branches}) + "\n")
    (tokens,) = lay_out(tiny, "shared", read_examples([data]), seed=0)
    assert tokens.n_cells > tiny.n_ctx_train, "or this shows nothing; pasted texts are stripped, and do fit"
    scores = []
    for in_order in (False, True):
        path = write_adapter(tmp_path / f"{in_order}.gguf", pyps__in_order=in_order, mapper=mapper_metadata(1))
        adapter = Adapter(path, tiny)
        scores.append([o.kl for o in evaluate(tiny, adapter, read_examples([data]), "shared", max_tokens=4)])
        adapter.close()
    assert scores[0] == scores[1]


@pytest.mark.usefixtures("kernels_off")
def test_long_prompts_are_read_apart(data: Path, tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a run does it; the measures hardly change."""
    measures = []
    for least in (1, 1000):
        monkeypatch.setattr(synthesis, "_LONG_PROMPT", least)
        outcomes = list(evaluate(tiny, None, read_examples([data]), "paper", kv_type="f32", max_tokens=8))
        measures.append([(o.kl, o.kl_first) for o in outcomes])
    for apart, together in zip(*measures, strict=True):
        assert apart == pytest.approx(together, rel=1e-2, abs=1e-4)


def test_intervals() -> None:
    assert interval(0, 0) == (0, 1)
    assert interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert interval(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert interval(10, 10) == pytest.approx((0.7225, 1), abs=1e-4)


def test_the_command(tmp_path: Path, data: Path) -> None:
    _, _, path, adapter = twin("llama", tmp_path)
    words = ["eval", str(data), "--model", str(path)]
    done = pyps(*words, "--adapter", str(adapter), "--json", "--plot", str(tmp_path / "p.png"), "--limit", "1")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["adapter"] == str(adapter)
    assert found["layout"] == "shared"
    assert found["examples"] == 2
    model = Model.load(path)
    names = [mode.name for mode in modes_of(Adapter(adapter, model), None)]
    model.close()
    assert list(found["modes"]) == names
    assert len(found["outcomes"]) == 2 * len(names)
    text = found["modes"]["text"]
    assert text["kl"] == 0
    assert text["accuracy"] == 0
    assert text["families"]["g"]["accuracy"] is None
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")

    plain = pyps(*words, "--adapter", "none")
    assert plain.returncode == 0, plain.stderr
    assert [line.split("  ")[0] for line in plain.stdout.splitlines()[3:6]] == ["text", "text, backwards", "cache"]
    assert "adapter" not in plain.stdout


def test_the_built_in_suite(smollm2_path: Path) -> None:
    done = pyps("eval", "--limit", "1", "--json", "--adapter", "none")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["examples"] == 6
    assert 0 < found["modes"]["cache"]["kl"] < 5
    assert found["modes"]["cache"]["ttft_ms"] > 0


def test_ctrl_c_ends_with_what_is_done() -> None:
    process = start("eval", "--adapter", "none", "--json")
    wait_for(process, "evaluating")  # said after the first example
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "of 240 examples" in errors
    found = json.loads(output)
    assert 1 <= found["examples"] < 240
    assert found["modes"]["cache"]["examples"] == found["examples"]


def test_mistakes(tmp_path: Path, data: Path, tiny_path: Path) -> None:
    for words, message in (
        (["--model", str(tmp_path / "no.gguf")], "no such model file"),
        (["--model", str(tiny_path), "--adapter", str(tmp_path / "no.gguf")], "no such adapter file"),
        (["--model", str(tiny_path), "--plot", str(tmp_path / "none" / "p.png")], "cannot be written"),
        (["--model", str(tiny_path), "--plot", str(tmp_path / "p.xyz")], "PNG, SVG or PDF"),
        (["--model", str(tiny_path), "--limit", "0"], "Invalid value"),
    ):
        done = pyps("eval", str(data), *words)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
    long = {"task": "word " * 3000, "branches": [{"text": "x"}]}
    data.write_text(json.dumps(long) + "\n")
    done = pyps("eval", str(data), "--model", str(tiny_path))
    assert done.returncode == 2, done.stderr
    assert "was trained on 2,048" in done.stderr


def test_summaries() -> None:
    assert summarise([]) == {}
