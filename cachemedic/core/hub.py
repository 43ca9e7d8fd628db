"""The Hugging Face hub: whether it can answer, found out at once."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError


def why_out_of_reach(name: str) -> str | None:
    """Why a repository "org/name" is neither kept on this machine nor can be fetched; None if it may be read.

    Those who read from the hub would ask again and again, for the better part of a minute.
    """
    endpoint = urlsplit(constants.ENDPOINT)
    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return None
        if constants.HF_HUB_OFFLINE:
            return "not kept from the Hugging Face hub, which HF_HUB_OFFLINE forbids to ask"
        if endpoint.hostname is None or getproxies():  # a proxy may reach what a socket does not
            return None
        socket.create_connection((endpoint.hostname, endpoint.port or 443), timeout=5).close()
    except HFValidationError:  # no name of a repository: who reads it says why
        return None
    except OSError as error:
        return f"not kept from the Hugging Face hub, which cannot be reached ({error})"
    return None
