"""The training loop: mapper and LoRA on a frozen base, resumable at every checkpoint (docs/method.md, section 4)."""

import functools
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import peft
import torch
import transformers
import yaml
from pydantic import ValidationError
from torch.nn.functional import cross_entropy

from pyps.adapters.format import AdapterMetadata
from pyps.convert.lora import BaseShape, Lora, read_adapter, write_adapter
from pyps.data.example import read_examples
from pyps.engine.find import find_adapter, find_model
from pyps.engine.model import Model
from pyps.errors import InputError, MachineError, first_of
from pyps.files import make_folder, whole
from pyps.train.cache_mapper import CacheMapper
from pyps.train.config import TrainConfig
from pyps.train.data import prepare
from pyps.train.encoded import EncodedStore
from pyps.train.report import write_report
from pyps.train.synthesis import Encoded, Synthesis

ADAPTER, CHECKPOINT, LOG, TOKENS = "adapter.gguf", "checkpoint.pt", "log.jsonl", "tokens.jsonl"


@dataclass(frozen=True)
class Measures:
    """Means over examples of means over an answer's tokens.

    Attributes:
        kl: KL divergence from the next-token distribution of text synthesis, in nats.
        kl_first: The same for the first token of the answer only.
        ce: Cross-entropy of the target, in nats.
        agreement: Share of tokens at which the most likely one is also that of text synthesis.
    """

    kl: float
    kl_first: float
    ce: float
    agreement: float


_NAMES = tuple(f.name for f in fields(Measures))

_ENCODE_TOGETHER = 8  # examples in one pass without gradients
_WINDOW = 8  # steps among which examples are sorted by length


class Trainer:
    """One training run.

    It writes adapter.gguf, checkpoint.pt, log.jsonl and config.yaml to config.output, and at its end report.md and
    report.png. If the folder has a checkpoint, the run goes on from there as if it had not been interrupted. Processes
    that `accelerate launch` starts share the examples of each step; a single process runs where Accelerate chooses.

    Args:
        config: What to train, on what and how.
        report: It is called with a line about every step and measurement.

    Attributes:
        config: The configuration.
        synthesis: The model and the mapper.
        step: Steps that are done.

    Raises:
        InputError: The base, the data or the output folder cannot be used, or the folder is another run's.
        MachineError: The disk is full or fails.
    """

    def __init__(self, config: TrainConfig, report: Callable[[str], None] = print) -> None:
        self.config = config
        self._accelerator = accelerate.Accelerator(cpu=not torch.cuda.is_available())
        self._report = report if self._accelerator.is_main_process else lambda line: None
        if config.batch_size % (n := self._accelerator.num_processes):
            raise InputError(f"batch_size: {config.batch_size} examples cannot be shared by {n} processes")
        with self._accelerator.main_process_first():
            _check_output(config)
        path = find_model(config.base)
        data, held_out = read_examples(config.data), read_examples(config.held_out) if config.held_out else []
        self._n_train = len(data)
        model = Model.load(path)
        try:
            self._base = model.metadata.get("general.name", ""), model.fingerprint
            with self._accelerator.main_process_first():  # the others read what it has written
                # one list for both: first the examples to train on, then those to measure on
                tokens = prepare(model, config.layout, data + held_out, config.output / TOKENS, self._report)
            self._examples = [replace(t, in_order=config.in_order) for t in tokens]
            arch = model.arch
        finally:
            model.close()
        self.synthesis, self._shape = _build(config, path, arch)
        if config.start:
            start = find_adapter(config.start, config.base)
            if start is None:
                raise InputError(f"start: pyps has no adapter for {config.base}")
            load_adapter(self.synthesis, start, self._shape)
        with self._accelerator.main_process_first():
            self._store = EncodedStore(config.output, self._examples, self.synthesis.sizes)
        size = f"{self._store.n_bytes / 1e9:.1f} GB in {config.output}"
        if self._store.fits:
            self._report(f"the branches' caches are kept until the end of the run: {size}")
        else:
            self._report(f"the disk has no room to keep the branches' caches ({size}): every step computes them anew")
        lora = [p for n, p in self.synthesis.model.named_parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": lora, "lr": config.lr_lora},
                {"params": list(self.synthesis.mapper.parameters()), "lr": config.lr_mapper},
            ],
            weight_decay=0.0,
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, self._rate)
        self.step = 0
        self._encoding = 0.0, 0  # seconds spent on encoding, and examples encoded
        self._module = self._accelerator.prepare(self.synthesis)
        self._resume()  # at the end: what is loaded goes to the device of the parameters

    def _rate(self, step: int) -> float:
        """Return the share of the peak learning rate: up in `warmup` steps, then down to a tenth along a cosine.

        Neither of Transformers' cosine schedules with a least rate is the same: the warm-up of one begins at 0, so that
        the first step does nothing, and the cosine of the other is a step ahead, so that the rate is not at its peak
        after the warm-up.
        """
        if step < self.config.warmup:
            return (step + 1) / self.config.warmup
        done = (step - self.config.warmup) / max(self.config.steps - self.config.warmup, 1)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * min(done, 1)))

    def run(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Train to the end, or until `stopped`, which is called after every step, returns true.

        The state is saved before it returns.

        Raises:
            MachineError: The disk is full or fails; the last checkpoint is whole.
        """
        if self.step == 0:
            self._measure()
        self._encoding = 0.0, 0
        began, first = time.perf_counter(), self.step
        tokens = 0
        while self.step < self.config.steps:
            batch = self._batch(self.step)
            tokens += sum(len(self._examples[i]) for i in batch)
            measures = self._train(batch)
            self.step += 1
            took = time.perf_counter() - began
            left = self._left(took, self.step - first)
            self._log({"step": self.step, **asdict(measures)})
            self._report(
                f"step {self.step}/{self.config.steps}  kl {measures.kl:.3f}  ce {measures.ce:.3f}  "
                f"{tokens / took:,.0f} tokens/s  {left / 60:.0f} min left"
            )
            # every process must know, or the others would wait for one that has left
            stop = bool(self._accelerator.reduce(self._tensor([stopped()])).item())
            if self.step % self.config.save_every == 0 or self.step == self.config.steps:
                self._measure()
                self._save()
            elif stop:
                self._save()
            if stop and self.step < self.config.steps:
                return
        if self._accelerator.is_main_process:
            write_report(self.config.output, self.config.output / LOG)
            self._store.remove()

    def _left(self, took: float, steps: int) -> float:
        """Estimate the seconds left, from the steps done and from the encoding that each example still needs once."""
        seconds, n = self._encoding
        new = len(self._store.missing(range(self._n_train))) if self._store.fits else 0
        ahead = (self.config.steps - self.step) * self.config.batch_size
        encoding = seconds / n * min(new, ahead) if n else 0.0
        return (took - seconds) / steps * (self.config.steps - self.step) + encoding

    def _batch(self, step: int) -> list[int]:
        """Return this process's share of a step's examples.

        Each round over the data has its own shuffle. Within a window of steps, examples with answers of like length go
        together, which needs less padding.
        """
        n, rank = self._accelerator.num_processes, self._accelerator.process_index
        window, at = divmod(step, _WINDOW)
        return self._batches(window)[at][rank::n]

    def _batches(self, window: int) -> list[list[int]]:
        size, chosen = self.config.batch_size, []
        for i in range(window * _WINDOW * size, (window + 1) * _WINDOW * size):
            epoch, at = divmod(i, self._n_train)
            chosen.append(_order(self._n_train, self.config.seed, epoch)[at])
        chosen.sort(key=lambda i: len(self._examples[i].synthesizer) + len(self._examples[i].answer))
        batches = [chosen[start : start + size] for start in range(0, len(chosen), size)]
        random.Random(f"{self.config.seed} {window}").shuffle(batches)
        return batches

    def _encode(self, batch: Sequence[int], soon: Sequence[int]) -> list[Encoded]:
        """Return what needs no gradient of a batch.

        If it is kept, all examples that will be needed `soon` are encoded, those of like length together, which needs
        less padding.
        """
        if not self._store.fits:
            return self.synthesis.encode([self._examples[i] for i in batch])
        missing = sorted(self._store.missing(sorted(set(soon))), key=lambda i: len(self._examples[i]))
        if missing:
            self._report(f"computing the caches of {len(missing)} examples")
        began = time.perf_counter()
        for start in range(0, len(missing), _ENCODE_TOGETHER):
            self._store.fill(missing[start : start + _ENCODE_TOGETHER], self.synthesis.encode)
        seconds, n = self._encoding
        self._encoding = seconds + time.perf_counter() - began, n + len(missing)
        return [self._store.get(i) for i in batch]

    def _train(self, batch: list[int]) -> Measures:
        first = self.step // _WINDOW * _WINDOW  # the same steps together after an interruption
        soon = [i for step in range(first, min(first + _WINDOW, self.config.steps)) for i in self._batch(step)]
        examples = [self._examples[i] for i in batch]
        self._optimizer.zero_grad()
        student, teacher, targets, example = self._module(examples, self._encode(batch, soon))
        kl, ce, measures = _losses(student, teacher, targets, example, len(examples))
        # an answer of text synthesis is learned from its distribution, as long as that is learned from at all
        from_data = torch.tensor([float(e.given or self.config.kl == 0) for e in examples], device=ce.device)
        self._accelerator.backward(self.config.kl * kl.mean() + self.config.ce * (from_data * ce).mean())
        self._accelerator.clip_grad_norm_([p for p in self.synthesis.parameters() if p.requires_grad], 1.0)
        self._optimizer.step()
        self._schedule.step()
        return self._mean([measures], [len(batch)])

    @torch.no_grad()
    def _measure(self) -> None:
        """Measure on the held-out examples."""
        if self._n_train == len(self._examples):
            return
        n, rank = self._accelerator.num_processes, self._accelerator.process_index
        share = range(self._n_train, len(self._examples))[rank::n]
        measures, sizes = [], []
        for start in range(0, len(share), _ENCODE_TOGETHER):
            batch = share[start : start + _ENCODE_TOGETHER]
            examples = [self._examples[i] for i in batch]
            student, teacher, targets, example = self.synthesis(examples, self._encode(batch, share))
            measures.append(_losses(student, teacher, targets, example, len(examples))[2])
            sizes.append(len(batch))
        mean = self._mean(measures, sizes)
        self._log({"step": self.step, "held_out": asdict(mean)})
        self._report(
            f"held out after {self.step} steps: kl {mean.kl:.3f} (first token {mean.kl_first:.3f}), ce {mean.ce:.3f}, "
            f"agreement {mean.agreement:.0%}"
        )

    def _mean(self, measures: Sequence[Measures], sizes: Sequence[int]) -> Measures:
        """Return the mean over all examples of all processes, from the means over groups of these sizes."""
        sums = [sum(n * asdict(m)[name] for m, n in zip(measures, sizes, strict=True)) for name in _NAMES]
        total = self._accelerator.reduce(self._tensor([*sums, sum(sizes)])).tolist()
        return Measures(*(x / total[-1] for x in total[:-1]))

    def _tensor(self, values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._accelerator.device)

    def _log(self, values: dict[str, Any]) -> None:
        if not self._accelerator.is_main_process:
            return
        path = self.config.output / LOG
        try:
            with path.open("a") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise MachineError(f"{path}: cannot be written: {error.strerror}") from error

    def _save(self) -> None:
        """Write a checkpoint, and the adapter as it is now."""
        if not self._accelerator.is_main_process:
            return
        output = self.config.output
        state = {
            "step": self.step,
            "trained": {n: p.data for n, p in self.synthesis.named_parameters() if p.requires_grad},
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
        }
        # to a file, not to a path: only then is a full disk an OSError
        with whole(output / CHECKPOINT) as partial, partial.open("wb") as file:
            torch.save(state, file)
        metadata = AdapterMetadata(
            arch=self._shape.arch,
            alpha=float(self.config.lora.alpha),
            layout=self.config.layout,
            in_order=self.config.in_order,
            mapper=self.synthesis.mapper.to_runtime(),
            base_name=self._base[0],
            base_fingerprint=self._base[1],
        )
        write_adapter(output / ADAPTER, self._shape, extract_lora(self.synthesis.model), metadata)

    def _resume(self) -> None:
        path = self.config.output / CHECKPOINT
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            # whatever unpickling a damaged file may raise
            raise InputError(f"{path}: the checkpoint is damaged: remove it to begin anew ({error})") from None
        trained = {n: p for n, p in self.synthesis.named_parameters() if p.requires_grad}
        for name, values in state["trained"].items():
            trained[name].data.copy_(values)
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self.step = state["step"]
        self._report(f"going on after step {self.step}")


@functools.lru_cache(maxsize=2)  # a batch may begin in one epoch and end in the next
def _order(n: int, seed: int, epoch: int) -> list[int]:
    order = list(range(n))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order


def _losses(
    student: torch.Tensor,
    teacher: torch.Tensor,
    targets: torch.Tensor,
    example: torch.Tensor,
    n: int,
) -> tuple[torch.Tensor, torch.Tensor, Measures]:
    """Return the KL divergence and the cross-entropy of each of n examples, [n] both, and the means to report."""
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    ce = cross_entropy(student, targets, reduction="none")

    def each(values: torch.Tensor) -> torch.Tensor:
        """Return the mean over each example's tokens."""
        sums = torch.zeros(2, n, device=values.device).index_add(
            1, example, torch.stack([values, torch.ones_like(values)])
        )
        return sums[0] / sums[1]

    first = torch.cat([example[:1] == example[:1], example[1:] != example[:-1]])
    agreement = each((student.argmax(-1) == teacher.argmax(-1)).float())
    kl, ce, kl_first = each(kl), each(ce), kl[first]
    return kl, ce, Measures(*(float(x.detach().mean()) for x in (kl, kl_first, ce, agreement)))


def _check_output(config: TrainConfig) -> None:
    """Save the configuration, or raise InputError if the folder is another run's."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    path = config.output / "config.yaml"
    make_folder(config.output)
    try:
        if path.exists() and TrainConfig.model_validate(yaml.safe_load(path.read_text())) != config:
            raise InputError(f"{config.output} holds a run with another config: choose another output, or remove it")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        keys, message = first_of(error)
        mistake = f"{'.'.join(map(str, keys))}: {message}"
        raise InputError(f"{path}: not a config of this version of pyps: remove {config.output} ({mistake})") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not a config of this version of pyps: remove {config.output} ({error})") from None
    with whole(path) as partial:
        partial.write_text(text)


def _build(config: TrainConfig, path: Path, arch: str) -> tuple[Synthesis, BaseShape]:
    torch.manual_seed(config.seed)
    messages: Any = transformers.utils.logging
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    try:
        base = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=getattr(torch, config.dtype),
            quantization_config=transformers.GgufConfig(dequantize=True),
        )
    except Exception as error:
        # each architecture that Transformers cannot read from GGUF fails in its own way
        raise InputError(f"{path}: Transformers cannot read this {arch!r} model: {error}") from None
    lora = peft.LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        target_modules=config.lora.targets,
        task_type="CAUSAL_LM",
    )
    text = base.config.get_text_config()
    shape = BaseShape(arch, text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads)
    shape.check()
    try:
        model = peft.get_peft_model(base, lora)
    except ValueError as error:
        raise InputError(f"lora.targets: {error}") from None
    return Synthesis(model, CacheMapper(config.mapper.features, config.mapper.hidden)), shape


def load_adapter(synthesis: Synthesis, path: Path, shape: BaseShape) -> None:
    """Give a model with a LoRA, and its mapper, the values of an adapter file.

    Args:
        synthesis: The model and the mapper.
        path: The adapter file (docs/method.md, section 6).
        shape: The model's shape.

    Raises:
        InputError: The file is not an adapter, or its values are of other shapes.
    """
    metadata, lora = read_adapter(path, shape)
    linear = {n: m for n, m in synthesis.model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    parts = {n: (m.lora_A["default"].weight, m.lora_B["default"].weight) for n, m in linear.items()}
    shapes = {n: (tuple(a.shape), tuple(b.shape)) for n, (a, b) in parts.items()}
    if shapes != {n: (a.shape, b.shape) for n, (a, b) in lora.items()}:
        raise InputError(f"{path}: its LoRA has other layers or another rank than lora says")
    mapper = metadata.mapper
    trained = synthesis.mapper
    if mapper and (mapper.features, len(mapper.b1)) != (trained.features, trained.inner.out_features):
        raise InputError(f"{path}: its mapper has other inputs or another size than mapper says")
    with torch.no_grad():
        for name, (a, b) in lora.items():
            # B is scaled by alpha / rank: by the file's there, by this run's here
            scale = np.float32(metadata.alpha / (linear[name].scaling["default"] * a.shape[0]))
            parts[name][0].copy_(torch.from_numpy(a.copy()))
            parts[name][1].copy_(torch.from_numpy(b * scale))
        if mapper:
            trained.load_state_dict(CacheMapper.from_runtime(mapper).state_dict())


def extract_lora(model: Any) -> Lora:
    """Return the matrices A and B of a peft.PeftModel's LoRA by module name, float32."""

    def values(linear: torch.nn.Linear) -> np.ndarray:
        return linear.weight.detach().float().cpu().numpy()

    modules = model.get_base_model().named_modules()
    return {n: (values(m.lora_A["default"]), values(m.lora_B["default"])) for n, m in modules if hasattr(m, "lora_A")}
