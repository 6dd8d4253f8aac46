"""portllm: move a LoRA patch to the next release of its base model, without training.

Every verb of the command line is a function here, loaded when it is first used:

    import portllm
    record = portllm.port("my-patch", onto="new-base", out="ported")

fetch, prepare, evolve, train, port, verify, evaluate, report, register, fingerprint, tasks and doctor are described in
portllm.api, their parameters (TrainParams, PortParams …) in portllm.params. A wrong input raises PortllmError;
portllm.errors has the tree of what derives from it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from portllm import errors as errors
    from portllm.api import (
        doctor,
        evaluate,
        evolve,
        fetch,
        fingerprint,
        port,
        prepare,
        register,
        report,
        tasks,
        train,
        verify,
    )
    from portllm.errors import PortllmError
    from portllm.params import (
        ArchitectureParams,
        CorpusParams,
        EvaluateParams,
        EvolveParams,
        FetchParams,
        LoraParams,
        OptimParams,
        Params,
        PortParams,
        PrepareParams,
        RegisterParams,
        ReleaseParams,
        ReportParams,
        TaskOverrides,
        TrainParams,
    )

__all__ = [
    "ArchitectureParams",
    "CorpusParams",
    "EvaluateParams",
    "EvolveParams",
    "FetchParams",
    "LoraParams",
    "OptimParams",
    "Params",
    "PortParams",
    "PortllmError",
    "PrepareParams",
    "RegisterParams",
    "ReleaseParams",
    "ReportParams",
    "TaskOverrides",
    "TrainParams",
    "__version__",
    "doctor",
    "errors",
    "evaluate",
    "evolve",
    "fetch",
    "fingerprint",
    "port",
    "prepare",
    "register",
    "report",
    "tasks",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'portllm' has no attribute {name!r}; it has {', '.join(__all__)}")
    if name == "errors":
        return importlib.import_module("portllm.errors")
    of_params = name.endswith("Params") or name == "TaskOverrides"
    module = "portllm.errors" if name == "PortllmError" else "portllm.params" if of_params else "portllm.api"
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return __all__
