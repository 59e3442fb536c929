"""Sequences that generate together: they come and go between steps, and fail alone."""

from collections.abc import Iterator

import pytest

from pyps import Branch, ForkJoin, InputError, Sampling
from pyps.engine.context import Context
from pyps.engine.generate import Generation, LockStep, generate
from pyps.engine.model import Model

GREEDY = Sampling(temperature=0, repeat_penalty=1, max_tokens=12, ignore_eos=True)
PROMPT = [10, 20, 30]
# after an "a", a character that is none: no token can come next
IMPOSSIBLE = 'root ::= "a" [^\\x00-\\U0010FFFF]'


@pytest.fixture
def ctx(tiny: Model) -> Iterator[Context]:
    with Context(tiny, 256, 3) as ctx:
        yield ctx


def alone(model: Model, prompt: list[int], sampling: Sampling = GREEDY) -> list[int]:
    with Context(model, 256) as ctx:
        generation = Generation(ctx, 0, prompt, sampling)
        for _ in generate(ctx, [generation]):
            pass
        return generation.tokens


def test_a_sequence_may_come_later(tiny: Model, ctx: Context) -> None:
    """It says what it would have said alone, and so does the other."""
    first, second = Generation(ctx, 0, PROMPT, GREEDY), Generation(ctx, 2, PROMPT[::-1], GREEDY)
    together = LockStep(ctx, [first])
    for _ in range(4):
        assert [member for member, _ in together.step()] == [first]
    together.add(second)
    while together.step():
        pass
    together.flush()
    assert (first.tokens, second.tokens) == (alone(tiny, PROMPT), alone(tiny, PROMPT[::-1]))
    assert (ctx.end(0), ctx.end(1), ctx.end(2)) == (first.end, 0, second.end)


def test_a_sequence_may_go(tiny: Model, ctx: Context) -> None:
    first, second = Generation(ctx, 0, PROMPT, GREEDY), Generation(ctx, 1, PROMPT, GREEDY)
    together = LockStep(ctx, [first, second])
    for _ in range(4):
        together.step()
    together.remove(second)
    n = len(second.tokens)
    while together.step():
        pass
    together.flush()
    assert first.tokens == alone(tiny, PROMPT)
    assert second.tokens == first.tokens[:n]
    assert second.finish_reason is None


def test_a_failure_ends_its_sequence_only(smollm2: Model) -> None:
    """Not on the tiny model: among its tokens are bytes that no character begins with, which grammars let pass."""
    sampling = Sampling(temperature=0, max_tokens=12, grammar=IMPOSSIBLE)
    prompt = smollm2.tokenize("A cat is")
    with Context(smollm2, 256, 2) as ctx:
        bad, good = Generation(ctx, 0, prompt, sampling), Generation(ctx, 1, prompt, GREEDY)
        for _ in generate(ctx, [bad, good]):
            pass
        assert bad.finish_reason == "error"
        assert "no token that could come next" in str(bad.error)
        assert good.tokens == alone(smollm2, prompt)
        assert ctx.end(0) == bad.end


def test_a_branch_that_fails_leaves_the_others(smollm2: Model) -> None:
    """The run goes on with what the others have said; the failure is in the result."""
    branches: list[str | Branch] = ["Talk.", Branch("Fail.", sampling=Sampling(max_tokens=8, grammar=IMPOSSIBLE))]
    fj = ForkJoin(smollm2, read=0)  # not closed: the model is everybody's
    result = fj.run("Say something.", branches, sampling=Sampling(temperature=0, max_tokens=8))
    assert [b.finish_reason for b in result.branches] == ["length", "error"]
    assert result.branches[0].error is None
    assert "no token" in str(result.branches[1].error)
    assert result.tokens.joined == sum(b.tokens for b in result.branches)
    assert result.answer
    assert result.finish_reason in ("stop", "length")
    with pytest.raises(InputError, match="every branch has failed; the first one: "):
        fj.run("Say something.", branches[1:], sampling=Sampling(temperature=0, max_tokens=8))
