"""Open tasks, with the sides of each that a branch may be asked about. Every fifth is for held-out examples."""

BRANCHES = ("Talk about {}.", "Focus on {}.", "What about {}?", "Write only about {}, shortly.")

# task: sides
_TOPICS = """
How can I sleep better?: food and drink; light and screens; exercise; the bedroom; a daily routine
How do I learn to cook?: simple dishes; the tools; shopping; mistakes that beginners make
Plan a birthday party for a child of six.: games; food; decoration; the invitation
Which pet suits a small flat?: cats; fish; hamsters; birds; dogs
How can a family save money?: food; energy; holidays; shopping; the car
Which database should a small desktop app use?: SQLite; PostgreSQL; DuckDB; plain files
What should I know before I buy a used car?: the engine; the papers; the price; the test drive
How do I prepare for a job interview?: clothes; questions; the company; nerves
Write the plan for a weekend in Rome.: the old buildings; food; museums; walking
How do plants grow?: light; water; the soil; the seasons
How can I run my first five kilometres?: shoes; training; breathing; food; rest
Why do people like music?: feelings; memory; dancing; company
How should a beginner invest money?: shares; savings; risk; patience
What makes a good teacher?: patience; knowledge; humour; listening
How do I keep a small garden?: vegetables; flowers; watering; insects
Which programming language should I learn first?: Python; JavaScript; C; Rust
How do I make friends in a new city?: sports; work; neighbours; courses
What helps against stress at work?: breaks; planning; talking; movement
Explain how a bicycle works.: the pedals and the chain; the brakes; balance; the gears
How do I write a good letter of complaint?: the tone; the facts; what to ask for; the ending
Should our town build a new bridge?: traffic; cost; nature; the shops
How can children learn to read?: stories; letters; patience; games
What is a healthy breakfast?: grains; fruit; eggs; drinks
How do I take better photographs?: light; the subject; the background; patience
Which sport is right for me?: swimming; football; climbing; tennis; dancing
How does the weather come about?: the sun; wind; clouds; the sea
How should I pack for a week in the mountains?: clothes; food; maps; first aid
Why did people build castles?: defence; power; trade; living
How do I learn a language?: words; grammar; speaking; films and books
What should a first-aid box contain?: wounds; burns; medicine; tools
How can a school save energy?: light; heating; lessons about it; machines
How do I write a short story?: the hero; the place; the conflict; the ending
How is bread made?: flour; yeast; kneading; baking
Is it better to live in a city or in the country?: work; nature; neighbours; cost
How do I keep my computer safe?: passwords; updates; backups; e-mail
How can I be more punctual?: planning; clocks; habits; travel
What do bees do for us?: honey; flowers; farming; nature
How do I paint a room?: preparation; colours; tools; cleaning up
How does a bank work?: accounts; loans; safety; interest
What should I consider when I adopt a dog?: time; food; training; cost
How do I give a good speech?: the opening; the voice; the structure; practice
How can we make our street safer?: cars; lamps; children; crossings
What are good ideas for a rainy day?: games; cooking; reading; crafts
How do I choose a present?: hobbies; the price; surprise; wrapping
Why is the sea salty?: rivers; rocks; evaporation; life in the sea
How do I train my memory?: repetition; pictures; sleep; notes
Which phone should my grandmother have?: size; price; battery; simplicity
How do I look after houseplants?: water; light; soil; pests
How can a small shop win customers?: prices; service; the window; advertising
How do I repair a flat bicycle tyre?: tools; finding the hole; the patch; the pump
What is important in a good team?: trust; roles; talking; aims
How do I start to meditate?: sitting; breathing; time; thoughts
How does a library help a town?: children; studying; meetings; quiet
What should be in a good report?: the summary; the facts; the structure; the conclusion
How can I eat less sugar?: drinks; sweets; cooking; shopping
How do I plan a long journey by train?: tickets; luggage; food; changing trains
Why do leaves change colour in autumn?: light; cold; the tree; the pigments
How do I teach a child to swim?: safety; games; breathing; patience
What are the pros and cons of working from home?: time; colleagues; concentration; cost
How do I organise a small concert?: the place; the musicians; tickets; sound
How do I review a piece of code?: correctness; names; tests; speed
How do birds fly?: feathers; wings; muscles; air
What makes a film exciting?: the story; music; actors; pictures
How do I move house without chaos?: boxes; lists; helpers; the last day
How can I use less plastic?: shopping; the kitchen; the bathroom; travelling
How does a vaccine work?: the body's defence; safety; memory of the body; history
Which heating suits an old house?: gas; wood; heat pumps; insulation
How do I set up a small aquarium?: the tank; the fish; plants; cleaning
How can two people settle a quarrel?: listening; a break; fairness; a third person
How do I become a better chess player?: openings; endings; practice; calm
"""

TOPICS: list[tuple[str, list[str]]] = [
    (task, sides.strip().split("; "))
    for task, _, sides in (line.partition(": ") for line in _TOPICS.strip().splitlines())
]
