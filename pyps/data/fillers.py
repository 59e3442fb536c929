"""Sentences that fill long notes: true of any entity of a domain, and silent about all that questions ask for.

A sentence is an opening and a clause, in which {e} stands for the entity. All clauses of a domain go together, so
several notes about the same entity never contradict each other in them. None has a number or a value of a property in
it. Every fifth clause is for held-out examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Fillers:
    """What sentences of a domain are made of.

    Attributes:
        openings: How they begin. The first is empty.
        clauses: What they say.
    """

    openings: Sequence[str]
    clauses: Sequence[str]


def _fillers(openings: str, clauses: str) -> Fillers:
    return Fillers(("", *openings.strip().split("; ")), clauses.strip().splitlines())


PEOPLE = _fillers(
    "Relatives say that; As is well known,; By the way,; It is also true that; A cousin mentions that; "
    "As far as we know,; It is no secret that; A former flatmate adds that",
    """
{e} keeps every letter and every postcard in a box under the bed
the balcony is full of herbs, and tomatoes grow there in summer
{e} makes strong coffee for all guests and never lets anybody wash the cups
the front door squeaks, although somebody promises every month to oil it
{e} likes long walks along the canal when the streets are quiet
a framed map of the old town hangs in the hall, next to the coats
{e} answers letters by hand and takes a whole evening for each of them
the kitchen smells of cinnamon for most of the winter
{e} belongs to a choir that meets once a week in the hall behind the church
an old piano in the living room has needed a tuning for ages
{e} can tell a good story and knows when to stop
the stairs to the flat are steep, so visitors arrive out of breath
{e} reads the newspaper from the last page to the first
the windows look out on a courtyard with a large chestnut tree
{e} forgets umbrellas on trains and has given up buying new ones
there is always a bowl of apples by the door for anyone who is hungry
{e} writes down every dream in a notebook with a soft cover
the living room is small, but a whole party has danced in it
{e} has a talent for repairing things that others would throw away
on Sundays the whole staircase can hear the same old records
{e} never misses a football match of the local team, even when it loses
a bus stops right in front of the house, which makes visits easy
{e} learnt to swim late and now does it with great pleasure
the shelves in the hall are filled with travel books and old atlases
{e} prefers trains to planes and always takes a seat by the window
most of the furniture came from a flea market and was repaired at home
{e} cooks for the whole staircase on the last Friday of the month
the postman often rings the wrong bell because the name plate is hard to read
{e} collects stamps with pictures of lighthouses and trades them by mail
a narrow path leads from the back door to a shed with tools
{e} is known for patience and has never been heard to shout
the telephone rings often, since everybody comes here for advice
{e} sings in the kitchen and hums on the stairs
a neighbour waters the plants whenever the flat is empty
{e} bakes bread at night because the house is quiet then
the old armchair by the stove is the favourite place for reading
{e} plays chess by letter against somebody on another continent
the cellar is full of jam from the autumn, with labels in neat handwriting
{e} gets up before everybody else and enjoys the silence
photographs of the whole family stand in a long row on the cupboard
{e} has a weakness for crossword puzzles and solves them with a pencil
a large calendar in the kitchen shows every birthday of the family
{e} once won a prize for the best pumpkin of the district
the garden gate has to be lifted a little before it opens
{e} knows the names of all the stars that can be seen from the roof
every spring the flat is painted again, with the help of many friends
{e} returns borrowed books on time and expects the same from others
in the evening there is music from the room under the roof
{e} laughs easily and remembers the jokes of others for years
the mailbox is usually full, because so many letters come from abroad
{e} helps at the food bank and carries the boxes from the van
a rope ladder still hangs in the tree from the last summer party
{e} would rather walk for an hour than wait for a bus
the bell of the nearby church is so loud that meetings stop for it
{e} studies old maps and can explain how the river was moved
there is a chalkboard in the kitchen with a list of things to buy
{e} goes to the market early and talks with everybody there
the spare room is ready for guests all year round
{e} hates hurry and plans every journey weeks ahead
an aunt comes to visit every autumn and stays until the first frost
{e} takes photographs of doors and has a whole album of them
the lights in the flat are often on until long after midnight
{e} has a good memory for faces and a poor one for names
a heavy curtain keeps the noise of the street away from the bedroom
{e} took part in the last town run and came in smiling
the bookshop around the corner keeps a chair ready for this regular guest
{e} mends clothes with small, careful stitches that nobody can see
the dinner table is an old door on a pair of trestles
{e} keeps a diary and has not missed a day since school
the radio in the kitchen is on all day, but very quietly
{e} likes rules in games and nowhere else
a sledge from childhood hangs on the wall above the coats
{e} eats breakfast standing up and lunch in the park
the neighbours borrow sugar here so often that there is a list
{e} can whistle any tune after hearing it a single time
the flat has high ceilings and floors that creak at night
{e} visits the same museum every month and always begins in the last room
a small theatre group rehearses in the living room before each premiere
{e} never learnt to drive and does not miss it at all
the hall is used by the whole house to store bicycles
{e} speaks slowly and thinks about every question before the answer
a basket with wool stands by the armchair, ready for long evenings
{e} sends a postcard from every journey, however short it was
the doormat was a present and shows a picture of a sleeping bear
{e} listens well, which is why so many people tell their worries here
at the end of the corridor a narrow door opens onto the roof
{e} grows beans along the railing and gives most of them away
a suitcase under the stairs is always packed, just in case
{e} was the first in the house to sort the rubbish carefully
the birthday parties in the courtyard have become a small tradition
{e} walks barefoot at home and leaves the shoes on the landing
the kitchen clock is always a little fast, and everybody knows it
{e} invents new recipes and writes them on the backs of envelopes
a friend from school comes by every Thursday for a game of cards
{e} keeps promises, even the small ones that others forget
the view from the bathroom is better than the view from the balcony
{e} sleeps with the window open in every season
a box of tools stands ready for anybody in the house who needs it
{e} dislikes loud restaurants and knows where the quiet ones are
the wardrobe was carried up the stairs in pieces and put together again
{e} reads aloud at the children's hospital on the first Monday of the month
the curtains were sewn by a grandmother and have lasted well
{e} enjoys jigsaw puzzles and leaves them on the floor for weeks
a thick rug makes the hall quiet enough for a late return
{e} has run the lottery at the street party for as long as anyone remembers
the old typewriter on the desk still gets used for invitations
{e} can be found in the reading room of the library on most afternoons
a paper lantern from a summer party still hangs over the balcony
{e} gives away more presents than anybody else in the street
the key to the cellar hangs on a nail behind the door
{e} trusts people quickly and is seldom disappointed
the ceiling of the bedroom is painted like the night sky
{e} began to learn the guitar last winter and practises every day
somebody left a rowing boat in the courtyard, and nobody has come for it
{e} hums the same few notes when something goes well
a bench in front of the house invites everybody to sit down for a while
{e} signs all letters with a small drawing of a snail
the coffee machine came from a café that closed long ago
{e} cuts the hair of half the family, with great care
a jar on the shelf is filled with shells from many beaches
{e} is always the last to leave a party, because somebody has to tidy up
the ivy on the wall has reached the windows of the upper floor
{e} often lends money and hardly ever asks for it back
a grandfather built the large cupboard that fills the hall
{e} knows where to find mushrooms and does not tell anybody
the attic is dusty and full of costumes from the carnival
{e} drinks tea without sugar and coffee with a lot of it
a hammock hangs between the trees behind the house from May to September
{e} has a firm handshake and a very soft voice
the heating makes strange noises that guests take for footsteps
{e} votes in every election and talks the neighbours into it
an exhibition of small drawings covers the wall beside the mirror
{e} repairs old radios and gives them to the neighbours
a wide windowsill in the kitchen serves as a second table
{e} finds lost keys faster than anybody else in the family
the guest book by the door goes back for several decades
{e} learnt magic tricks from an uncle and still shows them at weddings
the flat was a workshop once, and there are hooks in the ceiling
{e} wears the same old coat every winter and is proud of it
a little bell above the kitchen door calls everybody to dinner
{e} takes the stairs even when the lift is working
the candles on the windowsill are lit on long winter evenings
{e} makes lists for everything and loses most of them
in the yard a table tennis table is used until late in autumn
{e} gets seasick on any boat but loves the sound of waves
the doorbell plays a short tune that nobody can name
{e} waits until the last page before giving an opinion on a book
a pile of board games fills the lowest shelf in the living room
{e} once stood on a stage by accident and stayed until the end
the room at the back is kept empty for dancing
{e} thanks the people at the counter by name in every shop
a thermometer from the time of the grandparents hangs outside the kitchen
{e} would never throw away a book, not even a bad one
the mirror in the hall makes everybody look a little taller
{e} spends the holidays in the mountains with a group of old friends
a string of small lights has hung in the stairwell since the last party
""",
)

THINGS = _fillers(
    "The seller says that; As an employee explains,; Buyers report that; By the way,; "
    "We also noticed that; It is good to know that; It is also true that; A review mentions that",
    """
{e} comes in a plain box with a handle on the lid
the box shows a drawing of {e} from all sides
a small booklet explains how to look after {e}
{e} was shown at a fair last spring, where many visitors stopped to look
the shop keeps {e} near the entrance so that everybody can try it
{e} has a number under the base that the maker uses for repairs
spare parts can be ordered from the same shop by telephone
{e} is easy to clean with a soft cloth and a little warm water
the maker sends a friendly letter to everybody who registers {e}
{e} was designed by a small family business that still works by hand
every customer may take {e} home for a weekend before deciding
{e} fits well into a small flat and into a large house
the edges of {e} are rounded so that nobody gets hurt
{e} was tested by a group of students, who used it every day for a month
a short film on the website shows how {e} is used
{e} is wrapped with care, and nothing rattles when the box is shaken
the shop offers to engrave a name on {e} for birthdays and weddings
{e} stood in the shop window during the winter holidays
the sign beside {e} was written by hand and decorated with flowers
{e} can be picked up at the back door of the shop after closing time
the instructions come in several languages and have clear pictures
{e} has been in the catalogue for many seasons and has hardly changed
the drawing on the first page of the catalogue shows {e} in use
{e} won a small award for its simple shape
most questions about {e} are answered on the last page of the booklet
{e} needs no assembly and can be used straight away
the maker asks customers to send in photographs of {e} in use
{e} is often bought as a present for a new home
a check in the workshop is recommended from time to time
{e} is handed over in person, so that questions can be asked
the shop will take {e} back if it is returned with its box
{e} was drawn first on a napkin, as the maker likes to tell
an older model of {e} can be seen in the local museum
{e} passed all the safety checks on the first attempt
the people in the shop like to show how {e} works
{e} has a small mark on the underside that proves it is genuine
nobody in the shop can remember a complaint about {e}
{e} comes with a spare part that most owners never need
the maker of {e} also repairs old pieces that others have given up
{e} should be kept away from small children
a customer once wrote a poem about {e}, and the shop has framed it
{e} looks better in daylight than in the photograph
the box can be folded flat and used again for storage
{e} is part of a series, and the other parts go well with it
the designer wanted {e} to look as if it had always been there
{e} was mentioned in a magazine for people who like simple things
the shop hands out a sheet with tips for the owners of {e}
{e} can stay outside under a roof, but not in the open
a sticker on the box tells how to reach the maker
{e} leaves no marks on a floor or on a wall
the shop has sold {e} to several hotels in the area
{e} should be checked every spring by somebody who knows it well
a club of owners meets once a month to talk about {e}
{e} can be borrowed for a day by anybody who lives nearby
the first owner of {e} was a friend of the maker
{e} feels pleasant in the hand and has no sharp corners
the string around the box is tied with a special knot
{e} is packed by the same brothers who built the shop
an exhibition about everyday things included {e} last autumn
{e} was improved after a suggestion from a customer
the catalogue has a whole page about the history of {e}
{e} is popular with people who move house often
a map in the shop shows where the other owners of {e} live
{e} does not come with batteries, because it needs none
the maker keeps a list of everybody who has ever bought {e}
{e} is polished by hand before it leaves the workshop
the shop lends out a cover that protects {e} in winter
{e} was photographed for the poster that hangs in the station
a smaller box inside the box keeps everything in its place
{e} is carried to the car by the assistant, if that is wanted
the booklet has a page for notes about repairs to {e}
{e} should be unpacked slowly and with clean hands
the shop gives lessons on Saturday mornings for new owners
{e} keeps its shape even after many years of daily use
the name of the maker is printed on the bottom in small letters
{e} is the favourite piece of the woman who runs the shop
visitors are allowed to touch {e} and to turn it around
{e} has to be ordered at the counter, where a short form is filled in
a photograph of the workshop hangs on the wall behind {e}
{e} went through many small changes before the maker was satisfied
the label can be removed without leaving any marks
{e} should not be placed on top of other things
an earlier owner used {e} every day and returned it for a check
{e} comes with a cloth for cleaning and a card from the maker
the apprentices learn their craft by making parts of {e}
{e} is recommended by a group that tests things for the home
a hook for hanging up {e} can be bought separately
{e} is shown to every school class that visits the workshop
the shop wants to keep {e} in the catalogue next year
{e} can be taken apart with a simple tool and put together again
a neighbour of the shop has owned {e} since it was first sold
{e} was part of the scenery in a play at the town theatre
the maker answers letters about {e} personally
{e} takes up little space when it is put away
a clear drawing in the booklet names every part of {e}
{e} has proved useful on long journeys and at short parties
the owners of the shop have {e} at home themselves
{e} stays where it is put and does not slip
a museum asked for a piece of the same kind for its collection
{e} goes through a final check by the oldest worker in the workshop
the box has holes at the sides so that it can be carried easily
{e} may look delicate, but it survives a fall without damage
the shop raffles off {e} at the street party every summer
{e} was named after a grandmother of the maker in the first catalogue
a film crew borrowed {e} for a scene in a kitchen
{e} can be exchanged for another model within the first month
the shape of {e} has not been copied by anybody so far
{e} is unpacked and explained by the assistant on request
a simple trick, described in the booklet, makes {e} last even longer
{e} is not suitable for use under water
the workshop is open to visitors on the last Friday of the month
{e} has its own page in the guest book of the shop
a leaflet asks owners to bring {e} back for recycling at the end
{e} is lifted out of the box most easily with both hands
the staff voted {e} their favourite of the season
{e} can be reserved by telephone for a few days
a video call with the maker is offered to everybody with questions about {e}
{e} was first made for a friend who could not find anything like it
the corner in which {e} stands is the busiest in the shop
{e} is checked for scratches before it is put on show
an artist made a large painting of {e} for the back wall
{e} has no visible seams and no loose parts
the catalogue suggests {e} as a present for people who have everything
{e} was used in a lecture about good design
the maker never made any advertisement for {e}
{e} has a quiet charm that is hard to describe
a bag for transport is included, together with a strap
{e} can be stacked with others of its kind
the little booklet smells of fresh ink and is fun to read
{e} has been repaired once in the workshop as a demonstration
a card in the box thanks the buyer and explains the next steps
{e} was chosen by a jury from a long list of entries
the shop dusts {e} every morning before the doors open
{e} is meant for everyday use and not for the cupboard
an old photograph of {e} hangs in the café next door
{e} does its work well without drawing attention to itself
the maker tried out {e} at home for a whole winter
{e} is available all year round and not only before the holidays
a broken part is replaced while the customer waits
{e} has a place of honour in the maker's own kitchen
the photograph in the catalogue was taken by a customer
{e} can be turned upside down without losing anything
a note on the box says which side has to be at the top
{e} was praised on the local news as an example of good craft
the maker signs every piece before it is packed
{e} is best kept at room temperature and out of reach of children
the shop also sells a stand on which {e} can be displayed
{e} survived the flood in the cellar of the workshop unharmed
a lid, a strap and a small tool are in the same box
{e} can be handed down to the next owner with a signed card
the idea for {e} came up during a long train journey
{e} is shown upside down in the catalogue by mistake
""",
)

PLACES = _fillers(
    "Tourists report that; As we were told,; By the way,; It is also true that; "
    "Residents say that; We also learned that; It is well known that; A leaflet mentions that",
    """
the trams in {e} run until midnight and stop at every larger corner
the central library of {e} has a reading room with tall windows
a footbridge in {e} is closed to cars and full of musicians in summer
the market in the middle of {e} opens before sunrise and closes at noon
{e} has a park with old trees and a pond for small boats
many streets in {e} are so narrow that only bicycles get through
the railway station of {e} was rebuilt a short time ago
a tower near the town hall of {e} can be climbed by visitors
{e} has a museum about clocks that few visitors know
the people of {e} like to sit outside until late in the evening
a free map of {e} can be had at every kiosk in the centre
the university of {e} lets guests sit in on its lectures
in {e} the shops close for a long break in the early afternoon
{e} celebrates its founding with a parade and a fair
the zoo of {e} has given its animals larger enclosures
an old factory in {e} has become a place for concerts
{e} is proud of its fountains, many of which have names
the main square of {e} is covered with small round cobbles
the taxis in {e} can be called with a single number
a cable car carries visitors of {e} up to a terrace with a view
the bakeries in {e} begin to sell their bread long before breakfast
{e} has more bookshops than most cities of its size
the theatre of {e} shows a new play almost every month
a long avenue with trees on both sides leads into {e}
{e} has a school for puppet makers that is known all over the world
the botanical garden of {e} is open every day except Monday
street names in {e} are written on small enamel plates
{e} has begun to turn car parks into gardens
a marathon through the streets of {e} is held every autumn
the cinemas in {e} show old films on the first weekend of the month
a newspaper in {e} still prints a chess problem every day
{e} lends out bicycles at most of its stations
the oldest house in {e} is now a small museum for toys
the buses in {e} are free for children and students
{e} has a quarter where nearly every house is an artist's studio
the town hall of {e} has a bell that is rung by hand
many roofs in {e} have been planted with grass and flowers
{e} has a covered hall where flowers are sold at night
a small railway for children runs through the largest park of {e}
the people of {e} say good morning to strangers in the lift
the castle above {e} can be visited with a candle at night
{e} has public pianos on which anybody may play
a choir festival brings singers from many countries to {e}
the swimming pools of {e} are open until late in the evening
{e} has a long tradition of street theatre
old warehouses in {e} have been turned into flats and workshops
the underground stations in {e} are decorated by well known artists
{e} keeps its archive in a former monastery
a walk around the old walls of {e} takes most of a morning
the cafés of {e} put out newspapers in several languages
{e} has a famous school of dance near the opera
every quarter of {e} has its own small festival
the observatory of {e} invites visitors when the sky is dark enough
{e} lights up its bridges at night during the holidays
the antique dealers of {e} meet on a square behind the station
a ferry and a tunnel connect both sides of {e}
{e} has playgrounds that were planned by children
the football stadium of {e} lies in the middle of a quiet quarter
public benches in {e} carry the names of people who gave money for them
{e} gives every newborn child a tree in a park
the post office of {e} is a palace with painted ceilings
a school class from {e} made the models of houses in the town museum
{e} has many courtyards that can be seen only on open days
the courts of {e} meet in a building with a large dome
a chain of small gardens runs along the old railway line in {e}
{e} allows street musicians to play until late in the evening
the chimneys of the old power station can be seen from all over {e}
{e} has a radio station that plays nothing but requests
most visitors of {e} come by train and stay for a weekend
the cemetery of {e} is as quiet and green as a park
{e} has kept its gas lamps in a few of the older streets
a letter box for children's wishes hangs at the town hall of {e}
{e} has a good hospital with a garden for the patients
the tailors of {e} have their workshops in the same street
an arcade in {e} is famous for its shop of old buttons
{e} trains its own gardeners in a school beside the greenhouse
the fire brigade of {e} shows its old engines on Sundays
{e} has a clear system of signs for people on foot
a large mural at the station tells the history of {e}
the airport of {e} is connected with the centre by a fast train
{e} organises a night of open museums every spring
many families in {e} rent a small garden outside the centre
the skaters of {e} meet in front of the concert hall
{e} has a house where writers from abroad can live and work for a year
the stairs beside the cathedral of {e} are a meeting place for students
a lane in {e} is so narrow that neighbours can shake hands across it
{e} publishes a calendar with all the concerts of the month
the second-hand shops in {e} attract collectors from far away
the people of {e} argue about football more than about politics
{e} has restored the frescoes in its oldest chapel
a row of old mills at the edge of {e} is looked after by volunteers
the evening classes of {e} are so popular that there are waiting lists
{e} has banned loud advertising from its trams
the clock on the main square of {e} plays a different tune every day
the cycle paths of {e} are swept every morning
{e} has a market for old records under the railway arches
a statue of an unknown traveller stands at the gate of {e}
the gates of the palace gardens in {e} are locked at sunset
{e} holds a contest for the best balcony flowers
the public library of {e} also lends tools and games
many signs in {e} can be read with the fingertips
{e} has a tradition of telling stories on the stairs of the town hall
the ring road around {e} is closed to cars on some Sundays
the voices in the lifts of {e} belong to local actors
{e} has a quiet quarter with embassies and large gardens
students in {e} pay little for the opera on weekdays
a glass roof covers the oldest shopping street of {e}
{e} moved its fish market out of the centre long ago
the school orchestra of {e} has won many competitions
every taxi driver in {e} has to know the smallest streets by heart
{e} has an office that helps newcomers to find their way
the puppet theatre of {e} plays for adults in the evening
old and new buildings stand side by side in the centre of {e}
{e} keeps a book in which visitors may write their wishes
a path with signs leads past the birthplaces of famous people in {e}
the kiosks of {e} sell flowers as well as newspapers
{e} has a hall for climbing in a former church
the street sweepers of {e} have their own brass band
tickets for the trams of {e} can be bought on board
{e} has planted fruit trees that everybody may pick from
the harvest festival of {e} fills the streets with carts
a small publishing house in {e} prints nothing but poems
{e} has given old telephone boxes to the libraries as book exchanges
the lighting of the main street of {e} was chosen by vote
a school for cooks in {e} opens its dining room to guests at lunch
the archives of {e} hold a letter with a very large seal
{e} has a lost property office that holds a yearly auction
the local train to the suburbs of {e} leaves from its own small station
{e} asks its guests to separate their rubbish carefully
many doors in the old part of {e} have knockers in the shape of a hand
a society in {e} looks after the last hand-painted shop signs
the ice rink of {e} becomes a roller rink in summer
{e} has a square on which chess is played with very large pieces
the concert hall of {e} is known for its good sound
a quarter at the edge of {e} was planned without any cars
{e} has won a prize for its school buildings
the people of {e} speak fast and laugh a lot
a bookbinder in {e} shows visitors how old books are saved
the tram drivers of {e} greet each other with a bell
{e} has an annual exchange of plants in front of the town hall
some houses in {e} have doors that are lower than the street
the music school of {e} lends instruments to beginners
{e} is twinned with a town on another continent
a balcony on the town hall of {e} is used for speeches once a year
the hills around {e} can be reached by bus and on foot
{e} keeps the old rule that no house may be higher than the church
the students of {e} run a night café near the main library
a tunnel under the main street of {e} is used for exhibitions
{e} sends a book to every child that starts school
the paths in the parks of {e} are named after flowers
a group of volunteers in {e} repairs anything that people bring along
""",
)

LIBRARY = _fillers(
    "Subscribers say that; The librarian adds that; As is well known,; As the catalogue says,; "
    "It is often said that; A visitor remarks that; By the way,; It is worth a mention that",
    """
{e} opens with a quarrel at a wedding that nobody expected
the cover of {e} shows a door that stands half open
the dialogues in {e} sound as if they had been overheard on a bus
{e} has been turned into a play for radio
many readers of {e} were surprised by the ending
the chapters of {e} have titles that form a sentence when read in a row
{e} is often given as a present at the end of school
the language of {e} is simple, but the thoughts are not
a map at the front of {e} helps the reader to find the way
{e} plays with readers, who cannot believe all that is told in it
the library keeps {e} on a shelf beside the reading room
{e} has been read aloud on the radio in several parts
the first sentence of {e} is quoted in many schoolbooks
{e} mixes humour and sadness in nearly every scene
a reading group met for a whole winter to talk about {e}
the drawings in {e} were made by a friend of the family
{e} is a favourite of people who do not usually read novels
some scenes in {e} are slow, but the patience is rewarded
{e} has a family tree on the inside of the cover
several letters are printed in {e} as if they were real
the publisher of {e} sent it back at first and asked for changes
{e} was discussed on television by people who disagreed about it
the jokes in {e} become better when they are read aloud
{e} ends with a letter that nobody in the story ever opens
a famous composer wrote a song about a scene in {e}
the print in {e} is large enough for tired eyes
{e} begins in the middle of the story and explains the rest later
the smell of the sea is described in {e} better than anywhere else
{e} has a short preface that can be skipped without any loss
many sentences in {e} can be read in more ways than expected
the villain of {e} is more likeable than most of the others
{e} was translated into many languages soon after its success
a student wrote a thesis about the dreams in {e}
the plot of {e} turns on a mistake in a telegram
{e} is printed on thick pages that feel pleasant to the fingers
the library has repaired the spine of {e} with linen tape
{e} makes a good choice for a long train journey
every chapter of {e} is told from another point of view
the house in {e} seems to be a character of its own
{e} has an index of all the songs that are mentioned in it
a café near the library named a cake after {e}
the weather plays a large part in {e} and is always described with care
{e} was nearly lost when the manuscript was left in a taxi
some of the minor characters of {e} appear again in a later book
{e} asks what people owe to their parents
the translator of {e} added helpful notes at the back
{e} is better on the second reading, when the hints become clear
an actor recorded {e} for people who prefer to listen
the last chapter of {e} can be read as a story of its own
{e} contains a recipe for a soup that really works
readers have written many letters to the publisher of {e}
{e} avoids easy answers and leaves much to the reader
the title of {e} is explained only near the end
{e} makes it hard to take sides, since nobody in it is entirely good
a theatre put {e} on the stage with a very small cast
the descriptions of meals in {e} make readers hungry
{e} was written mostly at night, as a note at the end explains
the rhythm of the sentences in {e} reminds critics of music
{e} leaves out exactly what most other novels would explain
a scene on a staircase is the heart of {e}
the cover of {e} was chosen in a contest among students
{e} is the book that the library recommends to new members
children like {e} because of its many animals
{e} has been on the list of the book club for several seasons
the conflict in {e} begins with a borrowed coat
a bookmark with a drawing comes with every copy of {e}
{e} is shelved among the novels, although some call it a memoir
the copy of {e} in the library has notes in the margins from many hands
{e} was banned in some schools because of a harmless joke
a long walk through the snow is the best known scene of {e}
{e} deals with friendship more than with love
the style of {e} has been copied by many beginners
{e} switches between the past and the present without any warning
a critic called {e} a book to be read in bed
the secret in {e} is known to the reader from the start
{e} has been filmed more than once, and every film changed the ending
the characters in {e} talk past each other all the time
{e} includes a glossary of words from old trades
readers learn a lot about bees in {e} without noticing it
{e} is dedicated to a teacher who is not named
a lost suitcase keeps the story of {e} going
the humour of {e} is so dry that some readers miss it
{e} reads like a letter from an old friend
the library owns a signed copy of {e} that cannot be taken home
{e} has a scene in a lift that everybody remembers
the plot of {e} was taken from a report in a newspaper
{e} is known for its exact pictures of everyday work
a question on the cover of {e} is never answered inside
the sentences of {e} are short, and the paragraphs are long
{e} shows how a small lie grows into a large one
a museum has an exhibition about the objects in {e}
the ending of {e} was rewritten several times before it was printed
{e} was a present from the publisher to the library
many people have named their boats after a ship in {e}
{e} has been praised for its portraits of old people
the pages of {e} have a narrow margin and a clear type
a game of cards decides everything in {e}
{e} can be read without knowing any other book of the series
the narrator of {e} is not named until the final scene
{e} treats a serious subject in a light tone
a poem at the beginning of {e} sums up the whole story
the letters in {e} are set in a different type
{e} was read by a whole town as part of a festival
the mystery in {e} is solved by somebody who hardly speaks
{e} is full of doors, keys and staircases
a neighbour who plays the trumpet causes most of the trouble in {e}
the library shows {e} in its window every autumn
{e} was illustrated anew for the latest edition
some chapters of {e} consist of nothing but lists
{e} keeps its secrets until very late
the end of {e} leaves room for a sequel that was never written
a lamp that never goes out is a symbol in {e}
{e} has given its name to a prize for new translators
the scenes at the market are the liveliest part of {e}
{e} is a story about leaving home and coming back
a broken promise has serious consequences in {e}
the reviewers of {e} could not agree what kind of book it is
{e} has been set as a text for examinations
the copy of {e} smells faintly of pipe smoke
{e} makes fun of people who take themselves too seriously
a whole chapter of {e} describes the repair of a clock
the story of {e} leaps over whole decades in a single sentence
{e} surprises readers with a change of narrator halfway through
the library has {e} as an audio book as well
{e} contains a map that turns out to be wrong
a train journey at night takes up the best part of {e}
the friendship in {e} survives a war and a wedding
{e} is praised for saying much in few words
the quarrels in {e} are funny, and the silences are sad
{e} was printed by a small press that closed soon afterwards
a reader found a mistake in {e}, and the publisher thanked her
the moral of {e} is hidden in a fairy tale within the story
{e} is the first book that many people read in a foreign language
the garden scenes of {e} were praised by gardeners
{e} has a twist that should not be given away
an old photograph is the key to the story of {e}
the dust jacket of {e} is missing, as so often in libraries
{e} was adapted as an opera for children
a stranger at the door causes a good deal of confusion in {e}
the footnotes of {e} tell a second story
{e} returns again and again to the steps of a station
the author's note in {e} thanks the staff of an archive
{e} has been called a puzzle and a pleasure
a chess game runs through the whole of {e}
the smallest details in {e} become important later
{e} makes readers laugh in the wrong places
the family in {e} owns a shop that sells nothing useful
{e} was the subject of a quarrel between famous critics
a festival of street music forms the background of {e}
the library keeps a folder of letters about {e}
{e} is remembered for a speech that is never given
a bicycle trip in {e} ends in an unexpected friendship
the tone of {e} is friendly even where the events are not
""",
)
