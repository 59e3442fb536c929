"""Adapter files: what is read, what is refused, and that no file of any shape gets past us to crash llama.cpp."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.caches import fill, kl
from support.contexts import context_with
from support.tiny import mapper_metadata, write_adapter

from pyps.adapters.adapter import Adapter
from pyps.adapters.format import AdapterMetadata, read_mapper, read_metadata, write_metadata
from pyps.engine.gguf_file import open_gguf, writing
from pyps.engine.model import Model
from pyps.errors import InputError


def test_reads_mapper_lora_and_layout(tmp_path: Path, tiny: Model) -> None:
    path = write_adapter(tmp_path / "a.gguf", mapper=mapper_metadata(3), pyps__layout="paper")
    adapter = Adapter(path, tiny)
    assert adapter.mapper is not None
    assert adapter.lora
    assert adapter.layout == "paper"
    assert adapter.in_order is False
    assert adapter.warnings == []
    adapter.close()


def test_a_lora_without_mapper_and_a_mapper_without_lora(tmp_path: Path, tiny: Model) -> None:
    plain = Adapter(write_adapter(tmp_path / "lora.gguf", pyps__version=None), tiny)
    assert plain.mapper is None
    assert plain.lora
    assert plain.layout is None
    plain.close()
    bare = Adapter(write_adapter(tmp_path / "mapper.gguf", lora=False, mapper=mapper_metadata(3)), tiny)
    assert bare.mapper is not None
    assert bare.lora is None
    bare.close()


def test_stock_llama_cpp_loads_it_as_an_ordinary_lora(tmp_path: Path, tiny: Model) -> None:
    path = write_adapter(tmp_path / "a.gguf", mapper=mapper_metadata(3), pyps__layout="shared")
    handle = llama_cpp.llama_adapter_lora_init(tiny.pointer, str(path).encode())
    assert handle
    llama_cpp.llama_adapter_lora_free(handle)


def test_the_lora_is_on_in_the_contexts_that_ask_for_it(tmp_path: Path, tiny: Model) -> None:
    adapter = Adapter(write_adapter(tmp_path / "a.gguf"), tiny)
    logits = []
    for use in (None, adapter, None):
        with context_with(use, tiny, 256) as ctx:
            fill(ctx, 0, 10)
            ctx.prefill(0, [1])
            logits.append(ctx.logits())
    adapter.close()
    assert kl(logits[0], logits[1]) > 1e-3
    assert (logits[0] == logits[2]).all()


def test_another_base_of_the_same_shape_is_a_warning(tmp_path: Path, tiny: Model) -> None:
    adapter = Adapter(write_adapter(tmp_path / "a.gguf", pyps__base__name="somebody-else"), tiny)
    assert "somebody-else" in adapter.warnings[0]
    adapter.close()


def test_keys_of_a_later_version_are_ignored(tmp_path: Path, tiny: Model) -> None:
    path = write_adapter(tmp_path / "a.gguf", mapper=mapper_metadata(3), pyps__colour="blue", pyps__mapper__depth=2)
    adapter = Adapter(path, tiny)
    assert adapter.mapper is not None
    assert adapter.warnings == []
    adapter.close()


def test_metadata_is_read_as_it_was_written(tmp_path: Path) -> None:
    mapper = read_mapper(mapper_metadata(3))
    assert mapper is not None
    metadata = AdapterMetadata(
        arch="llama",
        alpha=0.5,
        layout="paper",
        in_order=True,
        mapper=mapper,
        base_name="tiny",
        base_fingerprint="0123456789abcdef",
    )
    for wanted in (metadata, replace(metadata, layout=None, in_order=False, mapper=None, base_name="")):
        with writing(tmp_path / "a.gguf", "llama") as writer:
            write_metadata(writer, wanted)
        with open_gguf(tmp_path / "a.gguf", "adapter") as reader:
            got = read_metadata(reader)
        assert replace(got, mapper=None) == replace(wanted, mapper=None)
        assert (got.mapper is None) == (wanted.mapper is None)
        if got.mapper:
            assert got.mapper.features == mapper.features
            assert all((getattr(got.mapper, x) == getattr(mapper, x)).all() for x in ("w1", "b1", "w2", "b2"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "qwen3"}, "made for 'qwen3' models"),
        ({"n_embd": 48}, "cannot use this LoRA.*shape"),
        ({"n_layers": 9}, "cannot use this LoRA.*does not exist"),
        ({"general__type": "model"}, "not an adapter"),
        ({"general__type": None}, "not an adapter"),
        ({"adapter__type": "control_vector"}, "adapter.type"),
        ({"adapter__lora__alpha": 8}, "adapter.lora.alpha must be of type FLOAT32"),
        ({"adapter__lora__alpha": None}, "adapter.lora.alpha is missing"),
        ({"general__type": 1}, "general.type must be of type STRING"),
        ({"pyps__version": 2}, "pyps.version is 2"),
        ({"pyps__base__name": 5}, "pyps.base.name must be of type STRING"),
        ({"pyps__layout": "sideways"}, "pyps.layout is 'sideways'"),
        ({"pyps__in_order": "yes"}, "pyps.in_order must be true or false"),
        ({"mapper": {**mapper_metadata(1), "pyps.mapper.w2": [0.5]}}, r"w2 must be \[4, 32\]"),
    ],
)
def test_refused(tmp_path: Path, tiny: Model, arguments: dict[str, Any], message: str) -> None:
    path = write_adapter(tmp_path / "a.gguf", **arguments)
    with pytest.raises(InputError, match=message) as caught:
        Adapter(path, tiny)
    assert str(path) in str(caught.value)


def test_other_files_are_refused(tmp_path: Path, tiny: Model, tiny_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("GGUH, nearly")
    for path, message in (
        (tmp_path / "nowhere.gguf", "no such adapter file"),
        (tmp_path, "cannot read the adapter"),
        (text, "not a GGUF file"),
        (tiny_path, "not an adapter"),
    ):
        with pytest.raises(InputError, match=message):
            Adapter(path, tiny)

    odd = tmp_path / "odd.gguf"
    for name, message in (("blk.0.attn_q.weight.lora_a", "LoRA tensors are F32"), ("x", "'x' is not part of a LoRA")):
        with writing(odd, "llama") as writer:
            writer.add_type("adapter")
            writer.add_string("adapter.type", "lora")
            writer.add_float32("adapter.lora.alpha", 1.0)
            writer.add_tensor(name, np.zeros((4, 64), np.int32))
        with pytest.raises(InputError, match=message):
            Adapter(odd, tiny)

    cut = write_adapter(tmp_path / "cut.gguf")
    cut.write_bytes(cut.read_bytes()[:-40])  # more than the padding at its end
    with pytest.raises(InputError, match="cut off"):
        Adapter(cut, tiny)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_end_in_our_exception_or_load(tmp_path: Path, tiny: Model, data: st.DataObject) -> None:
    """Cut anywhere, or with bytes of the header overwritten: a crash would take the test process with it."""
    path = tmp_path / "a.gguf"
    if not path.exists():
        write_adapter(path, mapper=mapper_metadata(1), n_layers=1)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, min(2500, len(content) - 1)))] = data.draw(st.integers(0, 255))
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(content)
    with contextlib.suppress(InputError):
        Adapter(damaged, tiny).close()
