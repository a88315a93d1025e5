"""The Hugging Face hub: whether it can be reached, found out once instead of by every file's retries, and why a
model does not come."""

import logging

from huggingface_hub import constants, get_session
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from ..files import first_line

ANSWER_SECONDS = 5.0
"""How long the hub may take to say anything."""


def check_hub() -> None:
    """Go on as with HF_HUB_OFFLINE=1 (what is in the cache is used, all else is an error at once) if the hub does
    not answer. Call it before ``datasets`` is imported, which copies that setting."""
    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=ANSWER_SECONDS)
    except Exception as error:  # noqa: BLE001 - of requests or httpx, by the version; each means the same here
        constants.HF_HUB_OFFLINE = True
        logging.getLogger(__name__).warning(
            "%s does not answer (%s); only what is in the cache is used",
            constants.ENDPOINT,
            type(error).__name__,
        )


def why_not_downloaded(error: Exception) -> str:
    """Why ``error`` kept a model from being downloaded and what to do, as the end of a sentence. The library's own
    first line is often a status and a request's number only."""
    if isinstance(error, GatedRepoError):
        return (
            "its authors ask for consent; give it on the model's page, then log in with `hf auth login`"
        )
    if isinstance(error, RepositoryNotFoundError):
        return "the hub shows you none of this name; check the name, or log in with `hf auth login` if it is private"
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, and the cache has no copy; check the name, or unset it"
    return f"{first_line(error)}; check the name and the network"
