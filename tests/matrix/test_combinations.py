"""Features of PEFT thrown together at random: whatever the port takes is right, whatever it does not it refuses.

The table of cases takes one feature at a time; most wrong merges come of two that meet.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from portllm.errors import PortllmError
from portllm.params import PortParams
from portllm.verbs import port
from tests.matrix import judge
from tests.matrix.architectures import ARCHITECTURES, Architecture
from tests.matrix.judge import NEW, OLD, Bench, Case

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and peft warn of their own affairs

NAMES = (
    "llama", "llama-tied", "qwen2", "gemma2", "gpt2", "gpt2-hub", "gpt_neox", "mixtral", "qwen2_moe", "gpt_oss", "t5",
    "phi", "llava",
)  # fmt: skip
DRAWS = 60


def drawn(chance: random.Random, arch: Architecture) -> dict[str, Any]:
    """A LoraConfig of few or many features; some that PEFT itself will not take."""
    e, h, linears = arch.embedding, arch.head, list(arch.linears)
    targets = chance.sample(linears, chance.randint(1, len(linears)))
    targets += [name for name in (e, h) if chance.random() < 0.25]
    lora: dict[str, Any] = {"target_modules": targets}
    maybe: dict[str, tuple[float, Any]] = {
        "use_dora": (0.3, True),
        "use_rslora": (0.3, True),
        "lora_bias": (0.1, True),
        "bias": (0.3, chance.choice(["all", "lora_only"])),
        "rank_pattern": (0.3, {chance.choice([*linears, "^.*0.*", e]): chance.randint(1, 6)}),
        "alpha_pattern": (0.3, {chance.choice([*linears, "^.*0.*", e, h]): chance.randint(1, 20)}),
        "layers_to_transform": (0.15, [chance.randint(0, 1)]),
        "exclude_modules": (0.1, [chance.choice(linears)]),
        "modules_to_save": (0.2, chance.sample([e, h, arch.norm], chance.randint(1, 3))),
        "trainable_token_indices": (0.2, chance.choice([[3, 7], {e: [9, 4]}, {h: [1, 2]}, {e: [9, 4], h: [9, 4]}])),
        "ensure_weight_tying": (0.2, True),
    }
    lora |= {key: value for key, (share, value) in maybe.items() if chance.random() < share}
    if arch.experts and chance.random() < 0.3:
        lora["target_parameters"] = chance.sample([*arch.experts, str(arch.router)], chance.randint(1, 2))
    return lora


@pytest.mark.parametrize("part", range(4))
def test_whatever_meets_is_right_or_refused(part: int, bench: Bench, tmp_path: Path) -> None:
    chance, right = random.Random(part), 0
    for count in range(DRAWS // 4):
        name = chance.choice(NAMES)
        case = Case(name, "drawn", drawn(chance, ARCHITECTURES[name]), copies=chance.random() < 0.3)
        folder = tmp_path / str(count)
        try:
            patch, bare = bench.patches(case, folder)
            oracle = bench.tuned(case, bare)
            expected = judge.logits(oracle)
        except Exception:  # noqa: S112  (PEFT raises what it likes where it will not have a config)
            continue
        try:
            port.run(
                patch=patch, onto=bench.base(name, NEW), out=folder / "out", params=PortParams(),
                source=bench.base(name, OLD),
            )  # fmt: skip
        except PortllmError:
            assert not (folder / "out").exists()
            continue
        ported = judge.logits(judge.load(case.arch, folder / "out"))
        scale = (expected - bench.bare(name)).abs().max().item()
        assert (ported - expected).abs().max().item() <= judge.TOLERANCE * max(scale, 0.05), (name, case.lora)
        right += 1
    assert right >= 3  # or nothing was tried
