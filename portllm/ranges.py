"""Which values a number of params.yaml may take."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from portllm.errors import ParamsError

Rule = tuple[str, Callable[[float], bool]]

ONE: Rule = ("1 or more", lambda value: 1 <= value < math.inf)
ZERO: Rule = ("0 or more", lambda value: 0 <= value < math.inf)
BELOW_ONE: Rule = ("a share from 0, below 1", lambda value: 0 <= value < 1)
SHARE: Rule = ("a share from 0 to 1", lambda value: 0 <= value <= 1)
SHOTS: Rule = ("a number of examples, or -1 for the task's own", lambda value: value >= -1)

OPTIM: Mapping[str, Rule] = {
    **dict.fromkeys(("batch_size", "gradient_accumulation", "logging_steps"), ONE),
    **dict.fromkeys(("learning_rate", "epochs", "max_steps", "threads", "save_steps"), ZERO),
    **dict.fromkeys(("weight_decay", "max_grad_norm"), ZERO),
    **dict.fromkeys(("warmup_ratio", "beta1", "beta2"), BELOW_ONE),
    "decay_ratio": SHARE,
}
LORA: Mapping[str, Rule] = {"r": ONE, "dropout": BELOW_ONE}
EVALUATE: Mapping[str, Rule] = {**dict.fromkeys(("batch_size", "limit", "threads"), ZERO), "num_fewshot": SHOTS}


def hold(section: Any, where: str, rules: Mapping[str, Rule]) -> None:
    """Raises ParamsError for the first number of `section` that its rule does not allow (NaN: none does)."""
    for name, (expected, allowed) in rules.items():
        value = getattr(section, name)
        if not allowed(value):
            raise ParamsError(f"{where}.{name} is {value}; expected {expected}")
