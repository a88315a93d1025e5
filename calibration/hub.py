"""Whether the Hugging Face hub can be reached, found out once instead of by every file's retries."""

import logging

from huggingface_hub import constants, get_session

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
