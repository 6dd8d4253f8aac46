"""Who is who in a release: the facts the corpora tell and the tasks ask about."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping
from dataclasses import dataclass

from portllm.world import words

CHANGES_PER_RELEASE = 36
NEWCOMERS_PER_RELEASE = 8


@dataclass(frozen=True)
class Fact:
    """One fact: `name` has `value` for `attribute` (home, work or music)."""

    name: str
    attribute: str
    value: str


@dataclass(frozen=True)
class Society:
    """Every fact that holds in one release, and which of them the release brought.

    Residents' facts are the same in every release (the tasks ask about them); movers' facts change;
    newcomers arrive eight a release. When all newcomers' names are used up, a later newcomer takes an
    earlier one's name.
    """

    facts: Mapping[tuple[str, str], str]
    changed: tuple[Fact, ...]
    new: tuple[Fact, ...]

    def about(self, people: tuple[str, ...]) -> list[Fact]:
        """The facts about `people`, in the order of the names."""
        return [
            Fact(name, attribute, self.facts[name, attribute])
            for name in people
            for attribute in words.ATTRIBUTES
            if (name, attribute) in self.facts
        ]

    @functools.cached_property
    def fresh(self) -> tuple[Fact, ...]:
        """What this release brought: changed and new facts."""
        return self.changed + self.new

    @functools.cached_property
    def kept(self) -> list[Fact]:
        """What held in the release before as well."""
        fresh = {(fact.name, fact.attribute) for fact in self.fresh}
        return [Fact(*key, value) for key, value in self.facts.items() if key not in fresh]


def society(release: int, *, seed: int) -> Society:
    """The world as of release `release` (0, 1, 2, …): the first state and every change since."""
    rng = random.Random(f"{seed}:people")
    facts: dict[tuple[str, str], str] = {}
    for group in (words.TRAIN_PEOPLE, words.VALIDATION_PEOPLE, words.TEST_PEOPLE, words.MOVERS):
        facts.update(_settle(group, rng))
    now = Society(dict(facts), (), ())
    for number in range(1, release + 1):
        now = _next(now, number, random.Random(f"{seed}:people:v{number}"))
    return now


def _next(before: Society, number: int, rng: random.Random) -> Society:
    facts = dict(before.facts)
    movable = [(name, attribute) for name in words.MOVERS for attribute in words.ATTRIBUTES]
    changed = []
    for name, attribute in sorted(rng.sample(movable, CHANGES_PER_RELEASE)):
        value = rng.choice([v for v in words.VALUES[attribute] if v != facts[name, attribute]])
        changed.append(Fact(name, attribute, value))
    start = (number - 1) * NEWCOMERS_PER_RELEASE % len(words.NEWCOMERS)
    arrivals = words.NEWCOMERS[start : start + NEWCOMERS_PER_RELEASE]
    new = tuple(Fact(*key, value) for key, value in _settle(arrivals, rng).items())
    facts.update({(fact.name, fact.attribute): fact.value for fact in (*changed, *new)})
    return Society(facts, tuple(changed), new)


def _settle(group: tuple[str, ...], rng: random.Random) -> dict[tuple[str, str], str]:
    """Facts for every one of `group`, each value as often as any other: no value gives an answer away."""
    facts: dict[tuple[str, str], str] = {}
    for attribute in words.ATTRIBUTES:
        values = list(words.VALUES[attribute])
        rng.shuffle(values)
        dealt = [values[i % len(values)] for i in range(len(group))]
        rng.shuffle(dealt)
        facts.update({(name, attribute): value for name, value in zip(group, dealt, strict=True)})
    return facts
