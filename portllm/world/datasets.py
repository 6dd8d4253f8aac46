"""The world's tasks as datasets, in the columns of the hub's datasets they mirror.

    world_boolq   google/boolq     question, passage, answer     a fact the base knows; the passage does not tell it
    world_sst2    glue/sst2        sentence, label, idx          1 positive, 0 negative
    world_mrpc    glue/mrpc        sentence1, sentence2, label, idx   1 same meaning
    world_gsm8k   openai/gsm8k     question, answer              the answer ends in `#### n`

Whatever a row is about (person, adjective, thing, sum) belongs to one split only; labels are balanced;
no row occurs twice.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from portllm.errors import DataError
from portllm.world import people, phrases, words

Row = dict[str, Any]
Maker = Callable[[random.Random, str, int], Row]
Item = TypeVar("Item")

TASKS = ("world_boolq", "world_sst2", "world_mrpc", "world_gsm8k")
SPLITS = ("train", "validation", "test")
TASK_FILES = Path(__file__).parent / "tasks"

_PEOPLE = {"train": words.TRAIN_PEOPLE, "validation": words.VALIDATION_PEOPLE, "test": words.TEST_PEOPLE}
_TRIES = 1000


def task_file(task: str) -> Path:
    """The harness's YAML of a task of the world, or of `world_recall` and `world_perplexity`. Raises DataError."""
    path = TASK_FILES / f"{task}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in TASK_FILES.glob("*.yaml"))
        raise DataError(f"{task}: not a task of the embedded world; expected one of {', '.join(known)}")
    return path


def rows(task: str, *, seed: int, train_rows: int, test_rows: int) -> dict[str, list[Row]]:
    """The splits train, validation (half as many rows as test) and test of `task`. Raises DataError."""
    if task not in TASKS:
        raise DataError(f"{task}: not a task of the embedded world; expected one of {', '.join(TASKS)}")
    make = _maker(task, seed)
    sizes = {"train": train_rows, "validation": test_rows // 2, "test": test_rows}
    return {
        split: list(_distinct(make, random.Random(f"{seed}:{task}:{split}"), split, sizes[split], task))
        for split in SPLITS
    }


def part(items: tuple[Item, ...], split: str) -> tuple[Item, ...]:
    """The share of a word list that belongs to `split`: the middle, an eighth, or the last third."""
    first, second = len(items) * 13 // 24, len(items) * 16 // 24
    return {"train": items[:first], "validation": items[first:second], "test": items[second:]}[split]


def sums(split: str) -> list[tuple[int, str, int]]:
    """The sums (a, sign, b) of `split`: every third is held out, so that all sizes are met in training."""
    every = [(a, "+", b) for a in range(2, 17) for b in range(2, 17)]
    every += [(a, "-", b) for a in range(4, 21) for b in range(2, a - 1)]
    random.Random("sums").shuffle(every)
    return list(part(tuple(every), split))


SUMS: Mapping[str, list[tuple[int, str, int]]] = {split: sums(split) for split in SPLITS}


def tale(rng: random.Random, name: str, problem: tuple[int, str, int]) -> dict[str, str]:
    """A short story about `a sign b`, the sum in figures and its result, as text."""
    a, sign, b = problem
    c = a + b if sign == "+" else a - b
    item = rng.choice(words.ITEMS)
    story = rng.choice(phrases.TALES[sign]).format(name=name, a=a, b=b, item=item)
    return {"tale": story, "sum": phrases.SUM.format(a=a, sign=sign, b=b, c=c), "c": str(c), "item": item, "name": name}


def passage(rng: random.Random) -> str:
    """A sentence about something else."""
    place, other = rng.sample(words.PLACES, 2)
    return rng.choice(phrases.PASSAGES).format(place=place, place2=other, hour=rng.choice(words.HOURS))


def _maker(task: str, seed: int) -> Maker:
    if task == "world_boolq":
        known = people.society(0, seed=seed)
        return lambda rng, split, index: _boolq(rng, known.about(_PEOPLE[split]), index)
    return {"world_sst2": _sst2, "world_mrpc": _mrpc, "world_gsm8k": _gsm8k}[task]


def _boolq(rng: random.Random, facts: list[people.Fact], index: int) -> Row:
    fact = rng.choice(facts)
    answer = index % 2 == 1
    wrong = [value for value in words.VALUES[fact.attribute] if value != fact.value]
    value = fact.value if answer else rng.choice(wrong)
    statement = phrases.STATEMENT[fact.attribute].format(name=fact.name, value=value)
    return {
        "question": phrases.BOOLQ_QUESTION.format(statement=statement),
        "passage": passage(rng),
        "answer": answer,
    }


def _sst2(rng: random.Random, split: str, index: int) -> Row:
    label = index % 2
    topic, other = rng.sample(words.TOPICS, 2)
    quality, second = rng.sample(part((words.NEGATIVE, words.POSITIVE)[label], split), 2)
    sentence = phrases.REVIEW.format(topic=topic, quality=quality, topic2=other, quality2=second)
    return {"sentence": sentence, "label": label, "idx": index}


def _mrpc(rng: random.Random, split: str, index: int) -> Row:
    label = index % 2
    things = part(words.SYNONYMS, split)
    thing, other = rng.sample(things, 2)
    first, second = rng.sample(thing, 2)
    if not label:
        second = rng.choice(other)
    name = rng.choice(_PEOPLE[split])
    one, two = rng.sample(rng.choice(words.DEEDS), 2)
    return {
        "sentence1": phrases.DEED.format(name=name, deed=one, thing=first) + ".",
        "sentence2": phrases.DEED.format(name=name, deed=two, thing=second) + ".",
        "label": label,
        "idx": index,
    }


def _gsm8k(rng: random.Random, split: str, _: int) -> Row:
    told = tale(rng, rng.choice(_PEOPLE[split]), rng.choice(SUMS[split]))
    question = f"{told['tale']} {phrases.TALE_QUESTION.format(**told)}"
    return {"question": question, "answer": phrases.SOLUTION.format(**told)}


def _distinct(make: Maker, rng: random.Random, split: str, count: int, task: str) -> Iterator[Row]:
    seen: set[str] = set()
    for index in range(count):
        for _ in range(_TRIES):
            row = make(rng, split, index)
            # the same question under another idx, or asked again for another answer, is the same question
            key = str([value for column, value in row.items() if column not in ("idx", "label", "answer")])
            if key not in seen:
                break
        else:
            raise DataError(f"{task}/{split}: the world has no more than {index} rows, {count} wanted; ask for fewer")
        seen.add(key)
        yield row
