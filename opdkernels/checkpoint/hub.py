"""A checkpoint on the Hugging Face hub, by `org/name` or `org/name@revision`: downloaded, then read as a folder."""

from __future__ import annotations

import os
import re

from opdkernels.checkpoint.sharded import read_index
from opdkernels.errors import InputError, UsageError, printable

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]{1,200})?", re.ASCII)
FACTS = ["config.json", "adapter_config.json", "*.safetensors.index.json", "*.bin.index.json"]
# One after the other: a repository often holds the same weights in several formats, and one of them is enough.
WHOLE = (["model.safetensors"], ["*.safetensors"], ["pytorch_model.bin"])


def looks_like_id(text: str) -> bool:
    """Whether `text` has the form of a hub id; a path that exists is none, which the caller sees to.

    >>> looks_like_id("Qwen/Qwen2.5-0.5B@main"), looks_like_id("runs/step 20"), looks_like_id("./a/b")
    (True, False, False)
    """
    return HUB_ID.fullmatch(text) is not None


def download(text: str, revision: str | None) -> str:
    """The local folder of a repository's config, index and weights. Raises InputError where it cannot be had."""
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
        folder = fetch(FACTS)
        weights = _listed(folder)
        if weights:
            return fetch([*FACTS, *weights])
        for patterns in WHOLE:
            folder = fetch([*FACTS, *patterns])
            if any(entry.endswith((".safetensors", ".bin")) for entry in os.listdir(folder)):
                break
        return folder
    except InputError:
        raise
    except Exception as error:  # no network, no such repository, no access, a full disk: each in its own class
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"{printable(text)} does not exist here and cannot be had from the hub ({type(error).__name__}:"
            f" {printable(lines[0][:160])}); check the id and the network, or give a folder"
        ) from error


def _listed(folder: str) -> list[str]:
    """The shards that the repository's index lists, safetensors before torch; empty where it has no index."""
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        index = os.path.join(folder, name)
        if os.path.exists(index):
            return list(read_index(index))
    return []
