"""Resolve BASE, PATCH and MODEL: a local directory, or `hub-id[@revision]` at a pinned commit."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.checkpoint.files.headers import shard_names
from portllm.checkpoint.files.names import ADAPTER_WEIGHTS as ADAPTER
from portllm.checkpoint.files.names import INDEX, SINGLE
from portllm.errors import CheckpointError, PortllmError, UnsafeFileError
from portllm.lm.remote.refusals import api, chain, line, of_the_network, scrubbed
from portllm.suggestions import did_you_mean_path

if TYPE_CHECKING:
    from portllm.checkpoint.files.progress import Progress
    from portllm.lm.remote.downloading import Download

HUB_ID = re.compile(r"(?P<repo>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")
# pickled weights are never downloaded
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")
# what a model loads in addition to its weights; other files of a repository (original/, gguf, onnx) stay there
COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.md")
NOT_COMPANIONS = ("consolidated*", "*.index.json")
TEMPLATES = "additional_chat_templates/"


def resolve(
    name: str | Path,
    *,
    whole: bool = False,
    on_plan: Callable[[Download], None] | None = None,
    on_progress: Progress | None = None,
) -> Path:
    """Return the directory that `name` stands for: itself, or a snapshot of the hub's repository at one commit.

    A snapshot has the files that a model or an adapter loads; with `whole`, every file that is not pickled. `on_plan`
    receives the download before it starts, `on_progress` (bytes present, bytes in all). Where the hub cannot be
    reached, the cache is used. Raises CheckpointError when `name` is neither or the hub refuses, OutputError when the
    disk is too small.
    """
    path = Path(name)
    try:
        is_directory = path.is_dir()
    except OSError as error:
        raise CheckpointError(f"{name}: cannot be read ({error.strerror}); check the path") from error
    if is_directory and name != "":
        return path
    match = HUB_ID.fullmatch(str(name))
    if match is None or path.is_absolute() or str(name).startswith("."):
        raise CheckpointError(
            f"{name or repr(name)}: no such directory; expected a checkpoint or patch directory, or a hub id"
            f"{did_you_mean_path(path) if name else ''}"
        )
    request = HubRequest(str(name), match["repo"], match["revision"], whole)
    with request.reasons():
        download = request.plan()
        if download is None:
            return request.cached()
        if on_plan is not None:
            on_plan(download)
        download.check_room()
        return download.run(on_progress)


def is_hub_id(name: str) -> bool:
    """Return whether `name` is no local directory and can be a repository of the hub."""
    return not Path(name).is_dir() and not Path(name).is_absolute() and HUB_ID.fullmatch(name) is not None


@dataclass(frozen=True)
class HubRequest:
    """A repository of the hub, as the user named it, and whether all its files are requested (`whole`)."""

    name: str
    repo: str
    revision: str | None
    whole: bool

    def plan(self) -> Download | None:
        """Return the files to download, at the revision's commit of now; None when the hub cannot be reached."""
        from huggingface_hub.errors import OfflineModeIsEnabled

        from portllm.lm.remote.downloading import Download, RemoteFile

        try:
            info = api().model_info(self.repo, revision=self.revision, files_metadata=True)
        except OfflineModeIsEnabled:
            return None
        except Exception as error:
            if not of_the_network(error) or _status(error) is not None:
                raise
            if self._in_cache() is None:
                raise
            return None
        files = {
            one.rfilename: RemoteFile(nbytes=one.size or 0, sha256=one.lfs.sha256 if one.lfs else None)
            for one in info.siblings or ()
        }
        commit = str(info.sha)
        chosen = {name: files[name] for name in self._chosen(sorted(files), commit)}
        return Download(self.repo, self.revision, commit, chosen, self._missing(chosen, commit))

    def _missing(self, names: Iterable[str], commit: str) -> frozenset[str]:
        """Return the files that huggingface_hub would download, by its dry run."""
        from huggingface_hub import snapshot_download

        from portllm.lm.remote.downloading import exactly, no_bars, quiet

        with quiet():
            files = snapshot_download(
                self.repo, revision=commit, allow_patterns=exactly(names), dry_run=True, tqdm_class=no_bars()
            )  # fmt: skip
        return frozenset(file.filename for file in files if file.will_download)

    def cached(self) -> Path:
        """Return the complete snapshot in the hub's cache. Raises OfflineModeIsEnabled where there is none."""
        folder = self._in_cache()
        if folder is None:
            from huggingface_hub.errors import OfflineModeIsEnabled

            raise OfflineModeIsEnabled
        return folder

    def _in_cache(self) -> Path | None:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        # the library recorded all files of a repository when it was downloaded, and checks that they are present
        try:
            snapshot = snapshot_download(
                self.repo, revision=self.revision, local_files_only=True,
                allow_patterns=None if self.whole else [], ignore_patterns=list(PICKLES),
            )  # fmt: skip
        except LocalEntryNotFoundError:
            return None
        folder = Path(snapshot)
        return folder if _complete(folder) else None

    def _chosen(self, names: Sequence[str], commit: str) -> list[str]:
        if self.whole:
            return [name for name in names if not _like(name, PICKLES)]
        weights = self._weights(names, commit)
        if missing := sorted(set(weights) - set(names)):
            raise CheckpointError(
                f"{self.name}: {INDEX} names {missing[0]}, which the repository lacks; choose another revision"
            )
        return sorted({*weights, *(name for name in names if _is_companion(name))})

    def _weights(self, names: Sequence[str], commit: str) -> list[str]:
        """Return the safetensors that a model or an adapter loads. Raises CheckpointError where there are none."""
        if ADAPTER in names and SINGLE not in names and INDEX not in names:
            return [ADAPTER]
        if INDEX not in names:
            if SINGLE not in names:
                raise self._no_safetensors(names, commit)
            return [SINGLE, *(name for name in names if name == ADAPTER)]
        shards = shard_names(self._index(commit).parent)
        if SINGLE in names and shards != [SINGLE]:
            raise CheckpointError(
                f"{self.name}: has both {SINGLE} and {INDEX}, which contradict each other; choose another revision"
            )
        return [*shards, INDEX]

    def _index(self, commit: str) -> Path:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(self.repo, INDEX, revision=commit))

    def _no_safetensors(self, names: Sequence[str], commit: str) -> CheckpointError:
        pickles = [name for name in names if _like(name, PICKLES)]
        if not pickles:
            first = ", ".join(names[:3]) or "no files"
            return CheckpointError(
                f"{self.name}: expected safetensors that a model loads from, found {first}; is it a model's repository?"
            )
        code = (
            "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
            "r, v, out = sys.argv[1:]; "
            "M.from_pretrained(r, revision=v, dtype='auto').save_pretrained(out); "
            "T.from_pretrained(r, revision=v).save_pretrained(out)"
        )
        command = shlex.join(["python", "-c", code, self.repo, commit, "NEW_DIR"])
        return UnsafeFileError(
            f"{self.name}: has only pickled weights ({pickles[0]}), expected safetensors; convert it with: {command}"
        )

    @contextlib.contextmanager
    def reasons(self) -> Iterator[None]:
        """Raise every error of the block as one CheckpointError that gives the reason and the next step."""
        try:
            yield
        except PortllmError:
            raise
        except Exception as error:
            # huggingface_hub raises its own errors, its HTTP library's and plain ones
            if self._is_absent(error) and (hint := did_you_mean_path(Path(self.name))):
                raise CheckpointError(
                    f"{self.name}: no such directory{hint} (and no hub id that can be reached)"
                ) from error
            raise CheckpointError(scrubbed(f"{self.name}: {self._reason(error)}")) from error

    def _is_absent(self, error: BaseException) -> bool:
        """Return whether nothing has that name: a misspelt directory looks like a hub id."""
        from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

        links = list(chain(error))
        if any(isinstance(link, GatedRepoError) for link in links):  # derives from RepositoryNotFoundError
            return False
        absent = any(isinstance(link, (OfflineModeIsEnabled, RepositoryNotFoundError)) for link in links)
        return absent or (of_the_network(error) and _status(error) is None)

    def _reason(self, error: BaseException) -> str:
        from huggingface_hub import errors, get_token

        place = f"{api().endpoint}/{self.repo}"
        has_token = bool(get_token())
        links = list(chain(error))

        def is_caused_by(kind: type[BaseException]) -> bool:
            return any(isinstance(link, kind) for link in links)

        if is_caused_by(errors.GatedRepoError):
            if has_token:
                return f"gated, and this token's account has no access; request it at {place}, or use another token"
            return f"gated; accept its terms at {place}, then log in with `hf auth login` or set HF_TOKEN"
        if is_caused_by(errors.RevisionNotFoundError):
            return f"the repository has no revision {self.revision or 'main'}; see its branches at {place}/tree/main"
        if is_caused_by(errors.RepositoryNotFoundError):
            visible = "that your token can read" if has_token else "that can be read without a token (`hf auth login`)"
            return f"neither a directory nor a repository of the hub {visible}; check the name"
        if is_caused_by(errors.OfflineModeIsEnabled):
            return (
                "neither a directory nor complete in the hub's cache, and the hub is switched off (HF_HUB_OFFLINE); "
                "unset that to download, or give a local directory"
            )
        return _other_reason(error, links)


def _other_reason(error: BaseException, links: Sequence[BaseException]) -> str:
    status = next((s for link in links if (s := _status(link)) is not None), None)
    if status == 401:
        return "the token is unknown to the hub, or has expired; log in again with `hf auth login`, or unset HF_TOKEN"
    if status == 429:
        return "the hub received too many requests (HTTP 429); try again later"
    if status is not None:
        return f"the hub {'failed' if status >= 500 else 'refused'} (HTTP {status}); try again later"
    if any(isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT) for link in links):
        return "the disk of the hub's cache is full; free some space, or put the cache elsewhere (HF_HOME)"
    if any(type(link) is OSError and link.errno is None for link in links):  # the library's own check of the size
        return "a file did not arrive complete; check the network, then run the same command again"
    text = line(str(error)) or type(error).__name__
    if of_the_network(error):
        return (
            f"the hub cannot be reached ({text}), and it is not complete in the cache; check the network, "
            "or give a local directory; files that are complete are kept"
        )
    return f"the download failed ({text}); try again"


def _status(error: BaseException) -> int | None:
    """Return the HTTP status of an error's response."""
    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    return status if isinstance(status, int) else None


def _complete(folder: Path) -> bool:
    """Return whether a snapshot has all its weights: they are downloaded last, so it has the rest, too."""
    try:
        names = [ADAPTER] if (folder / ADAPTER).is_file() else shard_names(folder)
    except CheckpointError:
        return False
    return all((folder / name).is_file() for name in names)


def _is_companion(name: str) -> bool:
    inside = name.removeprefix(TEMPLATES)
    if "/" in inside or inside.startswith("."):
        return False
    return _like(inside, COMPANIONS) and not _like(inside, NOT_COMPANIONS)


def _like(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
