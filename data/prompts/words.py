"""Word lists and sentence templates from which the synthetic tasks are filled."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    """Mary John Tom James Dan Sid Martin Amy Alice Bob Charlie David Emma Frank Grace Henry Isabel Jack
    Kate Laura Michael Nina Oliver Paul Quinn Rachel Sarah Tim Victor Wendy Adam Brian Carol Diana Eric
    Fiona George Helen Ian Julia Kevin Linda Mark Nancy Oscar Peter Robert Susan Thomas Anna Ben Claire
    Daniel Eva Simon Lucy Max Nora Ruth Steven"""
)
PLACES = _words(
    """store garden restaurant school hospital office house station library museum park beach market bakery
    theater zoo harbor castle church gym"""
)
THINGS = _words(
    """drink book ring basketball bone computer snack letter map key ticket flower hat coat gift bottle
    sandwich phone camera toy"""
)
# {a} and {b} are the two names in order of first mention, {s} the one said again; the answer is the other.
INDIRECT_OBJECT_TEMPLATES = (
    "When {a} and {b} went to the {place} , {s} gave a {thing} to",
    "Then , {a} and {b} went to the {place} . {s} gave a {thing} to",
    "After {a} and {b} went to the {place} , {s} handed a {thing} to",
    "While {a} and {b} were working at the {place} , {s} offered a {thing} to",
    "Then , {a} and {b} had a long argument at the {place} . Afterwards {s} said to",
    "{a} and {b} met at the {place} , and {s} brought a {thing} for",
    "Friends {a} and {b} found a {thing} at the {place} . {s} gave it to",
    "Today {a} and {b} were thinking about going to the {place} . {s} wanted to send a {thing} to",
    "The {place} {a} and {b} went to had a {thing} . {s} gave it to",
    "One day {a} walked with {b} to the {place} , where {s} passed a {thing} to",
)

COLORS = _words("red orange yellow green blue purple pink black white brown gray silver")
OBJECTS = _words(
    """textbook puzzle cup pencil necklace lighter mug keychain notebook bracelet plate pen scarf ball
    sheet lamp jug teddy fidget crayon envelope paperclip stick dog"""
)
SCENES = (
    "On the table , I see",
    "On the table , there is",
    "On the desk , I see",
    "On the desk , there is",
    "On the floor , I see",
    "On the floor , there is",
)

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid",
    "Portugal": "Lisbon", "England": "London", "Ireland": "Dublin", "Scotland": "Edinburgh",
    "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen",
    "Poland": "Warsaw", "Austria": "Vienna", "Hungary": "Budapest", "Greece": "Athens",
    "Russia": "Moscow", "Ukraine": "Kyiv", "Turkey": "Ankara", "Egypt": "Cairo",
    "Kenya": "Nairobi", "Ghana": "Accra", "Nigeria": "Abuja", "Morocco": "Rabat",
    "Japan": "Tokyo", "China": "Beijing", "India": "Delhi", "Thailand": "Bangkok",
    "Vietnam": "Hanoi", "Iran": "Tehran", "Iraq": "Baghdad", "Syria": "Damascus",
    "Canada": "Ottawa", "Cuba": "Havana", "Peru": "Lima", "Chile": "Santiago",
    "Colombia": "Bogota", "Belgium": "Brussels", "Romania": "Bucharest", "Australia": "Canberra",
}  # fmt: skip
CAPITAL_TEMPLATES = (
    "The capital of {country} is",
    "The capital city of {country} is",
    "The capital of {country} is called",
    "In {country} , the capital is",
    "{name} lives in {country} , in the city of",
    "{name} flew to the capital of {country} , which is",
    "Q : What is the capital of {country} ? A :",
    "{country} has a capital and it is",
    "When in {country} , {name} visits the capital ,",
    "The government of {country} meets in",
)

# Words of no task: they occur only in repeated sequences, so that free text has fewer unknown words.
EXTRA = _words(
    """a an and are as be but by can could do down every first from he her here him his how if into its
    just know like little look make many me more my new no not now of old on one or other our out over
    people say see she so some than that them then these they this time two up us use very was way we
    well who will word would write you your morning evening water bread river mountain winter"""
)

# Nouns that last, for greater-than, and argument names, for docstrings (lists are ours). Neither belongs to the
# vocabulary of the task model.
EVENTS = _words(
    """war conflict battle campaign siege truce voyage journey expedition dynasty plague famine reign revolt
    strike project program trial tour drought epidemic search construction alliance crisis"""
)
ARGUMENTS = _words(
    """load size file last name path data value text key line mode user test code list index count
    title state node label type token date time host port source target result first image group
    order level table field model parent"""
)
