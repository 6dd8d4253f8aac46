"""The embedded default: a small generated world, whose corpora and tasks need no network and no account.

    people.py     the facts of each release: who drinks tea, who moved, who is new
    words.py      the lists of words that documents and rows are made of
    phrases.py    the sentences that documents and rows are made of, and the vocabulary
    corpora.py    the text of each release, and the probes of a base
    datasets.py   the tasks, in the columns of the hub's datasets
    scoring.py    the metrics that the task files name
    tokenizer.py  one token a word, one vocabulary for every release
    tasks/        the task files of the LM Evaluation Harness

The same seed gives the same bytes on every machine.
"""
