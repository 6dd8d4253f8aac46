"""Every error portllm raises on purpose, as one tree.

    PortllmError                  a wrong input or environment: one line, exit 1
    ├── ParamsError               params.yaml or a flag: unknown key, wrong type, impossible value
    ├── DataError                 a dataset: missing split or column, bad label, overlap between splits
    ├── CheckpointError           a checkpoint directory cannot be used as it is
    │   ├── UnsafeFileError       pickle, or a path that leads outside its directory
    │   └── HeaderError           a safetensors header that does not describe its file
    ├── PatchError                a patch (PEFT directory) cannot be used as it is
    │   ├── UnsupportedPatchError a PEFT feature portllm refuses by name
    │   ├── ShapeError            a patch tensor does not fit its base tensor
    │   └── UnmatchedModulesError patch tensors without a counterpart in the base
    ├── OutputError               OUT exists, is one of the inputs, is being written, or does not fit on the disk
    ├── VerificationError         a ported directory differs from its port.json, or from the result of base and patch
    ├── HubError                  the hub cannot be reached, refuses, or answers something else than expected
    ├── EvaluationError           a task, a metric or a model is not as the harness needs it
    ├── MachineError              the machine lacks memory, a GPU, a library, or another process of the same job
    └── TrackingError             the tracking store or the model registry refuses

A message has the place, the expected and the found value, and the next step.
"""

from __future__ import annotations

MAX_CHARACTERS = 900


class PortllmError(Exception):
    """Root of every error raised on purpose; its text is one line, safe for a terminal."""

    def __str__(self) -> str:
        # names from hostile files may contain line breaks, colours or a megabyte
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in super().__str__())
        half = MAX_CHARACTERS // 2
        return text if len(text) <= MAX_CHARACTERS else f"{text[:half]} […] {text[-half:]}"


class ParamsError(PortllmError):
    """params.yaml or a flag has an unknown key, an ill-typed or an impossible value."""


class DataError(PortllmError):
    """A dataset lacks a split or column, has a bad value, or its splits overlap."""


class CheckpointError(PortllmError):
    """A checkpoint directory is incomplete or contradicts itself."""


class UnsafeFileError(CheckpointError):
    """A pickle file, or a file name that leads outside its directory."""


class HeaderError(CheckpointError):
    """A safetensors header does not describe its file."""


class PatchError(PortllmError):
    """A patch directory is incomplete or contradicts itself."""


class UnsupportedPatchError(PatchError):
    """The patch uses a PEFT feature that portllm refuses by name."""


class ShapeError(PatchError):
    """A patch tensor does not fit its base tensor."""


class UnmatchedModulesError(PatchError):
    """The patch has modules that the base does not have."""


class OutputError(PortllmError):
    """OUT exists already, is an input, is being written by another process, or does not fit."""


class VerificationError(PortllmError):
    """A ported directory differs from its port.json, or from the result of its base and patch."""


class HubError(PortllmError):
    """The hub cannot be reached, refuses, or contains files that must not be mixed with pushed ones."""


class EvaluationError(PortllmError):
    """A task, a metric or a model is not as the evaluation harness needs it."""


class MachineError(PortllmError):
    """The machine lacks memory, a GPU, an optional library, or another process of the same job."""


class TrackingError(PortllmError):
    """The tracking store or the model registry refuses."""
