"""ForkJoin on the default model: both modes, both layouts, and what is refused before any work."""

import itertools
import string
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from support.contexts import context_with
from support.tiny import mapper_metadata, write_adapter, write_model

from pyps import (
    AnswerToken,
    Branch,
    BranchDone,
    BranchToken,
    Done,
    Event,
    ForkJoin,
    InputError,
    Joined,
    RefusedError,
    Result,
    Sampling,
)
from pyps.engine.context import Context
from pyps.engine.generate import Generation, generate
from pyps.engine.join import Span, join
from pyps.engine.model import Model
from pyps.forkjoin import synthesis
from pyps.prompts.layout import DEFAULT_SYNTHESIZE, Layout

TASK = "Which database should a small desktop app use?"
BRANCHES = ["Argue for SQLite.", "Argue for PostgreSQL.", "Argue for DuckDB."]
GREEDY = Sampling(temperature=0, max_tokens=40)


@pytest.fixture(scope="module")
def fj(smollm2_path: Path) -> Iterator[ForkJoin]:
    with ForkJoin.from_pretrained(str(smollm2_path), read=0) as fj:
        yield fj


def test_run(fj: ForkJoin) -> None:
    result = fj.run(TASK, BRANCHES, sampling=GREEDY, compare=True)
    assert [b.name for b in result.branches] == ["branch-1", "branch-2", "branch-3"]
    assert [b.prompt for b in result.branches] == BRANCHES
    assert all(b.text and 0 < b.tokens <= 40 for b in result.branches)
    assert result.answer
    assert result.tokens.joined == sum(b.tokens for b in result.branches)
    assert 0 < result.tokens.prefilled < 30
    assert 0 < result.tokens.generated <= 40
    t = result.timing_ms
    assert 0 < t.join + t.prefill <= t.ttft < t.total
    assert result.compare is not None
    assert result.compare.answer
    assert result.compare.tokens.joined == 0
    assert result.compare.tokens.prefilled > result.tokens.joined
    assert (result.mode, result.adapter, result.layout, result.interrupted) == ("cache", None, "shared", False)


def test_events_tell_the_same_as_the_result(fj: ForkJoin) -> None:
    texts, answers, done, order = ["", "", ""], {"cache": "", "text": ""}, {}, []
    result: Result | None = None
    for event in fj.stream(TASK, BRANCHES, sampling=replace(GREEDY, temperature=0.7, seed=4), compare=True):
        order.append(type(event))
        match event:
            case BranchToken(branch, text):
                texts[branch] += text
            case BranchDone(branch, branch_result):
                done[branch] = branch_result
            case AnswerToken(text, mode):
                answers[mode] += text
            case Joined(tokens, _):
                assert tokens == sum(b.tokens for b in done.values())
            case Done():
                result = event.result
    assert result is not None
    assert order[-1] is Done
    assert order.count(Joined) == 1
    assert texts == [b.text for b in result.branches]
    assert [done[i] for i in range(3)] == list(result.branches)
    assert answers["cache"] == result.answer
    assert result.compare is not None
    assert answers["text"] == result.compare.answer


def test_same_seed_same_result(fj: ForkJoin) -> None:
    sampling = Sampling(seed=11, max_tokens=24)
    first, second = (fj.run(TASK, BRANCHES, sampling=sampling) for _ in range(2))
    assert first.branches == second.branches
    assert first.answer == second.answer
    assert fj.run(TASK, BRANCHES, sampling=replace(sampling, seed=12)).branches != first.branches


def test_samples_of_one_question_differ(fj: ForkJoin) -> None:
    result = fj.run("Name an animal.", [Branch()] * 4, sampling=Sampling(temperature=1.5, seed=1, max_tokens=12))
    assert len({b.text for b in result.branches}) > 1


def test_branches_have_names_and_sampling_of_their_own(fj: ForkJoin) -> None:
    branches = [Branch("One.", name="short", sampling=replace(GREEDY, max_tokens=3)), Branch("Two.", name="long")]
    result = fj.run(TASK, branches, sampling=GREEDY)
    assert [b.name for b in result.branches] == ["short", "long"]
    assert (result.branches[0].tokens, result.branches[0].finish_reason) == (3, "length")


def test_text_mode(fj: ForkJoin) -> None:
    cache = fj.run(TASK, BRANCHES, sampling=GREEDY, compare=True)
    text = fj.run(TASK, BRANCHES, sampling=GREEDY, mode="text")
    assert text.branches == cache.branches
    assert cache.compare is not None
    assert text.answer == cache.compare.answer
    assert (text.tokens, text.mode) == (cache.compare.tokens, "text")


def test_the_text_baseline_reads_exactly_its_prompt(fj: ForkJoin) -> None:
    """Flash attention for reading and the move to another context must not change what is answered: the same first
    token as one plain prefill of the whole prompt."""
    result = fj.run(TASK, BRANCHES, sampling=GREEDY, mode="text", answer=Sampling(temperature=0, max_tokens=1))
    layout = Layout(fj.model, "shared", TASK, None, DEFAULT_SYNTHESIZE)
    tail = layout.pasted([b.name for b in result.branches], [b.text for b in result.branches])
    with Context(fj.model, 1024) as ctx:
        ctx.prefill(0, layout.prompts([""]).prefix + tail)
        first = int(ctx.logits().argmax())
    assert fj.model.piece(first).decode() == result.answer


@pytest.mark.parametrize("layout", ["shared", "paper"])
def test_the_synthesizer_reads_what_the_layout_says(fj: ForkJoin, layout: str) -> None:
    """The first answer token, against the same cells placed by hand."""
    with_layout = ForkJoin(fj.model, layout=layout, read=0)  # not closed: the model is the fixture's
    result = with_layout.run(TASK, BRANCHES, sampling=GREEDY, answer=Sampling(temperature=0, max_tokens=1))
    prompts = Layout(fj.model, layout, TASK, None, DEFAULT_SYNTHESIZE).prompts(BRANCHES)
    n_prefix = len(prompts.prefix)
    with Context(fj.model, 512, 3) as branches, Context(fj.model, 1024) as synthesizer:
        spans = []
        for seq, (prompt, b) in enumerate(zip(prompts.branches, result.branches, strict=True)):
            output = fj.model.tokenize(b.text)
            assert len(output) == b.tokens
            branches.prefill(seq, prompts.prefix + prompt + output)
            start = n_prefix + len(prompt)
            spans.append(Span(seq, start, start + len(output), prompts.branch_point))
        if layout == "shared":
            synthesizer.prefill(0, prompts.prefix)
        join(branches, synthesizer, spans)
        synthesizer.prefill(0, prompts.synthesizer)
        first = int(synthesizer.logits().argmax())
    assert fj.model.piece(first).decode() == result.answer


def test_an_empty_branch_is_joined_as_empty(fj: ForkJoin) -> None:
    """A stop text at the very beginning leaves nothing to join."""
    everything = tuple(string.ascii_letters + string.digits + string.punctuation + " \n")
    silent = Branch("x", sampling=Sampling(temperature=0, stop=everything))
    one = fj.run(TASK, [silent, "Argue for SQLite."], sampling=GREEDY)
    assert (one.branches[0].text, one.branches[0].tokens, one.branches[0].finish_reason) == ("", 0, "stop")
    assert one.tokens.joined == one.branches[1].tokens
    for layout in ("shared", "paper"):
        none = ForkJoin(fj.model, layout=layout, read=0).run(TASK, [silent, silent], sampling=GREEDY)
        assert none.tokens.joined == 0
        assert none.answer


def test_stopped_in_the_branches_and_in_the_answer(fj: ForkJoin) -> None:
    for limit in (6, 3 * 40 + 5):
        seen: list[Event] = []
        events = fj.stream(
            TASK,
            BRANCHES,
            sampling=replace(GREEDY, ignore_eos=True),
            stopped=lambda seen=seen, limit=limit: len(seen) >= limit,  # type: ignore[misc]
        )
        result: Result | None = None
        for event in events:
            if isinstance(event, BranchToken | AnswerToken):
                seen.append(event)
            elif isinstance(event, Done):
                result = event.result
        assert result is not None
        assert result.interrupted
        assert all(b.text for b in result.branches)
        assert bool(result.answer) == (limit > 100)


def test_a_stream_that_is_dropped_frees_its_contexts(fj: ForkJoin) -> None:
    for _ in range(3):
        events = fj.stream(TASK, BRANCHES, sampling=GREEDY)
        next(events)
        assert isinstance(events, Generator)
        events.close()
    assert fj.run(TASK, BRANCHES, sampling=GREEDY).answer


@pytest.mark.usefixtures("kernels_off")
def test_a_long_prompt_is_read_with_flash_attention_and_moved(smollm2: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """In both modes: what the answer sees is the same, and it can be kept."""
    runs = []
    for least in (16, 10**6):
        monkeypatch.setattr(synthesis, "_LONG_PROMPT", least)
        fj = ForkJoin(smollm2, layout="paper", kv_type="f32", read=0)
        result = fj.run(TASK, BRANCHES, sampling=GREEDY, compare=True, keep=True)
        assert result.kept
        assert result.compare
        assert result.kept.ctx.n_cells(0) == result.tokens.joined + result.tokens.prefilled + result.tokens.generated
        again = fj.run(TASK, join=result.kept, sampling=GREEDY)
        runs.append((result.answer, result.tokens, result.compare.answer, result.compare.tokens, again.answer))
        result.kept.close()
    assert runs[0] == runs[1]


def test_on_an_existing_llama(smollm2_path: Path, fj: ForkJoin) -> None:
    def text() -> str:
        completion: Any = llama("The capital of France is", max_tokens=8, temperature=0)
        return str(completion["choices"][0]["text"])

    llama = llama_cpp.Llama(str(smollm2_path), n_ctx=256, n_gpu_layers=-1, verbose=False)
    before = text()
    with ForkJoin(llama=llama, read=0) as borrowed:
        result = borrowed.run(TASK, BRANCHES, sampling=GREEDY)
    assert result.branches == fj.run(TASK, BRANCHES, sampling=GREEDY).branches
    assert text() == before
    llama.close()


def test_from_several_threads(tiny_path: Path) -> None:
    with ForkJoin.from_pretrained(str(tiny_path), threads=1, read=0) as fj:
        sampling = Sampling(seed=1, max_tokens=30)
        want = fj.run(TASK, BRANCHES, sampling=sampling)
        with ThreadPoolExecutor() as pool:
            workers = [pool.submit(fj.run, TASK, BRANCHES, sampling=sampling) for _ in range(4)]
        got = [worker.result() for worker in workers]
    assert len(got) == 4
    assert all((g.branches, g.answer) == (want.branches, want.answer) for g in got)


@pytest.mark.parametrize("kv_type", ["f32", "bf16", "q8_0", "q4_0", "q8_0/f16"])
def test_kv_types(smollm2_path: Path, kv_type: str) -> None:
    with ForkJoin.from_pretrained(str(smollm2_path), kv_type=kv_type, read=0) as fj:
        assert fj.run(TASK, BRANCHES, sampling=GREEDY).answer


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "qwen3moe", "smollm3", "gemma", "gemma3", "gpt-oss"])
def test_each_architecture(tmp_path: Path, arch: str) -> None:
    with ForkJoin.from_pretrained(str(write_model(tmp_path / "m.gguf", arch)), read=0) as fj:
        result = fj.run(TASK, BRANCHES, sampling=GREEDY, compare=True)
        assert result.tokens.joined == sum(b.tokens for b in result.branches)


@pytest.mark.parametrize("max_tokens", [16, 150])  # the synthesizer needs more than 512 cells for the latter
def test_long_rope_models_get_contexts_that_agree(tmp_path: Path, max_tokens: int) -> None:
    path = write_model(tmp_path / "m.gguf", "phi3", long_rope=True, phi3__rope__scaling__original_context_length=512)
    sampling = Sampling(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    with ForkJoin.from_pretrained(str(path), read=0) as fj:
        result = fj.run(TASK, BRANCHES, sampling=sampling, compare=True)
        assert result.tokens.joined == max_tokens * len(BRANCHES)


@pytest.mark.parametrize("arch", ["mamba", "jamba", "deepseek2", "qwen2vl", "gpt2", "llama4", "hunyuan-dense"])
def test_models_that_cannot_be_joined_still_have_text_mode(tmp_path: Path, arch: str) -> None:
    with ForkJoin.from_pretrained(str(write_model(tmp_path / "m.gguf", arch)), read=0) as fj:
        with pytest.raises(RefusedError, match=f"'{arch}'"):
            fj.run(TASK, BRANCHES, sampling=GREEDY)
        assert fj.run(TASK, BRANCHES, sampling=GREEDY, mode="text").tokens.prefilled > 0


@pytest.mark.parametrize("in_order", [False, True])
def test_an_adapter_is_used_by_the_synthesizer_only(tmp_path: Path, tiny_path: Path, in_order: bool) -> None:
    options: dict[str, Any] = {"pyps__layout": "paper", "pyps__in_order": in_order}
    adapter = write_adapter(tmp_path / "a.gguf", mapper=mapper_metadata(5), **options)
    sampling = Sampling(temperature=0, max_tokens=20, ignore_eos=True)
    with ForkJoin.from_pretrained(str(tiny_path), layout="paper", read=0) as plain:
        without = plain.run(TASK, BRANCHES, sampling=sampling)
    with ForkJoin.from_pretrained(str(tiny_path), adapter=adapter) as fj:
        assert fj.layout == "paper"
        result = fj.run(TASK, BRANCHES, sampling=sampling, compare=True)
        assert result.adapter == str(adapter)
        assert result.branches == without.branches
        assert result.answer != without.answer

        # by hand: mapper on the joined cells, LoRA on in the synthesizer
        prompts = Layout(fj.model, "paper", TASK, None, DEFAULT_SYNTHESIZE).prompts(BRANCHES)
        assert fj.adapter is not None
        assert fj.adapter.mapper is not None
        answers = []
        for use_mapper in (True, False):
            with Context(fj.model, 512, 3) as branches, context_with(fj.adapter, fj.model, 1024) as synthesizer:
                generations = [
                    Generation(branches, i, prompts.prefix + p, sampling) for i, p in enumerate(prompts.branches)
                ]
                deque(generate(branches, generations), maxlen=0)
                lengths = [len(g.tokens) for g in generations]
                affine = fj.adapter.mapper.coefficients(lengths, 4)
                spans = [Span(g.seq, g.start, g.end, in_order * sum(lengths[: g.seq])) for g in generations]
                join(branches, synthesizer, spans, 0, affine if use_mapper else None)
                answer = Generation(synthesizer, 0, prompts.synthesizer, sampling)
                deque(generate(synthesizer, [answer]), maxlen=0)
                answers.append(answer.text)
    assert answers[0] == result.answer
    assert answers[1] != result.answer, "the mapper makes a difference"


def test_spans_in_order_need_positions(tmp_path: Path, tiny_path: Path) -> None:
    """Where the model (2,048) has none for all of them, they begin at the branch point, as without an order."""
    answers = {}
    for in_order, n in itertools.product((False, True), (600, 700)):
        adapter = write_adapter(tmp_path / "a.gguf", pyps__in_order=in_order)
        with ForkJoin.from_pretrained(str(tiny_path), adapter=adapter) as fj:
            sampling = Sampling(temperature=0, max_tokens=n, ignore_eos=True)
            answer = Sampling(temperature=0, max_tokens=20, ignore_eos=True)
            answers[in_order, n] = fj.run(TASK, BRANCHES, sampling=sampling, answer=answer).answer
    assert answers[True, 600] != answers[False, 600]
    assert answers[True, 700] == answers[False, 700]


def test_refused_before_any_work(fj: ForkJoin, tmp_path: Path) -> None:
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"branches": []}, "no branches"),
        ({"branches": ["x"] * 257}, "257 branches are too many"),
        ({"task": "  "}, "task is empty"),
        ({"mode": "magic"}, "choose 'cache' or 'text'"),
        ({"mode": "text", "compare": True}, "compare"),
        ({"sampling": Sampling(max_tokens=9000)}, r"may need 9,0\d\d positions.*trained on 8,192"),
    ]
    for changes, message in mistakes:
        arguments: dict[str, Any] = {"task": TASK, "branches": BRANCHES, **changes}
        with pytest.raises(InputError, match=message):
            fj.stream(**arguments)
    with pytest.raises(InputError, match="one of the two"):
        ForkJoin()
    small = ForkJoin(fj.model, n_ctx=256, read=0)
    with pytest.raises(InputError, match=r"the synthesizer may need \d\d\d cells; the limit given is 256"):
        small.stream(TASK, ["a"] * 20, sampling=GREEDY)
    with pytest.raises(InputError, match="a branch may need 304 cells; the limit given is 256"):
        small.stream(TASK, BRANCHES)
    assert small.run("Hi", ["a", "b"], sampling=replace(GREEDY, max_tokens=20)).answer is not None
    with pytest.raises(InputError, match="no such adapter file"):
        ForkJoin(fj.model, adapter=tmp_path / "nowhere.gguf", read=0)


def test_a_closed_fork_join(tiny_path: Path) -> None:
    fj = ForkJoin.from_pretrained(str(tiny_path), read=0)
    fj.close()
    with pytest.raises(InputError, match="closed"):
        fj.run(TASK, BRANCHES)


def test_the_synthesizer_may_hold_more_cells_than_positions(tiny_path: Path) -> None:
    """Joined spans share positions: branches that together exceed the trained length still fit."""
    with ForkJoin.from_pretrained(str(tiny_path), read=0) as fj:
        sampling = Sampling(temperature=0, max_tokens=600, ignore_eos=True)
        result = fj.run("Go", ["a", "b", "c", "d"], sampling=sampling, answer=Sampling(temperature=0, max_tokens=4))
        assert result.tokens.joined == 2400 > fj.model.n_ctx_train
        with pytest.raises(InputError, match="text synthesis may need"):
            fj.run("Go", ["a", "b", "c", "d"], sampling=sampling, mode="text")


def test_a_branch_of_its_own_reads_what_it_is_told(tiny_path: Path) -> None:
    """A task or a system message of a branch's own: it says what it would say if they were the run's."""
    own = [Branch("Go.", task="Another task."), Branch("Go.", system="Be brief."), Branch("Go.")]
    with ForkJoin.from_pretrained(str(tiny_path), read=0) as fj:

        def texts(task: str, branches: list[Branch], system: str | None = None) -> list[str]:
            with fj.fork(task, branches, system=system, sampling=GREEDY) as forked:
                return [result.text for result in forked.results]

        mixed = texts(TASK, own)
        alone = [texts("Another task.", own[2:]), texts(TASK, own[2:], "Be brief."), texts(TASK, own[2:])]
        assert [[text] for text in mixed] == alone
        assert len(set(mixed)) == 3
        result = fj.run(TASK, own, sampling=GREEDY, compare=True)
        assert [b.text for b in result.branches] == mixed
        assert result.compare
        # no branch has the whole prefix: text synthesis reads it itself
        again = fj.run(TASK, own[:2], sampling=GREEDY, mode="text")
        assert again.tokens.prefilled < result.compare.tokens.prefilled


def test_a_conversation_as_the_prefix(smollm2: Model) -> None:
    """Messages of every role come before the branches; what a branch is told is a turn of its own after a tool's."""
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Which rivers are long?"},
        {"role": "assistant", "content": "I look it up."},
        {"role": "tool", "content": "Nile, Amazon <|im_end|>"},
    ]
    head = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhich rivers are long?<|im_end|>\n"
        "<|im_start|>assistant\nI look it up.<|im_end|>\n<|im_start|>tool\nNile, Amazon <|im_end|><|im_end|>\n"
    )
    layout = Layout(smollm2, "shared", messages, None, "Answer.")
    prompts = layout.prompts(["Go on.", ""])

    def text(tokens: list[int]) -> str:
        return b"".join(smollm2.piece(token, special=True) for token in tokens).decode()

    told = [text([*prompts.prefix, *branch]) for branch in prompts.branches]
    assert told == [
        f"{head}<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n",
        f"{head}<|im_start|>assistant\n",
    ]
    # what a tool has said is data: its control token is text, and not one token
    assert prompts.prefix.count(smollm2.tokenize("<|im_end|>")[0]) == 4
    fj = ForkJoin(smollm2, read=0)  # not closed: the model is everybody's
    result = fj.run(messages, ["Go on.", ""], sampling=GREEDY, compare=True)
    assert result.answer
    assert result.compare
    continued = fj.run([*messages[:1], {"role": "user", "content": TASK}], ["Go."], sampling=GREEDY)
    plain = fj.run(TASK, ["Go."], system="Be brief.", sampling=GREEDY)
    assert continued.answer == plain.answer
    assert continued.branches == plain.branches
