"""The manifest of a sync patch's file (`opds` 1), validated as untrusted data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from opdkernels.checkpoint.base import MAX_DIMS, MAX_TENSORS
from opdkernels.errors import InputError, printable
from opdkernels.models import Strict, validate
from opdkernels.outputs import SYNC_PATCH
from opdkernels.patch.manifest import digest_bytes
from opdkernels.untrusted import parse_json

FORMAT, VERSION = SYNC_PATCH.format, "1"
DAMAGED = "it is damaged or not a sync patch; copy it or save it again"
NOT_A_PATCH = "give a file that sync.Patch.save wrote"
ENTRIES = {"values": "u8", "counts": "u32", "positions": "u8"}
LARGEST = 1 << 63

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
AdditiveDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
Size = Annotated[int, Field(ge=0, lt=LARGEST)]
Range = Annotated[list[Size], Field(min_length=2, max_length=2)]


class Tensor(Strict):
    """One tensor; `blocks` are items of the entry `counts`, the other two ranges bytes of the entries of their name."""

    name: str
    dtype: str
    shape: list[Size] = Field(max_length=MAX_DIMS)
    aliases: list[str]
    mode: Literal["sparse", "whole"]
    changed: Size
    blocks: Range
    positions: Range
    values: Range
    base_digest: AdditiveDigest
    digest: AdditiveDigest


class Manifest(Strict):
    """Which version a patch makes from which; `content_digest` is that of values, counts and positions."""

    run: Digest
    base_version: Size
    version: Size
    base_digest: Digest
    digest: Digest
    parts: list[Literal[1]] = Field(min_length=2, max_length=2)
    codec: Literal["plain"]
    values: Literal["new"]
    content_digest: Digest
    tensors: list[Tensor] = Field(max_length=MAX_TENSORS)
    step: Size | None = None
    created: str | None = None
    producer: str | None = None


def metadata_of(manifest: Manifest) -> dict[str, str]:
    """Returns the metadata of a file's header."""
    text = manifest.model_dump_json(exclude_none=True)
    return {"format": FORMAT, "version": VERSION, "manifest": text, "manifest_digest": digest_bytes(text.encode())}


def bad(path: str, what: str) -> InputError:
    return InputError(f"{printable(path)} {what[:500]}: {DAMAGED}")


def read_manifest(metadata: dict[str, str], path: str) -> Manifest:
    """Returns the validated manifest of a file's metadata."""
    if metadata.get("format") != FORMAT:
        raise InputError(f"{printable(path)} is a safetensors file but not a sync patch; {NOT_A_PATCH}")
    if metadata.get("version") != VERSION:
        raise InputError(
            f"{printable(path)} is a sync patch of version {printable(str(metadata.get('version'))[:20])};"
            f" this version of opdkernels reads version {VERSION}: update opdkernels"
        )
    text = metadata.get("manifest", "")
    if digest_bytes(text.encode("utf-8", "surrogatepass")) != metadata.get("manifest_digest"):
        raise bad(path, "has a manifest with a wrong digest")
    if metadata.keys() != {"format", "version", "manifest", "manifest_digest"}:
        raise bad(path, "has metadata that are not those of a sync patch")
    shown = f"{printable(path)}: its manifest"
    manifest = validate(Manifest, parse_json(text, shown, remedy=DAMAGED), shown, remedy=DAMAGED)
    if manifest.base_version >= manifest.version:
        raise bad(path, f"makes version {manifest.version} from version {manifest.base_version}")
    if not manifest.tensors and manifest.base_digest != manifest.digest:
        raise bad(path, "changes the digest of the model and no tensor")
    names = [name for tensor in manifest.tensors for name in (tensor.name, *tensor.aliases)]
    if len(set(names)) < len(names):
        raise bad(path, "has two tensors of one name")
    return manifest
