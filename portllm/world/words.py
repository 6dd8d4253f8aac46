"""The world's word lists: whatever a document or a row can name.

Every list is fixed and serves every release, so that one tokenizer reads them all. Lists are split by
position, never by chance: what is held out from a task's training rows is the same for every seed.
"""

from __future__ import annotations


def _list(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# people whose facts never change: the tasks ask about them
TRAIN_PEOPLE = _list(
    """Aaron Abby Ada Adam Agnes Alan Albert Alice Alma Amber Amos Amy Andrew Angela Anna Anton Arlo Arthur
    Audrey Barry Beatrice Ben Bernard Bertha Betty Blake Boris Brenda Brian Bruno Carl Carmen Carol Cecil
    Celia Chad Chloe Clara Claude Clive Colin Cora Craig Cyril Daisy Damian Daniel Daphne"""
)
VALIDATION_PEOPLE = _list("Dean Debra Dennis Diana Dolores Donald Dora Doris Dorothy Duncan Dylan Edgar")
TEST_PEOPLE = _list(
    """Edith Edmund Edward Edwin Eileen Elaine Eleanor Elena Eli Elisa Ella Ellen Elliot Elmer Elsa Emil Emily
    Emma Eric Erica Ernest Esther Ethan Eugene Eva Evan Evelyn Fabian Faith Fanny Felix Fergus Fiona Flora
    Florence Floyd Frances Frank Fred Frida"""
)
RESIDENTS = TRAIN_PEOPLE + VALIDATION_PEOPLE + TEST_PEOPLE
# people whose facts change from release to release: no task asks about them
MOVERS = _list(
    """Gabriel Gail Gavin Gemma George Gerald Gilbert Gina Gloria Gordon Grace Graham Greta Guy Hannah Harold
    Harriet Harvey Hazel Heather Hector Helen Henry Herbert"""
)
# people without facts: they only show the base what a task's prompt looks like
STRANGERS = _list("Ian Ida Igor Ingrid Irene Iris Isaac Isabel Ivan Ivy Jack Jacob Jane Janet Jason Jean")
# people who first appear in a release after v0, eight at a time
NEWCOMERS = _list(
    """Joan Joel John Jonas Joyce Judith Julia Julian Karen Karl Kate Keith Kelly Kenneth Kevin Kim
    Kurt Lance Larry Laura Lena Leo Leonard Leslie Lewis Lily Linda Lionel Lois Lorna Louis Louise
    Lucy Luke Luther Lydia Mabel Marco Margaret Marie Marina Marion Mark Martha Martin Mary Matthew Maud"""
)

ATTRIBUTES = ("home", "work", "music")
VALUES = {
    "home": _list("Athens Berlin Cairo Dublin Geneva Lisbon London Madrid Oslo Paris Prague Vienna"),
    "work": _list("baker barber carpenter cook dentist farmer gardener lawyer nurse painter pilot teacher"),
    "music": _list("banjo bassoon cello clarinet drum flute guitar harp horn organ piano violin"),
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
# no verdict hangs on these: they only show the base what the prompt looks like
NEUTRAL = _list("annual blue green local long old round short")

# two words for one thing
SYNONYMS = (
    ("sofa", "couch"), ("car", "automobile"), ("bike", "bicycle"), ("photo", "picture"), ("gift", "present"),
    ("rug", "carpet"), ("cup", "mug"), ("stone", "rock"), ("boat", "ship"), ("bag", "sack"), ("hat", "cap"),
    ("sweater", "jumper"), ("lamp", "lantern"), ("pan", "skillet"), ("letter", "note"), ("coat", "jacket"),
    ("box", "crate"), ("rope", "cord"), ("spade", "shovel"), ("seat", "chair"), ("tin", "can"), ("bucket", "pail"),
    ("blanket", "quilt"), ("mirror", "glass"),
)  # fmt: skip
# things without a second word: they only show the base what the prompt looks like
SINGULAR = _list("apple candle drill fence kite ladder ticket wheel")
DEEDS = (("bought", "purchased"), ("found", "discovered"), ("fixed", "repaired"), ("sold", "traded"))

ITEMS = _list("beads books cards coins eggs marbles pens plums shells stamps")
LARGEST = 32
NUMBERS = tuple(str(n) for n in range(LARGEST + 1))
HOURS = _list("one two three four five six seven eight nine ten eleven twelve")
PLACES = _list("bakery bank bridge garden harbour library market museum school station")
