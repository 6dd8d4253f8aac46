"""The command line: one thin command per verb; nothing heavy is imported before a command runs.

__init__.py   the group: options before the verb, the verbs in the order of the pipeline
data.py       prepare, tasks
releases.py   fetch, evolve
training.py   train
porting.py    port, and the plan of a dry run
scoring.py    evaluate
judging.py    verify, report, register, fingerprint
doctor.py     doctor
options.py    flags generated from the sections of params.py, and those that all verbs share
running.py    progress, tracking, cost and the JSON object, shared by every command
launching.py  the same command on all GPUs, by accelerate launch
"""

from __future__ import annotations

import click

from portllm import __version__, processes
from portllm.cli import data, doctor, judging, porting, releases, scoring, training
from portllm.cli.running import Settings, Verbs, hush, join_the_others


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="portllm")
@click.option("-v", "--verbose", count=True, help="More notes; twice: a traceback on errors.")
@click.option("-q", "--quiet", is_flag=True, help="No progress and no notes, errors only.")
@click.option("--track/--no-track", default=None, help="Record in MLflow [default: inside a pipeline only].")
@click.pass_context
def main(ctx: click.Context, verbose: int, quiet: bool, track: bool | None) -> None:
    """Move a LoRA patch to the next release of its base model, without training.

    \b
    Examples:
      portllm port my-patch --onto new-base --out ported
      portllm verify ported --onto new-base --patch my-patch
      portllm evaluate new-base --patch my-patch --tasks boolq --out scores.json
      portllm fingerprint new-base
    """
    join_the_others()
    quiet = quiet or not processes.is_main()
    hush(quiet=quiet)
    ctx.obj = Settings(verbose=verbose, quiet=quiet, track=track if processes.is_main() else False)


for command in (
    data.prepare,
    releases.fetch,
    releases.evolve,
    training.train,
    porting.port,
    judging.verify,
    scoring.evaluate,
    judging.report,
    judging.register,
    judging.fingerprint,
    data.tasks,
    doctor.doctor,
):
    main.add_command(command)
