"""What each stage of an experiment will need, estimated from its parameters and the model's size by formulas.

Bytes are exact where they follow from counts (checkpoints, patches); memory and time are estimates, and ASSUMED lists
what they assume. Formulas:
- full-weight training takes 6·N FLOP per token, a forward alone 2·N (Kaplan et al., arXiv:2001.08361, §2.1); LoRA takes
  4·N, as frozen weights get no gradient of their own; recomputing activations adds one forward;
- memory of AdamW: weight, gradient and two moments of every trainable parameter (ZeRO, arXiv:1910.02054, §3.1);
- activations: what autograd keeps per token and layer of a dense decoder with gated MLPs (`activation_bytes`).
An estimate that a model's architecture or an unmeasured device does not allow is left out, by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from portllm.lm.sizing.models import SCRATCH, WORLD, ModelSize, Widths
from portllm.lm.sizing.pace import LAYER_STEP_SECONDS, STEP_SECONDS, Pace
from portllm.params import OptimParams, Params

CHARACTERS_PER_TOKEN = 4.0
CORPUS_ROW_TOKENS = 400  # of instruction corpora whose text is not on this machine
GENERATED_TOKENS = 256  # the harness's default limit per answer
PORT_BYTES_PER_SECOND = 0.5e9  # written by merged ports, measured on two cores
HEAVY_START_SECONDS, LIGHT_START_SECONDS = 12.0, 3.0  # imports of a process, measured
EVALUATED_ROWS, EVALUATED_TOKENS = 8, 512  # the smallest batch an evaluation should fit beside the weights
FOUR_BIT_BYTES = 0.516  # per parameter of a linear: four bits, and scales quantised again (QLoRA, arXiv:2305.14314)

ASSUMED = (
    f"{CHARACTERS_PER_TOKEN:.0f} characters to a token; {CORPUS_ROW_TOKENS} tokens to a corpus's row",
    f"generated answers run to the harness's {GENERATED_TOKENS} tokens",
)
ASSUMED_OF_TIME = (
    f"a step takes {1e3 * STEP_SECONDS:.0f} ms and {1e3 * LAYER_STEP_SECONDS:.1f} ms a layer to start kernels",
    f"merged ports write {PORT_BYTES_PER_SECOND / 1e9:.1f} GB/s",
)


@dataclass(frozen=True, kw_only=True)
class TaskSize:
    """Rows, and characters of a prompt with its answer, of the training and the scored split."""

    rows: int
    characters: int
    scored_rows: int
    scored_characters: int
    choices: int = 2
    generated: bool = False


# published sizes; characters were counted on the rows with the harness's prompts
TASKS = {
    "boolq": TaskSize(rows=9427, characters=642, scored_rows=3270, scored_characters=626),
    "sst2": TaskSize(rows=67349, characters=120, scored_rows=872, scored_characters=172),
    "mrpc": TaskSize(rows=3668, characters=323, scored_rows=408, scored_characters=325),
    "rte": TaskSize(rows=2490, characters=360, scored_rows=277, scored_characters=347),
    "wnli": TaskSize(rows=635, characters=189, scored_rows=71, scored_characters=191),
    "winogrande": TaskSize(rows=40398, characters=99, scored_rows=1267, scored_characters=101),
    "gsm8k": TaskSize(rows=7473, characters=541, scored_rows=1319, scored_characters=258, choices=1, generated=True),
}


@dataclass(frozen=True, kw_only=True)
class Device:
    """The device of an experiment: bytes of an activation, and its measured pace; None where nothing was measured."""

    element_bytes: int
    pace: Pace | None

    def step_seconds(self, size: ModelSize, tokens: float, passes: float) -> float | None:
        """Return the seconds of one step of `passes` forwards over `tokens`; None without a pace or the widths."""
        if self.pace is None or size.widths is None:
            return None
        flops = 2 * passes * size.multiplied_parameters * tokens
        return self.pace.step_seconds(flops, size.widths.layers, passes)


@dataclass(frozen=True, kw_only=True)
class Need:
    """One stage: how often it runs, bytes it leaves on disk, bytes of memory, seconds in all (None: not estimated).

    `unknown` names what is not counted.
    """

    stage: str
    runs: int
    disk_bytes: int = 0
    memory_bytes: int = 0
    seconds: float | None = 0.0
    unknown: tuple[str, ...] = field(default=())


def estimate(params: Params, sizes: Mapping[str, ModelSize], device: Device) -> tuple[Need, ...]:
    """Return the stages' needs in the pipeline's order; `sizes` by release."""
    stages = (_prepare, _fetch, _evolve, _train, _port, _evaluate, _report)
    needs = tuple(stage(params, sizes, device) for stage in stages)
    if device.pace is None:
        return tuple(replace(need, seconds=None) for need in needs)
    return needs


def total_seconds(parts: Iterable[float | None]) -> float | None:
    """Return the sum; None where a part is not estimated."""
    seconds = 0.0
    for part in parts:
        if part is None:
            return None
        seconds += part
    return seconds


def training_bytes(
    size: ModelSize, trainable: int, micro_tokens: int, element_bytes: int, optim: OptimParams, four_bit: bool
) -> int:
    """Return the memory at the peak of a step: weights, AdamW's states of what is trained, activations, logits.

    Without the activations where the model's widths are not known.
    """
    # float32 each: weight, gradient, two moments; what is not trained is stored as it is computed with
    frozen = _weights_bytes(size, element_bytes, four_bit) if trainable < size.parameters else 0
    states = 16 * trainable
    logits = micro_tokens * size.vocabulary * (element_bytes + 8)  # as computed, in float32, its gradient
    kept = activation_bytes(size.widths, micro_tokens, element_bytes, optim) if size.widths else 0
    return int(frozen + states + logits + kept)


def activation_bytes(widths: Widths, tokens: int, element_bytes: int, optim: OptimParams) -> int:
    """Return what autograd keeps of the layers for a LoRA on all linears; attention keeps no matrix of scores.

    Per token: two norms (input in float32 twice, output once), each linear's input after its own dropout with the mask,
    queries, keys, values and the attention's output, and three tensors of the gated MLP's width.
    """
    e, h, i = element_bytes, widths.hidden, widths.intermediate
    norms = 2 * (8 + e) * h
    adapted = (e + 1) * (5 * h + widths.queries + i)
    attention = e * (2 * widths.queries + 2 * widths.keys)
    layer = norms + adapted + attention + 3 * e * i
    if optim.gradient_checkpointing:
        return tokens * (widths.layers * e * h + layer)
    return tokens * widths.layers * layer


def trained_tokens(task: str, params: Params) -> tuple[int, float] | None:
    """Return (rows, tokens) of one pass over a task's training rows, each cut to max_length; None for other tasks."""
    counts = _task_size(task, params)
    if counts is None:
        return None
    rows = min(counts.rows, params.prepare.limit or counts.rows)
    return rows, rows * min(counts.characters / CHARACTERS_PER_TOKEN + 1, params.train.max_length)


def _weights_bytes(size: ModelSize, element_bytes: int, four_bit: bool = False) -> float:
    each = FOUR_BIT_BYTES if four_bit else element_bytes
    return size.layer_parameters * each + (size.parameters - size.layer_parameters) * element_bytes


def _unfitting(release: str, size: ModelSize) -> list[str]:
    """Return what of a stage that computes is not counted for this architecture."""
    if size.widths is not None:
        return []
    return [f"activations and time of {release}, whose config does not describe a dense decoder with gated MLPs"]


def _prepare(params: Params, sizes: Mapping[str, ModelSize], device: Device) -> Need:  # noqa: ARG001
    count = len(params.tasks) + len(params.releases)
    rows = sum(t.rows * t.characters for task in params.tasks if (t := _task_size(task, params)))
    corpora = sum(c.rows * CORPUS_ROW_TOKENS * CHARACTERS_PER_TOKEN for c in params.prepare.corpora.values())
    unlimited = tuple(f"all rows of {c.source}" for c in params.prepare.corpora.values() if not c.rows)
    return Need(
        stage="prepare", runs=count, disk_bytes=int(rows + corpora), seconds=count * LIGHT_START_SECONDS,
        unknown=unlimited,
    )  # fmt: skip


def _fetch(params: Params, sizes: Mapping[str, ModelSize], device: Device) -> Need:
    release, fetch = params.releases[0], params.fetch
    size = sizes[release]
    if fetch.source not in (WORLD, SCRATCH):
        return Need(stage="fetch", runs=1, disk_bytes=size.stored_bytes, seconds=LIGHT_START_SECONDS)
    tokens = fetch.optim.batch_size * fetch.block_length
    steps = fetch.optim.max_steps
    seconds = _training_seconds(steps, device.step_seconds(size, tokens, 3))
    memory = training_bytes(size, size.parameters, tokens, device.element_bytes, fetch.optim, four_bit=False)
    unknown = () if steps else ("steps of pretraining (fetch.optim.max_steps)",)
    return Need(
        stage="fetch", runs=1, disk_bytes=size.stored_bytes, memory_bytes=memory, seconds=seconds, unknown=unknown
    )


def _training_seconds(steps: int, step_seconds: float | None) -> float | None:
    return None if step_seconds is None else HEAVY_START_SECONDS + steps * step_seconds


def _evolve(params: Params, sizes: Mapping[str, ModelSize], device: Device) -> Need:
    evolve, later = params.evolve, params.releases[1:]
    optim, lora = evolve.optim, evolve.mode == "lora"
    seconds: list[float | None] = []
    memory, unknown = 0, []
    for release in later:
        if evolve.releases[release].source is not None:
            seconds.append(LIGHT_START_SECONDS)
            continue
        size = sizes[release]
        trainable = size.lora_parameters(evolve.lora.r, evolve.lora.target_modules) if lora else size.parameters
        tokens = optim.batch_size * evolve.block_length
        steps = optim.max_steps or _corpus_steps(params, release, tokens * optim.gradient_accumulation)
        if not steps:
            unknown.append(f"rows of the corpus of {release}")
        unknown += _unfitting(release, size)
        passes = (2 if lora else 3) + optim.gradient_checkpointing
        step_seconds = device.step_seconds(size, tokens, passes)
        seconds.append(_training_seconds(steps * optim.gradient_accumulation, step_seconds))
        memory = max(memory, training_bytes(size, trainable, tokens, device.element_bytes, optim, four_bit=False))
    return Need(
        stage="evolve", runs=len(later), disk_bytes=sum(sizes[release].stored_bytes for release in later),
        memory_bytes=memory, seconds=total_seconds(seconds), unknown=tuple(unknown),
    )  # fmt: skip


def _corpus_steps(params: Params, release: str, tokens: int) -> int:
    corpus = params.prepare.corpora.get(release)
    if corpus is None or not corpus.rows:
        return 0
    return max(1, int(params.evolve.optim.epochs * corpus.rows * CORPUS_ROW_TOKENS / tokens))


def _train(params: Params, sizes: Mapping[str, ModelSize], device: Device) -> Need:
    seconds: list[float | None] = []
    memory, disk, unknown = 0, 0, []
    for release in params.releases:
        size = sizes[release]
        unknown += _unfitting(release, size)
        for task in params.tasks:
            section = params.train.for_task(task)
            optim, four_bit = section.optim, section.quantization == "4bit"
            added = size.lora_parameters(section.lora.r, section.lora.target_modules)
            disk += 4 * added
            longest = optim.batch_size * section.max_length
            memory = max(memory, training_bytes(size, added, longest, device.element_bytes, optim, four_bit))
            if (counts := trained_tokens(task, params)) is None:
                unknown.append(f"rows of {task}")
            else:
                seconds.append(_task_seconds(*counts, size, optim, device))
    runs = len(params.tasks) * len(params.releases)
    return Need(
        stage="train", runs=runs, disk_bytes=disk, memory_bytes=memory, seconds=total_seconds(seconds),
        unknown=tuple(dict.fromkeys(unknown)),
    )  # fmt: skip


def _task_seconds(rows: int, tokens: float, size: ModelSize, optim: OptimParams, device: Device) -> float | None:
    """Return the seconds of training one patch on `rows` rows of `tokens` tokens in all."""
    batch = optim.batch_size * optim.gradient_accumulation
    steps = optim.max_steps or max(1, round(optim.epochs * rows / batch))
    passes = 2 + optim.gradient_checkpointing
    step_seconds = device.step_seconds(size, optim.batch_size * tokens / rows, passes)
    return _training_seconds(steps * optim.gradient_accumulation, step_seconds)


def _port(params: Params, sizes: Mapping[str, ModelSize], device: Device) -> Need:  # noqa: ARG001
    written = 0
    for release in params.releases:
        lora = params.train.lora
        each = sizes[release].stored_bytes
        if params.port.as_ == "adapter":
            each = 4 * sizes[release].lora_parameters(lora.r, lora.target_modules)
        written += len(params.tasks) * each
    runs = len(params.tasks) * len(params.releases)
    seconds = runs * LIGHT_START_SECONDS + written / PORT_BYTES_PER_SECOND
    return Need(stage="port", runs=runs, disk_bytes=written, memory_bytes=2**28, seconds=seconds)


def _evaluate(params: Params, sizes: Mapping[str, ModelSize], device: Device) -> Need:
    seconds: list[float | None] = []
    memory, unknown = 0, []
    for release in params.releases:
        size = sizes[release]
        if size.widths is None:
            unknown.append(f"time of {release}, whose config does not describe a dense decoder with gated MLPs")
        seconds.append(HEAVY_START_SECONDS)
        loaded = 2 if params.port.as_ == "merged" else 1  # a merged port is loaded beside the bare release
        logits = EVALUATED_ROWS * EVALUATED_TOKENS * size.vocabulary * (device.element_bytes + 4)
        memory = max(memory, loaded * size.stored_bytes + logits)  # in the dtype that is stored
        for task in params.tasks:
            if (counts := _task_size(task, params)) is None:
                unknown.append(f"rows of {task}")
            else:
                # the bare release, the ported and the re-tuned patch
                seconds += 3 * [_scored_seconds(counts, size, params, device)]
    return Need(
        stage="evaluate", runs=len(params.releases), memory_bytes=memory, seconds=total_seconds(seconds),
        unknown=tuple(dict.fromkeys(unknown)),
    )  # fmt: skip


def _scored_seconds(task: TaskSize, size: ModelSize, params: Params, device: Device) -> float | None:
    rows = min(task.scored_rows, params.evaluate.limit or task.scored_rows)
    tokens = rows * task.choices * task.scored_characters / CHARACTERS_PER_TOKEN
    batch = params.evaluate.batch_size or 32
    steps = max(1.0, rows * task.choices / batch)
    read, token = device.step_seconds(size, tokens / steps, 1), device.step_seconds(size, batch, 1)
    if read is None or token is None or device.pace is None:
        return None
    if not task.generated:
        return steps * read
    # each generated token reads all weights once for the whole batch
    floor = size.stored_bytes / device.pace.memory_bytes_per_second
    return steps * (read + GENERATED_TOKENS * max(floor, token))


def _report(params: Params, sizes: Mapping[str, ModelSize], device: Device) -> Need:  # noqa: ARG001
    # drift reads two releases each, a residual the release under a re-tuned patch
    later = params.releases[1:]
    read = sum((2 + len(params.tasks)) * sizes[release].stored_bytes for release in later)
    return Need(stage="report", runs=1, memory_bytes=2**30, seconds=LIGHT_START_SECONDS + read / PORT_BYTES_PER_SECOND)


def _task_size(name: str, params: Params) -> TaskSize | None:
    if name.startswith("world_"):
        rows, scored = params.prepare.train_rows, params.prepare.test_rows
        return TaskSize(rows=rows, characters=100, scored_rows=scored, scored_characters=100)
    return TASKS.get(name)
