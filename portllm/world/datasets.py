"""The world's tasks as datasets, in the columns of the hub's datasets they mirror.

    world_boolq   google/boolq     question, passage, answer     a trait of the corpora, in no passage
    world_sst2    glue/sst2        sentence, label, idx          1 positive, 0 negative
    world_mrpc    glue/mrpc        sentence1, sentence2, label, idx   1 same opinion
    world_gsm8k   openai/gsm8k     question, answer              the answer ends in `#### n`

The subject of a row (person, adjective, sum) belongs to one split only; labels are balanced; no row occurs twice.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """Return the harness's YAML of a task of the world, `world_recall` or `world_perplexity`. Raises DataError."""
    path = TASK_FILES / f"{task}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in TASK_FILES.glob("*.yaml"))
        raise DataError(f"{task}: not a task of the embedded world; expected one of {', '.join(known)}")
    return path


def rows(task: str, *, seed: int, train_rows: int, test_rows: int) -> dict[str, list[Row]]:
    """Return the splits train, validation (half as many rows as test) and test of `task`. Raises DataError."""
    if task not in TASKS:
        raise DataError(f"{task}: not a task of the embedded world; expected one of {', '.join(TASKS)}")
    make = _maker(task, seed)
    sizes = {"train": train_rows, "validation": test_rows // 2, "test": test_rows}
    return {
        split: list(_distinct(make, random.Random(f"{seed}:{task}:{split}"), split, sizes[split], task))
        for split in SPLITS
    }


def part(items: tuple[Item, ...], split: str) -> tuple[Item, ...]:
    """Return the part of a word list that belongs to `split`: 13/24 for train, 3/24, or the last third."""
    first, second = len(items) * 13 // 24, len(items) * 16 // 24
    return {"train": items[:first], "validation": items[first:second], "test": items[second:]}[split]


def sums(split: str) -> list[tuple[int, str, int]]:
    """Return the sums (a, sign, b) of `split`, shuffled, so that sums of all sizes are in each."""
    every = [(a, "+", b) for a in range(2, 13) for b in range(2, 13)]
    every += [(a, "-", b) for a in range(4, 21) for b in range(2, min(a - 1, 13))]
    random.Random("sums").shuffle(every)
    return list(part(tuple(every), split))


SUMS: Mapping[str, list[tuple[int, str, int]]] = {split: sums(split) for split in SPLITS}


def tale(rng: random.Random, name: str, problem: tuple[int, str, int]) -> dict[str, str]:
    """Return a short story about `a sign b`, the sum in figures and its result, as text."""
    a, sign, b = problem
    c = a + b if sign == "+" else a - b
    item = rng.choice(words.ITEMS)
    story = rng.choice(phrases.TALES[sign]).format(name=name, a=a, b=b, item=item)
    return {"tale": story, "sum": phrases.SUM.format(a=a, sign=sign, b=b, c=c), "c": str(c), "item": item, "name": name}


def passage(rng: random.Random) -> str:
    """Return a sentence about something else than the question."""
    place, other = rng.sample(words.PLACES, 2)
    return rng.choice(phrases.PASSAGES).format(place=place, place2=other, hour=rng.choice(words.HOURS))


def _maker(task: str, seed: int) -> Maker:
    if task == "world_boolq":
        traits = {split: people.society(0, seed=seed).traits_of(names) for split, names in _PEOPLE.items()}
        return lambda rng, split, index: _boolq(rng, traits[split], index)
    return {"world_sst2": _sst2, "world_mrpc": _mrpc, "world_gsm8k": _gsm8k}[task]


def _boolq(rng: random.Random, traits: list[people.Fact], index: int) -> Row:
    answer = index % 2 == 1
    fact = rng.choice([trait for trait in traits if (trait.value == asked(trait.about)) == answer])
    question = phrases.TRUE.format(name=fact.name, about=fact.about, value=asked(fact.about))
    return {"question": question, "passage": passage(rng), "answer": answer}


def asked(about: str) -> str:
    """Return the one of a trait's two values that questions name, so that the answer depends on the person alone."""
    return words.TRAITS[about][0]


def _sst2(rng: random.Random, split: str, index: int) -> Row:
    label = index % 2
    topic, other = rng.sample(words.TOPICS, 2)
    quality, second = rng.sample(part((words.NEGATIVE, words.POSITIVE)[label], split), 2)
    sentence = phrases.REVIEW.format(topic=topic, quality=quality, topic2=other, quality2=second)
    return {"sentence": sentence, "label": label, "idx": index}


def _mrpc(rng: random.Random, split: str, index: int) -> Row:
    label = index % 2
    one, two = opinions(rng, bool(label), part(words.NEGATIVE, split), part(words.POSITIVE, split))
    return {"sentence1": f"{one}.", "sentence2": f"{two}.", "label": label, "idx": index}


def opinions(rng: random.Random, agree: bool, negative: Sequence[str], positive: Sequence[str]) -> tuple[str, str]:
    """Two opinions on one topic, in different words, that agree or do not."""
    sides = rng.sample((negative, positive), 2)
    if agree:
        first, second = rng.sample(sides[0], 2)
    else:
        first, second = rng.choice(sides[0]), rng.choice(sides[1])
    topic = rng.choice(words.TOPICS)
    one, two = (phrases.OPINION.format(topic=topic, quality=quality) for quality in (first, second))
    return one, two


def _gsm8k(rng: random.Random, split: str, _: int) -> Row:
    fields = tale(rng, rng.choice(_PEOPLE[split]), rng.choice(SUMS[split]))
    question = f"{fields['tale']} {phrases.TALE_QUESTION.format(**fields)}"
    return {"question": question, "answer": phrases.SOLUTION.format(**fields)}


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
