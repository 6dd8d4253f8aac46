"""OUT appears complete or not at all, and nothing is left beside it."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from portllm.checkpoint.files import output
from portllm.checkpoint.files.output import kept, staged, staged_file
from portllm.errors import DataError, MachineError, OutputError


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def write(out: Path, name: str, error: BaseException | None = None, force: bool = False) -> None:
    """Stage `out` with one file in it, and fail afterwards where an error is given."""
    with staged(out, force=force) as folder:
        (folder / name).write_text("1")
        if error is not None:
            raise error


def write_half(path: Path) -> None:
    with staged_file(path) as partial:
        partial.write_text("half")
        raise ValueError("x")


def test_appears_complete(tmp_path: Path) -> None:
    with staged(tmp_path / "deep" / "out") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "deep" / "out").exists()
    assert files(tmp_path) == ["deep", "deep/out", "deep/out/a"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_after_a_failure(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error):
        write(tmp_path / "deep" / "er" / "out", "a", error())
    assert files(tmp_path) == []


def test_a_failing_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match=r"could not be written \(fsync failed: No space left on device at"):
        write(tmp_path / "out", "a")
    assert files(tmp_path) == []


def test_an_existing_out_is_refused_or_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "a")  # empty: as good as none
    with pytest.raises(OutputError, match="pass --force"):
        write(tmp_path / "out", "b")
    write(tmp_path / "out", "c", force=True)
    assert files(tmp_path) == ["out", "out/c"]


def test_a_failure_with_force_keeps_what_was_there(tmp_path: Path) -> None:
    with staged(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
    with pytest.raises(ValueError, match="x"):
        write(tmp_path / "out", "b", ValueError("x"), force=True)
    assert files(tmp_path) == ["out", "out/a"]


@pytest.mark.parametrize("out", ["base", "base/inside", ".", "base/../base", "link/inside"])
def test_out_may_not_overlap_an_input(out: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (tmp_path / "link").symlink_to(base)
    with (
        pytest.raises(OutputError, match="inputs are never changed"),
        staged(tmp_path / out, force=True, inputs=[base]),
    ):
        pytest.fail("entered")
    assert files(base) == []


def test_a_file_or_link_is_no_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(OutputError, match="expected a directory or nothing"), staged(tmp_path / name, force=True):
            pytest.fail("entered")


def test_two_runs_to_one_out_do_not_mix(tmp_path: Path) -> None:
    with staged(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
        with pytest.raises(OutputError, match="another portllm is writing it"), staged(tmp_path / "out"):
            pytest.fail("entered")
    assert files(tmp_path) == ["out", "out/a"]


def test_leftovers_of_a_kill_are_cleaned_by_the_next_run(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from portllm.checkpoint.files.output import staged
        with staged(Path(sys.argv[1])) as folder:
            (folder / "half").write_text("1")
            print("ready", flush=True)
            time.sleep(60)
    """)
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "out")], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert files(tmp_path) == [".out.partial", ".out.partial/half"]
    with staged(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
    assert files(tmp_path) == ["out", "out/a"]


def test_a_kill_in_the_middle_of_a_replacement_is_undone(tmp_path: Path) -> None:
    aside = output._beside(tmp_path / "out", "replaced")
    aside.mkdir()
    (aside / "precious").write_text("1")
    with pytest.raises(OutputError, match="exists and is not empty"), staged(tmp_path / "out"):
        pytest.fail("entered")
    assert files(tmp_path) == ["out", "out/precious"]


def test_a_kill_at_the_end_of_a_replacement_is_finished(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    aside = output._beside(tmp_path / "out", "replaced")
    aside.mkdir()
    (aside / "old").write_text("1")
    with staged(tmp_path / "out") as folder:
        (folder / "new").write_text("1")
    assert files(tmp_path) == ["out", "out/new"]


def test_a_replacement_that_fails_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with staged(tmp_path / "out") as folder:
        (folder / "old").write_text("1")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OutputError, match="Input/output error"):
        write(tmp_path / "out", "new", force=True)
    assert files(tmp_path) == ["out", "out/old"]


def test_one_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x"):
        write_half(tmp_path / "f.json")
    assert files(tmp_path) == []
    with staged_file(tmp_path / "f.json") as partial:
        partial.write_text("whole")
    with staged_file(tmp_path / "f.json") as partial:
        partial.write_text("whole again")
    assert files(tmp_path) == ["f.json"]
    assert (tmp_path / "f.json").read_text() == "whole again"


def test_leftovers_half_deleted_never_come_back_as_out(tmp_path: Path) -> None:
    discarded = output._beside(tmp_path / "out", "discarded")
    discarded.mkdir()
    (discarded / "half").write_text("1")
    write(tmp_path / "out", "a")
    assert files(tmp_path) == ["out", "out/a"]


@pytest.mark.parametrize("kind", ["partial", "replaced", "discarded"])
def test_a_link_in_place_of_a_leftover_leads_nowhere(kind: str, tmp_path: Path) -> None:
    """Who may write beside OUT could otherwise have a home emptied."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "precious").write_text("1")
    output._beside(tmp_path / "out", kind).symlink_to(home)
    with contextlib.suppress(OutputError):
        write(tmp_path / "out", "a")
    assert files(home) == ["precious"]
    assert not (tmp_path / "out").is_symlink()


def test_a_rename_that_does_not_reach_the_disk_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", "old")
    sync = os.fsync

    def fail(handle: int) -> None:
        if (tmp_path / "out" / "new").exists():
            raise OSError(5, "Input/output error")
        sync(handle)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match="fsync failed: Input/output error"):
        write(tmp_path / "out", "new", force=True)
    assert files(tmp_path) == ["out", "out/old"]


def test_a_run_that_is_done_leaves_the_next_ones_partial_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the rename and the clean-up another run may have begun to write the same OUT."""
    replace = output._replace

    def and_another_begins(partial: Path, out: Path) -> None:
        replace(partial, out)
        partial.mkdir()
        (partial / "others").write_text("1")

    monkeypatch.setattr(output, "_replace", and_another_begins)
    write(tmp_path / "out", "a")
    assert files(tmp_path) == [".out.partial", ".out.partial/others", "out", "out/a"]


@pytest.mark.parametrize("name", [".", "..", "deep/..", "x" * 300, "a\0b", "circle/out"])
def test_no_name_for_a_directory(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "circle").symlink_to("circle")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError):
        write(Path(name), "a", force=True)
    assert files(tmp_path) == ["circle"]


def test_parents_made_in_vain_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir = os.mkdir

    def fail(path: Path, mode: int = 0o777) -> None:
        if str(path).endswith("er"):
            raise OSError(122, "Disk quota exceeded")
        mkdir(path, mode)

    monkeypatch.setattr(os, "mkdir", fail)
    with pytest.raises(OutputError, match="could not be written .Disk quota exceeded"):
        write(tmp_path / "deep" / "er" / "out", "a")
    assert files(tmp_path) == []


def test_what_a_kill_left_of_one_file_is_swept_up_a_day_later(tmp_path: Path) -> None:
    old, young, other = (tmp_path / name for name in (".f.json.a.partial", ".f.json.b.partial", ".g.json.x.partial"))
    for path in (old, young, other):
        path.touch()
    os.utime(old, (0, 0))
    os.utime(other, (0, 0))
    with staged_file(tmp_path / "f.json") as partial:
        partial.write_text("whole")
    assert files(tmp_path) == [young.name, other.name, "f.json"]


def test_a_file_that_cannot_be_where_it_is_to_be_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("1")
    for out, said in {
        "folder": "found a directory", "file/scores.json": "found a file", "file/deep/er.json": "found a file",
        "folder/" + "x" * 300: "File name too long",
    }.items():  # fmt: skip
        for refusing in (output.refuse_file, lambda path: staged_file(path).__enter__()):
            with pytest.raises(OutputError, match=said):
                refusing(tmp_path / out)
    output.refuse_file(tmp_path / "file")
    output.refuse_file(tmp_path / "deep" / "er" / "scores.json")
    assert files(tmp_path) == ["file", "folder"]


def test_a_disk_that_refuses_one_file_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OutputError, match="No space left on device"), staged_file(tmp_path / "f.json") as partial:
        partial.write_text("1")
    assert files(tmp_path) == []


def test_weights_that_do_not_fit_on_the_disk_are_an_error_of_ours(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OutputError, match="could not be written"), staged(tmp_path / "out") as folder:
            save_file({"a": torch.zeros(4096)}, folder / "model.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert files(tmp_path) == []


def test_of_several_processes_the_main_one_alone_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with staged(tmp_path / "left over") as folder:  # a RANK that no launcher set means nothing
        (folder / "file").write_text("1")
    assert (tmp_path / "left over" / "file").is_file()

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    with staged(tmp_path / "out") as folder, staged_file(tmp_path / "file") as file:
        (folder / "file").write_text("1")
        file.write_text("1")
    assert not folder.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["left over"]


@pytest.mark.parametrize(
    ("error", "stays"),
    [(KeyboardInterrupt, True), (MachineError, True), (DataError, False), (OutputError, True), (OSError, True)],
)
def test_what_is_kept_stays_where_the_next_run_can_go_on(
    tmp_path: Path, error: type[BaseException], stays: bool
) -> None:
    out = tmp_path / "out"

    def work(key: str | None, fail: type[BaseException] | None) -> list[str]:
        with staged(out, key=key, force=True):
            if key:
                kept(out, key).mkdir(parents=True, exist_ok=True)
            found = sorted(p.name for p in tmp_path.glob(".out.kept/*"))
            if fail is not None:
                raise fail("stopped")
        return found

    with pytest.raises(OutputError if error is OSError else error):
        work("one", error)
    assert kept(out, "one").is_dir() == stays
    with pytest.raises(KeyboardInterrupt):
        work("two", KeyboardInterrupt)
    assert not kept(out, "one").exists(), "other work is not kept"
    assert work("two", None) == ["two"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(KeyboardInterrupt):
        work("two", KeyboardInterrupt)
    work(None, None)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_is_abandoned_leaves_nothing(tmp_path: Path) -> None:
    def work() -> None:
        with staged(tmp_path / "new" / "out") as folder:
            (folder / "file").write_text("1")
            output.abandon()
            assert list(tmp_path.iterdir()) == []

    with pytest.raises(OutputError):
        work()
    assert list(tmp_path.iterdir()) == []
