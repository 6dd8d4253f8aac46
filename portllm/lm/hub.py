"""Where BASE, PATCH and MODEL come from: a local directory, or `hub-id[@revision]` at a pinned commit."""

from __future__ import annotations

import re
from pathlib import Path

from portllm.errors import CheckpointError

HUB_ID = re.compile(r"(?P<repo>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")
# safetensors only: pickled weights are never downloaded
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")
PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja", "*.md")


def resolve(name: str | Path, *, whole: bool = False) -> Path:
    """The directory `name` stands for: itself when it exists, else a snapshot of the hub repository.

    A snapshot has what a model loads from; `whole`: every file that is not pickled. Raises CheckpointError when it is
    neither, or when the hub cannot be reached or refuses.
    """
    path = Path(name)
    try:
        found = path.is_dir()
    except OSError as error:
        raise CheckpointError(f"{name}: cannot be looked at ({error.strerror}); check the path") from error
    if found and name != "":
        return path
    match = HUB_ID.fullmatch(str(name))
    if match is None or path.is_absolute() or str(name).startswith("."):
        raise CheckpointError(
            f"{name or repr(name)}: no such directory; expected a checkpoint or patch directory, or a hub id"
        )
    return _download(str(name), match["repo"], match["revision"], whole)


def _download(name: str, repo: str, revision: str | None, whole: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        allowed, ignored = (None, list(PICKLES)) if whole else (list(PATTERNS), None)
        return Path(snapshot_download(repo, revision=revision, allow_patterns=allowed, ignore_patterns=ignored))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name}: the hub repository is gated; accept its terms there, then log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{name}: the hub repository has no revision {revision}; check its branches") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name}: neither a directory nor a hub repository you can see; check the name, or log in"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"{name}: not a directory, and the hub is out of reach (offline); give a local directory"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{name}: the hub did not give it ({reason}); try again") from error
