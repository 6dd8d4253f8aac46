"""Errors of the hub and of its library as one line, without the token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from huggingface_hub import HfApi

HTTP_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "hf_xet")


def api() -> HfApi:
    """Return the hub's API, with portllm's name and version in its requests."""
    from huggingface_hub import HfApi

    from portllm import __version__

    return HfApi(library_name="portllm", library_version=__version__)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, its cause, the cause of that, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def of_the_network(error: BaseException) -> bool:
    """Return whether an HTTP library raised `error` or one of its causes."""
    return any(type(link).__module__.split(".")[0] in HTTP_LIBRARIES for link in chain(error))


def line(text: str) -> str:
    """Return `text` as one line of 200 characters at most."""
    words = " ".join(text.split())
    return words if len(words) <= 200 else words[:197] + "..."


def scrubbed(text: str) -> str:
    """Return `text` without the token, which the hub's answer may contain."""
    from huggingface_hub import get_token

    token = get_token()
    return text.replace(token, "<token>") if token else text
