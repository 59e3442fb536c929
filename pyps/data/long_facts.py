"""What long examples ask about: four of the domains of facts.py, with more properties, values and entities.

Every list begins with what facts.py has, so that what is held out there is held out here, too (facts.split).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pyps.data import fillers
from pyps.data.facts import LIBRARY, PEOPLE, PLACES, THINGS, Domain, Field
from pyps.data.fillers import Fillers


@dataclass(frozen=True)
class Criterion:
    """What a proposal must have.

    Attributes:
        field: The name of the property.
        side: Where its value must be: "below" or "above" a limit; "at" for a value that it must be.
        ways: What follows "the product that …"; {n} stands for the limit or the value. The last is for held-out
            examples.
    """

    field: str
    side: str
    ways: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class LongDomain(Domain):
    """A domain of which long notes can be written.

    Attributes:
        kind: What its entities are when they are proposed.
        who: The relative pronoun that goes with it.
        calls: What fillers may call an entity instead of by its name.
        criteria: What proposals can be asked to have.
        fillers: The sentences that fill notes.
    """

    kind: str
    who: str = "that"
    calls: Mapping[str, str]
    criteria: Sequence[Criterion]
    fillers: Fillers


def _more(values: Sequence[str], text: str) -> list[str]:
    return [*values, *text.split("; ")]


_WOMEN = _more(
    (),
    "Anna; Clara; Elena; Greta; Irene; Karla; Maria; Olga; Rosa; Tara; Vera; Xenia; Zoe; Bianca; Dora; Fatima; Hanna; "
    "Julia; Linda; Nadia; Petra; Selma; Ursula; Wanda; Yara; Alice; Diana; Flora; Helga; Jane",
)
_CITIES = PLACES.entities
_SURNAMES = _more(
    LIBRARY.fields["author"].values,
    "Abbott; Bauer; Castro; Delgado; Eriksen; Fontaine; Garcia; Hoffman; Ivanov; Jansen; Kovacs; Larsen; Mancini; "
    "Nakamura; Okafor; Petrov; Romero; Silva; Thomsen; Vogel",
)
_JOBS = _more(
    PEOPLE.fields["job"].values,
    "cook; optician; florist; jeweller; mechanic; translator; cleaner; porter; miner; sailor; surgeon; courier; "
    "potter; locksmith; roofer; glazier",
)
_PETS = _more(
    PEOPLE.fields["pet"].values,
    "mouse; rat; ferret; gecko; pigeon; chicken; sheep; pig; donkey; llama; hedgehog; budgie; cockatoo; goldfish; "
    "tortoise; gerbil; cow; turkey; peacock; swan; chinchilla; owl; iguana; alpaca; crab; tarantula",
)
_LANGUAGES = _more(
    (),
    "Portuguese; Spanish; French; German; Italian; Danish; Swedish; Finnish; Greek; Czech; Dutch; Turkish; Arabic; "
    "Hebrew; Persian; Hindi; Urdu; Bengali; Tamil; Thai; Korean; Japanese; Chinese; Vietnamese; Malay; Swahili; Zulu; "
    "Russian; Ukrainian; Romanian; Hungarian; Bulgarian; Serbian; Croatian; Norwegian; Icelandic; Irish; Welsh; "
    "Latvian; Estonian; Albanian",
)
_COLOURS = _more(
    THINGS.fields["colour"].values,
    "turquoise; crimson; maroon; navy; teal; cream; lilac; scarlet; indigo; mint; khaki; amber; coral; lavender; "
    "mustard; olive; peach; ruby; salmon; charcoal; emerald; magenta; plum; rust; ivory; burgundy",
)
_MATERIALS = _more(
    THINGS.fields["material"].values,
    "linen; tin; brass; cork; marble; concrete; cardboard; denim; velvet; oak; nylon; canvas; aluminium; zinc; "
    "porcelain; wicker; straw; wax; granite; slate; titanium; bronze; jute; hemp; suede; resin",
)
_PRODUCTS = _more(
    THINGS.entities,
    "the toaster; the sofa; the desk; the bench; the stool; the telescope; the mug; the jug; the tray; the towel; "
    "the trumpet; the flute; the piano; the accordion; the harp; the wheelbarrow; the bucket; the broom; the rake; "
    "the spade; the sledge; the kite; the skateboard; the canoe; the hammock; the printer; the drill; the wrench; "
    "the pump; the heater",
)
# none that needs frost, since the temperature is a property of its own
_WEATHER = _more((), "sunny; rainy; cloudy; windy; hazy; foggy; stormy; misty; humid; dry")
_DISHES = _more(
    (),
    "dumplings; noodles; pancakes; meatballs; lentils; goulash; risotto; paella; curry; lasagne; ravioli; omelettes; "
    "sausages; pizza; falafel; couscous; chowder; waffles; kebabs; tacos; burritos; sushi; ramen; fondue; moussaka; "
    "gnocchi; schnitzel; pierogi; borscht; gumbo; polenta; hummus; tamales; empanadas; quiche; dolma; samosas; "
    "spaghetti; croquettes; pretzels; fritters",
)
_BOOKS = _more(
    LIBRARY.entities,
    '"The Copper Coast"; "A Late Visitor"; "Seven Lanterns"; "The Borrowed Coat"; "Under the Bridge"; '
    '"The Velvet Map"; "Crooked Hill"; "A Season of Wolves"; "The Paper Crown"; "Low Tide"; "The Clockmaker"; '
    '"White Orchard"; "The Second Window"; "Lemon Street"; "The Silent Bell"; "A Handful of Sand"; '
    '"The Northern Line"; "Hollow Oak"; "The Painted Stairs"; "Nine Swallows"; "The Winter Guest"; "Broken Compass"; '
    '"The Tinker\'s Song"; "Harvest Moon"; "The Amber Ring"; "Distant Thunder"; "The Wooden Horse"; "Blind Corner"; '
    '"The Apple Thief"; "Early Snow"; "The Forgotten Ferry"; "Black Pepper"; "The Tall Grass"; "Lost Letters"; '
    '"The Orange Door"',
)

_PEOPLE = LongDomain(
    entities=PEOPLE.entities,
    fields={
        "city": PEOPLE.fields["city"],
        "job": replace(PEOPLE.fields["job"], values=_JOBS),
        "pet": replace(PEOPLE.fields["pet"], values=_PETS),
        "age": replace(PEOPLE.fields["age"], numbers=(20, 69)),
        "language": Field(
            ["{e} speaks {v}.", "The language of {e} is {v}.", "{e} grew up with {v} as the first language."],
            ["Which language does {e} speak?", "What is the language of {e}?", "Name the language of {e}.",
             "Which language did {e} grow up with?", "Tell me the language of {e}."],
            ["Which languages do {a} and {b} speak?", "What are the languages of {a} and {b}?",
             "Name the languages of {a} and {b}.",
             "Which languages did {a} and {b} grow up with?", "Tell me the languages of {a} and {b}."],
            ["List the languages of all these people.", "What are the languages of these people?",
             "Name every language.",
             "Which languages do they speak?", "Tell me all the languages."],
            "the language of {e}",
            _LANGUAGES,
        ),
        "wage": Field(
            ["{e} asks for {v} dollars an hour.", "The wage of {e} is {v} dollars an hour.",
             "For an hour of work {e} takes {v} dollars."],
            ["Which wage does {e} ask for?", "How many dollars an hour does {e} ask for?", "What is the wage of {e}?",
             "How much does {e} earn in an hour?", "Tell me the wage of {e}."],
            ["Which wages do {a} and {b} ask for?", "What are the wages of {a} and {b}?",
             "Name the wages of {a} and {b}.",
             "How much do {a} and {b} earn in an hour?", "Tell me the wages of {a} and {b}."],
            ["List the wages of all these people.", "What are the wages of these people?", "Name every wage.",
             "Which wages do they ask for?", "Tell me all the wages."],
            "the wage of {e}",
            numbers=(15, 95),
            most=["Who asks for the highest wage?", "Which of these people asks for the most money?",
                  "Name the person with the highest wage.",
                  "Who earns the most in an hour?", "Tell me whose wage is the highest."],
            is_most="The highest wage is that of {e}.",
            target=1,
        ),
    },
    prompt=PEOPLE.prompt,
    kind="candidate",
    who="who",
    calls={name: "she" if name in _WOMEN else "he" for name in PEOPLE.entities} | {"Quinn": "Quinn", "Chen": "Chen"},
    criteria=[
        Criterion("age", "below", ["is younger than {n}", "is less than {n} years old", "has an age below {n}"]),
        Criterion("age", "above", ["is older than {n}", "is more than {n} years old", "has an age above {n}"]),
        Criterion(
            "wage",
            "below",
            ["asks for less than {n} dollars an hour", "has a wage of less than {n} dollars",
             "earns less than {n} dollars an hour"],
        ),
        Criterion("city", "at", ["lives in {n}", "has a home in {n}", "is at home in {n}"]),
        Criterion("job", "at", ["is a {n}", "works as a {n}", "has the job of a {n}"]),
        Criterion("language", "at", ["speaks {n}", "has {n} as a language", "grew up with {n}"]),
    ],
    fillers=fillers.PEOPLE,
)  # fmt: skip

_THINGS = LongDomain(
    entities=_PRODUCTS,
    fields={
        "colour": replace(THINGS.fields["colour"], values=_COLOURS),
        "material": replace(THINGS.fields["material"], values=_MATERIALS),
        "price": THINGS.fields["price"],
        "guarantee": Field(
            ["{e} has a guarantee of {v} years.", "The guarantee of {e} is {v} years.",
             "The maker gives a guarantee of {v} years on {e}."],
            ["How long is the guarantee of {e}?", "How many years of guarantee does {e} have?",
             "What is the guarantee of {e}?",
             "For how many years does the guarantee of {e} last?", "Tell me the guarantee of {e}."],
            ["How long are the guarantees of {a} and {b}?", "How many years of guarantee do {a} and {b} have?",
             "Name the guarantees of {a} and {b}.",
             "For how many years do the guarantees of {a} and {b} last?", "Tell me the guarantees of {a} and {b}."],
            ["List the guarantees of all these things.", "How long are the guarantees of these things?",
             "Name every guarantee.",
             "Which guarantees do they have?", "Tell me all the guarantees."],
            "the guarantee of {e}",
            numbers=(2, 20),
            most=["Which of these things has the longest guarantee?", "What has the longest guarantee?",
                  "Name the thing with the longest guarantee.",
                  "What is guaranteed for the longest time?", "Tell me which guarantee is the longest."],
            is_most="The longest guarantee is that of {e}.",
            target=1,
        ),
        "delivery": Field(
            ["The delivery of {e} takes {v} days.", "{e} arrives {v} days after the order.",
             "It takes {v} days to deliver {e}."],
            ["How long does the delivery of {e} take?", "How many days does it take to deliver {e}?",
             "After how many days does {e} arrive?",
             "How long must customers wait for {e}?", "Tell me how long the delivery of {e} takes."],
            ["How long do the deliveries of {a} and {b} take?", "How many days does it take to deliver {a} and {b}?",
             "After how many days do {a} and {b} arrive?",
             "How long must customers wait for {a} and for {b}?", "Tell me how long {a} and {b} take to arrive."],
            ["List the times of delivery of all these things.", "How long do the deliveries of these things take?",
             "Name every time of delivery.",
             "How many days do the deliveries take?", "Tell me all the times of delivery."],
            "how long the delivery of {e} takes",
            numbers=(2, 40),
            most=["Which of these things takes the longest to arrive?", "Which delivery takes the longest?",
                  "Name the thing with the slowest delivery.",
                  "For which of these things must customers wait the longest?", "Tell me what arrives the latest."],
            is_most="The longest delivery is that of {e}.",
        ),
        "origin": Field(
            ["{e} was made in {v}.", "{e} comes from {v}.", "{v} is the city where {e} was made."],
            ["Where was {e} made?", "In which city was {e} made?", "Which city does {e} come from?",
             "What is the city of origin of {e}?", "Tell me where {e} was made."],
            ["Where were {a} and {b} made?", "In which cities were {a} and {b} made?",
             "Which cities do {a} and {b} come from?",
             "What are the cities of origin of {a} and {b}?", "Tell me where {a} and {b} were made."],
            ["List the cities in which these things were made.", "Where were these things made?",
             "Name every city of origin.",
             "Which cities do they come from?", "Tell me where all of them were made."],
            "where {e} was made",
            _CITIES,
        ),
    },
    prompt=THINGS.prompt,
    kind="product",
    calls=dict.fromkeys(_PRODUCTS, "the product"),
    criteria=[
        Criterion(
            "price",
            "below",
            ["costs less than {n} dollars", "is cheaper than {n} dollars", "has a price of less than {n} dollars"],
        ),
        Criterion(
            "guarantee",
            "above",
            ["has a guarantee of more than {n} years", "has more than {n} years of guarantee",
             "is guaranteed for more than {n} years"],
        ),
        Criterion(
            "delivery",
            "below",
            ["is delivered in less than {n} days", "arrives in less than {n} days",
             "takes less than {n} days to arrive"],
        ),
        Criterion("colour", "at", ["is {n}", "has the colour {n}", "is {n} in colour"]),
        Criterion("material", "at", ["is made of {n}", "consists of {n}", "has {n} as its material"]),
        Criterion("origin", "at", ["was made in {n}", "comes from {n}", "has its origin in {n}"]),
    ],
    fillers=fillers.THINGS,
)  # fmt: skip

_PLACES = LongDomain(
    entities=_CITIES,
    fields={
        "weather": replace(PLACES.fields["weather"], values=_WEATHER),
        "temperature": PLACES.fields["temperature"],
        "hotel": Field(
            ["A hotel room in {e} costs {v} dollars a night.", "Hotels in {e} ask for {v} dollars a night.",
             "A night in a hotel in {e} costs {v} dollars."],
            ["What does a hotel room in {e} cost?", "How much is a night in a hotel in {e}?",
             "How many dollars do hotels in {e} ask for?",
             "How much must guests pay for a hotel room in {e}?", "Tell me what a hotel room in {e} costs."],
            ["What do hotel rooms in {a} and {b} cost?", "How much is a night in a hotel in {a} and in {b}?",
             "How many dollars do hotels in {a} and {b} ask for?",
             "How much must guests pay for a hotel room in {a} and in {b}?",
             "Tell me what hotel rooms in {a} and {b} cost."],
            ["List what a hotel room costs in all these cities.", "What do hotel rooms in these cities cost?",
             "Name the cost of a hotel room in every city.",
             "How much do hotels ask for there?", "Tell me what all the hotel rooms cost."],
            "the cost of a hotel room in {e}",
            numbers=(41, 199),
            most=["Where are hotels the most expensive?", "Which of these cities has the most expensive hotels?",
                  "Name the city with the most expensive hotels.",
                  "In which city do guests pay the most for a room?", "Tell me where a hotel room costs the most."],
            is_most="The city with the most expensive hotels is {e}.",
        ),
        "rain": Field(
            ["It rains on {v} days of the year in {e}.", "{e} has {v} days of rain in a year.",
             "In {e} there are {v} days of rain in a year."],
            ["On how many days does it rain in {e}?", "How many days of rain does {e} have?",
             "What is the number of days of rain in {e}?",
             "How often does it rain in {e}?", "Tell me the number of days of rain in {e}."],
            ["On how many days does it rain in {a} and {b}?", "How many days of rain do {a} and {b} have?",
             "Name the numbers of days of rain in {a} and {b}.",
             "How often does it rain in {a} and in {b}?", "Tell me the numbers of days of rain in {a} and {b}."],
            ["List the days of rain of all these cities.", "How many days of rain do these cities have?",
             "Name every number of days of rain.",
             "How often does it rain in each of them?", "Tell me all the numbers of days of rain."],
            "the number of days of rain in {e}",
            numbers=(40, 210),
            most=["Where does it rain the most often?", "Which of these cities has the most days of rain?",
                  "Name the city with the most rain.",
                  "In which city does it rain on the most days?", "Tell me where it rains the most often."],
            is_most="The city with the most rain is {e}.",
            target=1,
        ),
        "dish": Field(
            ["The favourite dish in {e} is {v}.", "People in {e} love to eat {v}.", "Most kitchens in {e} serve {v}."],
            ["What is the favourite dish in {e}?", "What do people in {e} love to eat?",
             "Which dish do most kitchens in {e} serve?",
             "Which dish is loved in {e}?", "Tell me the favourite dish in {e}."],
            ["What are the favourite dishes in {a} and {b}?", "What do people in {a} and {b} love to eat?",
             "Name the favourite dishes in {a} and {b}.",
             "Which dishes are loved in {a} and {b}?", "Tell me the favourite dishes in {a} and {b}."],
            ["List the favourite dishes in all these cities.", "What are the favourite dishes in these cities?",
             "Name every dish.",
             "Which dishes are loved there?", "Tell me all the favourite dishes."],
            "the favourite dish in {e}",
            _DISHES,
        ),
        "mayor": Field(
            ["The mayor of {e} is called {v}.", "{e} has a mayor called {v}.", "{v} is the mayor of {e}."],
            ["Who is the mayor of {e}?", "What is the name of the mayor of {e}?", "What is the mayor of {e} called?",
             "Which mayor does {e} have?", "Tell me the mayor of {e}."],
            ["Who are the mayors of {a} and {b}?", "What are the names of the mayors of {a} and {b}?",
             "Name the mayors of {a} and {b}.",
             "Which mayors do {a} and {b} have?", "Tell me the mayors of {a} and {b}."],
            ["List the mayors of all these cities.", "Who are the mayors of these cities?", "Name every mayor.",
             "Which mayors do they have?", "Tell me all the mayors."],
            "the mayor of {e}",
            _SURNAMES,
        ),
    },
    prompt="Report on {e}.",
    kind="city",
    calls=dict.fromkeys(_CITIES, "the city"),
    criteria=[
        Criterion(
            "temperature",
            "above",
            ["is warmer than {n} degrees", "has more than {n} degrees",
             "has a temperature of more than {n} degrees"],
        ),
        Criterion(
            "temperature",
            "below",
            ["is cooler than {n} degrees", "has less than {n} degrees",
             "has a temperature of less than {n} degrees"],
        ),
        Criterion(
            "hotel",
            "below",
            ["has hotel rooms for less than {n} dollars", "has hotels that cost less than {n} dollars a night",
             "offers a hotel room for less than {n} dollars"],
        ),
        Criterion(
            "rain",
            "below",
            ["has fewer than {n} days of rain in a year", "has rain on fewer than {n} days",
             "sees rain on fewer than {n} days of the year"],
        ),
        Criterion("weather", "at", ["is {n} today", "has {n} weather", "has weather that is {n}"]),
        Criterion("dish", "at", ["loves to eat {n}", "has {n} as its favourite dish", "is fond of {n}"]),
    ],
    fillers=fillers.PLACES,
)  # fmt: skip

_LIBRARY = LongDomain(
    entities=_BOOKS,
    fields={
        "author": replace(LIBRARY.fields["author"], values=_SURNAMES),
        "pages": LIBRARY.fields["pages"],
        "year": Field(
            ["{e} appeared in {v}.", "{e} was first printed in {v}.", "{v} is the year in which {e} appeared."],
            ["When did {e} appear?", "In which year did {e} appear?", "In which year was {e} first printed?",
             "From which year is the first edition of {e}?", "Tell me the year in which {e} appeared."],
            ["When did {a} and {b} appear?", "In which years did {a} and {b} appear?",
             "In which years were {a} and {b} first printed?",
             "From which years are the first editions of {a} and {b}?",
             "Tell me the years in which {a} and {b} appeared."],
            ["List the years in which these books appeared.", "When did these books appear?", "Name every year.",
             "In which years were they printed?", "Tell me all the years."],
            "the year in which {e} appeared",
            numbers=(1905, 1999),
            most=["Which of these books is the newest?", "Which book appeared last?", "Name the newest book.",
                  "Which book was printed most recently?", "Tell me which book is the newest."],
            is_most="The newest book is {e}.",
        ),
        "setting": Field(
            ["{e} takes place in {v}.", "The story of {e} is set in {v}.", "{v} is the city where {e} takes place."],
            ["Where does {e} take place?", "In which city does {e} take place?", "Where is the story of {e} set?",
             "Which city is the setting of {e}?", "Tell me where {e} takes place."],
            ["Where do {a} and {b} take place?", "In which cities do {a} and {b} take place?",
             "Where are the stories of {a} and {b} set?",
             "Which cities are the settings of {a} and {b}?", "Tell me where {a} and {b} take place."],
            ["List the cities in which these books take place.", "Where do these books take place?",
             "Name the city of every book.",
             "Which cities are they set in?", "Tell me where all of them take place."],
            "where {e} takes place",
            _CITIES,
        ),
        "hero": Field(
            ["The hero of {e} is called {v}.", "{v} is the hero of {e}.", "{e} tells the story of {v}."],
            ["Who is the hero of {e}?", "What is the hero of {e} called?", "Whose story does {e} tell?",
             "What is the name of the hero of {e}?", "Tell me the hero of {e}."],
            ["Who are the heroes of {a} and {b}?", "What are the heroes of {a} and {b} called?",
             "Whose stories do {a} and {b} tell?",
             "What are the names of the heroes of {a} and {b}?", "Tell me the heroes of {a} and {b}."],
            ["List the heroes of all these books.", "Who are the heroes of these books?", "Name every hero.",
             "Which heroes do they have?", "Tell me all the heroes."],
            "the hero of {e}",
            PEOPLE.entities,
        ),
        "loans": Field(
            ["{e} was borrowed {v} times last year.", "Readers borrowed {e} {v} times last year.",
             "Last year the library lent {e} {v} times."],
            ["How often was {e} borrowed?", "How many times was {e} borrowed last year?",
             "How often did readers borrow {e}?",
             "How many times did the library lend {e}?", "Tell me how often {e} was borrowed."],
            ["How often were {a} and {b} borrowed?", "How many times were {a} and {b} borrowed last year?",
             "How often did readers borrow {a} and {b}?",
             "How many times did the library lend {a} and {b}?", "Tell me how often {a} and {b} were borrowed."],
            ["List how often all these books were borrowed.", "How often were these books borrowed?",
             "Name the number of loans of every book.",
             "How many times were they lent?", "Tell me how often all of them were borrowed."],
            "how often {e} was borrowed",
            numbers=(21, 480),
            most=["Which of these books was borrowed most often?", "Which book did readers borrow the most?",
                  "Name the book that was borrowed most often.",
                  "Which book has the most loans?", "Tell me which book was lent most often."],
            is_most="The book that was borrowed most often is {e}.",
        ),
    },
    prompt=LIBRARY.prompt,
    kind="book",
    calls=dict.fromkeys(_BOOKS, "the book"),
    criteria=[
        Criterion(
            "pages", "below", ["has fewer than {n} pages", "is shorter than {n} pages", "is less than {n} pages long"]
        ),
        Criterion(
            "pages", "above", ["has more than {n} pages", "is longer than {n} pages", "is more than {n} pages long"]
        ),
        Criterion("year", "above", ["appeared after {n}", "was first printed after {n}", "is from after {n}"]),
        Criterion("year", "below", ["appeared before {n}", "was first printed before {n}", "is from before {n}"]),
        Criterion(
            "loans",
            "above",
            ["was borrowed more than {n} times", "was borrowed on more than {n} occasions",
             "was lent more than {n} times"],
        ),
        Criterion("author", "at", ["was written by {n}", "has {n} as its author", "is by {n}"]),
        Criterion("setting", "at", ["takes place in {n}", "is set in {n}", "has {n} as its setting"]),
    ],
    fillers=fillers.LIBRARY,
)  # fmt: skip

LONG_DOMAINS = (_PEOPLE, _THINGS, _PLACES, _LIBRARY)
