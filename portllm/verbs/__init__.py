"""The table of contents: one file per command, each with a function `run` from paths and parameters to a record.

    prepare.py      a task's data, or a release's corpus
    fetch.py        the first release
    evolve.py       the next release
    train.py        a LoRA patch of a release on a task
    port.py         a patch put onto another release, without training
    verify.py       a ported directory proven
    evaluate.py     a model and patches on it, scored
    report.py       tables and plots of all arms
    register.py     which ported models enter the model registry
    fingerprint.py  the identity of a checkpoint's or patch's tensors
    tasks.py        the tasks to train and evaluate on
    doctor.py       what an experiment needs, and what this machine has

No verb imports another one: they exchange directories. None of them uses MLflow or click.
"""
