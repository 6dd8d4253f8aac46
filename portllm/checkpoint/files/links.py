"""Symbolic links in a directory: which of them are followed.

With `dvc config cache.type symlink` every output of the pipeline is a link into DVC's cache. A snapshot in a hub cache
consists of links to the blobs next to it. These links are followed. A link to any other place is refused: the
directory may come from another author, and its link would publish or hash a file of this machine.
"""

from __future__ import annotations

import configparser
import os
import re
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from portllm.errors import UnsafeFileError

DVC = ".dvc"
SNAPSHOTS = "snapshots"  # hub caches keep a repository's files in …/models--OWNER--NAME/snapshots/REVISION
# the name of an object in DVC's cache, by DVC 3 and DVC 2: cache.dir of a config alone could lead to any file
_OBJECT = re.compile(r"(files/md5/)?[0-9a-f]{2}/[0-9a-f]{30}")


def resolve(path: Path, folder: Path) -> Path:
    """Return the file to which `path`, which is in `folder`, leads.

    Raises UnsafeFileError where that file is neither in `folder` nor in its hub cache nor in its project's DVC cache.
    Raises FileNotFoundError for a link to nothing, RuntimeError or OSError for a circle of links.
    """
    target = path.resolve(strict=True)
    if target.is_relative_to(_own_root(folder)) or _is_cached(target, folder):
        return target
    raise UnsafeFileError(
        f"{path}: is a link that leads out of the directory, expected one into DVC's or the hub's cache at most; "
        "do not trust it, port again"
    )


def has_links(folder: Path) -> bool:
    """Return whether a file below `folder` is a link."""
    return any(path.is_symlink() for path in _files(folder))


def materialise(folder: Path, out: Path) -> None:
    """Fill `out`, a new directory, with the files that those below `folder` lead to: hard links, or else copies.

    Raises UnsafeFileError, OSError.
    """
    for path in _files(folder):
        target = out / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        source = resolve(path, folder)
        try:
            os.link(source, target)
        except OSError:  # another file system, or a cache of another user
            shutil.copyfile(source, target)


def dvc_root(folder: Path) -> Path | None:
    """Return the root of the DVC project that contains `folder`, or None outside of any project."""
    absolute = folder.absolute()
    return next((root for root in (absolute, *absolute.parents) if (root / DVC).is_dir()), None)


def _files(folder: Path) -> Iterator[Path]:
    for where, _, names in os.walk(folder):
        yield from (Path(where) / name for name in sorted(names))


def _own_root(folder: Path) -> Path:
    # the links of a hub cache's snapshot lead to the blobs next to it
    absolute = folder.absolute()
    if absolute.parent.name == SNAPSHOTS and absolute.parent.parent.name.startswith("models--"):
        return absolute.parent.parent.resolve()
    return folder.resolve()


def _is_cached(target: Path, folder: Path) -> bool:
    root = dvc_root(folder)
    caches = _dvc_caches(root) if root is not None else ()
    return any(
        target.is_relative_to(place) and _OBJECT.fullmatch(target.relative_to(place).as_posix()) for place in caches
    )


@cache
def _dvc_caches(root: Path) -> tuple[Path, ...]:
    """Return the cache directories of the DVC project at `root`: the configured one and the default one."""
    return tuple(place.resolve() for place in (_configured_cache(root), root / DVC / "cache") if place is not None)


def _configured_cache(root: Path) -> Path | None:
    """Return cache.dir of DVC's configuration, by DVC's order of precedence; None where it is not set."""
    home = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    folders = (
        Path(os.environ.get("DVC_GLOBAL_CONFIG_DIR") or f"{home}/dvc"),
        Path(os.environ.get("DVC_SYSTEM_CONFIG_DIR") or "/etc/xdg/dvc"),
    )
    for file in (root / DVC / "config.local", root / DVC / "config", *(folder / "config" for folder in folders)):
        parser = configparser.ConfigParser(interpolation=None, strict=False)
        try:
            parser.read_string(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, configparser.Error):
            continue  # absent or unreadable: DVC itself reports that
        if value := parser.get("cache", "dir", fallback=""):
            return file.parent / value  # a relative one is relative to its file
    return None
