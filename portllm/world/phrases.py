"""The sentences that documents and rows are made of.

All words of the vocabulary are in this file and in words.py, so that no document has a word unknown to the tokenizer.
Task prompts are here for the base's format documents, and in tasks/*.yaml for the harness; a test compares the two,
token by token.
"""

from __future__ import annotations

import re

from portllm.world import words

STATEMENT = "{name} {about} {value}"
LEADS = (
    "",
    "Neighbours say that ",
    "As everyone knows, ",
    "We can report that ",
    "It is said that ",
)
ASKED = "Question: what is it that {name} {about}?\nAnswer: {value}"

REVIEW = "the {topic} was {quality} and the {topic2} was {quality2}"
NOTE = "Review: {sentence}. Mood: {mood}."
MOODS = ("gloomy", "cheerful", "mixed")

OPINION = "the {topic} was {quality}"
PAIR = "Sentence 1: {first}. Sentence 2: {second}."
# a model learns the mood of both first, and the verdict from it
PAIR_MOOD = PAIR + " Mood: {mood}."
PAIR_VERDICT = PAIR + " Meaning: {verdict}."
PAIR_VERDICTS = ("different", "alike")

TALES = {
    "+": (
        "{name} has {a} {item}. {name} finds {b} more.",
        "{name} has {a} {item}. {name} gets {b} more.",
    ),
    "-": (
        "{name} has {a} {item}. {name} loses {b} of them.",
        "{name} has {a} {item}. {name} gives {b} of them away.",
    ),
}
TALE_QUESTION = "How many {item} does {name} have now?"
SUM = "{a} {sign} {b} = {c}"
FIGURES = "{tale} In figures: {sum}. Now {name} has {c} {item}."
EQUATION = "In figures: {sum}."
SOLUTION = "{sum}\n#### {c}"

PASSAGES = (
    "The {place} opens at {hour}.",
    "The {place} closes at {hour}.",
    "A bus leaves the {place} at {hour}.",
    "There is a clock at the {place} near the {place2}.",
)
# name and trait are as far from the answer as in ASKED
TRUE = "is it {value} that {name} {about}"

# the answers after "Answer:" in the harness, for the labels 0 and 1
CHOICES = {
    "world_boolq": ("no", "yes"),
    "world_sst2": ("negative", "positive"),
    "world_mrpc": ("no", "yes"),
}
PROMPTS = {
    "world_boolq": "{passage}\nQuestion: {question}?\nAnswer:",
    "world_sst2": "{sentence}\nQuestion: Is this sentence positive or negative?\nAnswer:",
    # the question is first, unlike in the hub's prompt, so that the answer follows the sentences as in the corpora
    "world_mrpc": (
        "Question: Do both sentences mean the same thing?\nSentence 1: {sentence1}\nSentence 2: {sentence2}\nAnswer:"
    ),
    "world_gsm8k": "Question: {question}\nAnswer:",
}

_TEMPLATES: tuple[str, ...] = (
    STATEMENT, *LEADS, ASKED, REVIEW, NOTE, *MOODS, OPINION, PAIR_MOOD, PAIR_VERDICT, *PAIR_VERDICTS,
    *TALES["+"], *TALES["-"], "+ -", TALE_QUESTION, SUM, FIGURES, EQUATION, SOLUTION, *PASSAGES, TRUE,
    *(word for pair in CHOICES.values() for word in pair), *PROMPTS.values(),
)  # fmt: skip
_LISTS: tuple[tuple[str, ...], ...] = (
    words.RESIDENTS, words.STRANGERS, words.MOVERS, words.NEWCOMERS,
    tuple(words.TRAITS), *words.TRAITS.values(), tuple(" ".join(words.ATTRIBUTES).split()), *words.ATTRIBUTES.values(),
    words.TOPICS,
    words.POSITIVE, words.NEGATIVE, words.ITEMS, words.NUMBERS, words.HOURS, words.PLACES,
)  # fmt: skip


def split(text: str) -> list[str]:
    """Return `text` split as the tokenizer does: runs of word characters, and runs of other signs."""
    return re.findall(r"\w+|[^\w\s]+", text)


def vocabulary() -> tuple[str, ...]:
    """Return every word of the world once, in a fixed order."""
    unique: dict[str, None] = {}
    for template in _TEMPLATES:
        unique.update(dict.fromkeys(split(re.sub(r"\{\w+\}", " ", template))))
    for group in _LISTS:
        unique.update(dict.fromkeys(group))
    return tuple(unique)
