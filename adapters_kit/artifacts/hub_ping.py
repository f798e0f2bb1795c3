"""Whether the model hub answers, asked once and briefly: its library would retry for half a minute a file."""

from __future__ import annotations

import os
import socket
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from adapters_kit.errors import UnknownNameError

SECONDS = 4.0
"""How long the hub may take to accept a connection."""


def endpoint() -> str:
    """The hub's address: HF_ENDPOINT, or huggingface.co."""
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def not_asked() -> bool:
    """Whether the user has told the hub's libraries to ask nothing; 0 means no, as it does to them."""
    told = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(value.upper() in ("1", "ON", "YES", "TRUE") for value in told)


@cache
def reachable() -> bool:
    """Whether the hub, or the proxy that leads to it, accepts a connection. Asked once in a process."""
    target = urlsplit(endpoint())
    through = getproxies().get(target.scheme)
    if through:
        target = urlsplit(through if "//" in through else f"//{through}")
    port = target.port or (80 if target.scheme == "http" else 443)
    try:
        with socket.create_connection((target.hostname or "", port), timeout=SECONDS):
            return True
    except OSError:
        return False


def copy_without_hub(name: str, revision: str | None = None) -> Path | None:
    """Where the cache keeps a model, if the hub does not answer; None if it does, or is not to be asked anyway.

    Raises:
        UnknownNameError: the hub does not answer, and the cache has no such model.
    """
    if not_asked() or reachable():
        return None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except Exception as error:  # not a hub id, or not in the cache
        raise UnknownNameError(
            f"There is no folder or file {name!r} here, the cache of the hub has no model of that name, and the hub "
            f"({endpoint()}) does not answer. Check the name, or the network; behind a mirror set HF_ENDPOINT."
        ) from error


def described_on_hub(name: str, adapter_file: str) -> Path | None:
    """What the hub, or its cache, has under a hub id: an adapter's whole folder, or one with a model's config alone.

    Args:
        adapter_file: the file by which an adapter is known.

    Returns:
        The folder in the cache; None if neither is there, or the hub does not answer.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    here_only = not_asked() or not reachable()
    for file in (adapter_file, "config.json"):
        try:
            found = Path(hf_hub_download(name, file, local_files_only=here_only, endpoint=endpoint()))
        except (OSError, ValueError):  # no such file, no such repository, no hub id
            continue
        if file == adapter_file:
            return Path(snapshot_download(name, local_files_only=here_only, endpoint=endpoint()))
        return found.parent
    return None
