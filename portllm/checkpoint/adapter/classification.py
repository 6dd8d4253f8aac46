"""Classification of every tensor of a PEFT file by its name and the config; a tensor of no class is an error.

The names are those that peft's get_peft_model_state_dict (utils/save_and_load.py) writes for the LoRA family. A tensor
that PEFT would skip without a message when it loads the patch is an error here.
"""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from portllm.checkpoint.adapter.factors import LoraPair, TokenRows
from portllm.checkpoint.adapter.targeting import OUTPUTS, all_linear, matched, saved_whole, scalings, with_parameters
from portllm.checkpoint.files.headers import Header
from portllm.checkpoint.files.names import ADAPTER_CONFIG as CONFIG
from portllm.checkpoint.files.tensors import TensorEntry, times
from portllm.errors import PatchError, ShapeError, UnmatchedModulesError, UnsupportedPatchError

PREFIX = "base_model.model."
FLOATS = ("F64", "F32", "F16", "BF16")
MAX_NAME = 1000  # characters; patterns of the config are matched against names

LORA = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B|"
    r"lora_magnitude_vector(?:\.weight)?)"
)
# names of a model in memory: the part is followed by the adapter's name, which PEFT omits in its files
IN_MEMORY = re.compile(
    r"(?P<owner>.+\.(?:(?P<factor>lora_[AB])|lora_embedding_[AB]|lora_magnitude_vector|trainable_tokens_delta))"
    r"\.(?!(?:weight|bias)$)(?P<adapter>[^.]+)(?P<leaf>(?(factor)\.(?:weight|bias)|(?:\.weight)?))"
)
TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta")
# the parts that PEFT's wrappers insert between a module's name and its parameter's
WRAPPED = re.compile(r"(?P<module>.+?)(?P<wraps>(?:\.token_adapter)?(?:\.base_layer)+)\.(?P<leaf>weight|bias)")
# written with save_embedding_layers or bias=all next to the module of modules_to_save that replaces them
IDLE = re.compile(r"(?P<module>.+)\.(?:original_module|modules_to_save)\.(?P<rest>.+)")
NEST = ".base_layer"

Sides = dict[str, TensorEntry]


@dataclass
class Contents:
    """The tensors of a file by class; `Patch` documents what each mapping contains."""

    modules: dict[str, LoraPair] = field(default_factory=dict)
    stacks: dict[str, tuple[LoraPair, ...]] = field(default_factory=dict)
    replaced: Sides = field(default_factory=dict)
    tokens: dict[str, TokenRows] = field(default_factory=dict)
    saved: Sides = field(default_factory=dict)
    idle: Sides = field(default_factory=dict)
    follows_tie: set[str] = field(default_factory=set)


def sort_out(config: Mapping[str, Any], header: Header) -> Contents:
    """Return the contents of a file, from its header alone. Raises PatchError or a subclass, naming the tensor."""
    expect_names_of_a_file(header)
    sides, rest = _split(config, header)
    if not sides:
        raise PatchError(f"{header.path}: holds no tensors of LoRA; expected lora_A and lora_B, train the patch again")
    contents = Contents()
    _pair_up(config, sides, contents, header.path)
    for name in sorted(rest, key=lambda name: TOKENS.fullmatch(name) is None):
        _place(name, rest[name], config, contents, header.path)
    _loose_weights(config, contents, header.path)
    _check_tokens(config, contents, header.path)
    return contents


def expect_names_of_a_file(header: Header) -> None:
    """Raise PatchError where tensor names contain an adapter's name, as in memory: PEFT skips them on loading.

    The error contains the command that removes the adapter's name, where no two names become the same.
    """
    matches = {name: match for name in header.tensors if len(name) <= MAX_NAME and (match := IN_MEMORY.fullmatch(name))}
    plain_names = {name: f"{match['owner']}{match['leaf']}" for name, match in matches.items()}
    adapters = sorted({match["adapter"] for match in matches.values()})
    for name, plain in plain_names.items():
        if plain in header.tensors:
            raise _foreign(name, header.path, f"{plain.removeprefix(PREFIX)} is there, too")
        problem = (
            f"{header.path}: tensor names carry an adapter's name ({', '.join(adapters)[:80]}), which PEFT's files do "
            f"not: expected {plain.removeprefix(PREFIX)[-80:]}, found {name.removeprefix(PREFIX)[-80:]}"
        )
        if len(adapters) > 1:
            command = "model.save_pretrained(DIR, selected_adapters=[NAME])"
            raise PatchError(f"{problem}; expected one adapter in a file, save each on its own: {command}")
        raise PatchError(f"{problem}; remove it with: {_without_adapter_name(header.path, adapters[0])}")


def _without_adapter_name(path: Path, adapter: str) -> str:
    """Return the shell command that renames the tensors of `path`; the file is replaced complete or not at all."""
    code = (
        "import os,re,sys; from safetensors.torch import load_file,save_file; f,n=sys.argv[1:]; n=re.escape(n); "
        'p=rf"(\\.lora_\\w+|_delta)\\.{n}(?=\\.|$)|\\.modules_to_save\\.{n}(?=\\.)"; '
        'save_file({re.sub(p,r"\\1",k):v for k,v in load_file(f).items()},f+".new"); os.replace(f+".new",f)'
    )
    return shlex.join(["python", "-c", code, str(path), adapter])


def _split(config: Mapping[str, Any], header: Header) -> tuple[dict[str, Sides], Sides]:
    """Return (parts of LoRA by wrapped module, all other tensors by name), names without the prefix."""
    sides: defaultdict[str, Sides] = defaultdict(dict)
    rest: Sides = {}
    for full, entry in header.tensors.items():
        name = full.removeprefix(PREFIX)
        if name == full or not name or len(name) > MAX_NAME:
            raise _foreign(full, header.path, f"expected a name that starts with {PREFIX}")
        if entry.dtype not in FLOATS:
            raise PatchError(
                f"{header.path}: {full} has dtype {entry.dtype}, expected one of {', '.join(FLOATS)}; "
                "save the patch in a floating dtype"
            )
        match = LORA.fullmatch(name)
        if match is None:
            rest[name] = entry
        elif saved_whole(config, f"{match['module']}.weight"):
            raise _foreign(full, header.path, f"the config saves {match['module']} completely (modules_to_save)")
        elif (part := match["part"].removesuffix(".weight")) in sides[match["module"]]:
            raise _foreign(full, header.path, "there are two of them")
        else:
            sides[match["module"]][part] = entry
    return dict(sides), rest


# --- pairs ---


def _pair_up(config: Mapping[str, Any], sides: Mapping[str, Sides], contents: Contents, path: Path) -> None:
    levels = _levels(sides, path)
    hits = matched(config, list(levels))
    flat = {owner: depths[0] for owner, depths in levels.items() if set(depths) == {0}}
    single = {owner for owner in flat if hits[owner]}
    if all_linear(config):  # PEFT gives LoRA to no embedding then
        single -= {owner for owner in single if "lora_embedding_A" in flat[owner]}
    stacked = with_parameters(config, levels.keys() - single)
    rest = sorted(levels.keys() - single - stacked)
    ranks = scalings(config, sorted(flat.keys() - stacked))
    for owner in sorted(single):
        contents.modules[owner] = _pair(owner, flat[owner], ranks[owner], config, path)
    for owner in sorted(stacked):
        contents.stacks[owner] = _stack(owner, levels[owner], path)
    embeddings = {pair.shape for pair in contents.modules.values() if pair.kind == "embedding"}
    for owner in rest:
        # with ensure_weight_tying PEFT gives a tied head the embedding's factors, whether or not target_modules matches
        pair = _pair(owner, flat[owner], ranks[owner], config, path) if owner in flat and _ties(config) else None
        if pair is None or pair.kind != "linear" or pair.shape not in embeddings:
            name = next(iter(next(iter(levels[owner].values())).values())).name
            keys = "(target_modules, exclude_modules, layers_to_transform)"
            raise _foreign(name, path, f"the config gives {owner} no LoRA {keys}")
        contents.modules[owner] = pair
        contents.follows_tie.add(owner)


def _ties(config: Mapping[str, Any]) -> bool:
    return bool(config.get("ensure_weight_tying"))


def _levels(sides: Mapping[str, Sides], path: Path) -> dict[str, dict[int, Sides]]:
    """Return the parts of LoRA by module and by the number of PEFT's wrappers around them."""
    levels: defaultdict[str, dict[int, Sides]] = defaultdict(dict)
    for name, parts in sides.items():
        owner, depth = name, 0
        while owner.endswith(NEST):
            owner, depth = owner.removesuffix(NEST), depth + 1
        if f"{NEST}." in owner:
            raise UnsupportedPatchError(
                f"{path}: {next(iter(parts.values())).name} is inside another module with LoRA (MultiheadAttention?), "
                "which portllm does not port; train the patch on its linear modules"
            )
        levels[owner][depth] = parts
    return dict(levels)


def _pair(
    module: str, sides: Sides, rank_and_scale: tuple[int, float], config: Mapping[str, Any], path: Path
) -> LoraPair:
    rank, scale = rank_and_scale
    embedding = any(part.startswith("lora_embedding") for part in sides)
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    _expect(module, sides, names, config, path)
    a, b = (sides[name] for name in names)
    _check_factors(module, names, a, b, path)
    if a.shape[0] != rank or b.shape[1] != rank:
        raise ShapeError(
            f"{module}: {names[0]} is {times(a.shape)} and {names[1]} is {times(b.shape)}, expected r={rank} between "
            f"them ({CONFIG}); was the patch saved completely?"
        )
    kind = "embedding" if embedding else "linear"
    magnitude, bias = sides.get("lora_magnitude_vector"), sides.get("lora_B.bias")
    pair = LoraPair(module, "embedding" if embedding else "linear", a, b, rank, scale, magnitude, bias)
    for vector, length in ((magnitude, pair.shape[kind == "embedding"]), (bias, pair.shape[0])):
        if vector is not None and vector.shape != (length,):
            raise ShapeError(
                f"{vector.name} is {times(vector.shape)}, expected {length}; was the patch saved completely?"
            )
    return pair


def _stack(owner: str, levels: Mapping[int, Sides], path: Path) -> tuple[LoraPair, ...]:
    """Return the pairs of a module's parameters, outermost wrapper first, with rank 1 and scaling NaN.

    The parameter of each pair, and so its rank and scaling, depends on the order of the base's parameters:
    `targeting.stack_pairs` returns the pairs with both.
    """
    pairs = []
    for depth in range(len(levels)):
        if depth not in levels:
            raise PatchError(
                f"{path}: {owner} has {len(levels)} updates, but none {depth} deep; the file is incomplete"
            )
        name = owner + depth * NEST
        sides = levels[depth]
        _expect(name, sides, ("lora_A", "lora_B"), {}, path)
        a, b = sides["lora_A"], sides["lora_B"]
        _check_factors(name, ("lora_A", "lora_B"), a, b, path)
        if a.shape[0] != b.shape[1]:
            raise ShapeError(
                f"{name}: lora_A is {times(a.shape)} and lora_B is {times(b.shape)}, expected one rank between them; "
                "was the patch saved completely?"
            )
        pairs.append(LoraPair(owner, "parameter", a, b, 1, float("nan")))
    return tuple(pairs)


def _expect(module: str, sides: Sides, names: Sequence[str], config: Mapping[str, Any], path: Path) -> None:
    """Raise where a factor, DoRA's magnitude or the bias of lora_bias is missing, or present against the config."""
    expected = [*names]
    expected += ["lora_magnitude_vector"] if config.get("use_dora") else []
    expected += ["lora_B.bias"] if config.get("lora_bias") and "lora_B" in names else []
    if missing := [name for name in expected if name not in sides]:
        key = {"lora_magnitude_vector": " (use_dora)", "lora_B.bias": " (lora_bias)"}.get(missing[0], "")
        raise PatchError(
            f"{path}: {module} has no {missing[0]}{key}; expected {' and '.join(expected)}, the file is incomplete"
        )
    if extra := [name for name in sides if name not in expected]:
        raise _foreign(sides[extra[0]].name, path, f"the config gives {module} none (use_dora, lora_bias)")


def _check_factors(module: str, names: Sequence[str], a: TensorEntry, b: TensorEntry, path: Path) -> None:
    if 0 in (*a.shape, *b.shape):
        raise ShapeError(
            f"{path}: {module} has {names[0]} {times(a.shape)} and {names[1]} {times(b.shape)}, expected no empty "
            "factor; was it saved under DeepSpeed or FSDP without gathering? save it again"
        )
    if len(a.shape) > 2 and len(a.shape) == len(b.shape):
        raise UnsupportedPatchError(
            f"{path}: {a.name} is {times(a.shape)}: LoRA on a convolution, which portllm does not port; train without"
        )
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise ShapeError(
            f"{module}: {names[0]} is {times(a.shape)} and {names[1]} is {times(b.shape)}, expected two matrices; "
            "was the patch saved completely?"
        )


# --- all other tensors ---


def _place(name: str, entry: TensorEntry, config: Mapping[str, Any], contents: Contents, path: Path) -> None:
    if match := TOKENS.fullmatch(name):
        if match["module"] in contents.modules or match["module"] in contents.stacks:
            raise _foreign(entry.name, path, f"{match['module']} has LoRA, and PEFT trains no rows next to it")
        contents.tokens[match["module"]] = _token_rows(match["module"], entry, config, path)
    elif saved_whole(config, name) and not IDLE.fullmatch(name):
        contents.replaced[name] = entry
    elif match := IDLE.fullmatch(name):
        contents.idle[name] = entry
    elif match := WRAPPED.fullmatch(name):
        _wrapped(match["module"], match["leaf"], entry, config, contents, path)
    elif ".lora_" in name:
        raise _foreign(entry.name, path, "expected lora_A, lora_B, lora_embedding_A, ... without an adapter's name")
    elif name.endswith(".bias"):
        _bias(name, entry, config, contents, path)
    else:
        contents.saved[name] = entry  # _loose_weights classifies it after all other tensors


def _wrapped(
    module: str, leaf: str, entry: TensorEntry, config: Mapping[str, Any], contents: Contents, path: Path
) -> None:
    """Classify a base parameter of a module that PEFT wrapped: a trained bias, or a copy of its weight."""
    tokens = ".token_adapter." in entry.name
    if tokens or module in contents.modules:
        depth = int(module in (contents.tokens if tokens else contents.modules))
    else:
        depth = len(contents.stacks.get(module, ()))
    if depth == 0 or entry.name.count(NEST) != depth:
        raise _foreign(entry.name, path, f"{module} has {depth} of LoRA's wrappers in the file")
    if leaf == "weight":
        contents.saved[f"{module}.weight"] = entry
    elif config.get("bias") == "all" or (config.get("bias") == "lora_only" and not tokens):
        contents.replaced[f"{module}.bias"] = entry
    else:
        raise _foreign(entry.name, path, f"it is a bias, and the config has bias={config.get('bias') or 'none'}")


def _bias(name: str, entry: TensorEntry, config: Mapping[str, Any], contents: Contents, path: Path) -> None:
    module = name.rpartition(".")[0]
    if config.get("bias") != "all" or module in contents.modules or module in contents.stacks:
        raise _foreign(entry.name, path, f"it is a bias, and the config has bias={config.get('bias') or 'none'}")
    contents.replaced[name] = entry


def _loose_weights(config: Mapping[str, Any], contents: Contents, path: Path) -> None:
    """Classify weights that the config does not name: copies of the base's embeddings; raise for any other."""
    saved, contents.saved = contents.saved, {}
    plain = {}
    for name, entry in saved.items():
        module, _, leaf = name.rpartition(".")
        if entry.name != PREFIX + name:
            contents.saved[module] = entry
        elif leaf != "weight" or len(entry.shape) != 2 or module in contents.modules or module in contents.stacks:
            raise _foreign(entry.name, path, "expected LoRA's factors or what the config names")
        elif module in contents.tokens:
            raise _foreign(entry.name, path, f"rows of {module} are trained, not all of it")
        else:
            plain[module] = entry
    if len(plain) > 2:
        raise _foreign(list(plain.values())[2].name, path, "expected copies of the input and output embedding at most")
    _copies(plain, config, contents)
    for name, entry in contents.idle.items():
        match = IDLE.fullmatch(name)
        if match is None or f"{match['module']}.{match['rest']}" not in contents.replaced:
            raise _foreign(entry.name, path, "the file does not hold the tensor that replaces it (modules_to_save)")


def _copies(plain: Sides, config: Mapping[str, Any], contents: Contents) -> None:
    shapes = {entry.shape for entry in contents.replaced.values()}
    for module, entry in plain.items():
        # ensure_weight_tying with modules_to_save: PEFT saves the tied head next to the embedding
        tied = config.get("ensure_weight_tying") and config.get("modules_to_save") and entry.shape in shapes
        if tied and module.rpartition(".")[2] in OUTPUTS:
            contents.replaced[f"{module}.weight"] = entry
            contents.follows_tie.add(module)
        else:
            contents.saved[module] = entry


def _token_rows(module: str, entry: TensorEntry, config: Mapping[str, Any], path: Path) -> TokenRows:
    trained = config.get("trainable_token_indices")
    by_module = trained if isinstance(trained, dict) else {module: trained or []}
    lists = [indices for key, indices in by_module.items() if key and module.endswith(key) and indices]
    if len(lists) != 1:
        raise _foreign(entry.name, path, f"trainable_token_indices names {module} {len(lists)} times, expected once")
    indices = tuple(lists[0])
    if len(set(indices)) != len(indices):
        raise PatchError(f"{path}: trainable_token_indices names a token of {module} twice; correct {CONFIG}")
    if len(entry.shape) != 2 or entry.shape[0] != len(indices):
        raise ShapeError(
            f"{entry.name} is {times(entry.shape)}, expected {len(indices)} rows (trainable_token_indices)"
        )
    return TokenRows(module, indices, entry)


def _check_tokens(config: Mapping[str, Any], contents: Contents, path: Path) -> None:
    """Raise where an entry of trainable_token_indices has no rows; a tied head shares rows of the same tokens."""
    trained = config.get("trainable_token_indices") or []
    token_lists = {rows.indices for rows in contents.tokens.values()}
    for key, indices in (trained if isinstance(trained, dict) else {"": trained}).items():
        has_rows = any(module.endswith(key) for module in contents.tokens)
        if indices and not has_rows and tuple(indices) not in token_lists:
            raise PatchError(
                f"{path}: holds no rows for the trained tokens of {key or 'the embedding'}; expected "
                "trainable_tokens_delta, was the patch saved completely?"
            )
        if indices and not has_rows:
            contents.follows_tie.add(key)
    if not isinstance(trained, dict) and len(contents.tokens) > 1:  # a list is for the input embedding
        # with save_embedding_layers PEFT also writes the rows of the tied head, and never reads them
        for module in [module for module in contents.tokens if module.rpartition(".")[2] in OUTPUTS]:
            contents.idle[f"{module}.token_adapter.trainable_tokens_delta"] = contents.tokens.pop(module).entry
        if len(contents.tokens) != 1:
            names = ", ".join(contents.tokens) or next(iter(contents.idle))
            raise _foreign(names, path, "trainable_token_indices is a list, which is for the input embedding")


def _foreign(name: str, path: Path, why: str) -> UnmatchedModulesError:
    return UnmatchedModulesError(f"{path}: tensor {name} is not PEFT's LoRA as {CONFIG} describes it: {why}")
