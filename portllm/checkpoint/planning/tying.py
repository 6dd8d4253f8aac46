"""Tied weights: what becomes of an embedding and the head that is the same parameter when a patch changes either.

An update of one side unties them, so that the other stays what it was, unless both change alike. PEFT's merge adds to
both (off by whole units in the logits); its unmerged forward, the law here, does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from portllm.checkpoint.adapter.factors import LoraPair
from portllm.checkpoint.adapter.patch import Patch
from portllm.checkpoint.adapter.patterns import WHOLE, first_matches
from portllm.checkpoint.base.base import RELEASE
from portllm.checkpoint.base.layout import Layout
from portllm.checkpoint.files.names import ADAPTER_CONFIG as CONFIG
from portllm.checkpoint.files.tensors import times
from portllm.checkpoint.planning.changes import Change, ChangeSet
from portllm.errors import ShapeError, UnsupportedPatchError

# the names by which PEFT knows embeddings and heads (its EMBEDDING_LAYER_NAMES)
TIED_BY_PEFT = ("embed_tokens", "lm_head")


def settle(changes: ChangeSet, patch: Patch) -> None:
    """Complete `changes`, and its config, for every tied pair that they touch.

    Raises UnsupportedPatchError where a base cannot be untied, ShapeError where the sides would disagree.
    """
    base = changes.base
    for head, embedding in base.layout.tied.items():
        below, above = base.stored_tensor(embedding), base.head_tensor(head)
        if below is None or (below not in changes.changes and above not in changes.changes):
            continue
        module = embedding.rpartition(".")[0]
        if (module in changes.extended and above not in changes.changes) or _stays_tied(head, embedding, patch):
            if module in patch.tokens:
                base.refuse_bias(head.rpartition(".")[0])
            _keep_tied(head, above, below, changes)
        else:
            _untie(head, above, below, changes)
            changes.config["tie_word_embeddings"] = False


def check_sides(patch: Patch, layout: Layout) -> None:
    """Prove that the two sides of a tied pair are equal where PEFT makes them one (it would keep the last one read).

    Raises UnsupportedPatchError, naming the side.
    """
    if not patch.ensure_weight_tying or not _tied_by_peft(patch.config):
        return
    for head, embedding in layout.tied.items():
        above, below = (patch.modules.get(name.rpartition(".")[0]) for name in (head, embedding))
        same = above is None or below is None or _equal_factors(above, below)
        if head in patch.replaced and embedding in patch.replaced:
            same = same and patch.replaced[head].equals(patch.replaced[embedding])
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
    """Return whether the sides' updates differ nevertheless: PEFT ties factors, not their scaling nor DoRA's norms."""
    if above is None or below is None:
        return False
    return above.scaling != below.scaling or above.magnitude is not None or below.magnitude is not None


def _tied_by_peft(config: Mapping[str, Any]) -> bool:
    """Return whether ensure_weight_tying has an effect when PEFT loads this patch: by the last names of its targets."""
    targets, saved = config.get("target_modules") or [], config.get("modules_to_save") or []
    names = {name.rpartition(".")[2] for name in [*saved, *([] if isinstance(targets, str) else targets)]}
    if isinstance(targets, str):
        matches = first_matches([targets], TIED_BY_PEFT, WHOLE, f"{CONFIG}: target_modules")
        names |= {name for name, match in zip(TIED_BY_PEFT, matches, strict=True) if match == 0}
    return not names.isdisjoint(TIED_BY_PEFT)


def _holds(patch: Patch, parameter: str) -> bool:
    return parameter in patch.replaced or parameter.rpartition(".")[0] in patch.modules


def _keep_tied(head: str, above: str, below: str, changes: ChangeSet) -> None:
    """Keep one change for both sides: the embedding's, also where the head has a copy of its own on disk."""
    if below not in changes.changes:
        raise UnsupportedPatchError(
            f"{head}: the patch keeps tied weights tied (ensure_weight_tying) but changes only the head; "
            "expected the embedding's update, was the patch saved completely?"
        )
    own = changes.changes.pop(above, None)
    if own is not None and own.shape != changes.changes[below].shape:
        raise ShapeError(f"{head}: is {times(own.shape)} in the patch, the embedding it is tied to is not; {RELEASE}")
    if above in changes.base.tensors:
        change = changes.changes[below]
        changes.changes[above] = Change(above, change.dtype, change.shape, change.origin, change.edit, change.what)


def _untie(head: str, above: str, below: str, changes: ChangeSet) -> None:
    """Give each side a tensor of its own."""
    base, config = changes.base, changes.base.config
    if config.get("is_encoder_decoder") or "text_config" in config or len(base.layout.tied) > 1:
        raise UnsupportedPatchError(
            f"{head}: is tied in a way portllm cannot untie (model_type {config.get('model_type')}); "
            "expected a patch of neither, or one trained with ensure_weight_tying"
        )
    if above not in changes.changes:
        entry = base.checkpoint.entry(below)
        changes.changes[above] = Change(above, entry.dtype, entry.shape, below, None, "the base's embedding, untied")
    rows = changes.changes[below].shape[0] if below in changes.changes else base.shape(below)[0]
    if changes.changes[above].shape[0] != rows:
        raise ShapeError(
            f"{head}: has {changes.changes[above].shape[0]} rows, the embedding {rows}; expected one vocabulary, "
            "save both sides with the patch (modules_to_save)"
        )
