"""Lock-step generation: every branch as if it were alone, and none harmed by a join."""

from collections import deque
from collections.abc import Sequence

import pytest

from pyps.engine.context import Context
from pyps.engine.generate import Generation, generate
from pyps.engine.join import Span, join
from pyps.engine.model import Model
from pyps.engine.sampling import Sampling
from pyps.errors import InputError

PROMPTS = ["The capital of France is", "Water boils at", "Once upon a time there was a small", "1, 2, 3, 4, 5,"]
GREEDY = Sampling(temperature=0, max_tokens=24)


def run(ctx: Context, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling]) -> list[Generation]:
    generations = [Generation(ctx, i, p, s) for i, (p, s) in enumerate(zip(prompts, samplings, strict=True))]
    texts = ["" for _ in prompts]
    for g, text in generate(ctx, generations):
        texts[g.seq] += text
    assert texts == [g.text for g in generations], "what was shown is what was said"
    for g in generations:
        assert ctx.end(g.seq) == g.end, "exactly the generated tokens are in the cache"
    return generations


def test_together_as_alone(tiny: Model) -> None:
    """On a float32 model, where the size of a batch does not change what is chosen."""
    prompts = [tiny.tokenize(p) for p in PROMPTS]
    samplings = [
        Sampling(temperature=0, max_tokens=30),
        Sampling(temperature=1, seed=5, max_tokens=9),
        Sampling(temperature=2, top_k=0, top_p=1, min_p=0, seed=6, max_tokens=21),
        Sampling(temperature=0.8, seed=7, max_tokens=30),
    ]
    with Context(tiny, 256, 4, kv_type="f32") as ctx:
        together = run(ctx, prompts, samplings)
    for i, prompt in enumerate(prompts):
        with Context(tiny, 256, 1, kv_type="f32") as ctx:
            (alone,) = run(ctx, [prompt], [samplings[i]])
        assert together[i].tokens == alone.tokens
        assert together[i].finish_reason == alone.finish_reason
    assert len({len(g.tokens) for g in together}) > 1, "they should not all end together"


def test_long_prompts_take_several_batches(tiny: Model) -> None:
    prompts = [tiny.tokenize("abcdefgh" * 50 + str(i)) for i in range(3)]
    assert sum(map(len, prompts)) > 1024
    with Context(tiny, 512, 3, kv_type="f32") as ctx:
        together = run(ctx, prompts, [GREEDY] * 3)
    with Context(tiny, 512, 1, kv_type="f32") as ctx:
        (alone,) = run(ctx, prompts[1:2], [GREEDY])
    assert together[1].tokens == alone.tokens


def test_a_branch_goes_on_after_a_join_as_without_it(smollm2: Model) -> None:
    def continued(joined: bool) -> list[list[int]]:
        with Context(smollm2, 256, 3) as ctx, Context(smollm2, 512) as synthesizer:
            first = run(ctx, [smollm2.tokenize(p) for p in PROMPTS[:3]], [GREEDY] * 3)
            if joined:
                join(ctx, synthesizer, [Span(g.seq, g.start, g.end, 0) for g in first])
                synthesizer.prefill(0, smollm2.tokenize("So"))
            more = run(ctx, [smollm2.tokenize(" And then")] * 3, [GREEDY] * 3)
            return [g.tokens for g in more]

    assert continued(True) == continued(False)


def test_many_branches(tiny: Model) -> None:
    with Context(tiny, 64, 64) as ctx:
        generations = run(ctx, [[1, 2, i] for i in range(64)], [Sampling(temperature=0, max_tokens=4)] * 64)
    assert all(len(g.tokens) == 4 or g.finish_reason == "stop" for g in generations)


def test_stop_texts(smollm2: Model) -> None:
    prompt = smollm2.tokenize("1, 2, 3, 4, 5,")
    with Context(smollm2, 256, 2) as ctx:
        free, stopped = run(
            ctx, [prompt, prompt], [GREEDY, Sampling(temperature=0, max_tokens=24, stop=("0, 1", "9,"))]
        )
        assert "9," in free.text
        assert stopped.text == free.text[: free.text.index("9,")]
        assert stopped.finish_reason == "stop"
        assert b"".join(map(smollm2.piece, stopped.tokens)).decode() == stopped.text


def test_a_stop_text_that_only_begins_is_shown_in_the_end(tiny: Model) -> None:
    with Context(tiny, 256) as ctx:
        (free,) = run(ctx, [[1, 2, 3]], [GREEDY])
        ctx.clear()
        (held,) = run(ctx, [[1, 2, 3]], [Sampling(temperature=0, max_tokens=24, stop=(free.text[-3:] + "zz",))])
    assert held.text == free.text


def test_length_and_ignored_ends(smollm2: Model) -> None:
    prompt = smollm2.tokenize("<|im_start|>user\nSay yes.<|im_end|>\n<|im_start|>assistant\n")
    with Context(smollm2, 256, 2) as ctx:
        short, long = run(
            ctx, [prompt, prompt], [Sampling(temperature=0), Sampling(temperature=0, max_tokens=90, ignore_eos=True)]
        )
    assert short.finish_reason == "stop"
    assert len(short.tokens) < 90
    assert long.finish_reason == "length"
    assert len(long.tokens) == 90


def test_stopping_leaves_what_there_is(tiny: Model) -> None:
    with Context(tiny, 256, 2) as ctx:
        generations = [Generation(ctx, i, [1, 2 + i], GREEDY) for i in range(2)]
        deque(generate(ctx, generations, stopped=lambda: len(generations[1].tokens) >= 3), maxlen=0)
        assert [len(g.tokens) for g in generations] == [3, 3]
        assert [g.finish_reason for g in generations] == [None, None]


def test_characters_of_several_tokens(smollm2: Model) -> None:
    """Emoji are several byte tokens: shown when complete, never as half a character."""
    prompt = smollm2.tokenize("Repeat: 🦜🦜🦜🦜🦜🦜 🦜🦜🦜🦜🦜🦜 🦜🦜🦜🦜🦜🦜")
    with Context(smollm2, 256) as ctx:
        for max_tokens in range(4, 9):
            ctx.clear()
            (g,) = run(ctx, [prompt], [Sampling(temperature=0, max_tokens=max_tokens)])
    assert "🦜" in g.text


def test_what_cannot_be_generated_is_refused(tiny: Model) -> None:
    with Context(tiny, 256) as ctx:
        with pytest.raises(InputError, match="at least one token"):
            Generation(ctx, 0, [], GREEDY)
        with pytest.raises(InputError, match="does not exist"):
            Generation(ctx, 1, [1], GREEDY)
        ctx.prefill(0, [1] * 250)
        with pytest.raises(InputError, match="full: 256 cells"):
            run(ctx, [[1, 2, 3]], [Sampling(temperature=0, max_tokens=20, ignore_eos=True)])


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"seed": -1},
        {"seed": 2**32},
        {"max_tokens": 0},
        {"stop": "abc"},
        {"stop": ("",)},
    ],
)
def test_sampling_out_of_range(values: dict[str, object]) -> None:
    with pytest.raises(InputError):
        Sampling(**values)  # type: ignore[arg-type]
