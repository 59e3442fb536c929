"""Built-in examples whose branches are notes of 100 to 300 tokens: six families.

    look-up        one branch has the answer
    combine        two branches have half of it each
    list           every branch has a part of it
    compare        the largest of the branches' numbers
    contradiction  all branches are about the same thing; the question is whether they agree
    best           each branch proposes something; one proposal alone meets two criteria

A note says all that is known of its entity (long_facts.py), in any order and among sentences that do not matter
(fillers.py). Held-out examples have other entities, values, questions and fillers.
"""

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from pyps.data.example import Example, ExampleBranch
from pyps.data.facts import Field, split
from pyps.data.families import (
    Scene,
    bare,
    capitalised,
    combine,
    compare,
    contradiction,
    list_all,
    look_up,
)
from pyps.data.long_facts import LONG_DOMAINS, Criterion, LongDomain

LONG_FAMILIES = ("look-up", "combine", "list", "compare", "contradiction", "best")

_WORDS = (90, 193)  # of a note, which may become longer by a sentence: 100 to 300 tokens
_MOST_SENTENCES = 18

_PROPOSALS = ("My proposal is {e}.", "I propose {e}.", "I would choose {e}.", "My choice is {e}.", "I recommend {e}.")
_WHICH = (
    "Which {kind} {a} and {b}?",
    "Choose the {kind} {who} {a} and {b}.",
    "We want a {kind} {who} {a} and {b}. Which is the right one?",
    "Only one {kind} {a} and {b}. Which one is it?",
    "Name the {kind} {who} {a} and {b}.",
)


def build_long(family: str, held_out: bool, rng: random.Random) -> Example:
    """Return a random example of a family, with four to eight branches; with four where all are listed.

    Args:
        family: One of LONG_FAMILIES.
        held_out: Whether it has entities, values, questions and fillers that are kept out of examples to train on.
        rng: Where all chance comes from.
    """
    return _MAKERS[family](held_out, rng).model_copy(update={"family": family})


@dataclass(frozen=True, kw_only=True)
class _LongScene(Scene):
    """A scene whose branches are long notes.

    Attributes:
        domain: The domain.
        fillers: The fillers that the example has so far, openings and clauses; none comes twice.
        proposes: Whether every note begins by proposing its entity.
    """

    domain: LongDomain
    fillers: set[tuple[str, str]]
    proposes: bool = False

    def state(self, way: str, entity: str, value: str) -> str:
        """Return the statement of a fact, with the article that the value needs."""
        return _with_articles(super().state(way, entity, value))

    def branch(self, entity: str) -> ExampleBranch:
        """Return a branch with all that is true of an entity."""
        return self._branch(entity, self.facts[entity])

    def claim(self, entity: str, value: str) -> ExampleBranch:
        """Return a branch with all that is true of an entity, but with this value of the property that is asked for."""
        return self._branch(entity, self.facts[entity] | {self.name: value})

    def _branch(self, entity: str, facts: Mapping[str, str]) -> ExampleBranch:
        prompt = "Present {e} as your proposal." if self.proposes else self.domain.prompt
        return ExampleBranch(prompt=prompt.format(e=entity), text=self._note(entity, facts))

    def _note(self, entity: str, facts: Mapping[str, str]) -> str:
        sentences = [self.say(entity, name, value) for name, value in facts.items()]
        sentences += self._fill(entity, self.rng.randint(*_WORDS) - _count_words(sentences))
        self.rng.shuffle(sentences)
        if self.proposes:
            sentences.insert(0, self.rng.choice(split(_PROPOSALS, self.held_out)).format(e=entity))
        else:  # the first sentence says what the note is about
            first = next(s for s in sentences if bare(entity) in s)
            sentences.remove(first)
            sentences.insert(0, first)
        return " ".join(sentences)

    def _fill(self, entity: str, n_words: int) -> list[str]:
        """Return fillers that no branch has yet, until they have so many words."""
        most = _MOST_SENTENCES - len(self.domain.fields) - self.proposes
        clauses = split(self.domain.fillers.clauses, self.held_out)
        sentences: list[str] = []
        openings: set[str] = set()
        for clause in self.rng.sample(clauses, most):
            if _count_words(sentences) >= n_words:
                break
            opening = self._choose_opening(clause, openings)
            openings.add(opening)
            self.fillers.add((opening, clause))
            name = entity if self.rng.random() < 0.4 else self.domain.calls[entity]
            sentences.append(capitalised(f"{opening} {clause}.".strip().format(e=name)))
        return sentences

    def _choose_opening(self, clause: str, used: set[str]) -> str:
        """Return an opening that this clause has not had in any branch: often none, and rarely one that is used."""
        free = [o for o in self.domain.fillers.openings if (o, clause) not in self.fillers]
        if "" in free and self.rng.random() < 0.6:
            return ""
        return self.rng.choice([o for o in free if o and o not in used] or free)


def _count_words(sentences: Iterable[str]) -> int:
    return sum(len(s.split()) for s in sentences)


def _with_articles(text: str) -> str:
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def _draw_scene(held_out: bool, rng: random.Random, n: int, *, numbers: bool = False) -> _LongScene:
    """Return a scene with `n` entities; with `numbers`, of a property with numbers."""
    domain = rng.choice(LONG_DOMAINS)
    options = {name: _options(f, held_out) for name, f in domain.fields.items() if f.numbers or not numbers}
    name = rng.choice([name for name, values in options.items() if len(values) >= n])
    return _make_scene(domain, name, {name: [options[name]] * n}, held_out, rng)


def _make_scene(
    domain: LongDomain, name: str, options: Mapping[str, Sequence[Sequence[str]]], held_out: bool, rng: random.Random
) -> _LongScene:
    """Return a scene of random entities.

    Args:
        domain: The domain.
        name: The name of the property that is asked for.
        options: For some properties, the values that the first entity can have, the second, and so on.
        held_out: Whether the example is held out.
        rng: Where all chance comes from.
    """
    n = len(options[name])
    free = {other: [_options(f, held_out)] * n for other, f in domain.fields.items() if other not in options}
    entities = rng.sample(split(domain.entities, held_out), n)
    facts: dict[str, dict[str, str]] = {e: {} for e in entities}
    used: set[str] = set()
    for other, values in {**options, **free}.items():
        for entity, possible in zip(entities, values, strict=True):
            facts[entity][other] = _draw_unused(possible, used, rng)
    order = rng.sample(entities, n)
    return _LongScene(
        domain=domain, name=name, facts={e: facts[e] for e in order}, held_out=held_out, rng=rng, fillers=set()
    )


def _options(field: Field, held_out: bool) -> list[str]:
    """Return the values that a property can have."""
    if field.numbers:
        low, high = field.numbers
        return [str(n) for n in range(low, high + 1)]
    return split(field.values, held_out)


def _draw_unused(values: Sequence[str], used: set[str], rng: random.Random) -> str:
    """Return a value that nothing in the example has, if there is one."""
    value = rng.choice([v for v in values if v not in used] or values)
    used.add(value)
    return value


def _draw_n_branches(rng: random.Random) -> int:
    """Return how many branches an example has."""
    return rng.randint(4, 8)


def _best(held_out: bool, rng: random.Random) -> Example:
    domain = rng.choice(LONG_DOMAINS)
    conditions = [_draw_condition(c, domain, held_out, rng) for c in rng.choice(_pairs(domain.criteria))]
    # the proposal that is right, two that meet one of the conditions each, and others that are wrong
    meets = [(True, True), (True, False), (False, True)]
    meets += rng.choices([(True, False), (False, True), (False, False)], k=_draw_n_branches(rng) - len(meets))
    options = {c.field: [c.options[m[i]] for m in meets] for i, c in enumerate(conditions)}
    s = replace(_make_scene(domain, conditions[0].field, options, held_out, rng), proposes=True)
    best = next(e for e in s.entities if all(s.facts[e][c.field] in c.options[True] for c in conditions))
    a, b = (c.text for c in rng.sample(conditions, 2))
    return s.example(
        s.ask(_WHICH, kind=domain.kind, who=domain.who, a=a, b=b),
        f"The {domain.kind} {domain.who} meets both conditions is {best}.",
        [bare(best)],
        [bare(e) for e in s.entities if e != best],
    )


@dataclass(frozen=True)
class _Condition:
    """A criterion with its limit.

    Attributes:
        field: The name of the property.
        text: What follows "the product that …".
        options: The values that meet it, under True, and those that do not.
    """

    field: str
    text: str
    options: dict[bool, list[str]]


def _pairs(criteria: Sequence[Criterion]) -> list[tuple[Criterion, Criterion]]:
    """Return the pairs of criteria for two properties, at least one of which has numbers."""
    return [(a, b) for a, b in combinations(criteria, 2) if a.field != b.field and {a.side, b.side} != {"at"}]


def _draw_condition(criterion: Criterion, domain: LongDomain, held_out: bool, rng: random.Random) -> _Condition:
    values = _options(domain.fields[criterion.field], held_out)
    if criterion.side == "at":
        at = rng.randrange(len(values))
        meeting, failing = [values[at]], values[:at] + values[at + 1 :]
    else:  # the limit itself is no proposal's number
        third = len(values) // 3
        at = rng.randrange(third, len(values) - third)
        meeting, failing = values[:at], values[at + 1 :]
        if criterion.side == "above":
            meeting, failing = failing, meeting
    way = rng.choice(criterion.ways[-1:] if held_out else criterion.ways[:-1])
    return _Condition(criterion.field, _with_articles(way.format(n=values[at])), {True: meeting, False: failing})


_MAKERS: dict[str, Callable[[bool, random.Random], Example]] = {
    "look-up": lambda held_out, rng: look_up(_draw_scene(held_out, rng, _draw_n_branches(rng))),
    "combine": lambda held_out, rng: combine(_draw_scene(held_out, rng, _draw_n_branches(rng))),
    "list": lambda held_out, rng: list_all(_draw_scene(held_out, rng, 4)),
    "compare": lambda held_out, rng: compare(_draw_scene(held_out, rng, _draw_n_branches(rng), numbers=True)),
    "contradiction": lambda held_out, rng: contradiction(_draw_scene(held_out, rng, 2), _draw_n_branches(rng)),
    "best": _best,
}
