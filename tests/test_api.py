"""`import portllm`: every verb of the command line, under the same names, with the same defaults."""

from __future__ import annotations

import dataclasses
import inspect
import json
import keyword
import subprocess
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

import click
import pytest
import torch

import portllm
from portllm import api, keywords, params
from portllm.cli import main
from portllm.errors import DataError, ParamsError, PortllmError
from portllm.parsing import Leaf, leaves

VERBS = tuple(main.commands)
# what only a process has: its output, its cost, its launcher
OF_A_PROCESS = {"json", "cost", "launch"}
# what only a caller in the same process can pass
OF_PYTHON = {"on_progress"}
# a name in Python that is not the option's: a list is in the plural
RENAMED = {("evaluate", "patch"): "patches"}
SECTIONS = {
    "prepare": params.PrepareParams, "fetch": params.FetchParams, "evolve": params.EvolveParams,
    "train": params.TrainParams, "port": params.PortParams, "evaluate": params.EvaluateParams,
    "report": params.ReportParams, "register": params.RegisterParams,
}  # fmt: skip
ERRORS = [
    "PortllmError", "ParamsError", "DataError", "CheckpointError", "UnsafeFileError", "HeaderError", "PatchError",
    "UnsupportedPatchError", "ShapeError", "UnmatchedModulesError", "OutputError", "VerificationError", "HubError",
    "EvaluationError", "MachineError", "TrackingError",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Argument:
    """What the command line and Python agree on."""

    required: bool
    default: Any


def leaves_of(verb: str) -> dict[str, Leaf]:
    if verb not in SECTIONS:
        return {}
    # fetch has `source` as an argument of its own, evolve's recipes are a mapping
    return {leaf.argument: leaf for leaf in leaves(SECTIONS[verb]) if (verb, leaf.path) != ("fetch", ("source",))}


def of_command(verb: str) -> dict[str, Argument]:
    """The arguments of a command under their names in Python, without its section's."""
    command = main.commands[verb]
    context, found = click.Context(command), {}
    for param in command.params:
        name = max(param.opts, key=len).removeprefix("--").replace("-", "_")
        name = RENAMED.get((verb, name), f"{name}_" if keyword.iskeyword(name) else name)
        default = param.get_default(context)
        if isinstance(default, (bool, int, str, Path)):
            found[name] = Argument(param.required, default)
        else:
            found[name] = Argument(param.required, () if param.multiple else None)  # type: ignore[attr-defined]
    own = OF_A_PROCESS | set(leaves_of(verb))
    return {name: one for name, one in found.items() if name not in own}


def of_function(verb: str) -> dict[str, Argument]:
    """The arguments of a function, without those of its section."""
    found = inspect.signature(getattr(api, verb)).parameters.values()
    return {
        one.name: Argument(one.default is one.empty, None if one.default is one.empty else one.default)
        for one in found
        if one.kind is not one.VAR_KEYWORD and one.name not in OF_PYTHON
    }


def options_of(verb: str) -> dict[str, Any]:
    """The keyword arguments of a function that are of its section, with their types."""
    hint = get_type_hints(getattr(api, verb), localns=vars(typing) | EVERYTHING).get("options")
    return {} if hint is None else get_type_hints(typing.get_args(hint)[0])


# names that api.py imports for its annotations alone
EVERYTHING: Mapping[str, Any] = dict.fromkeys(
    (
        "Plan",
        "Listed",
        "Registered",
        "Diagnosis",
        "Evaluation",
        "RegisterRecord",
        "ReportRecord",
        "CostRecord",
        "VerifyRecord",
    ),
    Any,
)


def test_portllm_exports_the_verbs_the_parameters_and_the_errors_alone() -> None:
    """issue 8, item 12: four of twelve verbs, and neither errors nor parameters, were exported."""
    sections = {name for name, one in vars(params).items() if dataclasses.is_dataclass(one)}
    assert set(portllm.__all__) == {*VERBS, *sections, "PortllmError", "errors", "__version__"}
    assert sorted(portllm.__all__) == portllm.__all__ == dir(portllm)
    for name in portllm.__all__:
        assert getattr(portllm, name) is not None
    assert {getattr(portllm, verb) for verb in VERBS} == {getattr(api, verb) for verb in VERBS}
    with pytest.raises(AttributeError, match="no attribute 'prot'"):
        _ = portllm.prot


def test_portllm_errors_has_the_whole_tree() -> None:
    """issue 8, item 12."""
    tree = [name for name, one in vars(portllm.errors).items() if isinstance(one, type) and name[0].isupper()]
    assert tree == ERRORS
    assert all(issubclass(getattr(portllm.errors, name), portllm.PortllmError) for name in tree)
    assert all(name in str(portllm.errors.__doc__) for name in tree)


def test_importing_portllm_loads_no_other_module_of_it() -> None:
    """issue 8, item 12: `import portllm` stays fast."""
    code = "import portllm, sys; print(sorted(m for m in sys.modules if m.split('.')[0] in ('portllm', 'click')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['portllm']"


@pytest.mark.parametrize("verb", VERBS)
def test_command_and_function_have_the_same_arguments_and_defaults(verb: str) -> None:
    """issue 8, item 12."""
    assert of_function(verb) == of_command(verb)


@pytest.mark.parametrize("verb", VERBS)
def test_arguments_of_a_command_are_the_positional_ones_of_its_function(verb: str) -> None:
    """issue 8, item 12."""
    found = inspect.signature(getattr(api, verb)).parameters.values()
    positional = [one.name for one in found if one.kind is one.POSITIONAL_OR_KEYWORD]
    arguments = [one.name for one in main.commands[verb].params if isinstance(one, click.Argument)]
    assert positional == (arguments or (["params"] if verb == "doctor" else []))


@pytest.mark.parametrize("verb", VERBS)
def test_options_of_a_section_have_its_names_and_types(verb: str) -> None:
    """issue 8, item 12."""

    def typed(hint: Any) -> Any:
        return str | Sequence[str] if get_origin(hint) is tuple else hint

    skipped = {"source"} if verb == "fetch" else set()
    expected = {name: typed(leaf.hint) for name, leaf in leaves_of(verb).items() if name not in skipped}
    found = options_of(verb)
    assert found == expected
    assert all(get_origin(found[name]) is Literal for name in ("schedule", "as_", "output_type") if name in found)


def test_options_take_precedence_over_params(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text("train: {seed: 5, lora: {r: 4}}", encoding="utf-8")
    for given in (file, str(file), params.load(file), params.load(file).train):
        options = {"learning_rate": 1, "lora_target_modules": "q_proj, v_proj", "max_steps": None}
        _, section = keywords.section_of(given, "train", params.TrainParams, options)
        assert (section.seed, section.lora.r, section.optim.learning_rate, section.optim.max_steps) == (5, 4, 1.0, 0)
        assert section.lora.target_modules == ("q_proj", "v_proj")
    assert keywords.section_of(None, "train", params.TrainParams, {})[1] == params.TrainParams()


def test_wrong_params_and_options_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"train\(\) got an unexpected keyword argument 'lora_rank'; did you mean"):
        portllm.train(base="b", task="t", out=tmp_path / "o", lora_rank=4)  # type: ignore[call-arg]
    with pytest.raises(ParamsError, match="params is a TrainParams, expected EvaluateParams, Params or the path"):
        portllm.evaluate("m", out="o", params=params.TrainParams())  # type: ignore[arg-type]
    with pytest.raises(ParamsError, match=r"train\.optim\.max_steps must be a int, found 'many'"):
        portllm.train(base="b", task="t", out="o", max_steps="many")  # type: ignore[arg-type]
    with pytest.raises(ParamsError, match="private and revision go with push_to_hub"):
        portllm.port("p", onto="b", out="o", private=True)
    with pytest.raises(ParamsError, match="all and sample exclude one another"):
        portllm.verify("d", all=True, sample=3)


def test_a_string_where_a_list_is_expected_is_a_list_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """issue 8, item 12: `tasks="wnli"` iterated over letters."""
    from portllm.verbs import evaluate

    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(evaluate, "run", lambda **given: calls.append(given))
    for name in ("m", "p", "q", "old"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    portllm.evaluate("m", tasks="wnli", patches="p", before=Path("old"), out="o.json", limit=3)
    portllm.evaluate("m", tasks="wnli, sst2", patches=["p", Path("q")], out="o.json")
    portllm.evaluate("m", params=params.Params(tasks=("rte",)), out="o.json")
    assert [call["tasks"] for call in calls] == [["wnli"], ["wnli", "sst2"], ("rte",)]
    assert [call["patches"] for call in calls] == [[Path("p")], [Path("p"), Path("q")], []]
    assert [call["before"] for call in calls] == [[Path("old")], [], []]
    assert [call["params"].limit for call in calls] == [3, 0, 0]


def test_port_and_verify_take_the_names_of_the_command_line(
    tmp_path: Path, make_checkpoint: Any, make_patch: Any
) -> None:
    """issue 8, item 12."""
    weight = "model.layers.0.self_attn.q_proj"
    for name in ("old", "new"):
        make_checkpoint(tmp_path / name, {f"{weight}.weight": torch.ones(4, 4)})
    make_patch(tmp_path / "p", {weight: (torch.ones(2, 4), torch.ones(4, 2))}, target_modules=["q_proj"])
    done = portllm.port(
        tmp_path / "p", onto=tmp_path / "new", out=tmp_path / "o", from_=tmp_path / "old", as_="merged", scale=2
    )
    assert (done.scale, done.output) == (2.0, "merged")
    assert portllm.verify(tmp_path / "o", onto=tmp_path / "new", patch=tmp_path / "p", all=True).proof is not None
    assert portllm.fingerprint(tmp_path / "o") == done.fingerprint


def test_prepare_tasks_and_doctor_return_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """issue 8, item 12."""
    monkeypatch.chdir(tmp_path)
    done = portllm.prepare("world_sst2", out="d", train_rows=20, test_rows=4)
    assert done.rows == {"train": 20, "validation": 2, "test": 4}
    real = params.Params(fetch=params.FetchParams(source="owner/name"))
    assert portllm.prepare("corpus_v0", out="c", params=real).rows == {}
    assert {"world_boolq", "sst2"} <= {one.task for one in portllm.tasks()}
    assert portllm.doctor().stages == ()
    with pytest.raises(DataError, match="pass its corpus"):
        portllm.fetch("world", out="v0")
    with pytest.raises(PortllmError, match="no data found in data/tasks/sst2 and data/sst2"):
        portllm.train(base=".", task="sst2", out="p")


def test_notes_go_to_the_logger(caplog: pytest.LogCaptureFixture) -> None:
    api._note("100 % of it")
    assert [(one.name, one.message) for one in caplog.records] == [("portllm", "100 % of it")]


@pytest.mark.slow
def test_register_hands_accepted_models_to_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """issue 8, item 12: as the command does."""
    from portllm.checkpoint.record.records import PortRecord, Source

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    source = Source(name="base", fingerprint="b" * 64)
    record = PortRecord(base=source, patch=source, task="sst2", fingerprint="f" * 64)
    Path("ported").mkdir()
    record.write(Path("ported"))
    rows = [
        {"task": "sst2", "patch": patch, "patch_task": task, "patch_fingerprint": mark, "arm": arm, "samples": 10,
         "metrics": {"acc,none": score}}
        for arm, patch, task, mark, score in (
            ("base", None, None, None, 0.5), ("ported", "ported", "sst2", "f" * 64, 0.9),
        )
    ]  # fmt: skip
    tree = {"schema_version": 1, "release": "v1", "model": {"name": "base", "fingerprint": "b" * 64}, "results": rows}
    Path("v1.json").write_text(json.dumps(tree), encoding="utf-8")
    done = portllm.register("ported", results="v1.json", name="my-{task}")
    assert [one.accepted for one in done.record.decisions] == [True]
    assert [(one.name, one.version) for one in done.versions] == [("my-sst2", "1")]
    assert Path("mlflow.db").is_file()
