"""Training's forward pass computes what the oracle and the runtime compute, and its gradients are right."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from support.contexts import context_with
from support.oracle import Oracle
from support.tiny import mapper_metadata, write_adapter, write_model
from test_oracle import MODELS

from pyps.adapters.adapter import Adapter
from pyps.adapters.format import AdapterMetadata, read_mapper
from pyps.adapters.mapper import Mapper
from pyps.convert.lora import BaseShape, read_adapter
from pyps.convert.lora import write_adapter as export
from pyps.data.tokens import TokenExample
from pyps.engine.context import Context, Token
from pyps.engine.join import Span, join
from pyps.engine.model import Model
from pyps.engine.positions import rotated_layers
from pyps.train.cache_mapper import CacheMapper
from pyps.train.synthesis import Synthesis


def tokens(n: int, seed: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, 250, n)]


def example(
    seed: int, lengths: list[int], prefix: int = 11, shared: bool = True, in_order: bool = False
) -> TokenExample:
    return TokenExample(
        prefix=tokens(prefix, seed),
        branches=[(tokens(3 + i, seed + i), tokens(n, seed + 10 + i)) for i, n in enumerate(lengths)],
        branch_point=prefix if shared else 0,
        synthesizer=tokens(7, seed + 20),
        pasted=tokens(40, seed + 21),
        answer=tokens(6, seed + 22),
        in_order=in_order,
    )


BATCH = [
    example(0, [24, 7, 31]),
    example(50, [5]),
    example(90, [12, 12], shared=False),
    example(120, [9, 30, 4], in_order=True),
]


def twin(name: str, folder: Path) -> tuple[Oracle, Synthesis, Path, Path]:
    """A tiny model with an adapter: the oracle's, and training's, with the same weights."""
    options = dict(MODELS[name])
    path = write_model(folder / "m.gguf", **options)
    shape = {key: options[key] for key in ("arch", "n_layers") if key in options}
    adapter = write_adapter(folder / "a.gguf", mapper=mapper_metadata(4), **shape)
    oracle = Oracle(path, adapter)
    metadata, lora = read_adapter(adapter, BaseShape(options["arch"], oracle.n_layers, 4, 2))
    targets = sorted({module.rpartition(".")[2] for module in lora})
    config = peft.LoraConfig(r=4, lora_alpha=int(metadata.alpha), target_modules=targets, task_type="CAUSAL_LM")
    model: Any = peft.get_peft_model(Oracle(path, adapter)._base, config)
    for module, (a, b) in lora.items():
        layer = model.get_base_model().get_submodule(module)
        layer.lora_A["default"].weight.data = torch.from_numpy(a.copy())
        layer.lora_B["default"].weight.data = torch.from_numpy(b.copy())
    mapper = read_mapper(mapper_metadata(4))
    assert mapper
    return oracle, Synthesis(model, CacheMapper.from_runtime(mapper)), path, adapter


def by_the_oracle(oracle: Oracle, mapper: Mapper, e: TokenExample) -> tuple[np.ndarray, np.ndarray]:
    """Student's and teacher's logits of the answer."""
    spans = []
    for prompt, output in e.branches:
        start = len(e.prefix) + len(prompt)
        spans.append(oracle.encode([*e.prefix, *prompt, *output], (start, start + len(output))))
    head = oracle.encode(e.prefix, (0, e.branch_point)) if e.branch_point else None
    coefficients = mapper.coefficients([len(o) for _, o in e.branches], oracle.n_layers)
    joined = oracle.join(head, spans, coefficients, e.in_order)
    n = len(e.answer)
    student = oracle.synthesize(joined, [*e.synthesizer, *e.answer[:-1]], lora=True)
    teacher = oracle.plain([*e.prefix, *e.pasted, *e.answer[:-1]], lora=False)
    return student[-n:], teacher[-n:]


@pytest.mark.parametrize("name", ["llama", "llama-3", "qwen2", "qwen3", "smollm3", "phi3", "gemma3"])
def test_it_computes_what_the_oracle_computes(tmp_path: Path, name: str) -> None:
    oracle, synthesis, _, _ = twin(name, tmp_path)
    student, teacher, targets, which = synthesis(BATCH)
    mapper = synthesis.mapper.to_runtime()
    for i, e in enumerate(BATCH):
        want_student, want_teacher = by_the_oracle(oracle, mapper, e)
        assert targets[which == i].tolist() == e.answer
        np.testing.assert_allclose(student[which == i].detach().numpy(), want_student, rtol=0, atol=2e-4)
        np.testing.assert_allclose(teacher[which == i].numpy(), want_teacher, rtol=0, atol=2e-4)


def test_the_mapper_is_the_runtimes() -> None:
    for features in (("length", "num_agents", "layer"), ("length",), ()):
        mapper = read_mapper(mapper_metadata(7, features=features) | {"pyps.mapper.features": list(features)})
        assert mapper
        lengths = [3, 50, 7]
        got: torch.Tensor = CacheMapper.from_runtime(mapper)(torch.tensor(lengths), torch.tensor([3, 3, 3]), 5)
        want = mapper.coefficients(lengths, 5)
        assert want is not None
        np.testing.assert_allclose(got.detach().numpy(), want, rtol=0, atol=1e-6)
        back = CacheMapper.from_runtime(mapper).to_runtime()
        assert all((getattr(back, n) == getattr(mapper, n)).all() for n in ("w1", "b1", "w2", "b2"))
    assert (CacheMapper()(torch.tensor([9]), torch.tensor([1]), 4) == torch.tensor([1.0, 0, 1, 0])).all()


def test_gradients_through_the_join(tmp_path: Path) -> None:
    """Of mapper and LoRA, against finite differences."""
    _, synthesis, _, _ = twin("llama", tmp_path)

    def loss() -> torch.Tensor:
        student, teacher, targets, _ = (t.double() if t.is_floating_point() else t for t in synthesis(BATCH[:2]))
        kl: torch.Tensor = (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1).mean()
        return kl + torch.nn.functional.cross_entropy(student, targets)

    torch.autograd.backward(loss())
    trained = {n: p for n, p in synthesis.named_parameters() if p.requires_grad}
    assert {n.split(".")[0] for n in trained} == {"mapper", "model"}
    rng = np.random.default_rng(0)
    for name in ["mapper.inner.weight", "mapper.outer.weight", "mapper.outer.bias", *rng.choice(sorted(trained), 6)]:
        parameter = trained[name]
        gradient = parameter.grad
        assert gradient is not None
        at = int(gradient.abs().argmax())
        values, step = parameter.data.view(-1), 3e-3
        with torch.no_grad():
            old = values[at].item()
            values[at] = old + step
            more = loss().item()
            values[at] = old - step
            less = loss().item()
            values[at] = old
        assert gradient.view(-1)[at].item() == pytest.approx((more - less) / (2 * step), rel=3e-2), name


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_an_exported_adapter_does_in_the_runtime_what_was_trained(tmp_path: Path, name: str) -> None:
    """PEFT to GGUF with its rows reordered, and the whole fork-join on llama.cpp."""
    oracle, synthesis, path, _ = twin(name, tmp_path)
    arch = MODELS[name]["arch"]
    lora = {}
    for module, layer in synthesis.model.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            pair = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            lora[module] = tuple(w.detach().numpy() for w in pair)
    exported = tmp_path / "exported.gguf"
    shape = BaseShape(arch, oracle.n_layers, 4, 2)
    metadata = AdapterMetadata(
        arch=arch,
        alpha=8.0,
        layout="shared",
        in_order=False,
        mapper=synthesis.mapper.to_runtime(),
        base_name="tiny",
        base_fingerprint="",
    )
    before = set(tmp_path.iterdir())
    export(exported, shape, lora, metadata, type="f32")
    assert set(tmp_path.iterdir()) - before == {exported}

    model = Model.load(path)
    adapter = Adapter(exported, model)
    assert adapter.mapper
    assert not adapter.warnings
    check_the_runtime(model, adapter, synthesis)
    model.close()


def check_the_runtime(model: Model, adapter: Adapter, synthesis: Synthesis, tolerance: float = 2e-4) -> None:
    """llama.cpp with the adapter gives the logits of PyTorch's model."""
    with torch.no_grad():
        student, _, _, which = synthesis(BATCH)
    for i, e in enumerate(BATCH):
        got = in_the_runtime(model, adapter, e)
        np.testing.assert_allclose(got, student[which == i].numpy(), rtol=0, atol=tolerance)


def in_the_runtime(model: Model, adapter: Adapter, e: TokenExample) -> np.ndarray:
    """The student's logits of the answer, by llama.cpp."""
    with (
        Context(model, 256, len(e.branches), kv_type="f32") as branches,
        context_with(adapter, model, 256, kv_type="f32", n_logits=64) as ctx,
    ):
        spans = []
        for seq, (prompt, output) in enumerate(e.branches):
            branches.prefill(seq, [*e.prefix, *prompt, *output])
            start = len(e.prefix) + len(prompt)
            spans.append(Span(seq, start, start + len(output), e.starts[seq]))
        if e.branch_point:
            join(branches, ctx, [Span(0, 0, e.branch_point, 0)])
        lengths = [len(o) for _, o in e.branches]
        coefficients = adapter.mapper.coefficients(lengths, len(rotated_layers(model))) if adapter.mapper else None
        join(branches, ctx, spans, 0, coefficients)
        start, prompt = ctx.end(0), [*e.synthesizer, *e.answer[:-1]]
        ctx.decode([Token(t, start + j, 0, logits=True) for j, t in enumerate(prompt)])
        return np.stack([ctx.logits(j) for j in range(len(prompt))])[-len(e.answer) :]


def test_a_batch_is_its_examples(tmp_path: Path) -> None:
    """Padding and neighbours change nothing."""
    _, synthesis, _, _ = twin("smollm3", tmp_path)
    together, _, _, which = synthesis(BATCH)
    for i, e in enumerate(BATCH):
        alone, *_ = synthesis([e])
        torch.testing.assert_close(together[which == i], alone, rtol=0, atol=1e-4)
    longer = replace(BATCH[1], pasted=tokens(5, 3))
    torch.testing.assert_close(synthesis([longer])[0], synthesis([BATCH[1]])[0], rtol=0, atol=1e-4)
