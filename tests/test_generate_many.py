"""Many prompts at once."""

from pathlib import Path

import pytest

from pyps import ForkJoin, InputError, Sampling

GREEDY = Sampling(temperature=0, repeat_penalty=1, max_tokens=12)
PROMPTS = ["The capital of France is", "The capital of Italy is", "Once upon a time", "The capital of France is"]


def test_each_prompt_as_if_it_were_alone(smollm2_path: Path) -> None:
    with ForkJoin.from_pretrained(str(smollm2_path)) as fj:
        at_once = fj.generate(PROMPTS, sampling=GREEDY)
        alone = [fj.generate([prompt], sampling=GREEDY)[0] for prompt in PROMPTS]
        assert at_once == alone
        assert "Paris" in at_once[0].text
        chat = fj.generate(["Say hello. <|im_end|>"], chat=True, sampling=GREEDY)
        assert chat[0].text
        assert chat[0] != fj.generate(["Say hello. <|im_end|>"], sampling=GREEDY)[0]


def test_more_than_one_batch_and_several_of_each(tiny_path: Path) -> None:
    sampling = Sampling(seed=3, max_tokens=6, ignore_eos=True)
    with ForkJoin.from_pretrained(str(tiny_path)) as fj:
        many = fj.generate([f"Number {i}" for i in range(40)], 2, sampling=sampling)
        assert len(many) == 80
        assert all(c.tokens == 6 and c.finish_reason == "length" for c in many)
        one = fj.generate(["Number 0"], 2, sampling=sampling)
        assert one == many[:2]
        assert one[0] != one[1], "each has a seed of its own"
        assert fj.generate([]) == []
        assert all(c.tokens <= 1 for c in fj.generate(["a", "b"], sampling=sampling, stopped=lambda: True))


def test_refused(tiny_path: Path) -> None:
    with ForkJoin.from_pretrained(str(tiny_path)) as fj:
        for prompts, n, message in (
            ("abc", 1, "list of texts"),
            (["a"], 0, "at least 1"),
            (["a" * 9000], 1, "may need"),
        ):
            with pytest.raises(InputError, match=message):
                fj.generate(prompts, n)
