"""Links: those into DVC's cache are followed, all others are refused (issue 8, item 9)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from portllm.checkpoint.files import links
from portllm.errors import UnsafeFileError

DEFAULT, OBJECT = Path(".dvc/cache"), "files/md5/7c/ac41f58325c757764a253daa7e2c73"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of a DVC project, with no configuration of DVC outside of the project."""
    for kind in ("GLOBAL", "SYSTEM"):
        monkeypatch.setenv(f"DVC_{kind}_CONFIG_DIR", str(tmp_path / kind))
    links._dvc_caches.cache_clear()
    ported = tmp_path / "project/models/ported/v1"
    ported.mkdir(parents=True)
    (tmp_path / "project/.dvc").mkdir()
    return ported


def link(folder: Path, target: Path, *, text: str = "content") -> Path:
    """Return a link in `folder` to the file `target`, which is written."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    path = folder / "port.json"
    path.symlink_to(target)
    return path


def configure(folder: Path, file: str, cache: str) -> None:
    path = links.dvc_root(folder) / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        f"[core]\n    analytics = false\n    autostage = false\n[cache]\n    type = symlink\n    dir = {cache}\n"
    )


@pytest.mark.parametrize("name", [OBJECT, OBJECT + ".dir", "7c/ac41f58325c757764a253daa7e2c73"])
def test_resolve_a_link_to_an_object_of_dvc_s_cache_returns_the_object(folder: Path, name: str) -> None:
    target = links.dvc_root(folder) / DEFAULT / name
    path = link(folder, target)
    if name.endswith(".dir"):  # a list of names, which DVC never links to
        with pytest.raises(UnsafeFileError):
            links.resolve(path, folder)
    else:
        assert links.resolve(path, folder) == target.resolve()


@pytest.mark.parametrize("file", [".dvc/config", ".dvc/config.local", "../GLOBAL/config"])
@pytest.mark.parametrize("is_relative", [True, False])
def test_resolve_follows_links_into_the_configured_cache(folder: Path, file: str, is_relative: bool) -> None:
    root = links.dvc_root(folder)
    place = root.parent / "shared-cache"
    configure(folder, file, os.path.relpath(place, (root / file).parent) if is_relative else str(place))
    path = link(folder, place / OBJECT)
    assert links.resolve(path, folder) == (place / OBJECT).resolve()


def test_resolve_prefers_the_local_configuration(folder: Path) -> None:
    configure(folder, ".dvc/config", "../one")
    configure(folder, ".dvc/config.local", "../two")
    with pytest.raises(UnsafeFileError, match="leads out of the directory"):
        links.resolve(link(folder, links.dvc_root(folder) / "one" / OBJECT), folder)


@pytest.mark.parametrize("target", ["secret", ".dvc/cache/files/md5/7c/../../../../secret", "elsewhere/" + OBJECT])
def test_resolve_a_link_to_another_place_is_refused(folder: Path, target: str) -> None:
    (links.dvc_root(folder) / ".dvc/cache/files/md5/7c").mkdir(parents=True)
    path = link(folder, links.dvc_root(folder) / target)
    with pytest.raises(UnsafeFileError, match="leads out of the directory"):
        links.resolve(path, folder)


def test_resolve_a_configured_cache_cannot_open_other_files(folder: Path, tmp_path: Path) -> None:
    configure(folder, ".dvc/config", "/")
    with pytest.raises(UnsafeFileError, match="leads out of the directory"):
        links.resolve(link(folder, tmp_path / "secret"), folder)


def test_resolve_outside_a_project_follows_no_cache(folder: Path, tmp_path: Path) -> None:
    target = links.dvc_root(folder) / DEFAULT / OBJECT
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(UnsafeFileError, match="leads out of the directory"):
        links.resolve(link(other, target), other)


def test_resolve_a_link_to_nothing_raises(folder: Path) -> None:
    path = folder / "port.json"
    path.symlink_to(links.dvc_root(folder) / DEFAULT / OBJECT)
    with pytest.raises(FileNotFoundError):
        links.resolve(path, folder)


def test_materialise_gives_files_in_place_of_links(folder: Path, tmp_path: Path) -> None:
    link(folder, links.dvc_root(folder) / DEFAULT / OBJECT)
    (folder / "chat").mkdir()
    (folder / "chat/a.jinja").write_text("a")
    assert links.has_links(folder)
    links.materialise(folder, tmp_path / "out")
    assert not links.has_links(tmp_path / "out")
    assert (tmp_path / "out/port.json").read_text() == "content"
    assert (tmp_path / "out/chat/a.jinja").read_text() == "a"
