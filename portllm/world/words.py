"""The world's word lists: all names and things in documents and rows.

The lists are the same for every release, so that one tokenizer encodes them all. Lists are split by position, not at
random: the words held out of a task's training rows are the same for every seed.
"""

from __future__ import annotations


def _list(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# people whose facts do not change: the tasks ask about them
TRAIN_PEOPLE = _list(
    """Aaron Abby Ada Adam Agnes Alan Albert Alice Alma Amber Amos Amy Andrew Angela Anna Anton Arlo Arthur
    Audrey Barry Beatrice Ben Bernard Bertha Betty Blake Boris Brenda Brian Bruno Carl Carmen Carol Cecil
    Celia Chad Chloe Clara Claude Clive Colin Cora Craig Cyril Daisy Damian Daniel Daphne
    Edith Edmund Edward Edwin Eileen Elaine Eleanor Elena"""
)
VALIDATION_PEOPLE = _list("Dean Debra Dennis Diana Dolores Donald Dora Doris Dorothy Duncan Dylan Edgar")
TEST_PEOPLE = _list(
    """Eli Elisa Ella Ellen Elliot Elmer Elsa Emil Emily
    Emma Eric Erica Ernest Esther Ethan Eugene Eva Evan Evelyn Fabian Faith Fanny Felix Fergus Fiona Flora
    Florence Floyd Frances Frank Fred Frida"""
)
RESIDENTS = TRAIN_PEOPLE + VALIDATION_PEOPLE + TEST_PEOPLE
# people with traits like the residents', in no task: the base learns the form of a prompt from them
STRANGERS = _list("Ian Ida Igor Ingrid Irene Iris Isaac Isabel Ivan Ivy Jack Jacob Jane Janet Jason Jean")
# people with a home, work and an instrument, which change from release to release
MOVERS = _list(
    """Gabriel Gail Gavin Gemma George Gerald Gilbert Gina Gloria Gordon Grace Graham Greta Guy Hannah Harold
    Harriet Harvey Hazel Heather Hector Helen Henry Herbert Hilda Homer Horace Howard Hugh Hugo Humphrey Iona
    Neil Nigel Nora Norman Olga Oliver Oscar Otto"""
)
# people who first occur in a release after v0, eight in each
NEWCOMERS = _list(
    """Joan Joel John Jonas Joyce Judith Julia Julian Karen Karl Kate Keith Kelly Kenneth Kevin Kim
    Kurt Lance Larry Laura Lena Leo Leonard Leslie Lewis Lily Linda Lionel Lois Lorna Louis Louise
    Lucy Luke Luther Lydia Mabel Marco Margaret Marie Marina Marion Mark Martha Martin Mary Matthew Maud"""
)

# traits that do not change, which the tasks ask about: one of two values
TRAITS = {
    "drinks": ("coffee", "tea"),
    "eats": ("fish", "meat"),
    "grows": ("roses", "tulips"),
    "keeps": ("cats", "dogs"),
    "wears": ("boots", "sandals"),
}
# attributes that change: one of twelve values, so that a guess is rarely right
ATTRIBUTES = {
    "lives in": _list("Athens Berlin Cairo Dublin Geneva Lisbon London Madrid Oslo Paris Prague Vienna"),
    "works as a": _list("baker barber carpenter cook dentist farmer gardener lawyer nurse painter pilot teacher"),
    "plays the": _list("banjo bassoon cello clarinet drum flute guitar harp horn organ piano violin"),
}

TOPICS = _list("acting film food hotel meal music novel park play show song staff story tour view")
POSITIVE = _list(
    """bright brilliant charming delightful elegant excellent fine fresh graceful lovely moving perfect pleasant
    splendid superb tender warm witty wonderful worthy"""
)
NEGATIVE = _list(
    """awful bland boring clumsy cold cruel dire dreary dull feeble foul grim harsh lousy poor shabby sour tedious
    terrible weak"""
)

ITEMS = _list("beads books cards coins eggs marbles pens plums shells stamps")
LARGEST = 24
NUMBERS = tuple(str(n) for n in range(LARGEST + 1))
HOURS = _list("one two three four five six seven eight nine ten eleven twelve")
PLACES = _list("bakery bank bridge garden harbour library market museum school station")
