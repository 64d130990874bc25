"""What a patch says of itself, and a patch opened: which files it makes, from which tensors, with which digests."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from opdkernels.checkpoint.base import TensorInfo
from opdkernels.checkpoint.io import Buffer, choose_io
from opdkernels.checkpoint.safetensors import SafetensorsFile, dtype_name, stored_dtype
from opdkernels.checkpoint.strict_json import DuplicateKeyError, unique_keys
from opdkernels.errors import InputError, printable
from opdkernels.formatting import byte_size, percent

FORMAT, VERSION = "opdkernels.patch", "1"
BESIDE_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
BESIDE_BYTES = 1 << 26
"""What of a checkpoint's folder goes with its weights: configuration and tokenizer, no code, and no file over 64 MiB."""

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Tensor(Strict):
    """One trained tensor: the source's that it was made from (none: stored whole), where its data is, digests, changed items."""

    source: str | None
    source_digest: Digest | None
    digest: Digest
    data: str
    changed: int = Field(ge=0)


class Beside(Strict):
    """A file beside the weights: in the patch, or where it is not `stored` the source folder's own."""

    stored: bool
    digest: Digest


class Manifest(Strict):
    values: Literal["new", "difference"]
    source_digest: Digest
    digest: Digest
    headers: dict[str, Digest]
    beside: dict[str, Beside]
    tensors: dict[str, Tensor]


def digest_bytes(content: bytes | memoryview) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


class TensorDigest:
    """The digest of a tensor: of its dtype and shape, and of the XXH3 digests of its blocks, in order."""

    def __init__(self, info: TensorInfo) -> None:
        described = f"{stored_dtype(info.dtype)} {'x'.join(map(str, info.shape))}\n"
        self._hash = hashlib.blake2b(described.encode(), digest_size=16)

    def add(self, blocks: torch.Tensor) -> None:
        self._hash.update(blocks.numpy().tobytes())

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def digest_all(tensors: Mapping[str, str]) -> str:
    """The digest of named tensors: of the JSON of their names and digests, sorted by name."""
    return digest_bytes(json.dumps(sorted(tensors.items()), separators=(",", ":")).encode())


def source_digests(tensors: Iterable[Tensor]) -> dict[str, str]:
    """Of the source's tensors that a patch was made from."""
    return {t.source: t.source_digest for t in tensors if t.source is not None and t.source_digest is not None}


def metadata_of(manifest: Manifest) -> dict[str, str]:
    """What stands in the header of a patch."""
    text = manifest.model_dump_json()
    return {
        "format": FORMAT,
        "version": VERSION,
        "source_digest": manifest.source_digest,
        "trained_digest": manifest.digest,
        "manifest": text,
        "manifest_digest": digest_bytes(text.encode()),
    }


class Patch:
    """An open patch. `files` are those it makes and their tensors in the order of their bytes; `headers` what begins each.

    Raises InputError, in one line, for everything that is not a whole patch of this version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._buffer = Buffer()
        if not os.path.isfile(self.path):
            raise InputError(f"{printable(self.path)} does not exist; give a file that patch create wrote")
        how = choose_io("auto", self.path)
        self._mapped = how == "mmap"
        self._file = SafetensorsFile(self.path, how)
        try:
            self.manifest = self._manifest(self._file.metadata)
            self.headers: dict[str, bytes] = {}
            self.files: dict[str, list[TensorInfo]] = {}
            for name, expected in self.manifest.headers.items():
                self.headers[name] = self.small(f"header:{name}", expected)
                self.files[name] = self._tensors(name, self.headers[name])
            self._complete()
        except BaseException:
            self.close()
            raise

    difference = property(lambda self: self.manifest.values == "difference")
    nbytes = property(lambda self: self._file.fingerprint.bytes)

    def bad(self, what: str) -> InputError:
        return InputError(f"{printable(self.path)} {what}: it is damaged or no patch; copy or create it again")

    def _manifest(self, metadata: dict[str, str]) -> Manifest:
        if metadata.get("format") != FORMAT:
            raise InputError(
                f"{printable(self.path)} is a safetensors file but no patch; give a file that patch create wrote"
            )
        if metadata.get("version") != VERSION:
            raise InputError(
                f"{printable(self.path)} is a patch of version {printable(str(metadata.get('version')))}, and this program reads"
                f" version {VERSION}; update opdkernels"
            )
        text = metadata.get("manifest", "")
        if digest_bytes(text.encode("utf-8", "surrogatepass")) != metadata.get("manifest_digest"):
            raise self.bad("has a manifest that is not of the digest written with it")
        try:
            manifest = Manifest.model_validate(json.loads(text, object_pairs_hook=unique_keys))
        except DuplicateKeyError as error:
            raise self.bad(f"names {printable(str(error))} twice in its manifest") from None
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            raise self.bad(
                f"has no valid {printable(where)} in its manifest ({printable(error.errors()[0]['msg'])})"
            ) from None
        except (ValueError, RecursionError):
            raise self.bad("has a manifest that is not JSON") from None
        if metadata_of(manifest) | {"manifest": "", "manifest_digest": ""} != metadata | {
            "manifest": "",
            "manifest_digest": "",
        }:
            raise self.bad("has metadata that is not that of its manifest")
        self._check_names(manifest)
        return manifest

    def _check_names(self, manifest: Manifest) -> None:
        names = [*manifest.headers, *manifest.beside]
        for name in names:
            # Untrusted: joined to the folder unchecked, "../../x" or "/x" would leave it.
            if (
                name.startswith(".")
                or any(c in "/\\:\0" for c in name)
                or not name.isprintable()
                or len(name.encode()) > 255
            ):
                raise self.bad(f"makes a file {printable(name)}, which is not a plain file name")
        if any(not name.endswith(".safetensors") for name in manifest.headers) or not manifest.headers:
            raise self.bad("makes a file of weights whose name does not end with .safetensors, or none")
        if any(not name.endswith(BESIDE_SUFFIXES) for name in manifest.beside):
            raise self.bad(f"makes a file beside the weights that is none of {', '.join(BESIDE_SUFFIXES)}")
        if len({name.casefold() for name in names}) < len(names):
            raise self.bad("makes two files of one name")

    def small(self, key: str, expected: str) -> bytes:
        """The content of a small entry, checked."""
        info = self.entry(key)
        if info.dtype != "u8":
            raise self.bad(f"has {printable(key)} as {printable(info.dtype)} instead of bytes")
        content = self.read(key, 0, info.nbytes).numpy().tobytes()
        if digest_bytes(content) != expected:
            raise self.bad(f"has {printable(key)} of another digest than was written with it")
        return content

    def entry(self, key: str) -> TensorInfo:
        info = self._file.tensors.get(key)
        if info is None:
            raise self.bad(f"lacks {printable(key)}")
        return info

    def read(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Items [start, stop) of an entry, as `Checkpoint.read_bits`."""
        return self._file.read_bits(key, start, stop, self._buffer)

    def keep(self, key: str, start: int, stop: int) -> torch.Tensor:
        """The same, to be held beyond the next reading."""
        part = self.read(key, start, stop)
        return part if self._mapped else part.clone()

    def _tensors(self, file: str, header: bytes) -> list[TensorInfo]:
        """The tensors that a file's header describes. Whether their sizes are those of their data is seen to later."""
        try:
            if int.from_bytes(header[:8], "little") != len(header) - 8:
                raise ValueError("length")
            table = json.loads(header[8:], object_pairs_hook=unique_keys)
            table.pop("__metadata__", None)
            found, at = [], 0
            for name, entry in sorted(table.items(), key=lambda item: item[1]["data_offsets"]):
                begin, end = entry["data_offsets"]
                shape = tuple(entry["shape"])
                if begin != at or end < begin or any(type(n) is not int or n < 0 for n in (begin, end, *shape)):
                    raise ValueError("offsets")
                at = end
                found.append(TensorInfo(name, dtype_name(entry["dtype"]), shape, math.prod(shape), file, end - begin))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise self.bad(f"has a header of {printable(file)} that is not valid") from None
        return found

    def _complete(self) -> None:
        """Every tensor of the files is in the manifest, once, its data in the patch, and nothing else is."""
        stored = {f"beside:{name}": beside.digest for name, beside in self.manifest.beside.items() if beside.stored}
        for key, expected in stored.items():
            self.small(key, expected)
        infos = [info for file in self.files.values() for info in file]
        tensors = self.manifest.tensors
        if sorted(info.name for info in infos) != sorted(tensors):
            raise self.bad("makes other tensors than its manifest lists")
        for info in infos:
            tensor = tensors[info.name]
            data = self.entry(tensor.data)
            whole = (tensor.source, tensor.source_digest) == (None, None) and _same(data, info)
            changes = (
                None not in (tensor.source, tensor.source_digest)
                and data.dtype == "u8"
                and tensor.data.startswith("changes:")
            )
            if not whole and not changes:
                raise self.bad(f"holds tensor {printable(info.name)} neither whole nor as changes")
        listed = {*stored, *(f"header:{name}" for name in self.headers), *(tensor.data for tensor in tensors.values())}
        if self._file.tensors.keys() != listed:
            raise self.bad("holds what its manifest does not list")
        trained = digest_all({name: tensor.digest for name, tensor in tensors.items()})
        if (digest_all(source_digests(tensors.values())), trained) != (
            self.manifest.source_digest,
            self.manifest.digest,
        ):
            raise self.bad("has digests of the whole that are not those of its tensors")

    def close(self) -> None:
        self._file.close()
        self._buffer.clear()


def _same(one: TensorInfo, other: TensorInfo) -> bool:
    return (one.dtype, one.shape, one.nbytes) == (other.dtype, other.shape, other.nbytes)


def info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a patch holds, from its header alone. Raises InputError where it is damaged or no patch."""
    with contextlib.closing(Patch(path)) as patch:
        return summary(patch)


def summary(patch: Patch) -> dict[str, Any]:
    """Digests, counts and sizes; `items` are coordinates (halves of 16-byte ones, bytes of those that share one)."""
    tensors = patch.manifest.tensors
    infos = [info for file in patch.files.values() for info in file]
    changed = [info for info in infos if tensors[info.name].source is not None]
    items, bytes_trained = sum(info.items for info in changed), sum(info.nbytes for info in infos)
    n_changed = sum(tensors[info.name].changed for info in changed)
    return {
        "path": patch.path,
        "version": int(VERSION),
        "source_digest": patch.manifest.source_digest,
        "trained_digest": patch.manifest.digest,
        "files": list(patch.files),
        "beside": {
            name: "stored" if beside.stored else "from the source" for name, beside in patch.manifest.beside.items()
        },
        "tensors": len(infos),
        "tensors_unchanged": sum(not tensors[info.name].changed for info in changed),
        "tensors_whole": sorted(info.name for info in infos if tensors[info.name].source is None),
        "items": items,
        "changed": n_changed,
        "density": n_changed / items if items else 0.0,
        "values": patch.manifest.values,
        "bytes": patch.nbytes,
        "bytes_trained": bytes_trained,
        "share": patch.nbytes / bytes_trained if bytes_trained else 0.0,
    }


def format_text(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    whole = found["tensors_whole"]
    text = [
        f"{printable(found['path'])}: {byte_size(found['bytes'])}, {percent(found['share'])} of the {byte_size(found['bytes_trained'])} it makes",
        f"from   {found['source_digest']}",
        f"makes  {found['trained_digest']}: {', '.join(map(printable, found['files']))}",
        f"changed {found['changed']:,} of {found['items']:,} ({percent(found['density'])}), {found['tensors']} tensors, {found['tensors_unchanged']} of them unchanged",
    ]
    if whole:
        text.append(
            f"whole   {', '.join(map(printable, whole[:4]))}"
            + (f" and {len(whole) - 4} more" if len(whole) > 4 else "")
        )
    if found["beside"]:
        text.append("beside  " + ", ".join(f"{printable(name)} ({how})" for name, how in found["beside"].items()))
    for name in found.get("left_out", ()):
        text.append(f"left out: {printable(name)}, which the source folder lacks or has otherwise; copy it yourself")
    return text
