"""Tied weights: what becomes of an embedding and the head that is the same parameter when a patch changes either.

An update of one side unties them, so that the other stays what it was, unless both change alike. PEFT's merge adds to
both (off by whole units in the logits); its unmerged forward, the law here, does not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from portllm.checkpoint.adapter.factors import LoraPair
from portllm.checkpoint.adapter.patch import CONFIG, Patch
from portllm.checkpoint.adapter.patterns import WHOLE, first_matches
from portllm.checkpoint.base.checkpoint import equal_values
from portllm.checkpoint.base.layout import Layout
from portllm.checkpoint.base.places import RELEASE, Places
from portllm.checkpoint.files.headers import times
from portllm.checkpoint.planning.changes import Change, disk_tensor
from portllm.errors import ShapeError, UnsupportedPatchError

# the names by which PEFT knows embeddings and heads (its EMBEDDING_LAYER_NAMES)
TIED_BY_PEFT = ("embed_tokens", "lm_head")


def settle(changes: dict[str, Change], patch: Patch, places: Places, extended: Collection[str] = ()) -> dict[str, Any]:
    """Complete `changes` for every tied pair that it touches; returns what config.json must say then.

    A module in `extended` only grew, and its head with it.
    Raises UnsupportedPatchError where a base cannot be untied, ShapeError where the sides would disagree.
    """
    config: dict[str, Any] = {}
    for head, embedding in places.layout.tied.items():
        below = disk_tensor(embedding, places.layout)
        above = places.head_tensor(head)
        if below is None or (below not in changes and above not in changes):
            continue
        if (embedding.rpartition(".")[0] in extended and above not in changes) or _stays_tied(head, embedding, patch):
            if embedding.rpartition(".")[0] in patch.tokens:
                places.refuse_bias(head.rpartition(".")[0])
            _keep_tied(head, above, below, changes, places)
        else:
            _untie(head, above, below, changes, places)
            config["tie_word_embeddings"] = False
    return config


def check_sides(patch: Patch, layout: Layout) -> None:
    """Prove that the two sides of a tied pair are equal where PEFT makes them one: of two it would keep the last read.

    Raises UnsupportedPatchError, naming the side.
    """
    if not patch.ensure_weight_tying or not _tied_by_peft(patch.config):
        return
    for head, embedding in layout.tied.items():
        above, below = (patch.modules.get(name.rpartition(".")[0]) for name in (head, embedding))
        same = above is None or below is None or _equal_factors(above, below)
        if head in patch.replaced and embedding in patch.replaced:
            path = patch.header.path
            same = same and equal_values((path, patch.replaced[head]), (path, patch.replaced[embedding]))
        if not same:
            raise UnsupportedPatchError(
                f"{patch.header.path}: {head} and {embedding} are one weight (ensure_weight_tying), expected equal "
                "values of both, found others; save the patch again with PEFT"
            )


def _equal_factors(above: LoraPair, below: LoraPair) -> bool:
    sides = (above.a, below.a), (above.b, below.b)
    return all(one.shape == other.shape and bool((one.double() == other.double()).all()) for one, other in sides)


def _stays_tied(head: str, embedding: str, patch: Patch) -> bool:
    above, below = head.rpartition(".")[0], embedding.rpartition(".")[0]
    if below in patch.tokens:
        # PEFT gives the rows of trained tokens to both sides unless each has its own
        if above not in patch.tokens and _holds(patch, head):
            raise UnsupportedPatchError(
                f"{head}: is tied to {below}, whose tokens are trained (trainable_token_indices), and is changed by "
                "the patch too, which portllm does not port; train the tokens or the head"
            )
        return above not in patch.tokens
    if not patch.ensure_weight_tying:
        return False
    if _tied_by_peft(patch.config):
        return not _differ(patch.modules.get(above), patch.modules.get(below))
    if _holds(patch, head) and _holds(patch, embedding):
        raise UnsupportedPatchError(
            f"{head}: the patch holds both sides of a tied pair, but PEFT ties only modules called "
            f"{' or '.join(TIED_BY_PEFT)} and leaves this one out on loading; expected a patch of one side"
        )
    return False


def _differ(above: LoraPair | None, below: LoraPair | None) -> bool:
    """Whether the two sides' updates differ all the same: PEFT ties the factors, not their scaling nor DoRA's norms."""
    if above is None or below is None:
        return False
    return above.scaling != below.scaling or above.magnitude is not None or below.magnitude is not None


def _tied_by_peft(config: Mapping[str, Any]) -> bool:
    """Whether ensure_weight_tying has an effect when PEFT loads this patch: by the last names of what it targets."""
    targets, saved = config.get("target_modules") or [], config.get("modules_to_save") or []
    names = {name.rpartition(".")[2] for name in [*saved, *([] if isinstance(targets, str) else targets)]}
    if isinstance(targets, str):
        matches = first_matches([targets], TIED_BY_PEFT, WHOLE, f"{CONFIG}: target_modules")
        names |= {name for name, match in zip(TIED_BY_PEFT, matches, strict=True) if match == 0}
    return not names.isdisjoint(TIED_BY_PEFT)


def _holds(patch: Patch, parameter: str) -> bool:
    return parameter in patch.replaced or parameter.rpartition(".")[0] in patch.modules


def _keep_tied(head: str, above: str, below: str, changes: dict[str, Change], places: Places) -> None:
    """Both sides change alike: the embedding's change holds, also where the head has a copy of its own on disk."""
    if below not in changes:
        raise UnsupportedPatchError(
            f"{head}: the patch keeps tied weights tied (ensure_weight_tying) but changes only the head; "
            "expected the embedding's update, was the patch saved whole?"
        )
    own = changes.pop(above, None)
    if own is not None and own.shape != changes[below].shape:
        raise ShapeError(f"{head}: is {times(own.shape)} in the patch, the embedding it is tied to is not; {RELEASE}")
    if above in places.base.where:
        change = changes[below]
        changes[above] = Change(above, change.dtype, change.shape, change.origin, change.edit, change.what)


def _untie(head: str, above: str, below: str, changes: dict[str, Change], places: Places) -> None:
    """Each side gets a tensor of its own."""
    config = places.base.config
    if config.get("is_encoder_decoder") or "text_config" in config or len(places.layout.tied) > 1:
        raise UnsupportedPatchError(
            f"{head}: is tied in a way portllm cannot untie (model_type {config.get('model_type')}); "
            "expected a patch of neither, or one trained with ensure_weight_tying"
        )
    if above not in changes:
        entry = places.base.entry(below)
        changes[above] = Change(above, entry.dtype, entry.shape, below, None, "the base's embedding, untied")
    rows = changes[below].shape[0] if below in changes else places.shape(below)[0]
    if changes[above].shape[0] != rows:
        raise ShapeError(
            f"{head}: has {changes[above].shape[0]} rows, the embedding {rows}; expected one vocabulary, "
            "save both sides with the patch (modules_to_save)"
        )
