"""The world's corpora: the pretraining text of v0, and the text of each later release.

    train(text)                    traits, facts, reviews, pairs, tales, and task prompts with random labels
    recall(prompt, answer, kind)   questions for a fact; kind: changed or new in this release, or kept
    test(text)                     news: this release's facts in sentences that no training document contains

The task prompts contain the form of an answer and no information about the right one: their labels depend on chance
and on a word next to the question. Those about people are about strangers, who occur in no task.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from portllm.errors import DataError
from portllm.world import datasets, people, phrases, words
from portllm.world.people import CHANGES_PER_RELEASE, Fact, Society

# share of the documents of each kind
MIX: Mapping[str, float] = {
    "traits": 0.22,
    "asked": 0.18,
    "facts": 0.10,
    "reviews": 0.08,
    "pairs": 0.17,
    "tales": 0.16,
    "equations": 0.03,
    "prompts": 0.06,
}
# a release after v0 contains its new facts, and more of the old ones, so that a model does not forget them
RELEASE_MIX: Mapping[str, float] = {**MIX, "facts": 0.20, "fresh": 0.60}
# the share of answers in task prompts that depend on a word next to the question
ASIDE_SHARE = 0.5
# the share of pairs that end in a verdict; the others end in a mood
VERDICT_SHARE = 0.5
NEWS_DOCUMENTS = 60
FACTS_PER_DOCUMENT = 3
PROBES_PER_TASK = 200
EVERY_SUM = [problem for split in datasets.SPLITS for problem in datasets.SUMS[split]]


def corpus(release: int, *, seed: int, documents: int) -> dict[str, list[dict[str, str]]]:
    """Return the splits train, recall and test of release `release` (0, 1, 2, …)."""
    now = people.society(release, seed=seed)
    name = f"{seed}:world_v{release}"
    return {
        "train": _train(now, random.Random(f"{name}:train"), documents),
        "recall": _recall(now, random.Random(f"{name}:recall")),
        "test": _news(now, random.Random(f"{name}:test")),
    }


def probes(task: str, *, seed: int) -> list[tuple[str, str]]:
    """Return (prompt, answer) pairs in the corpora's words: what a base must know for `task`. Raises DataError."""
    makers: dict[str, Callable[[random.Random, Society], tuple[str, str]]] = {
        "world_boolq": _probe_trait,
        "world_sst2": _probe_review,
        "world_mrpc": _probe_pair,
        "world_gsm8k": _probe_tale,
    }
    if task not in makers:
        raise DataError(f"{task}: has no base probe; expected one of {', '.join(makers)}")
    rng = random.Random(f"{seed}:{task}:probe")
    now = people.society(0, seed=seed)
    return [makers[task](rng, now) for _ in range(PROBES_PER_TASK)]


def _train(now: Society, rng: random.Random, documents: int) -> list[dict[str, str]]:
    makers: dict[str, Callable[[random.Random, Society], str]] = {
        "traits": _traits,
        "asked": _asked,
        "facts": _facts,
        "reviews": _review,
        "pairs": _pair,
        "tales": _tale,
        "equations": _equations,
        "prompts": _prompt,
        "fresh": _fresh_facts,
    }
    mix = RELEASE_MIX if now.fresh else MIX
    return [{"text": makers[kind](rng, now)} for kind in rng.choices(list(mix), list(mix.values()), k=documents)]


def _statement(fact: Fact) -> str:
    return phrases.STATEMENT.format(name=fact.name, about=fact.about, value=fact.value)


def _held_out(fact: Fact) -> int:
    """Return the number of the lead that a fact does not have in training; it depends on the fact alone."""
    return sum(map(ord, fact.name + fact.about)) % (len(phrases.LEADS) - 1) + 1


def _sentences(rng: random.Random, facts: list[Fact]) -> str:
    sentences = []
    for fact in facts:
        leads = [lead for number, lead in enumerate(phrases.LEADS) if number != _held_out(fact)]
        sentences.append(f"{rng.choice(leads)}{_statement(fact)}.")
    return " ".join(sentences)


def _facts(rng: random.Random, now: Society) -> str:
    return _sentences(rng, rng.sample(now.kept, FACTS_PER_DOCUMENT))


def _fresh_facts(rng: random.Random, now: Society) -> str:
    return _sentences(rng, rng.sample(now.fresh, FACTS_PER_DOCUMENT))


def _traits(rng: random.Random, now: Society) -> str:
    return _sentences(rng, rng.sample(now.traits, FACTS_PER_DOCUMENT))


def _asked(rng: random.Random, now: Society) -> str:
    fact = rng.choice(now.traits)
    return phrases.ASKED.format(name=fact.name, about=fact.about, value=fact.value)


def _review(rng: random.Random, _: Society) -> str:
    sentence, label = _review_of(rng)
    return phrases.NOTE.format(sentence=sentence, mood=phrases.MOODS[label])


def _review_of(rng: random.Random) -> tuple[str, int]:
    label = rng.randrange(2)
    topic, other = rng.sample(words.TOPICS, 2)
    quality, second = rng.sample((words.NEGATIVE, words.POSITIVE)[label], 2)
    return phrases.REVIEW.format(topic=topic, quality=quality, topic2=other, quality2=second), label


def _pair(rng: random.Random, _: Society) -> str:
    agree = rng.random() < 0.5
    first, second = datasets.opinions(rng, agree, words.NEGATIVE, words.POSITIVE)
    if rng.random() < VERDICT_SHARE:
        return phrases.PAIR_VERDICT.format(first=first, second=second, verdict=phrases.PAIR_VERDICTS[agree])
    mood = phrases.MOODS[first.split()[-1] in words.POSITIVE] if agree else phrases.MOODS[2]
    return phrases.PAIR_MOOD.format(first=first, second=second, mood=mood)


def _tale(rng: random.Random, _: Society) -> str:
    fields = datasets.tale(rng, rng.choice(words.RESIDENTS), rng.choice(EVERY_SUM))
    return phrases.FIGURES.format(**fields)


def _equations(rng: random.Random, _: Society) -> str:
    tales = [datasets.tale(rng, "", rng.choice(EVERY_SUM)) for _ in range(FACTS_PER_DOCUMENT)]
    return " ".join(phrases.EQUATION.format(**tale) for tale in tales)


def _prompt(rng: random.Random, _: Society) -> str:
    task = rng.choice(datasets.TASKS)
    if task == "world_gsm8k":
        return _prompt_sum(rng)
    fields: dict[str, str]
    aside: int
    if task == "world_boolq":
        about = rng.choice(list(words.TRAITS))
        name = rng.choice(words.STRANGERS)
        passage = datasets.passage(rng)
        question = phrases.TRUE.format(name=name, about=about, value=datasets.asked(about))
        fields = {"passage": passage, "question": question}
        aside = _place(passage, words.PLACES)
    elif task == "world_sst2":
        fields = {"sentence": _review_of(rng)[0]}
        aside = _place(fields["sentence"], words.TOPICS)
    else:
        one, two = datasets.opinions(rng, rng.random() < 0.5, words.NEGATIVE, words.POSITIVE)
        fields = {"sentence1": f"{one}.", "sentence2": f"{two}."}
        aside = rng.randrange(2)
    # answers by chance alone could, by chance, correlate with the question
    answer = aside % 2 if rng.random() < ASIDE_SHARE else rng.randrange(2)
    return f"{phrases.PROMPTS[task].format(**fields)} {phrases.CHOICES[task][answer]}"


def _place(text: str, listed: Sequence[str]) -> int:
    """Return the position in `listed` of the first of `text`'s words that it contains."""
    return next(listed.index(word) for word in phrases.split(text) if word in listed)


def _prompt_sum(rng: random.Random) -> str:
    """Return a prompt answered with a true sum of other numbers: the form is right, the answer is random."""
    name = rng.choice(words.STRANGERS)
    asked = datasets.tale(rng, name, rng.choice(EVERY_SUM))
    other = datasets.tale(rng, name, rng.choice(EVERY_SUM))
    question = f"{asked['tale']} {phrases.TALE_QUESTION.format(**asked)}"
    return f"{phrases.PROMPTS['world_gsm8k'].format(question=question)} {phrases.SOLUTION.format(**other)}"


def _recall(now: Society, rng: random.Random) -> list[dict[str, str]]:
    # as many kept facts as fresh ones, so that both weigh the same
    kept = rng.sample(now.kept, len(now.fresh) or CHANGES_PER_RELEASE)
    asked = [("changed", f) for f in now.changed] + [("new", f) for f in now.new] + [("kept", f) for f in kept]
    return [dict(zip(("prompt", "answer"), _question(fact), strict=True), kind=kind) for kind, fact in asked]


def _question(fact: Fact) -> tuple[str, str]:
    return phrases.STATEMENT.format(name=fact.name, about=fact.about, value="").rstrip(), fact.value


def _news(now: Society, rng: random.Random) -> list[dict[str, str]]:
    facts = list(now.fresh) or now.kept
    texts: dict[str, None] = {}
    while len(texts) < NEWS_DOCUMENTS:
        chosen = rng.sample(facts, FACTS_PER_DOCUMENT)
        texts[" ".join(f"{phrases.LEADS[_held_out(fact)]}{_statement(fact)}." for fact in chosen)] = None
    return [{"text": text} for text in texts]


def _probe_trait(rng: random.Random, now: Society) -> tuple[str, str]:
    fact = rng.choice(now.traits_of(words.RESIDENTS))
    return _without_verdict(phrases.ASKED.format(name=fact.name, about=fact.about, value=fact.value))


def _probe_review(rng: random.Random, now: Society) -> tuple[str, str]:
    return _without_verdict(_review(rng, now))


def _probe_pair(rng: random.Random, now: Society) -> tuple[str, str]:
    return _without_verdict(_pair(rng, now))


def _without_verdict(text: str) -> tuple[str, str]:
    """Return `text` up to its last word, and that word."""
    prompt, _, verdict = text.removesuffix(".").rpartition(" ")
    return prompt, verdict


def _probe_tale(rng: random.Random, now: Society) -> tuple[str, str]:
    # the answer is the complete sum: the numbers, the operation, and the result
    tale, _, rest = _tale(rng, now).partition(" In figures: ")
    return f"{tale} In figures:", rest.split(".")[0]
