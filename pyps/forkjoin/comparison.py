"""One job in several ways: from caches and from texts, on the same branches.

The branches are encoded once. A way answers greedily; its distributions are compared with those of another way's
answer, token by token. `pyps eval` and the calibration of a model go through here, and through the same synthesizer as
a run.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyps.adapters.adapter import Adapter
from pyps.engine.context import Context, Token
from pyps.engine.logits import log_softmax
from pyps.engine.model import Model
from pyps.errors import InputError
from pyps.forkjoin.reading import DEFAULT_CHOOSERS, JOIN_ONLY, Again, Reading, again_of
from pyps.forkjoin.synthesis import ContextOptions, Output, Synthesizer, placement

JUDGED_TOGETHER = 64  # tokens whose logits are kept at once: half a megabyte each with a large vocabulary


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to answer.

    Attributes:
        cache: From the branches' caches instead of their texts.
        mapper: With the adapter's mapper.
        lora: With the adapter's LoRA.
        backwards: From the texts, the last branch's first.
        reading: From caches: what is read again.
        choosers: From caches: what chooses it.
        omits: What would be joined is left out: the synthesizer has what it reads again, and nothing else.
    """

    cache: bool = False
    mapper: bool = False
    lora: bool = False
    backwards: bool = False
    reading: Reading = JOIN_ONLY
    choosers: tuple[str, ...] = DEFAULT_CHOOSERS
    omits: bool = False


@dataclass(frozen=True, kw_only=True)
class Job:
    """A fork-join whose branches have ended, in tokens, as layout.Prompts has them.

    Attributes:
        prefix: What every branch begins with.
        branches: The prompt and the output of each branch; no output is empty.
        branch_point: The position that outputs are re-encoded to.
        synthesizer: What the synthesizer reads after joined cells.
        labels: What it reads before each output, if it reads labels,
        labelled: and its prompt after the last output then.
        pasted: What follows the prefix in text synthesis,
        backwards: and in text synthesis with the last branch first.
        question: The words that the answer depends on.
    """

    prefix: list[int]
    branches: list[tuple[list[int], list[int]]]
    branch_point: int
    synthesizer: list[int]
    labels: list[list[int]]
    labelled: list[int]
    pasted: list[int]
    backwards: list[int]
    question: str

    @property
    def n_output(self) -> int:
        """Tokens of all outputs."""
        return sum(len(output) for _, output in self.branches)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a way said.

    Attributes:
        tokens: The answer's tokens.
        logs: Log-probabilities [tokens, and the end if it came to that; vocabulary].
        ttft_ms: Milliseconds from the branches' last token to the answer's first.
        n_again: The outputs' tokens that were read again; all of them from texts.
        n_read: All tokens that were read.
    """

    tokens: list[int]
    logs: NDArray[np.float32]
    ttft_ms: float
    n_again: int
    n_read: int


class Comparison:
    """A job's branches, encoded, and the synthesizers that answer from them. Close it, or use `with`.

    Args:
        model: The model.
        adapter: Its parts are used by the ways that name them.
        job: The job.
        max_tokens: Most tokens of an answer.
        options: How contexts are made.

    Raises:
        InputError: The job does not fit the model.
        EngineError: llama.cpp failed.
    """

    def __init__(
        self, model: Model, adapter: Adapter | None, job: Job, max_tokens: int, options: ContextOptions
    ) -> None:
        self._model, self._adapter, self._job, self._max_tokens = model, adapter, job, max_tokens
        self._end = 0  # of the prompt that was read last
        pasted, prompt = (max(map(len, p)) for p in ((job.pasted, job.backwards), (job.synthesizer, job.labelled)))
        longest = max(len(prompt) + len(output) for prompt, output in job.branches)
        side_by_side = max(map(len, job.labels)) + max(len(output) for _, output in job.branches) + prompt
        before = len(job.prefix)
        positions = max(before + pasted + max_tokens, before + longest, job.branch_point + side_by_side + max_tokens)
        if positions > model.n_ctx_train:
            raise InputError(
                f"an example needs {positions:,} positions; {model.name} was trained on {model.n_ctx_train:,}"
            )
        # all contexts are of one size: LongRoPE encodes positions by it
        all_labels = sum(map(len, job.labels))
        cells = max(positions, job.branch_point + job.n_output + all_labels + prompt + max_tokens)
        self._options = ContextOptions(kv_type=options.kv_type, threads=options.threads, min_cells=cells)
        self._synthesizers: dict[tuple[bool, bool], Synthesizer] = {}
        self.branches = self._options.open(model, cells, len(job.branches))
        try:
            self.branches.warm_up()
            self.branches.prefill(0, job.prefix)
            for seq in range(1, len(job.branches)):
                self.branches.copy(0, seq)
            batch = []
            for seq, (instruction, output) in enumerate(job.branches):
                batch += [Token(t, len(job.prefix) + i, seq) for i, t in enumerate(instruction + output)]
            self.branches.decode(batch)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Comparison":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free all contexts."""
        for synthesizer in self._synthesizers.values():
            synthesizer.close()
        self.branches.close()

    @property
    def outputs(self) -> list[Output]:
        """Where the outputs lie."""
        outputs = []
        for seq, (instruction, output) in enumerate(self._job.branches):
            start = len(self._job.prefix) + len(instruction)
            outputs.append(Output(self.branches, seq, ((start, start + len(output)),), output))
        return outputs

    def answer(self, way: Way, max_tokens: int | None = None) -> Answer:
        """Return the way's own greedy answer, of max_tokens at most; None for the most that there is room for."""
        ctx, ttft_ms, n_again, n_read = self._read(way)
        tokens: list[int] = []
        logs = []
        while True:
            logs.append(log_softmax(ctx.logits()))
            token = int(logs[-1].argmax())
            if self._model.ends(token):
                break
            tokens.append(token)
            if len(tokens) == (max_tokens or self._max_tokens):
                break
            ctx.decode([Token(token, ctx.end(0), 0, logits=True)])
        return Answer(tokens=tokens, logs=np.stack(logs), ttft_ms=ttft_ms, n_again=n_again, n_read=n_read)

    def judge(self, way: Way, reference: Answer) -> NDArray[np.float32]:
        """Return log-probabilities where the reference chose its tokens, under the way that answered last."""
        ctx = self._synthesizer(way).decoder
        ctx.remove(0, self._end - 1)
        last = self._prompt(way)[-1]
        tokens = [last, *reference.tokens][: len(reference.logs)]
        rows = []
        for start in range(0, len(tokens), JUDGED_TOGETHER):
            chunk = tokens[start : start + JUDGED_TOGETHER]
            position = self._end - 1 + start
            ctx.decode([Token(t, position + i, 0, logits=True) for i, t in enumerate(chunk)])
            rows += [log_softmax(ctx.logits(i)) for i in range(len(chunk))]
        return np.stack(rows)

    def _synthesizer(self, way: Way) -> Synthesizer:
        """Return the synthesizer of a way, with the prefix in it; those with the same contexts share one."""
        key = (way.cache, way.lora)
        if key not in self._synthesizers:
            job = self._job
            synthesizer = self._synthesizers[key] = Synthesizer(
                self._model,
                prompt=len(job.synthesizer) if way.cache else len(job.pasted),
                cells=self.branches.n_ctx - self._max_tokens,
                after=self._max_tokens,
                options=self._options,
                adapter=self._adapter if way.lora else None,
                n_logits=JUDGED_TOGETHER,
            )
            synthesizer.warm_up()
            synthesizer.keep_prefix(self.branches, self._prefix_cells(way))
        return self._synthesizers[key]

    def _prompt(self, way: Way) -> list[int]:
        job = self._job
        if way.cache:
            return job.labelled if way.reading.labels else job.synthesizer
        return job.backwards if way.backwards else job.pasted

    def _prefix_cells(self, way: Way) -> int:
        return self._job.branch_point if way.cache else len(self._job.prefix)

    def _read(self, way: Way) -> tuple[Context, float, int, int]:
        """Do everything up to the first token's logits.

        Returns where they are, the milliseconds it took, and how many tokens of the outputs and of all were read.
        """
        job, synthesizer, prompt = self._job, self._synthesizer(way), self._prompt(way)
        decoder = synthesizer.decoder
        synthesizer.forget(self._prefix_cells(way))
        synthesizer.reader.synchronize()
        n_again, n_labels = (0, 0) if way.cache else (job.n_output, 0)
        began = time.perf_counter()
        if way.cache:
            again = self._join(way, synthesizer, len(prompt))
            if again:
                n_again, n_labels = again.n_again, again.n_labels
        decoder.prefill(0, synthesizer.read(prompt))
        decoder.synchronize()
        self._end = decoder.end(0)
        n_read = n_labels + len(prompt) + (n_again if way.cache else 0)
        return decoder, (time.perf_counter() - began) * 1e3, n_again, n_read

    def _join(self, way: Way, synthesizer: Synthesizer, prompt: int) -> Again | None:
        job, outputs = self._job, self.outputs
        adapter = self._adapter if way.mapper or way.lora else None
        labels = job.labels if way.reading.labels else []
        again = again_of(
            self._model, way.reading, job.question, [o.tokens for o in outputs], labels, prompt, way.choosers
        )
        starts = placement(
            job.branch_point,
            [len(output) for output in outputs],
            in_order=bool(adapter and adapter.in_order),
            labels=[len(label) for label in labels],
            after=prompt + self._max_tokens,
            n_positions=self._model.n_ctx_train,
        )
        if not way.omits:
            synthesizer.join(outputs, starts, adapter.mapper if adapter and way.mapper else None, again)
        if again:
            synthesizer.read_again(outputs, starts, again)
        return again


def divergence(reference: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return KL(reference ‖ other) of each token, in nats, from log-probabilities [tokens, vocabulary]."""
    kl: NDArray[np.float32] = (np.exp(reference) * (reference - other)).sum(-1)
    return kl


def together(reference: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Return the share of tokens whose most likely token is the same, from log-probabilities [tokens, vocabulary]."""
    return float((reference.argmax(-1) == other.argmax(-1)).mean())


def words_of(task: str, synthesize: str) -> str:
    """Return the words that an answer depends on."""
    return f"{task}\n{synthesize}"


def names_of(names: Sequence[str | None]) -> list[str]:
    """Return the names of branches, as a run gives them to those without one."""
    return [name or f"branch-{i + 1}" for i, name in enumerate(names)]
