"""A checkpoint on the Hugging Face hub, by `org/name` or `org/name@revision`: downloaded, then read as a folder."""

from __future__ import annotations

import os
import re

from opdkernels.checkpoint import formats
from opdkernels.checkpoint.sharded import read_index
from opdkernels.errors import InputError, UsageError, printable

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]{1,200})?", re.ASCII)
SMALL_FILES = ["config.json", "adapter_config.json", *(f"*{format.index_suffix}" for format in formats.FORMATS)]


def looks_like_id(text: str) -> bool:
    """Whether `text` has the form of a hub id. The caller checks first that it is not an existing path.

    >>> looks_like_id("Qwen/Qwen2.5-0.5B@main"), looks_like_id("runs/step 20"), looks_like_id("./a/b")
    (True, False, False)
    """
    return HUB_ID.fullmatch(text) is not None


def download(text: str, revision: str | None) -> str:
    """Downloads a repository's config, index and weights.

    Args:
        text: Hub id, "org/name" or "org/name@revision".
        revision: Revision, if the id has none.

    Returns:
        The local folder.

    Raises:
        InputError: The download fails.
        UsageError: Two different revisions.
    """
    name, _, pinned = text.partition("@")
    if pinned and revision is not None and pinned != revision:
        raise UsageError(f"{printable(text)} names a revision and --revision another; give one of them")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise InputError(
            f"{printable(text)} does not exist here; if it is a hub id, pip install huggingface_hub"
        ) from error

    def fetch(patterns: list[str]) -> str:
        return snapshot_download(name, revision=pinned or revision, allow_patterns=patterns)

    try:
        folder = fetch(SMALL_FILES)
        indexed = _indexed_shards(folder)
        if indexed is not None:
            main_file, shards = indexed
            # transformers loads the usual single file where a repository has both.
            folder = fetch([*SMALL_FILES, main_file])
            if main_file not in shards and os.path.exists(os.path.join(folder, main_file)):
                return folder
            return fetch([*SMALL_FILES, *shards])
        # In turn: a repository often holds the same weights in several formats, and one of them is enough.
        for pattern in (pattern for format in formats.FORMATS for pattern in format.hub_patterns):
            folder = fetch([*SMALL_FILES, pattern])
            if any(name.endswith(format.suffixes[0]) for name in os.listdir(folder) for format in formats.FORMATS):
                break
        return folder
    except InputError:
        raise
    except Exception as error:  # network, repository, access, disk: each has its own exception class
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"{printable(text)} does not exist here and cannot be downloaded from the hub ({type(error).__name__}:"
            f" {printable(lines[0][:160])}); check the id and the network, or give a folder"
        ) from error


def _indexed_shards(folder: str) -> tuple[str, list[str]] | None:
    """Returns the usual single file of the first format with an index, and the shards that the index lists, or None."""
    for format in formats.FORMATS:
        index = os.path.join(folder, format.main_index)
        if os.path.exists(index):
            return format.main_file, list(read_index(index))
    return None
