"""Push a ported directory to the hub: refused early where possible, checked afterwards, the local files unchanged.

huggingface_hub reads the token from its usual places (HF_TOKEN, `hf auth login`); it is never written or printed.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import re
import shlex
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.checkpoint.files.hashing import file_digest
from portllm.checkpoint.record.provenance import is_hub_name
from portllm.errors import HubError, ParamsError
from portllm.lm.remote.refusals import api, chain, line, of_the_network, scrubbed

if TYPE_CHECKING:
    from huggingface_hub import HfApi

REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]*")
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf")
CHECKED_AT_ONCE = 500


@dataclass(frozen=True)
class Pushed:
    """The result of a push: the repository's full name, the branch, the commit, and its address."""

    repo: str
    revision: str
    commit: str
    url: str


@dataclass(frozen=True)
class Destination:
    """A model repository on the hub and a branch of it; with `private`, nobody else may read it."""

    repo: str
    private: bool = False
    revision: str | None = None

    def check(self) -> None:
        """Refuse what cannot succeed, before any work: a malformed name, no token, no hub, a read-only token.

        Raises ParamsError or HubError.
        """
        if not is_hub_name(self.repo):
            raise ParamsError(
                f"--push-to-hub: expected OWNER/NAME of letters, digits, '-', '_' and '.', found {self.repo[:200]!r}"
            )
        if self.revision is not None and (not REVISION.fullmatch(self.revision) or ".." in self.revision):
            raise ParamsError(f"--revision: expected the name of a branch, found {self.revision[:200]!r}")
        with self._reasons("nothing was ported; correct this, or leave out --push-to-hub"):
            token = (api().whoami().get("auth") or {}).get("accessToken") or {}
        if token.get("role") == "read":
            raise HubError(
                f"{self.repo}: the hub's token can only read, expected one that can write; "
                "create one at https://huggingface.co/settings/tokens"
            )

    def push(self, folder: Path, files: Collection[str]) -> Pushed:
        """Upload `files` (names) of `folder`, and verify by their hashes that the hub has them all.

        The repository and the branch are created if they do not exist. Raises HubError; the folder stays as it is.
        """
        flags = [*(["--revision", self.revision] if self.revision else []), *(["--private"] if self.private else [])]
        command = shlex.join(["hf", "upload", self.repo, str(folder), ".", *flags])
        with self._reasons(f"{folder} is complete: to push it, run the same command again, or {command}"):
            hub = api()
            repo = hub.create_repo(self.repo, private=self.private or None, exist_ok=True).repo_id
            branch = self.revision or "main"
            self._check_private(hub, repo)
            if branch != "main" and not branch.startswith("refs/"):
                hub.create_branch(repo, branch=branch, exist_ok=True)
            self._check_other_weights(hub, repo, branch, files)
            done = hub.upload_folder(
                repo_id=repo, folder_path=folder, revision=branch, commit_message="Port by portllm",
                allow_patterns=[glob.escape(name) for name in files],
            )  # fmt: skip
            _check_arrived(hub, repo, branch, folder, files)
            return Pushed(repo, branch, str(done.oid), f"{hub.endpoint}/{repo}")

    def _check_private(self, api: HfApi, repo: str) -> None:
        if self.private and not api.model_info(repo).private:
            raise HubError(
                f"{repo}: exists and is public, expected a private repository; make it private in its settings, "
                "choose another, or leave out --private"
            )

    def _check_other_weights(self, api: HfApi, repo: str, branch: str, files: Collection[str]) -> None:
        """Raise HubError for other weights in the repository: they could be loaded in place of the pushed ones."""
        stored = api.list_repo_files(repo, revision=branch)
        if others := sorted(name for name in stored if name.endswith(WEIGHTS) and name not in files):
            raise HubError(
                f"{repo}: has {others[0]} already, which is none of the ported files and could be loaded in their "
                "place; remove it there or choose another repository"
            )

    @contextlib.contextmanager
    def _reasons(self, hint: str) -> Iterator[None]:
        """Raise every error of the block as one HubError: the hub's answer, and `hint`."""
        try:
            yield
        except HubError as error:
            raise HubError(f"{error}; {hint}") from error
        except Exception as error:
            # huggingface_hub raises its own errors, its HTTP library's and plain ones; the port must survive all
            raise HubError(f"{self.repo}: {scrubbed(_reason(error))}; {hint}") from error


def _check_arrived(api: HfApi, repo: str, branch: str, folder: Path, files: Collection[str]) -> None:
    """Raise HubError where the hub's copy of a file differs, by SHA-256 for large files and git's hash for small."""
    names, arrived = sorted(files), {}
    for at in range(0, len(names), CHECKED_AT_ONCE):
        infos = api.get_paths_info(repo, names[at : at + CHECKED_AT_ONCE], revision=branch)
        arrived.update({info.path: info for info in infos})
    for name in names:
        copy: Any = arrived.get(name)
        lfs = getattr(copy, "lfs", None)
        path = folder / name
        is_equal = copy is not None and (lfs.sha256 == file_digest(path) if lfs else copy.blob_id == _git_hash(path))
        if not is_equal:
            stored = "none" if copy is None else f"another of {copy.size} bytes"
            raise HubError(f"{repo}: {name} did not arrive as it is here, the hub has {stored}")


def _git_hash(path: Path) -> str:
    """Return git's hash of a file's content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _reason(error: BaseException) -> str:
    """Return the reason in one line: the innermost answer of the hub, else the library's message."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    links = list(chain(error))
    if type(error) is ValueError:  # the library's own check, with the hub's reasons joined
        return f"the upload failed ({line(str(error))})"
    for link in links:
        if isinstance(link, OfflineModeIsEnabled):
            return "the hub is switched off on this machine (HF_HUB_OFFLINE); unset that"
        if isinstance(link, LocalTokenNotFoundError):
            return "no token of the hub was found; log in with `hf auth login`, or set HF_TOKEN"
        if isinstance(link, HfHubHTTPError):
            return _status_text(link.response.status_code, link.server_message)
    if of_the_network(error):
        return f"the hub cannot be reached ({line(str(links[-1])) or type(error).__name__})"
    return f"the upload failed ({line(str(error)) or type(error).__name__})"


def _status_text(status: int, message: str | None) -> str:
    meaning = {
        401: "the token is unknown to the hub, or has expired; log in again with `hf auth login`",
        403: "the token may not write there; use one with write access to this owner's repositories",
        404: "the hub has no such repository or branch that you can see",
        429: "the hub received too many requests; try again later",
    }.get(status, "the hub failed; try again later" if status >= 500 else "the hub refused")
    return f"{meaning} (HTTP {status}{': ' + line(message) if message else ''})"
