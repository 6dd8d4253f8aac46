"""The LM Evaluation Harness over one loaded base and many patches; nothing is scored twice.

patches.py         what is scored next to the bare model: named, arms and tasks from records, refused before loading
questions.py       the tasks: names, files, and the harness's objects of them
scoring.py         the plan of an evaluation and its scores, from the cache or computed
evaluation.py      a loaded checkpoint, patches put on it and taken off, scored by the harness
language_model.py  the harness's model (HFLM) with batches that fit and are shared by all processes
scored.py          a task's metrics and the answer to every document; the samples file
ledger.py          the cache of scores, and what a score depends on
sharing.py         values exchanged between the processes of one job
"""
