"""The modules to which PEFT gives LoRA by adapter_config.json, with their rank and scaling.

The rules are those of peft 0.21: check_target_module_exists and _inject_parameters of tuners_utils.py, get_pattern_key
of utils/other.py.
LoRA: arXiv:2106.09685; rank-stabilised LoRA: arXiv:2312.03732.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from portllm.checkpoint.adapter.config import names_of
from portllm.checkpoint.adapter.factors import LoraPair
from portllm.checkpoint.adapter.patterns import TAIL, WHOLE, first_matches
from portllm.checkpoint.files.names import ADAPTER_CONFIG as CONFIG
from portllm.errors import PatchError, ShapeError, UnmatchedModulesError, UnsupportedPatchError

ALL_LINEAR = "all-linear"
OUTPUTS = frozenset({"lm_head", "embed_out", "score", "classifier"})  # no LoRA with all-linear
LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")
# since this version the factors of experts are for (experts, out, in); before, the two last axes were swapped
EXPERTS_SINCE = (0, 19, 1)


def scaling(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Return (rank, alpha/r or alpha/√r) that PEFT gives `module`. Raises PatchError."""
    return scalings(config, [module])[module]


def scalings(config: Mapping[str, Any], modules: Sequence[str]) -> dict[str, tuple[int, float]]:
    """Return (rank, scaling) of each module, by the first pattern in the file that matches it. Raises PatchError."""
    ranks = _patterned(config, "rank_pattern", "r", modules)
    alphas = _patterned(config, "alpha_pattern", "lora_alpha", modules)
    return {m: _scaling(m, rank, alpha, config) for m, rank, alpha in zip(modules, ranks, alphas, strict=True)}


def matched(config: Mapping[str, Any], modules: Sequence[str]) -> dict[str, bool]:
    """Return for each of these modules of the model whether PEFT would give it LoRA. Raises PatchError.

    Without target_modules PEFT chooses by architecture, which the config does not contain: all but the excluded match.
    """
    targets = config.get("target_modules")
    excluded = _excluded(config, modules)
    if targets is None and not config.get("target_parameters"):
        hits = [True] * len(modules)
    elif isinstance(targets, str):
        hits = _hits(config, targets, modules)
    else:
        names = frozenset(targets or ())
        in_layers = _layer_test(config)
        hits = [module in names or (_listed(module, names) and in_layers(module)) for module in modules]
    return {m: hit and not out for m, hit, out in zip(modules, hits, excluded, strict=True)}


def all_linear(config: Mapping[str, Any]) -> bool:
    """Return whether target_modules is PEFT's shorthand for every linear module but the output's."""
    targets = config.get("target_modules")
    return isinstance(targets, str) and targets.lower() == ALL_LINEAR


def saved_whole(config: Mapping[str, Any], parameter: str) -> bool:
    """Return whether the parameter is in a module of modules_to_save, which PEFT matches by the end of its name."""
    names = tuple(config.get("modules_to_save") or ())
    return bool(names) and any(owner.endswith(names) for owner in _owners(parameter))


def with_parameters(config: Mapping[str, Any], owners: Collection[str]) -> set[str]:
    """Return the modules that target_parameters can name; a target without a module can be in any."""
    modules = {target.rpartition(".")[0] for target in config.get("target_parameters") or ()}
    return {owner for owner in owners if "" in modules or _listed(owner, modules)}


def stack_pairs(
    config: Mapping[str, Any], owner: str, parameters: Sequence[str], stack: Sequence[LoraPair]
) -> tuple[tuple[str, LoraPair], ...]:
    """Return (parameter, pair) for a module's stack, outermost first, with the rank and scaling of each parameter.

    `parameters` are the owner's own, in the order the model registers them. PEFT wraps those that target_parameters
    names in that order, so the last is outermost. Raises UnmatchedModulesError, ShapeError or UnsupportedPatchError.
    """
    targets = frozenset(config.get("target_parameters") or ())
    names = [name for name in reversed(parameters) if _listed(f"{owner}.{name}", targets)]
    if len(names) != len(stack):
        raise UnmatchedModulesError(
            f"{owner}: the patch holds {len(stack)} updates, target_parameters names {len(names)} of the base's "
            f"parameters ({', '.join(names) or 'none'}); is this a release of the base the patch was trained on?"
        )
    ranks = scalings(config, [f"{owner}.{name}" for name in names])
    pairs = [_with_rank(pair, *ranks[f"{owner}.{name}"]) for name, pair in zip(names, stack, strict=True)]
    for name, pair in zip(names, pairs, strict=True):
        _refuse_old_experts(config, f"{owner}.{name}", pair)
    return tuple(zip(names, pairs, strict=True))


def _with_rank(pair: LoraPair, rank: int, scale: float) -> LoraPair:
    rows, columns = pair.a_entry.shape[0], pair.b_entry.shape[1]
    if rows != columns or rows % rank:
        raise ShapeError(
            f"{pair.module}: lora_A has {rows} rows and lora_B {columns} columns, expected a multiple of r={rank} "
            f"({CONFIG}) in both; was the patch saved completely?"
        )
    return replace(pair, rank=rank, scaling=scale)


def _refuse_old_experts(config: Mapping[str, Any], parameter: str, pair: LoraPair) -> None:
    """Raise UnsupportedPatchError for square experts of an older PEFT: 0.19.1 swapped the meaning of their axes."""
    version = config.get("peft_version")
    if pair.experts > 1 and pair.shape[0] == pair.shape[1] and not _since(str(version), EXPERTS_SINCE):
        raise UnsupportedPatchError(
            f"{parameter}: the patch was saved by PEFT {version or 'of unknown version'}, which laid the experts of "
            f"target_parameters out otherwise, and {pair.shape[0]}×{pair.shape[1]} does not tell; expected 0.19.1 "
            "or later, train the patch again"
        )


def _since(version: str, first: tuple[int, int, int]) -> bool:
    match = re.match(r"(\d{1,4})\.(\d{1,4})\.(\d{1,4})", version)
    number = tuple(int(part) for part in match.groups()) if match else (0, 0, 0)
    return number > first or (number == first and "dev" not in version)  # dev: before or after the change


# --- rank and scaling ---


def _patterned(config: Mapping[str, Any], patterns: str, default: str, modules: Sequence[str]) -> list[Any]:
    table = config.get(patterns) or {}
    values = list(table.values())
    first = first_matches(list(table), modules, TAIL, f"{CONFIG}: {patterns}")
    return [values[i] if i >= 0 else table.get(m, config.get(default)) for i, m in zip(first, modules, strict=True)]


def _scaling(module: str, rank: Any, alpha: Any, config: Mapping[str, Any]) -> tuple[int, float]:
    if type(rank) is not int or not 1 <= rank < 2**31:
        raise PatchError(
            f"{CONFIG}: r of {module} must be a positive whole number, found {rank!r:.60}; correct {CONFIG}"
        )
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 2.0**127:
        raise PatchError(
            f"{CONFIG}: lora_alpha of {module} must be a finite number, found {alpha!r:.60}; correct {CONFIG}"
        )
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


# --- which modules ---


def _hits(config: Mapping[str, Any], pattern: str, modules: Sequence[str]) -> list[bool]:
    if all_linear(config):
        return [module.rpartition(".")[2] not in OUTPUTS for module in modules]
    return [i >= 0 for i in first_matches([pattern], modules, WHOLE, f"{CONFIG}: target_modules")]


def _listed(name: str, names: Collection[str]) -> bool:
    """Return whether the name, or its tail after a dot, is in `names`."""
    return name in names or any(tail in names for tail in _tails(name))


def _tails(name: str) -> Iterator[str]:
    while name:
        name = name.partition(".")[2]
        yield name


def _owners(parameter: str) -> Iterator[str]:
    while parameter := parameter.rpartition(".")[0]:
        yield parameter


def _excluded(config: Mapping[str, Any], modules: Sequence[str]) -> list[bool]:
    exclude = config.get("exclude_modules") or []
    if isinstance(exclude, str):
        first = first_matches([exclude], modules, WHOLE, f"{CONFIG}: exclude_modules")
        excluded = [i >= 0 for i in first]
    else:
        names = frozenset(exclude)
        excluded = [_listed(module, names) for module in modules]
    saved = names_of(config, "modules_to_save")
    if not saved:
        return excluded
    test = re.compile(rf"(^|.*\.)(?:{'|'.join(saved)})($|\..*)")
    return [hit or test.match(module) is not None for hit, module in zip(excluded, modules, strict=True)]


def _layer_test(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Return a test whether a module is in a layer of layers_to_transform; modules named in full skip it."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return lambda _: True
    numbers = frozenset([layers] if isinstance(layers, int) else layers)
    names = names_of(config, "layers_pattern")
    tests = [re.compile(rf"(?:^|.*?\.){name}\.(\d+)\.") for name in names] or [LAYER]

    def test(module: str) -> bool:
        layer = next((match for test in tests if (match := test.match(module))), None)
        return layer is not None and int(layer[1]) in numbers

    return test
