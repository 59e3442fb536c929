"""Loading models and their tokens."""

import itertools
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.contexts import context_with
from support.tiny import write_adapter, write_model

from pyps import ForkJoin
from pyps.adapters.adapter import Adapter
from pyps.engine.context import Context
from pyps.engine.model import Closeable, Model
from pyps.errors import InputError, MachineError


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fraction=st.floats(0, 0.999))
def test_a_model_cut_off_anywhere_ends_in_our_exception(tmp_path: Path, tiny_path: Path, fraction: float) -> None:
    content = tiny_path.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises(InputError, match=r"GGUF file|cannot load"):
        Model.load(cut)


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ue001\ue002")))
def test_any_text_survives_tokens(tiny: Model, text: str) -> None:
    """But for the two private characters that mark control tokens in data (as_data)."""
    tokens = tiny.tokenize(text)
    assert b"".join(tiny.piece(t, special=True) for t in tokens) == text.encode()


def test_the_text_of_tokens(tiny: Model) -> None:
    tokens = tiny.tokenize("Zoë<|im_end|>")
    assert tiny.text(tokens) == "Zoë"
    assert tiny.text([]) == ""
    assert tiny.text(tokens[:3]) == "Zo\ufffd", "the vocabulary is bytes: half a letter is left"


def test_text_that_is_not_unicode_does_not_reach_llama_cpp(tiny: Model) -> None:
    """Lone surrogates come from file names and arguments that are not UTF-8."""
    assert b"".join(map(tiny.piece, tiny.tokenize("a\udce9b\ud800"))) == b"a?b?"


def test_closed(tiny_path: Path) -> None:
    model = Model.load(tiny_path)
    ctx = Context(model, 256)
    ctx.close()
    ctx.close()
    with pytest.raises(InputError, match="closed"):
        ctx.prefill(0, [1])
    with pytest.raises(InputError, match="closed"):
        ctx.remove(0)
    model.close()
    model.close()
    with pytest.raises(InputError, match="closed"):
        Context(model, 256)


def test_closing_in_any_order(tiny_path: Path, tmp_path: Path) -> None:
    """What is freed too late or twice would take the process with it."""
    path = write_adapter(tmp_path / "a.gguf")
    for order in itertools.permutations(("model", "adapter", "context")):
        model = Model.load(tiny_path)
        adapter = Adapter(path, model)
        context = context_with(adapter, model, 256)
        parts: dict[str, Closeable] = {"model": model, "adapter": adapter, "context": context}
        for name in order:
            parts[name].close()
        with pytest.raises(InputError, match="closed"):
            context.prefill(0, [1])


def test_a_stream_outlives_its_fork_join(tiny_path: Path) -> None:
    fj = ForkJoin.from_pretrained(str(tiny_path), read=0)
    events = fj.stream("Hi", ["a", "b"])
    next(events)
    fj.close()
    with pytest.raises(InputError, match="closed"):
        list(events)  # what the last step has computed may still come


def test_a_borrowed_model_that_is_gone(tiny_path: Path) -> None:
    llama = llama_cpp.Llama(str(tiny_path), verbose=False)
    fj = ForkJoin(llama=llama, read=0)
    events = fj.stream("Hi", ["a", "b"])
    next(events)
    llama.close()
    with pytest.raises(InputError, match="closed"):
        list(events)
    with pytest.raises(InputError, match="closed"):
        fj.run("Hi", ["a"])
    fj.close()
    with pytest.raises(InputError, match="closed"):
        ForkJoin(llama=llama, read=0)


def test_contexts_that_cannot_be(tiny: Model) -> None:
    for arguments, message in (
        ((0,), "not possible"),
        ((2**31,), "not possible"),
        ((256, 0), "1 to 256 sequences"),
        ((256, 257), "1 to 256 sequences"),
    ):
        with pytest.raises(InputError, match=message):
            Context(tiny, *arguments)
    with pytest.raises(InputError, match="threads"):
        Context(tiny, 256, threads=0)
    with pytest.raises(InputError, match=r"need .* GB; this machine has"):
        Context(tiny, 2**30)
    with Context(tiny, 256) as ctx:
        with pytest.raises(InputError, match="cannot be decoded"):
            ctx.prefill(0, [10**6])
        with pytest.raises(InputError, match="cannot be decoded"):
            ctx.prefill(0, [-1])
        with pytest.raises(InputError, match="full"):
            ctx.prefill(0, [1] * 257)
        with pytest.raises(InputError, match="no logits"):
            ctx.logits(3)
        with pytest.raises(InputError, match="does not exist"):
            ctx.copy(0, 1)


@pytest.mark.parametrize(
    ("arch", "key", "value", "words"),
    [
        ("gemma3", "gemma3__rope__dimension_count", 48, "n_dims <= ne0"),  # more than a head has: found when computing
        ("qwen3moe", "qwen3moe__expert_used_count", 9, "n_expert_used"),  # more than there are: found when loading
    ],
)
def test_files_on_which_llama_cpp_aborts(tmp_path: Path, arch: str, key: str, value: int, words: str) -> None:
    metadata: dict[str, Any] = {key: value}
    path = write_model(tmp_path / "m.gguf", arch, **metadata)
    with pytest.raises(InputError, match=f"m.gguf: the file is damaged: .*{words}"):
        Model.load(path)


def test_a_trial_that_the_system_kills_is_the_machines_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = tmp_path / "killed"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr("pyps.engine.trial._PROGRAM", killed)
    with pytest.raises(MachineError, match="the system killed a trial with it, for want of memory"):
        Model.load(write_model(tmp_path / "m.gguf"))


def test_a_good_file_is_tried_once(smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYPS_CACHE", str(tmp_path))
    for _ in range(2):
        Model.load(smollm2_path).close()
    assert len(list((tmp_path / "tried").iterdir())) == 1
    monkeypatch.setattr("pyps.engine.trial._PROGRAM", tmp_path / "missing")
    Model.load(smollm2_path).close()


def test_a_closed_model_raises_whatever_is_asked(tiny_path: Path) -> None:
    """llama.cpp would read freed memory."""
    model = Model.load(tiny_path)
    model.close()
    for ask in (
        lambda: model.tokenize("a"),
        lambda: model.tokenize("a", start=True),
        lambda: model.piece(1),
        lambda: model.text([1]),
        lambda: model.ends(1),
        lambda: model.as_data("a"),
        lambda: model.render_chat([{"role": "user", "content": "a"}]),
        lambda: model.fingerprint,
        model.check_generates,
    ):
        with pytest.raises(InputError, match="the model is closed"):
            ask()
