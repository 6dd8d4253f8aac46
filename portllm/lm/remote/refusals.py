"""What the hub and its library say when something goes wrong, in one line, without the token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from huggingface_hub import HfApi

HTTP_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "hf_xet")


def api() -> HfApi:
    """The hub's API, told who asks."""
    from huggingface_hub import HfApi

    from portllm import __version__

    return HfApi(library_name="portllm", library_version=__version__)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it came from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def of_the_network(error: BaseException) -> bool:
    """Whether the HTTP library raised `error`, or what it came from."""
    return any(type(link).__module__.split(".")[0] in HTTP_LIBRARIES for link in chain(error))


def line(text: str) -> str:
    """`text` as one line of 200 characters at most."""
    words = " ".join(text.split())
    return words if len(words) <= 200 else words[:197] + "..."


def scrubbed(text: str) -> str:
    """`text` without the token, should the hub have echoed it."""
    from huggingface_hub import get_token

    token = get_token()
    return text.replace(token, "<token>") if token else text
