"""Built-in examples to train and to measure on: six families, and open ones.

    look-up        one branch has the answer
    combine        two branches have half of it each
    list           every branch has a part of it
    compare        the largest of the branches' numbers
    majority       each branch proposes an answer; the most frequent one is right
    contradiction  all branches are about the same thing; the question is whether they agree
    open           advice, plans, explanations: branches and answer are the model's own

Held-out examples have other entities, other values and other ways to ask (facts.py), and other topics (topics.py).
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence

from pyps.data.example import Example, ExampleBranch
from pyps.data.facts import Domain, Field, read_domains, split
from pyps.data.topics import BRANCHES, TOPICS

FAMILIES = ("look-up", "combine", "list", "compare", "majority", "contradiction")

_SYNTHESIZE = (
    "Answer from the notes, in one sentence.",
    "Using the notes above, answer in one sentence.",
    "Give a short answer from the notes.",
    "Answer the question shortly, from what the notes say.",
    "From the notes above, give one short answer.",
)
_GUESSES = ("{v}", "I think it is {v}.", "The answer is {v}.", "It is {v}.", "My answer is {v}.", "That would be {v}.")
_AGREE = (
    "Do the notes agree about {}?",
    "Is there a contradiction in the notes about {}?",
    "Do all notes say the same about {}?",
    "Are the notes of one mind about {}?",
    "Do any of the notes contradict each other about {}?",
)


def build(family: str, held_out: bool, rng: random.Random) -> Example:
    """Return a random example of a family, with two to five branches.

    Args:
        family: One of FAMILIES, or "open".
        held_out: Whether it has entities, values and questions that are kept out of examples to train on.
        rng: Where all chance comes from.
    """
    example = _MAKERS[family](held_out, rng)
    return example.model_copy(update={"family": family})


def _ask(ways: Sequence[str], held_out: bool, rng: random.Random) -> str:
    return rng.choice(ways[-2:] if held_out else ways[:-2])


class _Scene:
    """Some entities of one domain, and the facts about them in one example."""

    def __init__(self, held_out: bool, rng: random.Random, *, numbers: bool | None = None) -> None:
        self.held_out, self.rng = held_out, rng
        domains = [d for d in read_domains() if not numbers or any(f.numbers for f in d.fields.values())]
        self.domain: Domain = rng.choice(domains)
        names = [n for n, f in self.domain.fields.items() if numbers is None or bool(f.numbers) == numbers]
        self.name: str = rng.choice(names)
        self.field: Field = self.domain.fields[self.name]
        self.entities = rng.sample(split(self.domain.entities, held_out), rng.randint(3, 4))
        self.facts = {e: {n: self._value(e, n) for n in self.domain.fields} for e in self.entities}
        if len({f[self.name] for f in self.facts.values()}) < len(self.entities):  # no two alike
            self.__init__(held_out, rng, numbers=numbers)  # type: ignore[misc]

    def _value(self, entity: str, name: str) -> str:
        if known := self.domain.known:
            real = self.rng.random() < 2 / 3
            return known[entity if real else self.rng.choice(split(self.domain.entities, self.held_out))][name]
        return self.domain.fields[name].draw(self.held_out, self.rng)

    def ask(self, ways: Sequence[str], **names: str) -> str:
        return _capital(_ask(ways, self.held_out, self.rng).format(**names))

    def answers(self, *entities: str) -> list[str]:
        return [self.facts[e][self.name] for e in entities]

    def say(self, entity: str, name: str) -> str:
        return self._statement(self.rng.choice(self.domain.fields[name].says), entity, name)

    def target(self, entity: str) -> str:
        """Return the fact that is asked for, in the words that text synthesis would use."""
        return self._statement(self.field.says[self.field.target], entity, self.name)

    def _statement(self, way: str, entity: str, name: str) -> str:
        return _capital(way.format(e=entity, v=self.facts[entity][name]))

    def branches(self) -> list[ExampleBranch]:
        """Return a branch for each entity: the fact that is asked for, and sometimes another one."""
        branches = []
        for e in self.entities:
            names = [self.name]
            if self.rng.random() < 0.25:
                names.append(self.rng.choice(list(self.domain.fields)))
            self.rng.shuffle(names)
            text = " ".join(self.say(e, n) for n in dict.fromkeys(names))
            branches.append(ExampleBranch(prompt=self.domain.prompt.format(e=e), text=text))
        return branches

    def example(self, task: str, target: str, answer: list[str], wrong: list[str]) -> Example:
        return Example(
            task=task,
            branches=self.branches(),
            synthesize=_ask(_SYNTHESIZE, self.held_out, self.rng),
            target=target,
            answer=answer,
            wrong=wrong,
        )


def _look_up(held_out: bool, rng: random.Random) -> Example:
    s = _Scene(held_out, rng)
    one, *others = rng.sample(s.entities, len(s.entities))
    return s.example(s.ask(s.field.asks, e=one), s.target(one), s.answers(one), s.answers(*others))


def _combine(held_out: bool, rng: random.Random) -> Example:
    s = _Scene(held_out, rng)
    a, b, *others = rng.sample(s.entities, len(s.entities))
    first, second = s.target(a), s.target(b)
    target = f"{first[:-1]}, and {second[0].lower() if second.startswith(('The ', 'It ')) else second[0]}{second[1:]}"
    return s.example(s.ask(s.field.asks_two, a=a, b=b), target, s.answers(a, b), s.answers(*others))


def _list(held_out: bool, rng: random.Random) -> Example:
    s = _Scene(held_out, rng)
    values = s.answers(*s.entities)
    target = f"The notes say {', '.join(values[:-1])} and {values[-1]}."
    return s.example(s.ask(s.field.asks_all), target, values, [])


def _compare(held_out: bool, rng: random.Random) -> Example:
    s = _Scene(held_out, rng, numbers=True)
    best = max(s.entities, key=lambda e: int(s.facts[e][s.name]))
    others = [e for e in s.entities if e != best]
    return s.example(
        s.ask(s.field.most), _capital(s.field.is_most.format(e=best)), [_bare(best)], list(map(_bare, others))
    )


def _bare(entity: str) -> str:
    return entity.removeprefix("the ").strip('"')


def _majority(held_out: bool, rng: random.Random) -> Example:
    s = _Scene(held_out, rng)
    one, other = s.entities[:2]
    right, wrong = s.answers(one, other)
    n = rng.randint(3, 5)
    votes = [right] * rng.randint(n // 2 + 1, n)
    votes += [wrong] * (n - len(votes))
    rng.shuffle(votes)
    texts = [_capital(rng.choice(_GUESSES).format(v=v)) for v in votes]
    return Example(
        task=s.ask(s.field.asks, e=one),
        branches=[ExampleBranch(text=text) for text in texts],
        synthesize="The notes are answers. " + _ask(_MOSTLY, held_out, rng),
        target=s.target(one),
        answer=[right],
        wrong=[wrong] if Counter(votes)[wrong] else [],
    )


_MOSTLY = (
    "Give the one that most of them give, in one sentence.",
    "In one sentence, give the most frequent one.",
    "Which do most of them give? Answer in one sentence.",
    "Answer with the most common of them, in one sentence.",
    "In one sentence, give what the majority says.",
)


def _contradiction(held_out: bool, rng: random.Random) -> Example:
    s = _Scene(held_out, rng)
    one, other = s.entities[:2]
    right, wrong = s.answers(one, other)
    n = rng.randint(2, 4)
    agree = rng.random() < 0.5
    values = [right] * n if agree else [wrong, *[right] * (n - 1)]
    rng.shuffle(values)
    question = rng.choice([0, 1, 2] if not held_out else [3, 4])
    yes = agree == (question not in (1, 4))  # two of them ask for the contradiction
    text = "all notes say" if agree else "the notes say"
    target = f"{'Yes' if yes else 'No'}, {text} {' and '.join(dict.fromkeys(values))}."
    return Example(
        task=_AGREE[question].format(s.field.what.format(e=one)),
        branches=[
            ExampleBranch(
                prompt=s.domain.prompt.format(e=one), text=_capital(rng.choice(s.field.says).format(e=one, v=v))
            )
            for v in values
        ],
        synthesize="Answer with yes or no, and what the notes say.",
        target=target,
        answer=["yes" if yes else "no"],
        wrong=["no" if yes else "yes"],
    )


def _open(held_out: bool, rng: random.Random) -> Example:
    """Return an example without texts and answer: all of it is generated."""
    task, aspects = rng.choice(split(TOPICS, held_out))
    if rng.random() < 0.25:  # branches that are plain samples of the task
        instructions = [""] * rng.randint(2, 4)
    else:
        chosen = rng.sample(aspects, rng.randint(2, min(4, len(aspects))))
        instructions = [rng.choice(BRANCHES).format(a) for a in chosen]
    return Example(task=task, branches=[ExampleBranch(prompt=p) for p in instructions])


_MAKERS: dict[str, Callable[[bool, random.Random], Example]] = {
    "look-up": _look_up,
    "combine": _combine,
    "list": _list,
    "compare": _compare,
    "majority": _majority,
    "contradiction": _contradiction,
    "open": _open,
}


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
