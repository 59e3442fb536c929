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
from dataclasses import dataclass

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
    return _MAKERS[family](held_out, rng).model_copy(update={"family": family})


def choose_way(ways: Sequence[str], held_out: bool, rng: random.Random) -> str:
    """Return one of several ways to ask; the last two are for held-out examples."""
    return rng.choice(ways[-2:] if held_out else ways[:-2])


@dataclass(frozen=True)
class Scene:
    """Some entities of one domain, and the facts about them in one example.

    Attributes:
        domain: The domain.
        name: The name of the property that is asked for.
        facts: What is true: entity -> property -> value. No two entities have the same value of that property.
        held_out: Whether the example is held out.
        rng: Where all chance comes from.
    """

    domain: Domain
    name: str
    facts: dict[str, dict[str, str]]
    held_out: bool
    rng: random.Random

    @property
    def field(self) -> Field:
        """The property that is asked for."""
        return self.domain.fields[self.name]

    @property
    def entities(self) -> list[str]:
        """The entities."""
        return list(self.facts)

    def ask(self, ways: Sequence[str], **names: str) -> str:
        """Return one of several questions, with names in it."""
        return capitalised(choose_way(ways, self.held_out, self.rng).format(**names))

    def answers(self, *entities: str) -> list[str]:
        """Return the values that are asked for."""
        return [self.facts[e][self.name] for e in entities]

    def say(self, entity: str, name: str, value: str) -> str:
        """Return one of the ways to state a fact."""
        return self.state(self.rng.choice(self.domain.fields[name].says), entity, value)

    def target(self, entity: str) -> str:
        """Return the fact that is asked for, in the words that text synthesis would use."""
        return self.state(self.field.says[self.field.target], entity, self.facts[entity][self.name])

    def state(self, way: str, entity: str, value: str) -> str:
        """Return the statement of a fact."""
        return capitalised(way.format(e=entity, v=value))

    def branch(self, entity: str) -> ExampleBranch:
        """Return a branch about an entity: the fact that is asked for, and sometimes another one."""
        names = [self.name]
        if self.rng.random() < 0.25:
            names.append(self.rng.choice(list(self.domain.fields)))
        self.rng.shuffle(names)
        text = " ".join(self.say(entity, n, self.facts[entity][n]) for n in dict.fromkeys(names))
        return ExampleBranch(prompt=self.domain.prompt.format(e=entity), text=text)

    def claim(self, entity: str, value: str) -> ExampleBranch:
        """Return a branch that gives an entity this value, true or not, of the property that is asked for."""
        return ExampleBranch(prompt=self.domain.prompt.format(e=entity), text=self.say(entity, self.name, value))

    def example(self, task: str, target: str, answer: list[str], wrong: list[str]) -> Example:
        """Return an example with a branch about each entity."""
        return Example(
            task=task,
            branches=[self.branch(e) for e in self.entities],
            synthesize=choose_way(_SYNTHESIZE, self.held_out, self.rng),
            target=target,
            answer=answer,
            wrong=wrong,
        )


def _draw_scene(held_out: bool, rng: random.Random, *, numbers: bool | None = None) -> Scene:
    """Return a random scene; with `numbers`, of a property with numbers, or of one without."""
    while True:
        domains = [d for d in read_domains() if not numbers or any(f.numbers for f in d.fields.values())]
        domain = rng.choice(domains)
        names = [n for n, f in domain.fields.items() if numbers is None or bool(f.numbers) == numbers]
        name = rng.choice(names)
        entities = rng.sample(split(domain.entities, held_out), rng.randint(3, 4))
        facts = {e: {n: _draw_value(domain, e, n, held_out, rng) for n in domain.fields} for e in entities}
        if len({f[name] for f in facts.values()}) == len(entities):  # no two alike
            return Scene(domain, name, facts, held_out, rng)


def _draw_value(domain: Domain, entity: str, name: str, held_out: bool, rng: random.Random) -> str:
    if known := domain.known:
        real = rng.random() < 2 / 3
        return known[entity if real else rng.choice(split(domain.entities, held_out))][name]
    return domain.fields[name].draw(held_out, rng)


def look_up(s: Scene) -> Example:
    """Return an example in which one branch has the answer."""
    one, *others = s.rng.sample(s.entities, len(s.entities))
    return s.example(s.ask(s.field.asks, e=one), s.target(one), s.answers(one), s.answers(*others))


def combine(s: Scene) -> Example:
    """Return an example in which two branches have half of the answer each."""
    a, b, *others = s.rng.sample(s.entities, len(s.entities))
    first, second = s.target(a), s.target(b)
    if second.startswith(("The ", "It ", "A ")):
        second = second[0].lower() + second[1:]
    return s.example(
        s.ask(s.field.asks_two, a=a, b=b), f"{first[:-1]}, and {second}", s.answers(a, b), s.answers(*others)
    )


def list_all(s: Scene) -> Example:
    """Return an example in which every branch has a part of the answer."""
    values = s.answers(*s.entities)
    target = f"The notes say {', '.join(values[:-1])} and {values[-1]}."
    return s.example(s.ask(s.field.asks_all), target, values, [])


def compare(s: Scene) -> Example:
    """Return an example that asks for the largest of the branches' numbers."""
    best = max(s.entities, key=lambda e: int(s.facts[e][s.name]))
    others = [e for e in s.entities if e != best]
    return s.example(
        s.ask(s.field.most), capitalised(s.field.is_most.format(e=best)), [bare(best)], list(map(bare, others))
    )


def contradiction(s: Scene, n: int) -> Example:
    """Return an example in which all of `n` branches are about the same entity, and agree about it or not."""
    one, other = s.entities[:2]
    right, wrong = s.answers(one, other)
    agree = s.rng.random() < 0.5
    values = [right] * n if agree else [wrong, *[right] * (n - 1)]
    s.rng.shuffle(values)
    question = s.rng.choice([0, 1, 2] if not s.held_out else [3, 4])
    yes = agree == (question not in (1, 4))  # two of them ask for the contradiction
    text = "all notes say" if agree else "the notes say"
    target = f"{'Yes' if yes else 'No'}, {text} {' and '.join(dict.fromkeys(values))}."
    return Example(
        task=_AGREE[question].format(s.field.what.format(e=one)),
        branches=[s.claim(one, v) for v in values],
        synthesize="Answer with yes or no, and what the notes say.",
        target=target,
        answer=["yes" if yes else "no"],
        wrong=["no" if yes else "yes"],
    )


def bare(entity: str) -> str:
    """Return the name of an entity without an article and quotation marks."""
    return entity.removeprefix("the ").strip('"')


def capitalised(text: str) -> str:
    """Return a text with a capital letter at its beginning."""
    return text[0].upper() + text[1:]


def _majority(held_out: bool, rng: random.Random) -> Example:
    s = _draw_scene(held_out, rng)
    one, other = s.entities[:2]
    right, wrong = s.answers(one, other)
    n = rng.randint(3, 5)
    votes = [right] * rng.randint(n // 2 + 1, n)
    votes += [wrong] * (n - len(votes))
    rng.shuffle(votes)
    texts = [capitalised(rng.choice(_GUESSES).format(v=v)) for v in votes]
    return Example(
        task=s.ask(s.field.asks, e=one),
        branches=[ExampleBranch(text=text) for text in texts],
        synthesize="The notes are answers. " + choose_way(_MOSTLY, held_out, rng),
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
    "look-up": lambda held_out, rng: look_up(_draw_scene(held_out, rng)),
    "combine": lambda held_out, rng: combine(_draw_scene(held_out, rng)),
    "list": lambda held_out, rng: list_all(_draw_scene(held_out, rng)),
    "compare": lambda held_out, rng: compare(_draw_scene(held_out, rng, numbers=True)),
    "majority": _majority,
    "contradiction": lambda held_out, rng: contradiction(_draw_scene(held_out, rng), rng.randint(2, 4)),
    "open": _open,
}
