"""The people of a release: the facts that the corpora state and the tasks ask about."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from portllm.world import words

CHANGES_PER_RELEASE = 36
NEWCOMERS_PER_RELEASE = 8


@dataclass(frozen=True)
class Fact:
    """One fact: `name` drinks (`about`) tea (`value`)."""

    name: str
    about: str
    value: str


@dataclass(frozen=True)
class Society:
    """Every fact that is true in one release, and those that are new in it.

    Residents' and strangers' traits are the same in every release (the tasks ask about residents).
    Movers' homes, work and instruments change; newcomers come with theirs, eight a release. When all newcomers' names
    are used, a later newcomer has an earlier one's name.
    """

    traits: tuple[Fact, ...]
    facts: Mapping[tuple[str, str], str]
    changed: tuple[Fact, ...]
    new: tuple[Fact, ...]

    def traits_of(self, people: tuple[str, ...]) -> list[Fact]:
        """Return the traits of `people`."""
        return [fact for fact in self.traits if fact.name in people]

    @functools.cached_property
    def fresh(self) -> tuple[Fact, ...]:
        """The facts that are new in this release: changed and added ones."""
        return self.changed + self.new

    @functools.cached_property
    def kept(self) -> list[Fact]:
        """The changeable facts that were true in the previous release, too."""
        fresh = {(fact.name, fact.about) for fact in self.fresh}
        return [Fact(*key, value) for key, value in self.facts.items() if key not in fresh]


def society(release: int, *, seed: int) -> Society:
    """Return the world of release `release` (0, 1, 2, …): the first state and every change since."""
    rng = random.Random(f"{seed}:people")
    groups = (words.TRAIN_PEOPLE, words.VALIDATION_PEOPLE, words.TEST_PEOPLE, words.STRANGERS)
    traits = tuple(fact for group in groups for fact in _settle(group, words.TRAITS, rng))
    now = Society(traits, _table(_settle(words.MOVERS, words.ATTRIBUTES, rng)), (), ())
    for number in range(1, release + 1):
        now = _next(now, number, random.Random(f"{seed}:people:v{number}"))
    return now


def _next(before: Society, number: int, rng: random.Random) -> Society:
    changed = []
    for name, about in sorted(rng.sample(list(itertools.product(words.MOVERS, words.ATTRIBUTES)), CHANGES_PER_RELEASE)):
        others = [value for value in words.ATTRIBUTES[about] if value != before.facts[name, about]]
        changed.append(Fact(name, about, rng.choice(others)))
    start = (number - 1) * NEWCOMERS_PER_RELEASE % len(words.NEWCOMERS)
    new = _settle(words.NEWCOMERS[start : start + NEWCOMERS_PER_RELEASE], words.ATTRIBUTES, rng)
    return Society(before.traits, {**before.facts, **_table([*changed, *new])}, tuple(changed), tuple(new))


def _table(facts: Sequence[Fact]) -> dict[tuple[str, str], str]:
    return {(fact.name, fact.about): fact.value for fact in facts}


def _settle(group: Sequence[str], choices: Mapping[str, Sequence[str]], rng: random.Random) -> list[Fact]:
    """Return a fact of each kind for everyone in `group`; all values are equally frequent, so that none is a hint."""
    facts = []
    for about, values in choices.items():
        order = rng.sample(values, len(values))
        dealt = [order[i % len(order)] for i in range(len(group))]
        rng.shuffle(dealt)
        facts += [Fact(name, about, value) for name, value in zip(group, dealt, strict=True)]
    return facts
