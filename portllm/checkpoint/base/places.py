"""Where the parts of a patch find the parameters they are for: names in memory, names on disk, and tied heads."""

from __future__ import annotations

from portllm.checkpoint.base.checkpoint import Checkpoint
from portllm.checkpoint.base.layout import Kind, Layout, Part, on_disk, whole
from portllm.checkpoint.planning.changes import disk_tensor
from portllm.errors import UnmatchedModulesError, UnsupportedPatchError

RELEASE = "is this a release of the base the patch was trained on?"


class Places:
    """The parameters of one base. `tied_heads` holds, for the tensor a tied head gets of its own, the embedding's."""

    def __init__(self, base: Checkpoint, layout: Layout) -> None:
        self.base, self.layout = base, layout
        self.tied_heads: dict[str, str] = {}
        self._stored = {part.tensor for parts in layout.parts.values() for part in parts}
        self._memory = {parts[0].tensor: name for name, parts in layout.parts.items() if len(parts) == 1}

    def known(self, parameter: str) -> bool:
        """Whether the base has this parameter, under its name in memory or on disk."""
        layout = self.layout
        return any(parameter in names for names in (layout.tied, layout.parts, layout.opaque, self._stored))

    def place(self, parameter: str) -> tuple[tuple[Part, ...], tuple[int, ...]]:
        """(its parts on disk, its shape in memory); for a tied head, a tensor of its own read from the embedding's."""
        if parameter in self.layout.tied:
            below = disk_tensor(self.layout.tied[parameter], self.layout)
            if below is None:
                raise UnmatchedModulesError(f"{parameter}: is tied to a parameter that is not on disk; {RELEASE}")
            shape = self.shape(below)
            self.tied_heads[self.head_tensor(parameter)] = below
            return (whole(self.head_tensor(parameter), shape),), shape
        if parameter in self.layout.opaque:
            raise UnsupportedPatchError(
                f"{parameter}: is stored {self.layout.opaque[parameter]} in {self.base.path}, which portllm does not "
                "port; train the patch without it"
            )
        if parameter in self.layout.parts:
            module, _, leaf = parameter.rpartition(".")
            return self.layout.parts[parameter], self.layout.modules[module].parameters[leaf]
        if parameter in self._stored:  # a name of an older transformers, or of the model without its head
            shape = self.shape(parameter)
            return (whole(parameter, shape),), shape
        raise UnmatchedModulesError(f"{parameter}: is not in {self.base.path}; {RELEASE}")

    def kind(self, module: str) -> Kind:
        """A module's kind; one that is none of the known kinds is taken for a linear one."""
        known = self.layout.modules.get(self.in_memory(module))
        return known.kind if known is not None and known.kind != "other" else "linear"

    def in_memory(self, module: str) -> str:
        """The module's name in memory, where the patch has it by that of its tensor on disk."""
        if module in self.layout.modules:
            return module
        return self._memory.get(f"{module}.weight", f"{module}.").rpartition(".")[0]

    def single(self, name: str, parts: tuple[Part, ...], what: str) -> str:
        """The tensor that is all of `parts`, whole. Raises UnsupportedPatchError, naming `what` needs it so."""
        if len(parts) != 1 or parts[0].of != tuple((0, n) for n in self.shape(parts[0].tensor)):
            raise UnsupportedPatchError(
                f"{name}: is stored in {len(parts)} parts in {self.base.path}, and {what} needs it whole; not supported"
            )
        return parts[0].tensor

    def refuse_bias(self, module: str) -> None:
        """PEFT computes a linear module with trained tokens without its bias, which no checkpoint can say."""
        known = self.layout.modules.get(self.in_memory(module))
        if known is not None and known.kind == "linear" and "bias" in known.parameters:
            raise UnsupportedPatchError(
                f"{module}: has a bias, and PEFT leaves it out where tokens are trained (trainable_token_indices); "
                "expected an output head without a bias, train the embedding with modules_to_save"
            )

    def head_tensor(self, parameter: str) -> str:
        """What a tied head is called on disk once it has a tensor of its own."""
        return self.layout.absent.get(parameter) or on_disk(parameter, self.base)

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Shape of a tensor on disk, or of the one a tied head will get."""
        return self.base.shape(self.tied_heads.get(tensor, tensor))
