"""What each stage of an experiment will need, estimated from its parameters and the model's shape by formulas.

Bytes are exact where they follow from counts (checkpoints, patches); memory and time are estimates, and ASSUMED says of
what. Formulas:
- full-weight training takes 6·N FLOP per token, a forward alone 2·N (Kaplan et al., arXiv:2001.08361, §2.1); LoRA takes
  4·N, as frozen weights get no gradient of their own; recomputing activations adds one forward;
- memory of AdamW: weight, gradient and two moments of every trainable parameter (ZeRO, arXiv:1910.02054, §3.1);
- activations: what autograd keeps per token and layer, counted in `activation_bytes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from portllm.lm.sizing.shapes import Shape
from portllm.params import OptimParams, Params

CHARACTERS_PER_TOKEN = 4.0
CORPUS_ROW_TOKENS = 400  # of instruction corpora whose text is not at hand
GENERATED_TOKENS = 256  # the harness's default limit per answer
STEP_SECONDS, LAYER_STEP_SECONDS = (
    0.005,
    0.0011,
)  # what a step takes however small its batch: 180 launches of 6 µs a layer
PORT_BYTES_PER_SECOND = 0.5e9  # written by merged ports, measured on two cores
HEAVY_START_SECONDS, LIGHT_START_SECONDS = 12.0, 3.0  # imports of a process, measured
EVALUATED_ROWS, EVALUATED_TOKENS = 8, 512  # the smallest batch an evaluation should fit beside the weights
FOUR_BIT_BYTES = 0.516  # per parameter of a linear: four bits, and scales quantised again (QLoRA, arXiv:2305.14314)

ASSUMED = (
    f"{CHARACTERS_PER_TOKEN:.0f} characters to a token; {CORPUS_ROW_TOKENS} tokens to a corpus's row",
    f"a step takes {1e3 * STEP_SECONDS:.0f} ms and {1e3 * LAYER_STEP_SECONDS:.1f} ms a layer to start kernels",
    f"generated answers run to the harness's {GENERATED_TOKENS} tokens",
    f"merged ports write {PORT_BYTES_PER_SECOND / 1e9:.1f} GB/s",
)


@dataclass(frozen=True, kw_only=True)
class Task:
    """Rows, and characters of a prompt with its answer, of the training and the scored split."""

    rows: int
    characters: int
    scored_rows: int
    scored_characters: int
    choices: int = 2
    generated: bool = False


# published sizes; characters were counted on the rows with the harness's prompts
TASKS = {
    "boolq": Task(rows=9427, characters=642, scored_rows=3270, scored_characters=626),
    "sst2": Task(rows=67349, characters=120, scored_rows=872, scored_characters=172),
    "mrpc": Task(rows=3668, characters=323, scored_rows=408, scored_characters=325),
    "rte": Task(rows=2490, characters=360, scored_rows=277, scored_characters=347),
    "wnli": Task(rows=635, characters=189, scored_rows=71, scored_characters=191),
    "winogrande": Task(rows=40398, characters=99, scored_rows=1267, scored_characters=101),
    "gsm8k": Task(rows=7473, characters=541, scored_rows=1319, scored_characters=258, choices=1, generated=True),
}


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast a device computes: peak FLOP/s, the share of it that training reaches, bytes/s of its memory."""

    flops_per_second: float
    utilisation: float
    memory_bytes_per_second: float
    element_bytes: int  # of an activation, and of a weight while it is computed with

    def step_seconds(self, flops: float, layers: int, passes: float) -> float:
        """Seconds of one step of `passes` forwards' worth of kernels: computing, or starting what computes."""
        computing = flops / (self.flops_per_second * self.utilisation)
        return max(computing, STEP_SECONDS + layers * LAYER_STEP_SECONDS * passes / 3)


@dataclass(frozen=True, kw_only=True)
class Need:
    """One stage: how often it runs, bytes it leaves on disk, bytes of memory beside the model, seconds in all."""

    stage: str
    runs: int
    disk_bytes: int = 0
    memory_bytes: int = 0
    seconds: float = 0.0
    unknown: tuple[str, ...] = field(default=())


def estimate(params: Params, shapes: Mapping[str, Shape], pace: Pace) -> tuple[Need, ...]:
    """The stages in the pipeline's order; `shapes` by release. What is not known is named, not guessed."""
    makers = (_prepare, _fetch, _evolve, _train, _port, _evaluate, _report)
    return tuple(make(params, shapes, pace) for make in makers)


def training_bytes(
    shape: Shape, trainable: int, micro_tokens: int, pace: Pace, optim: OptimParams, four_bit: bool
) -> int:
    """Memory at the peak of a step: weights, what AdamW keeps of what is trained, activations, the head's logits."""
    # float32 each: weight, gradient, two moments; what is not trained lies there as it is computed with
    frozen = _weights_bytes(shape, pace, four_bit) if trainable < shape.parameters else 0
    states = 16 * trainable
    logits = micro_tokens * shape.vocabulary * (pace.element_bytes + 8)  # as computed, in float32, its gradient
    return int(frozen + states + logits + activation_bytes(shape, micro_tokens, pace.element_bytes, optim))


def activation_bytes(shape: Shape, tokens: int, element_bytes: int, optim: OptimParams) -> int:
    """What autograd keeps of the layers for a LoRA on all linears, in bytes; attention keeps no matrix of scores.

    Per token: two norms (input in float32 twice, output once), each linear's input after its own dropout with the mask,
    queries, keys, values and the attention's output, and three tensors of the gated MLP's width.
    """
    e, h, i = element_bytes, shape.hidden, shape.intermediate
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = 2 * (8 + e) * h
    adapted = (e + 1) * (5 * h + queries + i)
    attention = e * (2 * queries + 2 * keys)
    layer = norms + adapted + attention + 3 * e * i
    if optim.gradient_checkpointing:
        return tokens * (shape.layers * e * h + layer)
    return tokens * shape.layers * layer


def trained_tokens(task: str, params: Params) -> tuple[int, float] | None:
    """(rows, tokens) of one pass over a task's training rows, each cut to max_length; None where it is not known."""
    known = _task(task, params)
    if known is None:
        return None
    rows = min(known.rows, params.prepare.limit or known.rows)
    return rows, rows * min(known.characters / CHARACTERS_PER_TOKEN + 1, params.train.max_length)


def _weights_bytes(shape: Shape, pace: Pace, four_bit: bool = False) -> float:
    linears = shape.layers * sum(i * o for i, o in shape.linears.values())
    each = FOUR_BIT_BYTES if four_bit else pace.element_bytes
    return linears * each + (shape.parameters - linears) * pace.element_bytes


def _prepare(params: Params, shapes: Mapping[str, Shape], pace: Pace) -> Need:  # noqa: ARG001
    count = len(params.tasks) + len(params.releases)
    rows = sum(t.rows * t.characters for task in params.tasks if (t := _task(task, params)))
    corpora = sum(c.rows * CORPUS_ROW_TOKENS * CHARACTERS_PER_TOKEN for c in params.prepare.corpora.values())
    whole = tuple(f"all rows of {c.source}" for c in params.prepare.corpora.values() if not c.rows)
    return Need(
        stage="prepare", runs=count, disk_bytes=int(rows + corpora), seconds=count * LIGHT_START_SECONDS, unknown=whole
    )


def _fetch(params: Params, shapes: Mapping[str, Shape], pace: Pace) -> Need:
    shape, fetch = shapes[params.releases[0]], params.fetch
    if fetch.source not in ("world", "scratch"):
        return Need(stage="fetch", runs=1, disk_bytes=shape.stored_bytes, seconds=LIGHT_START_SECONDS)
    tokens = fetch.optim.batch_size * fetch.block_length
    steps = fetch.optim.max_steps
    seconds = HEAVY_START_SECONDS + steps * pace.step_seconds(6 * shape.multiplied * tokens, shape.layers, 3)
    memory = training_bytes(shape, shape.parameters, tokens, pace, fetch.optim, four_bit=False)
    unknown = () if steps else ("steps of pretraining (fetch.optim.max_steps)",)
    return Need(
        stage="fetch", runs=1, disk_bytes=shape.stored_bytes, memory_bytes=memory, seconds=seconds, unknown=unknown
    )


def _evolve(params: Params, shapes: Mapping[str, Shape], pace: Pace) -> Need:
    evolve, later = params.evolve, params.releases[1:]
    optim, lora = evolve.optim, evolve.mode == "lora"
    seconds, memory, unknown = 0.0, 0, []
    for release in later:
        if evolve.releases[release].source is not None:
            seconds += LIGHT_START_SECONDS
            continue
        shape = shapes[release]
        trainable = shape.lora_parameters(evolve.lora.r, evolve.lora.target_modules) if lora else shape.parameters
        tokens = optim.batch_size * evolve.block_length
        steps = optim.max_steps or _corpus_steps(params, release, tokens * optim.gradient_accumulation)
        if not steps:
            unknown.append(f"rows of the corpus of {release}")
        passes = (2 if lora else 3) + optim.gradient_checkpointing
        flops = 2 * passes * shape.multiplied * tokens
        micro = steps * optim.gradient_accumulation
        seconds += HEAVY_START_SECONDS + micro * pace.step_seconds(flops, shape.layers, passes)
        memory = max(memory, training_bytes(shape, trainable, tokens, pace, optim, four_bit=False))
    return Need(
        stage="evolve",
        runs=len(later),
        disk_bytes=sum(shapes[release].stored_bytes for release in later),
        memory_bytes=memory,
        seconds=seconds,
        unknown=tuple(unknown),
    )


def _corpus_steps(params: Params, release: str, tokens: int) -> int:
    corpus = params.prepare.corpora.get(release)
    if corpus is None or not corpus.rows:
        return 0
    return max(1, int(params.evolve.optim.epochs * corpus.rows * CORPUS_ROW_TOKENS / tokens))


def _train(params: Params, shapes: Mapping[str, Shape], pace: Pace) -> Need:
    seconds, memory, disk, unknown = 0.0, 0, 0, []
    for release in params.releases:
        shape = shapes[release]
        for task in params.tasks:
            section = params.train.for_task(task)
            optim, four_bit = section.optim, section.quantization == "4bit"
            added = shape.lora_parameters(section.lora.r, section.lora.target_modules)
            disk += 4 * added
            longest = optim.batch_size * section.max_length
            memory = max(memory, training_bytes(shape, added, longest, pace, optim, four_bit))
            known = trained_tokens(task, params)
            if known is None:
                unknown.append(f"rows of {task}")
                continue
            rows, tokens = known
            batch = optim.batch_size * optim.gradient_accumulation
            steps = optim.max_steps or max(1, round(optim.epochs * rows / batch))
            passes = 2 + optim.gradient_checkpointing
            flops = 2 * passes * shape.multiplied * optim.batch_size * tokens / rows
            micro = steps * optim.gradient_accumulation
            seconds += HEAVY_START_SECONDS + micro * pace.step_seconds(flops, shape.layers, passes)
    runs = len(params.tasks) * len(params.releases)
    return Need(
        stage="train", runs=runs, disk_bytes=disk, memory_bytes=memory, seconds=seconds,
        unknown=tuple(dict.fromkeys(unknown)),
    )  # fmt: skip


def _port(params: Params, shapes: Mapping[str, Shape], pace: Pace) -> Need:  # noqa: ARG001
    written = 0
    for release in params.releases:
        lora = params.train.lora
        each = shapes[release].stored_bytes
        if params.port.as_ == "adapter":
            each = 4 * shapes[release].lora_parameters(lora.r, lora.target_modules)
        written += len(params.tasks) * each
    runs = len(params.tasks) * len(params.releases)
    seconds = runs * LIGHT_START_SECONDS + written / PORT_BYTES_PER_SECOND
    return Need(stage="port", runs=runs, disk_bytes=written, memory_bytes=2**28, seconds=seconds)


def _evaluate(params: Params, shapes: Mapping[str, Shape], pace: Pace) -> Need:
    seconds, memory, unknown = 0.0, 0, []
    for release in params.releases:
        shape = shapes[release]
        seconds += HEAVY_START_SECONDS
        loaded = 2 if params.port.as_ == "merged" else 1  # a merged port is loaded beside the bare release
        logits = EVALUATED_ROWS * EVALUATED_TOKENS * shape.vocabulary * (pace.element_bytes + 4)
        memory = max(memory, loaded * shape.stored_bytes + logits)  # in the dtype that is stored
        for task in params.tasks:
            known = _task(task, params)
            if known is None:
                unknown.append(f"rows of {task}")
                continue
            # the bare release, the ported and the re-tuned patch
            seconds += 3 * _scored_seconds(known, shape, params, pace)
    return Need(
        stage="evaluate", runs=len(params.releases), memory_bytes=memory, seconds=seconds,
        unknown=tuple(dict.fromkeys(unknown)),
    )  # fmt: skip


def _scored_seconds(task: Task, shape: Shape, params: Params, pace: Pace) -> float:
    rows = min(task.scored_rows, params.evaluate.limit or task.scored_rows)
    tokens = rows * task.choices * task.scored_characters / CHARACTERS_PER_TOKEN
    batch = params.evaluate.batch_size or 32
    steps = max(1.0, rows * task.choices / batch)
    read = steps * pace.step_seconds(2 * shape.multiplied * tokens / steps, shape.layers, 1)
    if not task.generated:
        return read
    # each generated token reads all weights once for the whole batch
    floor = shape.stored_bytes / pace.memory_bytes_per_second
    token = max(floor, pace.step_seconds(2 * shape.multiplied * batch, shape.layers, 1))
    return read + steps * GENERATED_TOKENS * token


def _report(params: Params, shapes: Mapping[str, Shape], pace: Pace) -> Need:  # noqa: ARG001
    # drift reads two releases each, a residual the release under a re-tuned patch
    later = params.releases[1:]
    read = sum((2 + len(params.tasks)) * shapes[release].stored_bytes for release in later)
    return Need(stage="report", runs=1, memory_bytes=2**30, seconds=LIGHT_START_SECONDS + read / PORT_BYTES_PER_SECOND)


def _task(name: str, params: Params) -> Task | None:
    if name.startswith("world_"):
        rows, scored = params.prepare.train_rows, params.prepare.test_rows
        return Task(rows=rows, characters=100, scored_rows=scored, scored_characters=100)
    return TASKS.get(name)
