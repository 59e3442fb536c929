"""Going on after the answer."""

from pathlib import Path

import pytest
from support.command_line import pyps

from pyps import ForkJoin, InputError, Limits, Sampling, ToolCall, tool
from pyps.engine.context import Context
from pyps.engine.join import Span, join
from pyps.forkjoin.chat import Chat
from pyps.prompts.layout import Layout, follow_up

GREEDY = Sampling(temperature=0, repeat_penalty=1, max_tokens=12, ignore_eos=True)


def test_it_goes_on_in_front_of_the_same_cells(tiny_path: Path) -> None:
    """Each answer is what a context gives that has the same cells and reads the same tokens."""
    with ForkJoin.from_pretrained(str(tiny_path), read=0) as fj, fj.fork("Go", ["a", "b"], sampling=GREEDY) as branches:
        result = fj.run("Go", join=branches, sampling=GREEDY, keep=True, room=500)
        assert result.kept is not None
        with result.kept:
            chat = Chat(fj, result.kept)
            before = chat.room
            answers = ["".join(map(str, chat.say(text, GREEDY))) for text in ("And then?", "Why?")]
            assert before - chat.room >= 2 * 12
            assert chat.room > 0
        layout = Layout(fj.model, fj.layout, "Go", None, "Using the notes above, give one final answer.")
        prompts = layout.prompts([])
        with Context(fj.model, 2048) as again:
            again.prefill(0, prompts.prefix)
            join(branches.ctx, again, [Span(c.seq, *c.spans[0], prompts.branch_point) for c in branches.cached])
            texts = [result.answer, *answers]
            feeds = [prompts.synthesizer, follow_up(fj.model, "And then?"), follow_up(fj.model, "Why?")]
            for feed, text in zip(feeds, texts, strict=True):
                again.prefill(0, feed)
                out = b""
                for _ in range(12):
                    logits = again.logits()
                    logits[[t for t in range(fj.model.n_vocab) if fj.model.ends(t)]] = -1e9
                    token = int(logits.argmax())
                    out += fj.model.piece(token)
                    again.prefill(0, [token])
                assert out.decode(errors="replace") == text


def test_with_tools(smollm2_path: Path) -> None:
    @tool
    def clock() -> str:
        """The time."""
        return "It is noon."

    with ForkJoin.from_pretrained(str(smollm2_path), read=0) as fj:
        result = fj.run("Talk.", ["a", "b"], sampling=Sampling(temperature=0, max_tokens=8), keep=True, room=1000)
        assert result.kept is not None
        chat = Chat(fj, result.kept, [clock], Limits(min_calls=1, max_calls=1, result_tokens=32))
        parts = list(chat.say("What time is it?", Sampling(temperature=0, max_tokens=12)))
        assert [s.result for s in parts if isinstance(s, ToolCall)] == ["It is noon."]
        assert any(isinstance(s, str) and s for s in parts)
        result.kept.close()
        with pytest.raises(InputError, match="closed"):
            list(chat.say("More"))


def test_no_room(tiny_path: Path) -> None:
    with ForkJoin.from_pretrained(str(tiny_path), read=0) as fj:
        result = fj.run("Go", ["a"], sampling=GREEDY, keep=True)
        assert result.kept is not None
        with result.kept, pytest.raises(InputError, match="the chat is full"):
            list(Chat(fj, result.kept).say("x" * 600, GREEDY))
        with pytest.raises(InputError, match="room"):
            fj.run("Go", ["a"], sampling=GREEDY, keep=True, room=-1)


def test_on_the_command_line() -> None:
    arguments = ["run", "Talk.", "-b", "a", "-b", "b", "--max-tokens", "12", "--chat"]
    done = pyps(*arguments, stdin="Go on.\n\nAnd?\n")
    assert done.returncode == 0, done.stderr
    after = done.stdout.split("s in all\n")[1]
    assert len([part for part in after.split("\n\n") if part.strip()]) >= 2
    assert pyps(*arguments, "--json").returncode == 2
