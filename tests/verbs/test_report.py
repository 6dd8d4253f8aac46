"""report on a fabricated tree of results: what is written, that it is right, and what is refused."""

from __future__ import annotations

import csv
import html
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from portllm.cli import main
from portllm.errors import DataError, OutputError
from portllm.params import EvolveParams, ReleaseParams
from portllm.reporting.rendering import charts
from portllm.verbs import report

Fabricate = Callable[..., Any]


def edit(path: Path, change: Callable[[Any], None]) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


@pytest.fixture(scope="module")
def made(fabricate: Fabricate, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, report.ReportRecord]:
    """One tree reported once, only read by the tests below."""
    tree = fabricate(tmp_path_factory.mktemp("project"))
    return tree, tree.run()


@pytest.fixture
def small(fabricate: Fabricate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tree of one task and two releases, to be broken; no pictures are drawn."""
    monkeypatch.setattr(charts, "draw", lambda _: {})
    return fabricate(tmp_path, tasks=("world_sst2",), releases=("v0", "v1"), rows=12, layers=1)


class Page(HTMLParser):
    """What a page would load, the ids it has, and those it points to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "xlink:href") and (value or "").startswith("#"):
                self.targets.append((value or "")[1:])
            elif (value or "").startswith("data:"):
                continue
            elif name in ("src", "srcset", "href", "xlink:href", "action", "data") or tag in (
                "script",
                "iframe",
                "link",
            ):
                self.loads.append(f"{tag} {name}={value}")


def test_everything_is_written(made: tuple[Any, report.ReportRecord]) -> None:
    tree, record = made
    paths = tree.paths()
    pictures = {f"{name}.svg" for name in ("arms", "knowledge", "drift", "training")}
    assert {p.name for p in paths["out"].iterdir()} == {"report.md", "report.html"} | pictures
    assert {p.name for p in paths["plots"].iterdir()} == {"scores.csv", "knowledge.csv", "training.csv", "drift.csv"}
    assert json.loads(paths["metrics"].read_text()) == record.metrics
    assert not list(tree.root.rglob("*.partial"))


def test_the_page_is_whole_and_loads_nothing(made: tuple[Any, report.ReportRecord]) -> None:
    text = (made[0].paths()["out"] / "report.html").read_text()
    page = Page(text)
    assert page.loads == []
    assert not re.search(r"url\((?!#)|@import", text)
    assert len(page.ids) == len(set(page.ids))
    assert set(page.targets) <= set(page.ids)
    assert made[1].headline.split(". ")[0] in html.unescape(text)
    for task in made[0].tasks:
        assert task in text


def test_markdown_and_page_tell_the_same_numbers(made: tuple[Any, report.ReportRecord]) -> None:
    out = made[0].paths()["out"]
    markdown, page = (out / "report.md").read_text(), (out / "report.html").read_text()
    assert made[1].headline in markdown
    numbers = re.findall(r"(?<=\| )[−+]?\d+\.\d+(?= \|)", markdown)
    assert len(numbers) > 100
    assert all(number in page for number in numbers)
    assert all((out / name).is_file() for name in re.findall(r"\]\((\S+\.svg)\)", markdown))


def test_scores_and_differences_are_those_of_the_samples(made: tuple[Any, report.ReportRecord]) -> None:
    tree, record = made
    folder = tree.paths()["evaluated"]
    v0, v1 = (pq.read_table(folder / f"{r}.samples.parquet").to_pylist() for r in ("v0", "v1"))

    def right(rows: Sequence[Mapping[str, Any]], arm: str) -> list[bool]:
        return [r["correct"] for r in rows if (r["task"], r["arm"]) == ("world_boolq", arm)]

    found = record.metrics["v1"]["world_boolq"]
    tuned, base, ported, retuned = right(v0, "tuned"), right(v1, "base"), right(v1, "ported"), right(v1, "tuned")
    share = {name: sum(rows) / len(rows) for name, rows in (("base", base), ("ported", ported), ("retuned", retuned))}
    assert {name: found[name] for name in share} == pytest.approx(share, abs=1e-6)
    gain = (share["ported"] - share["base"]) / (share["retuned"] - share["base"])
    assert found["recovery"] == pytest.approx(gain, abs=1e-6)
    assert found["difference"] == pytest.approx(share["ported"] - share["retuned"], abs=1e-6)
    flipped = sum(a and not b for a, b in zip(tuned, ported, strict=True)) / len(tuned)
    assert found["negative_flips"] == pytest.approx(flipped, abs=1e-6)


def test_drift_and_residual_are_those_of_the_weights(made: tuple[Any, report.ReportRecord]) -> None:
    tree, record = made
    old, new = (load_file(tree.release(r) / "model.safetensors") for r in ("v0", "v2"))
    moved = sum(float((new[k].double() - old[k].double()).square().sum()) for k in old) ** 0.5
    size = sum(float(old[k].double().square().sum()) for k in old) ** 0.5
    assert record.metrics["v2"]["drift"]["from_v0"] == pytest.approx(moved / size, abs=1e-6)
    assert set(record.metrics["v2"]["drift"]) == {"from_v0", "from_v1"}

    patches = tree.root / "models" / "patches"
    deltas = []
    for release in ("v0", "v2"):
        factors = load_file(patches / release / "world_sst2" / "adapter_model.safetensors")
        names = sorted(k for k in factors if "lora_A" in k)
        deltas.append([2.0 * factors[k.replace("lora_A", "lora_B")] @ factors[k] for k in names])
    residual = sum(float((b - a).square().sum()) for a, b in zip(*deltas, strict=True)) ** 0.5
    patch = sum(float(a.square().sum()) for a in deltas[0]) ** 0.5
    found = record.metrics["v2"]["residual"]["world_sst2"]
    assert found["over_patch"] == pytest.approx(residual / patch, rel=1e-4)
    bases = [new[k.removeprefix("base_model.model.").replace("lora_A.weight", "weight")] for k in names]
    whole = sum(float((w + a).square().sum()) for w, a in zip(bases, deltas[0], strict=True)) ** 0.5
    assert found["over_weights"] == pytest.approx(residual / whole, rel=1e-4)


def test_the_same_results_give_the_same_bytes(made: tuple[Any, report.ReportRecord], tmp_path: Path) -> None:
    tree, _ = made
    again = tree.paths(out=tmp_path / "report", metrics=tmp_path / "metrics.json", plots=tmp_path / "plots")
    report.run(params=tree.params, **again)
    before = tree.paths()
    assert again["metrics"].read_bytes() == before["metrics"].read_bytes()
    for name in ("out", "plots"):
        for path in before[name].iterdir():
            assert (again[name] / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_report_does_not_depend_on_costs(fabricate: Fabricate, tmp_path: Path) -> None:
    """Seconds and memory differ from run to run, so no output of the report contains them (issue 8, item 20)."""
    tree = fabricate(tmp_path, tasks=("world_sst2",), releases=("v0", "v1"), rows=12, layers=1)
    tree.run()
    before = contents(tree.root / "results")
    for path in tree.costs.rglob("*.json"):
        edit(path, lambda cost: cost.update(wall_seconds=99.0, peak_rss_bytes=1))
    tree.run(force=True)
    after = contents(tree.root / "results")
    assert {name for name in before if before[name] != after[name]} == {n for n in before if n.startswith("cost/")}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_release_more_needs_no_code(fabricate: Fabricate, tmp_path: Path) -> None:
    tree = fabricate(tmp_path, tasks=("world_sst2",), releases=("v0", "v1", "v2", "v3"), rows=12, layers=1)
    record = tree.run()
    assert set(record.metrics["v3"]["drift"]) == {"from_v0", "from_v2"}
    assert "On v3 the ported patches" in record.headline


def test_without_retuned_arms_or_news_it_still_reports(fabricate: Fabricate, tmp_path: Path) -> None:
    tree = fabricate(tmp_path, tasks=("world_sst2",), releases=("v0", "v1"), retuned=False, rows=12, layers=1)
    edit(
        tree.paths()["evaluated"] / "v1.json",
        lambda found: found.update(results=[r for r in found["results"] if not r["task"].startswith("world_v1")]),
    )
    record = tree.run()
    assert "no re-tuned patch" in record.headline
    assert "recovery" not in record.metrics["v1"]["world_sst2"]
    text = (tree.paths()["out"] / "report.md").read_text()
    assert "R is not known" in text
    assert "| world_sst2 |" in text


def test_a_model_of_many_layers_and_kinds_is_drawn(fabricate: Fabricate, tmp_path: Path) -> None:
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    tree = fabricate(tmp_path, tasks=("gsm8k",), releases=("v0", "v1"), rows=12, layers=32, kinds=kinds)
    tree.run()
    with (tree.paths()["plots"] / "drift.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert {int(row["layer"]) for row in rows if row["layer"]} == set(range(32))
    assert {row["kind"] for row in rows} == {*kinds, "input_layernorm", "embed_tokens", "lm_head", "norm"}


def test_a_failed_probe_marks_the_task_and_keeps_it(small: Any) -> None:
    edit(small.release("v0") / "release.json", lambda tree: tree.update(probe={"world_sst2": 0.3}))
    record = small.run()
    assert "world_sst2 †" in (small.paths()["out"] / "report.md").read_text()
    assert "knows too little of what world_sst2 asks" in record.headline


def test_a_control_that_differs_is_reported(small: Any) -> None:
    path = small.paths()["evaluated"] / "v0.samples.parquet"
    rows = pq.read_table(path).to_pylist()
    ported = [row for row in rows if row["arm"] == "ported"]
    ported[0]["correct"], ported[1]["correct"] = False, True
    ported[2]["correct"], ported[3]["correct"] = False, True
    share = sum(row["correct"] for row in ported) / len(ported)
    pq.write_table(pa.Table.from_pylist(rows), path)

    def agree(tree: Any) -> None:
        for result in tree["results"]:
            if result["arm"] == "ported":
                result["metrics"]["acc,none"] = share

    edit(path.with_name("v0.json"), agree)
    assert "control FAILS" in small.run().headline


@pytest.mark.parametrize(
    ("path", "stage"),
    [
        ("results/evaluate/v1.json", "evaluate"),
        ("results/evaluate/v0.samples.parquet", "evaluate"),
        ("models/releases/v1", "evolve"),
        ("models/patches/v0/world_sst2", "train"),
    ],
)
def test_a_missing_input_names_itself_and_its_stage(small: Any, path: str, stage: str) -> None:
    gone = small.root / path
    gone.rename(gone.with_name("elsewhere"))
    with pytest.raises(DataError, match=f"{re.escape(str(gone))}: not found; .*dvc repro {stage}"):
        small.run()
    assert not small.paths()["out"].exists()
    assert not small.paths()["metrics"].exists()


def test_wrong_results_are_refused(small: Any) -> None:
    path = small.paths()["evaluated"] / "v1.json"
    whole = path.read_text()
    for change, says in (
        (lambda tree: tree["results"].append(tree["results"][0]), "two results for world_sst2, arm base"),
        (lambda tree: tree["results"][0].update(metrics={"acc,none": 0.123}), "samples average"),
        (lambda tree: tree["results"][0].update(metrics={"f1,none": 0.1}), "no score to report"),
        (lambda tree: tree["results"].pop(0), "has no base arm on world_sst2"),
        (lambda tree: tree.pop("results"), "not an evaluation of ours"),
    ):
        path.write_text(whole)
        edit(path, change)
        with pytest.raises(DataError, match=says):
            small.run()
    path.write_text("{")
    with pytest.raises(DataError, match="not readable JSON"):
        small.run()


def test_an_example_counted_twice_is_refused(small: Any) -> None:
    path = small.paths()["evaluated"] / "v1.samples.parquet"
    rows = pq.read_table(path).to_pylist()
    pq.write_table(pa.Table.from_pylist([*rows, rows[0]]), path)
    with pytest.raises(DataError, match="two samples of document 0"):
        small.run()


def test_an_existing_report_is_kept_unless_forced(small: Any) -> None:
    small.run()
    page = small.paths()["out"] / "report.html"
    page.write_text("mine")
    with pytest.raises(OutputError, match="--force"):
        small.run()
    assert page.read_text() == "mine"
    small.run(force=True)
    assert page.read_text() != "mine"


def test_names_cannot_break_the_page(fabricate: Fabricate, tmp_path: Path) -> None:
    task = "a<b>&|c"
    tree = fabricate(tmp_path, tasks=(task,), releases=("v0", "v1"), rows=12, layers=1)
    tree.run()
    page = (tree.paths()["out"] / "report.html").read_text()
    assert "<b>" not in page
    assert "a&lt;b&gt;&amp;|c" in page
    assert r"a&lt;b>&\|c" in (tree.paths()["out"] / "report.md").read_text()


def test_importing_the_verb_loads_nothing_heavy() -> None:
    heavy = ("torch", "matplotlib", "numpy", "pyarrow", "jinja2", "safetensors")
    code = f"import sys, portllm.verbs.report; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_real_tasks_on_a_tree_of_releases_without_probes_or_facts(fabricate: Fabricate, tmp_path: Path) -> None:
    tree = fabricate(tmp_path, tasks=("boolq", "gsm8k"), releases=("v0", "openorca", "openplatypus"), rows=12, layers=1)
    later = {name: ReleaseParams(base="v0") for name in tree.releases[1:]}
    tree.params = replace(tree.params, evolve=EvolveParams(releases=later))
    for name in tree.releases:
        edit(tree.release(name) / "release.json", lambda found: found.update(probe={}))
        edit(tree.paths()["evaluated"] / f"{name}.json", as_real)
    record = tree.run()
    assert set(record.metrics["openplatypus"]["drift"]) == {"from_v0"}, "every update comes from v0"
    text = (tree.paths()["out"] / "report.md").read_text()
    assert "| openorca | gsm8k | exact_match,flexible-extract |" in text
    assert "perplexity of unseen text" in text
    assert "facts |" not in text
    assert "What the base knows before any patch: no probe was recorded" in text
    assert "## What the base knows before any patch" not in text
    # nothing of what it never read is asked about either
    for name in tree.releases:
        edit(tree.paths()["evaluated"] / f"{name}.json", without_news)
    tree.run(force=True)
    text = (tree.paths()["out"] / "report.md").read_text()
    assert "What each arm knows of the news: no later release was asked" in text
    assert "## What each arm knows of the news" not in text


def as_real(tree: Any) -> None:
    """No facts are asked of a real release, and gsm8k is scored by two filters."""
    tree["results"] = [row for row in tree["results"] if not row["task"].endswith("_recall")]
    for row in tree["results"]:
        if row["task"] == "gsm8k":
            row["metrics"]["exact_match,flexible-extract"] = 0.5


def without_news(tree: Any) -> None:
    tree["results"] = [row for row in tree["results"] if not row["task"].endswith("_perplexity")]


def test_report_with_a_task_and_a_release_removed_equals_one_without_their_files(
    fabricate: Fabricate, tmp_path: Path
) -> None:
    """Issue 8, item 8: what params.yaml names no more is named in a note and is in no table, average or picture."""
    tree = fabricate(tmp_path, rows=20, layers=1)
    recipes = {name: recipe for name, recipe in tree.params.evolve.releases.items() if name != "v2"}
    tree.params = replace(
        tree.params, tasks=tree.tasks[:3], releases=("v0", "v1"), evolve=EvolveParams(releases=recipes)
    )
    notes: list[str] = []
    tree.run(on_note=notes.append)
    before = _contents(tree)
    (note,) = notes
    for orphan in ("patches/v0/world_gsm8k", "patches/v2/world_sst2", "releases/v2", "evaluate/v2.json"):
        assert orphan in note
    assert "v1/world_sst2" not in note

    _remove_orphans(tree)
    tree.run(force=True, on_note=notes.append)
    assert len(notes) == 1
    assert _contents(tree) == before
    assert b"gsm8k" not in b"".join(before.values())


def _contents(tree: Any) -> dict[str, bytes]:
    paths = tree.paths()
    files = [paths["metrics"], *paths["out"].iterdir(), *paths["plots"].iterdir()]
    return {path.name: path.read_bytes() for path in files}


def _remove_orphans(tree: Any) -> None:
    models, results = tree.root / "models", tree.root / "results"
    for folder in (models / "releases/v2", *models.glob("p*/v2"), *models.glob("p*/v[01]/world_gsm8k")):
        shutil.rmtree(folder)
    for file in (
        *results.glob("evaluate/v2.*"),
        *results.glob("cost/*/v2-*"),
        *results.glob("cost/*/v[01]-world_gsm8k.json"),
    ):
        file.unlink()
    for release in tree.params.releases:

        def keep_named(evaluation: Any) -> None:
            evaluation["results"] = [
                row for row in evaluation["results"] if "world_gsm8k" not in (row["task"], row["patch_task"])
            ]

        edit(results / "evaluate" / f"{release}.json", keep_named)


def test_costs_have_a_page_of_their_own(made: tuple[Any, report.ReportRecord], tmp_path: Path) -> None:
    """The page compares ports with re-tuning, adds up the stages and names those without a file (issue 8, item 20)."""
    tree, _ = made
    record = report.run_costs(params=tree.params, costs=tree.costs, out=tmp_path / "costs")
    assert {p.name for p in (tmp_path / "costs").iterdir()} == {"report.md", "report.html", "cost.svg"}
    text = (tmp_path / "costs" / "report.md").read_text()
    assert "| v2 | world_gsm8k | 3." in text
    assert re.search(r"Porting took \d+ s in all where re-tuning took \d+ s: 4\.\d× faster", text)
    assert "| train | 12 |" in text
    assert record.absent == ("fetch/v0", "evolve/v1", "evolve/v2", "evaluate/v0", "evaluate/v1", "evaluate/v2")
    assert "Without a cost file: fetch/v0, evolve/v1" in text
    assert "24 of 30 executions" in record.headline
    page = Page((tmp_path / "costs" / "report.html").read_text())
    assert page.loads == []
    assert set(page.targets) <= set(page.ids)


def test_costs_of_a_removed_task_are_named_and_not_counted(fabricate: Fabricate, tmp_path: Path) -> None:
    tree = fabricate(tmp_path, tasks=("world_sst2", "world_mrpc"), releases=("v0", "v1"), rows=12, layers=1)
    tree.params = replace(tree.params, tasks=("world_sst2",))
    record = report.run_costs(params=tree.params, costs=tree.costs, out=tmp_path / "costs")
    text = (tmp_path / "costs" / "report.md").read_text()
    assert "| port | 2 |" in text
    assert "no such task or release: port/v0/world_mrpc, port/v1/world_mrpc" in text
    assert "world_mrpc" not in "".join(record.absent)


def test_costs_that_are_not_there_or_wrong_are_refused(small: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: contains no cost file"):
        report.run_costs(params=small.params, costs=tmp_path / "nowhere", out=tmp_path / "out")
    with pytest.raises(OutputError, match="contains the cost files"):
        report.run_costs(params=small.params, costs=small.costs, out=small.costs.parent, force=True)
    (small.costs / "port" / "v1-world_sst2.json").write_text('{"stage": "port"}')
    with pytest.raises(DataError, match=r"v1-world_sst2\.json: not a cost file of ours"):
        report.run_costs(params=small.params, costs=small.costs, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_costs_on_the_command_line_replace_the_page_in_its_default_place_alone(
    small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`portllm report --costs` reads params.yaml and results/cost of the working directory (issue 8, item 20)."""
    monkeypatch.chdir(small.root)
    (small.root / "params.yaml").write_text(
        "tasks: [world_sst2]\nreleases: [v0, v1]\nevolve: {releases: {v1: {base: v0}}}\n"
    )
    for _ in range(2):
        done = CliRunner().invoke(main, ["report", "--costs", "--json"])
        assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["out"] == "results/cost/report"
    assert record["absent"] == ["fetch/v0", "evolve/v1", "evaluate/v0", "evaluate/v1"]
    assert (small.root / record["out"] / "report.html").is_file()
    assert not (small.root / "results" / "report").exists()
    assert not (small.root / "mlflow.db").exists()

    mine = CliRunner().invoke(main, ["report", "--costs", "--out", "results/cost/report"])
    assert mine.exit_code == 1
    assert "--force" in mine.output
    unused = CliRunner().invoke(main, ["report", "--costs", "--metrics", "m.json"])
    assert unused.exit_code == 2
    assert "leave out --metrics" in unused.output
