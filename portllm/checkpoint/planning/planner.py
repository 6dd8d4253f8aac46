"""Making the plan: every part of a patch finds its place in the base, or is refused by name.

Names in the patch are those of the model in memory when it was trained; the layout says where each is on disk. Names
that are not in memory any more but are on disk (experts that newer transformers fuse) are taken as they stand there.
Tied weights: an update of one side unties them, so that the other stays what it was, unless both change alike
(ensure_weight_tying).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from portllm.checkpoint.adapter.factors import LoraPair, TokenRows
from portllm.checkpoint.adapter.patch import Patch
from portllm.checkpoint.adapter.targeting import stack_pairs
from portllm.checkpoint.base.checkpoint import Checkpoint, equal_values
from portllm.checkpoint.base.layout import HEAD, Layout, Part, plain, whole
from portllm.checkpoint.base.places import RELEASE, Places
from portllm.checkpoint.files.headers import TensorEntry, times
from portllm.checkpoint.planning.changes import DTYPES, Change, Plan, disk_tensor, linears, refuse_quantised
from portllm.checkpoint.planning.heads import classifier
from portllm.checkpoint.planning.initialisation import Old, derived
from portllm.checkpoint.planning.low_rank import (
    LowRank,
    Piece,
    Shelf,
    block_reader,
    of_expert,
    of_pair,
    overlap,
    pieces,
)
from portllm.checkpoint.planning.replacements import extended, grew
from portllm.checkpoint.planning.tying import settle
from portllm.errors import CheckpointError, ParamsError, ShapeError, UnmatchedModulesError, UnsupportedPatchError

if TYPE_CHECKING:
    from portllm.algebra.edits import Edit

HEADS_OF_CLASSIFIERS = frozenset({"score", "classifier"})


def make_plan(
    patch: Patch, base: Checkpoint, layout: Layout | None = None, *, scale: float = 1.0, old: Old | None = None
) -> Plan:
    """Match every part of `patch` to tensors of `base`, whose layout is the plain one unless given.

    Reads headers, and tensors only where the patch holds what looks like a copy of another of its own. `scale`
    multiplies Δ. `old` is needed where the patch's meaning depends on it (PiSSA, OLoRA). Raises CheckpointError
    (quantised base), UnmatchedModulesError, ShapeError, UnsupportedPatchError or ParamsError, naming what does not fit.
    """
    refuse_quantised(base)
    planner = _Planner(patch, base, plain(base) if layout is None else layout, scale, old)
    return planner.plan()


class _Planner:
    def __init__(self, patch: Patch, base: Checkpoint, layout: Layout, scale: float, old: Old | None) -> None:
        self.patch, self.base, self.layout, self.scale, self.old = patch, base, layout, scale, old
        self.pieces: defaultdict[str, list[Piece]] = defaultdict(list)
        self.changes: dict[str, Change] = {}
        self.modules: set[str] = set()
        self.config: dict[str, Any] = {}
        self.shelf = Shelf()
        self.places = Places(base, layout)
        self.extended: list[str] = []

    def plan(self) -> Plan:
        self._refuse_missing()
        self._refuse_scale()
        self._refuse_untied()
        for module, pair in self.patch.modules.items():
            self._pair(module, pair)
        for owner, stack in self.patch.stacks.items():
            self._stack(owner, stack)
        for tensor, group in self.pieces.items():
            self._add(tensor, group)
        for parameter, entry in self.patch.replaced.items():
            self._replace(parameter, entry)
        for module, saved in self.patch.saved.items():
            self._extend(module, saved)
        for module, tokens in self.patch.tokens.items():
            self._tokens(module, tokens)
        self.config |= settle(self.changes, self.patch, self.places, self.extended)
        self._whole_vocabulary()
        total = linears(self.layout) | self.modules
        changes = dict(sorted(self.changes.items()))
        return Plan(changes, len(self.modules), len(total), self.config, tuple(self.extended))

    # --- low-rank updates ---

    def _pair(self, module: str, pair: LoraPair) -> None:
        parameter = f"{module}.weight"
        self.modules.add(self.places.in_memory(module))
        parts, shape = self.places.place(parameter)
        if self.patch.fan_in_fan_out and self.base.config.get("auto_map"):
            raise UnsupportedPatchError(
                f"{module}: the patch says fan_in_fan_out and the base runs code of its own (auto_map), so its layout "
                "cannot be told; expected a model_type that transformers has built in"
            )
        update = self._update(module, pair)
        if self.places.kind(module) == "conv1d":
            update = update.turned()
        if update.shape != shape:
            raise ShapeError(
                f"{module}: patch is {times(update.shape)}, base tensor {parts[0].tensor} is {times(shape)}; {RELEASE}"
            )
        if pair.magnitude is not None:
            self._dora(module, pair, parts, update)
        else:
            for piece in pieces(parts, lambda _: update, self.places.shape):
                self.pieces[piece.tensor].append(piece)
        if pair.bias is not None:
            self._bias(module, pair)

    def _update(self, module: str, pair: LoraPair) -> LowRank:
        if self.patch.init == "plain":
            return of_pair(pair, self.scale)
        if self.old is None:
            raise UnsupportedPatchError(
                f"{self.patch.path}: init_lora_weights={self.patch.config.get('init_lora_weights')} took a part out of "
                "the base it was trained on, expected that base to compute it again; pass it as --from"
            )
        return derived(module, pair, self.patch, self.old, self.scale)

    def _dora(self, module: str, pair: LoraPair, parts: tuple[Part, ...], update: LowRank) -> None:
        entry = pair.magnitude
        tensor = self.places.single(module, parts, "DoRA")
        turned = parts[0].transposed
        update = update.turned() if turned else update
        outputs = int((self.places.kind(module) == "linear") == turned)
        size = math.prod(entry.shape) if entry is not None else 1
        if size != update.shape[outputs]:
            raise ShapeError(f"{module}: the patch has {size} magnitudes, expected {update.shape[outputs]}; {RELEASE}")

        def edit() -> Edit:
            import torch

            from portllm.algebra.edits import Dora

            a, b = map(torch.as_tensor, update.factors())
            return Dora(a, b, update.scale, pair.magnitude_values, outputs=outputs)

        sources = (*update.sources, entry.name if entry is not None else "")
        self._change(tensor, edit, "m · (W + s·BA) / ‖W + s·BA‖", sources)

    def _bias(self, module: str, pair: LoraPair) -> None:
        name = disk_tensor(f"{module}.bias", self.layout)
        if name is None or pair.bias is None:
            raise UnsupportedPatchError(
                f"{self.base.path}: {module} has no bias on disk, so lora_bias has nowhere to go; expected a base with "
                "biases, train the patch without lora_bias"
            )
        if self.places.shape(name) != pair.bias.shape:
            raise ShapeError(
                f"{module}: the patch's bias is {times(pair.bias.shape)}, the base's {times(self.places.shape(name))}; "
                f"{RELEASE}"
            )

        def edit() -> Edit:
            from portllm.algebra.edits import AddVector

            return AddVector(pair.bias_values, self.scale * pair.scaling)

        self._change(name, edit, "b + s·b_B", (pair.bias.name,))

    def _stack(self, owner: str, stack: tuple[LoraPair, ...]) -> None:
        known = self.layout.modules.get(owner)
        if known is None:
            raise UnmatchedModulesError(f"{owner}: {self.base.path} has no such module; {RELEASE}")
        for name, pair in stack_pairs(self.patch.config, owner, tuple(known.parameters), stack):
            parameter = f"{owner}.{name}"
            self.modules.add(parameter)
            parts, shape = self.places.place(parameter)
            turned = len(shape) == 3 and known.transposed
            experts = shape[0] if len(shape) == 3 else 1
            expected = (shape[-1], shape[-2]) if turned else (shape[-2], shape[-1])
            if pair.shape != expected or pair.experts != experts:
                raise ShapeError(
                    f"{parameter}: the patch holds {pair.experts} updates of {times(pair.shape)}, the base {experts} "
                    f"matrices of {times(expected)}; {RELEASE}"
                )

            def update(expert: int, pair: LoraPair = pair, experts: int = experts, turned: bool = turned) -> LowRank:
                one = of_expert(pair, experts, expert, self.scale, self.shelf)
                return one.turned() if turned else one

            for piece in pieces(parts, update, self.places.shape):
                self.pieces[piece.tensor].append(piece)

    def _add(self, tensor: str, group: list[Piece]) -> None:
        if overlap(group):
            first, second = (group[0].update.sources[0], group[-1].update.sources[0])
            raise UnmatchedModulesError(
                f"{first} and {second} are both {tensor} of {self.base.path}; expected one update each"
            )

        def edit() -> Edit:
            from portllm.algebra.sums import AddLora, Block, Update

            blocks = ((p, *p.update.factors()) for p in group)
            return AddLora(*(Block(Update(a, b, p.update.scale), p.row, p.column) for p, a, b in blocks))

        sources = dict.fromkeys(name for piece in group for name in piece.update.sources)
        self._change(tensor, edit, "W + s·BA", tuple(sources))

    # --- replaced tensors and rows ---

    def _replace(self, parameter: str, entry: TensorEntry) -> None:
        self.modules.add(parameter.rpartition(".")[0])
        if self._is_new_head(parameter):
            self._new_head(parameter, entry)
            return
        parts, shape = self.places.place(parameter)
        grown = entry.shape != shape
        if grown:
            self._grow(parameter, entry, shape)
            self.places.single(parameter, parts, "a grown vocabulary")
        for part in parts:
            self.places.single(parameter, (part,), "a module saved whole")
            reads = not grown and part.tensor not in self.places.tied_heads
            own = entry.shape if len(parts) == 1 and not part.transposed else self.places.shape(part.tensor)
            edit = self._replacing(entry, whole(part.tensor, own) if grown else part)
            self._change(part.tensor, edit, "replaced", (entry.name,), shape=own, reads=reads)

    def _replacing(self, entry: TensorEntry, part: Part) -> Callable[[], Edit]:
        path = self.patch.header.path

        def edit() -> Edit:
            from portllm.algebra.edits import Replace

            return Replace(block_reader(path, entry, part))

        return edit

    def _grow(self, parameter: str, entry: TensorEntry, shape: tuple[int, ...]) -> None:
        """A vocabulary may grow, in the embedding and the head alike; nothing else may change its shape."""
        vocabulary = self.places.kind(parameter.rpartition(".")[0]) == "embedding" or self._is_head(parameter)
        if not vocabulary or len(entry.shape) != 2 or entry.shape[1] != shape[1] or entry.shape[0] < shape[0]:
            raise ShapeError(
                f"{parameter}: the patch saved {times(entry.shape)}, the base has {times(shape)}; {RELEASE}"
            )
        if isinstance(self.base.config.get("text_config"), dict):
            raise UnsupportedPatchError(
                f"{parameter}: the patch has a vocabulary of {entry.shape[0]}, and that of {self.base.path} is in its "
                "text_config, where portllm does not grow it; train on the base's own vocabulary"
            )
        self.config["vocab_size"] = entry.shape[0]

    def _extend(self, module: str, saved: TensorEntry) -> None:
        """A copy of a base weight with more rows than the base: the new ones come along."""
        parameter = f"{module}.weight"
        if parameter in self.layout.tied or parameter in self.patch.replaced or not self.places.known(parameter):
            return  # it grows with its embedding, or is the patch's own
        parts, shape = self.places.place(parameter)
        if not grew(saved, shape):
            return
        tensor = self.places.single(parameter, parts, "a grown vocabulary")
        self._grow(parameter, saved, shape)
        base, patch = (self.base.where[tensor].path, self.base.entry(tensor)), (self.patch.header.path, saved)
        tokens = self.patch.tokens.get(module)
        if tokens is not None:
            self._check_rows(module, tokens, saved.shape)
        sources = (saved.name, *([tokens.entry.name] if tokens is not None else []))
        self.extended.append(module)
        self._change(
            tensor, lambda: extended(base, patch, tokens), f"{saved.shape[0] - shape[0]} rows added", sources,
            shape=saved.shape, reads=False,
        )  # fmt: skip

    def _whole_vocabulary(self) -> None:
        """A vocabulary that grew has grown everywhere."""
        rows, old = self.config.get("vocab_size"), self.base.config.get("vocab_size")
        for name in self.base.where if rows is not None else ():
            module = name.rpartition(".")[0]
            shape = self.changes[name].shape if name in self.changes else self.base.shape(name)
            vocabulary = self.layout.modules.get(module)
            if (self._is_head(name) or (vocabulary and vocabulary.kind == "embedding")) and shape[:1] == (old,):
                raise ShapeError(
                    f"{name}: has {old} rows, the patch's vocabulary {rows}; expected one vocabulary, save the "
                    "embedding and the head with the patch (modules_to_save)"
                )

    def _is_head(self, parameter: str) -> bool:
        return parameter.rpartition(".")[0].rpartition(".")[2] in (HEAD, "embed_out")

    def _is_new_head(self, parameter: str) -> bool:
        module = parameter.rpartition(".")[0]
        return (
            self.patch.config.get("task_type") == "SEQ_CLS"
            and module in HEADS_OF_CLASSIFIERS
            and parameter not in self.layout.parts
            and parameter not in self.base.where
        )

    def _new_head(self, parameter: str, entry: TensorEntry) -> None:
        """The head of a classifier on a base that has none yet: a tensor and what config.json needs to load it."""
        self.config |= classifier(self.base, parameter, entry)
        dtype = self.base.dtype(self.base.names[0])
        edit = self._replacing(entry, whole(parameter, entry.shape))
        change = Change(parameter, dtype, entry.shape, None, edit, "added", (entry.name,))
        self.changes[parameter] = change

    def _tokens(self, module: str, tokens: TokenRows) -> None:
        self.modules.add(self.places.in_memory(module))
        if module in self.extended:
            return
        parts, shape = self.places.place(f"{module}.weight")
        tensor = self.places.single(module, parts, "trainable_token_indices")
        self.places.refuse_bias(module)
        self._check_rows(module, tokens, shape)

        def edit() -> Edit:
            from portllm.algebra.edits import ReplaceRows

            return ReplaceRows(dict(zip(tokens.indices, tokens.values, strict=True)))

        self._change(tensor, edit, f"{len(tokens.indices)} rows replaced", (tokens.entry.name,))

    def _check_rows(self, module: str, tokens: TokenRows, shape: tuple[int, ...]) -> None:
        if tokens.indices and max(tokens.indices) >= shape[0] or tokens.entry.shape != (len(tokens.indices), shape[1]):
            raise ShapeError(
                f"{module}: the patch trained {times(tokens.entry.shape)} rows up to {max(tokens.indices, default=0)}, "
                f"the base has {times(shape)}; {RELEASE}"
            )

    def _refuse_missing(self) -> None:
        names = [*self.patch.modules, *self.patch.tokens, *self.patch.stacks, *self.patch.replaced]
        missing = [name for name in names if not self._known(name)]
        if missing:
            some = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise UnmatchedModulesError(
                f"{len(missing)} of the patch's {len(names)} modules are not in {self.base.path}: {some}; {RELEASE}"
            )

    def _known(self, name: str) -> bool:
        if name in self.patch.stacks:
            return name in self.layout.modules
        parameter = name if name in self.patch.replaced else f"{name}.weight"
        return self.places.known(parameter) or self._is_new_head(parameter)

    def _refuse_untied(self) -> None:
        """What PEFT gives a module only because the base ties it to its embedding needs a base that does."""
        tied = [parameter.rpartition(".")[0] for parameter in self.layout.tied]
        for name in sorted(self.patch.follows_tie):
            if any(module.endswith(name) for module in tied):
                continue
            if f"{name}.weight" in self.patch.replaced:
                self._refuse_copy(f"{name}.weight")
            else:
                raise UnmatchedModulesError(
                    f"{name}: the patch was trained where it is tied to the embedding, {self.base.path} does not tie "
                    "them, so PEFT would not load it; expected a base that does (tie_word_embeddings)"
                )

    def _refuse_copy(self, parameter: str) -> None:
        """A head saved because it was tied is the embedding that was saved; any other is a copy of the old base's."""
        path, entry = self.patch.header.path, self.patch.replaced[parameter]
        others = [other for name, other in self.patch.replaced.items() if name != parameter]
        if not any(equal_values((path, entry), (path, other)) for other in others):
            raise UnsupportedPatchError(
                f"{path}: {entry.name} looks like a copy of the old base's (save_embedding_layers), which "
                "ensure_weight_tying hides; expected the embedding it is tied to, save the patch without copies"
            )

    def _refuse_scale(self) -> None:
        patch = self.patch
        whole = [
            *patch.replaced,
            *patch.tokens,
            *(m for m, pair in patch.modules.items() if pair.magnitude is not None),
        ]
        if self.scale != 1.0 and whole:
            raise ParamsError(
                f"port.scale is {self.scale:g}, but {whole[0]} is replaced or renormalised (modules_to_save, trained "
                "tokens or biases, DoRA), which has no scale; expected 1"
            )

    def _change(
        self, tensor: str, edit: Callable[[], Edit], what: str, sources: tuple[str, ...],
        *, shape: tuple[int, ...] | None = None, reads: bool = True,
    ) -> None:  # fmt: skip
        origin = self.places.tied_heads.get(tensor, tensor)
        entry = self.base.entry(origin)
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.base.path}: {origin} has dtype {entry.dtype}, expected one of {', '.join(DTYPES)}; "
                "port onto the release in floating point"
            )
        if tensor in self.changes:
            raise UnsupportedPatchError(
                f"{tensor}: is changed by {self.changes[tensor].sources[0]} and by {sources[0]}; expected one change"
            )
        self.changes[tensor] = Change(
            tensor, entry.dtype, shape or entry.shape, origin if reads else None, edit, what, sources
        )
