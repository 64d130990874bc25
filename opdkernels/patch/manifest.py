"""The manifest of a patch, and an open patch: which files it gives, from which tensors, with which digests."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from opdkernels.checkpoint.base import MAX_DIMS, MAX_HEADER_BYTES, TensorInfo
from opdkernels.checkpoint.io import Buffer, choose_io
from opdkernels.checkpoint.safetensors import SafetensorsFile, check_structure, dtype_name, stored_dtype
from opdkernels.errors import InputError, printable
from opdkernels.formatting import byte_size, percent
from opdkernels.models import Strict, validate
from opdkernels.outputs import PATCH
from opdkernels.untrusted import parse_json, unique_keys

FORMAT, VERSION = PATCH.format, "1"
EXTRA_FILE_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
MAX_EXTRA_FILE_BYTES = 1 << 26
"""A patch contains configuration and tokenizer of the trained folder: no code, and no file over 64 MiB."""

DAMAGED = "it is damaged or not a patch; copy or create it again"

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class Tensor(Strict):
    """One trained tensor: its base tensor (None: stored in full), the entry of its data, digests, changed items."""

    base: str | None
    base_digest: Digest | None
    digest: Digest
    data: str
    changed: int = Field(ge=0)


class ExtraFile(Strict):
    """A file of configuration or tokenizer: in the patch if `stored`, else in the base's folder."""

    stored: bool
    digest: Digest


class Manifest(Strict):
    values: Literal["new", "difference"]
    base_digest: Digest
    digest: Digest
    headers: dict[str, Digest]
    extra_files: dict[str, ExtraFile]
    tensors: dict[str, Tensor]


def digest_bytes(content: bytes | memoryview) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


class TensorDigest:
    """Digest of a tensor: blake2b-128 of its dtype, its shape and the XXH3 digests of its blocks, in order."""

    def __init__(self, info: TensorInfo) -> None:
        described = f"{stored_dtype(info.dtype)} {'x'.join(map(str, info.shape))}\n"
        self._hash = hashlib.blake2b(described.encode(), digest_size=16)

    def add(self, blocks: torch.Tensor) -> None:
        self._hash.update(blocks.numpy().tobytes())

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def digest_all(tensors: Mapping[str, str]) -> str:
    """Returns the digest of named tensors: that of the JSON of their names and digests, sorted by name."""
    return digest_bytes(json.dumps(sorted(tensors.items()), separators=(",", ":")).encode())


def base_digests(tensors: Iterable[Tensor]) -> dict[str, str]:
    """Returns the digests of the base tensors that a patch was made from, by name."""
    return {t.base: t.base_digest for t in tensors if t.base is not None and t.base_digest is not None}


def metadata_of(manifest: Manifest) -> dict[str, str]:
    """Returns the metadata of a patch's header."""
    text = manifest.model_dump_json()
    return {
        "format": FORMAT,
        "version": VERSION,
        "base_digest": manifest.base_digest,
        "trained_digest": manifest.digest,
        "manifest": text,
        "manifest_digest": digest_bytes(text.encode()),
    }


class Patch:
    """An open patch. Raises InputError for anything but an undamaged patch of this version.

    Attributes:
        manifest: The validated manifest.
        files: The files that the patch gives, and their tensors in the order of the bytes.
        headers: The safetensors header of each file, with its length.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._buffer = Buffer()
        remedy = "give a file that patch create wrote"
        self._file = SafetensorsFile(self.path, choose_io("auto", self.path), remedy=remedy)
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
        return InputError(f"{printable(self.path)} {what[:500]}: {DAMAGED}")

    def _manifest(self, metadata: dict[str, str]) -> Manifest:
        if metadata.get("format") != FORMAT:
            raise InputError(
                f"{printable(self.path)} is a safetensors file but not a patch; give a file that patch create wrote"
            )
        if metadata.get("version") != VERSION:
            raise InputError(
                f"{printable(self.path)} is a patch of version {printable(str(metadata.get('version'))[:20])};"
                f" this version of opdkernels reads version {VERSION}: update opdkernels"
            )
        text = metadata.get("manifest", "")
        if digest_bytes(text.encode("utf-8", "surrogatepass")) != metadata.get("manifest_digest"):
            raise self.bad("has a manifest with a wrong digest")
        shown = f"{printable(self.path)}: its manifest"
        manifest = validate(Manifest, parse_json(text, shown, remedy=DAMAGED), shown, remedy=DAMAGED)
        if metadata_of(manifest) | {"manifest": "", "manifest_digest": ""} != metadata | {
            "manifest": "",
            "manifest_digest": "",
        }:
            raise self.bad("has metadata that do not match its manifest")
        self._check_names(manifest)
        return manifest

    def _check_names(self, manifest: Manifest) -> None:
        names = [*manifest.headers, *manifest.extra_files]
        for name in names:
            # Untrusted: joined to the folder unchecked, "../../x" or "/x" would leave it.
            if (
                name.startswith(".")
                or any(c in "/\\:\0" for c in name)
                or not name.isprintable()
                or len(name.encode()) > 255
            ):
                raise self.bad(f"gives a file {printable(name)}, which is not a plain file name")
        if any(not name.endswith(".safetensors") for name in manifest.headers) or not manifest.headers:
            raise self.bad("gives no file of weights, or one whose name does not end with .safetensors")
        if any(not name.endswith(EXTRA_FILE_SUFFIXES) for name in manifest.extra_files):
            raise self.bad(f"gives an extra file that is none of {', '.join(EXTRA_FILE_SUFFIXES)}")
        if len({name.casefold() for name in names}) < len(names):
            raise self.bad("gives two files of one name")

    def small(self, key: str, expected: str) -> bytes:
        """Returns the content of a small entry, verified by its digest."""
        info = self.entry(key)
        if info.dtype != "u8":
            raise self.bad(f"has {printable(key)} as {printable(info.dtype)} instead of bytes")
        if info.nbytes > MAX_HEADER_BYTES + 8:
            raise self.bad(f"has {printable(key)} of {info.nbytes} bytes, more than the {MAX_HEADER_BYTES} allowed")
        content = self.read(key, 0, info.nbytes).numpy().tobytes()
        if digest_bytes(content) != expected:
            raise self.bad(f"has {printable(key)} with a wrong digest")
        return content

    def entry(self, key: str) -> TensorInfo:
        info = self._file.tensors.get(key)
        if info is None:
            raise self.bad(f"lacks {printable(key)}")
        return info

    def read(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Returns items [start, stop) of an entry, as `Checkpoint.read_bits`."""
        return self._file.read_bits(key, start, stop, self._buffer)

    def keep(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Returns the same, valid beyond the next read."""
        items = self.read(key, start, stop)
        return items if self._file.is_mapped else items.clone()

    def _tensors(self, file: str, header: bytes) -> list[TensorInfo]:
        """Returns the tensors that a file's header describes; their sizes are not yet compared with their data."""
        check_structure(f"{printable(self.path)}: {printable(file)}", header)
        try:
            if int.from_bytes(header[:8], "little") != len(header) - 8:
                raise ValueError("length")
            table = json.loads(header[8:], object_pairs_hook=unique_keys)
            table.pop("__metadata__", None)
            infos, offset = [], 0
            for name, entry in sorted(table.items(), key=lambda item: item[1]["data_offsets"]):
                begin, end = entry["data_offsets"]
                shape = tuple(entry["shape"])
                if len(shape) > MAX_DIMS:
                    raise ValueError("dimensions")
                if begin != offset or end < begin or any(type(n) is not int or n < 0 for n in (begin, end, *shape)):
                    raise ValueError("offsets")
                offset = end
                infos.append(TensorInfo(name, dtype_name(entry["dtype"]), shape, math.prod(shape), file, end - begin))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise self.bad(f"has a header of {printable(file)} that is not valid") from None
        return infos

    def _complete(self) -> None:
        """Raises InputError unless manifest and entries list exactly the tensors of the files."""
        stored = {f"extra:{name}": extra.digest for name, extra in self.manifest.extra_files.items() if extra.stored}
        for key, expected in stored.items():
            self.small(key, expected)
        infos = [info for file in self.files.values() for info in file]
        tensors = self.manifest.tensors
        if sorted(info.name for info in infos) != sorted(tensors):
            raise self.bad("gives other tensors than its manifest lists")
        for info in infos:
            tensor = tensors[info.name]
            data = self.entry(tensor.data)
            stored_in_full = (tensor.base, tensor.base_digest) == (None, None) and _same(data, info)
            changes = (
                None not in (tensor.base, tensor.base_digest)
                and data.dtype == "u8"
                and tensor.data.startswith("changes:")
            )
            if not stored_in_full and not changes:
                raise self.bad(f"holds tensor {printable(info.name)} neither in full nor as changes")
        listed = {*stored, *(f"header:{name}" for name in self.headers), *(tensor.data for tensor in tensors.values())}
        if self._file.tensors.keys() != listed:
            raise self.bad("has an entry that its manifest does not list")
        trained = digest_all({name: tensor.digest for name, tensor in tensors.items()})
        if (digest_all(base_digests(tensors.values())), trained) != (
            self.manifest.base_digest,
            self.manifest.digest,
        ):
            raise self.bad("has digests of the checkpoints that do not match its tensors")

    def close(self) -> None:
        self._file.close()
        self._buffer.clear()


def _same(a: TensorInfo, b: TensorInfo) -> bool:
    return (a.dtype, a.shape, a.nbytes) == (b.dtype, b.shape, b.nbytes)


def info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns what a patch contains, from its header alone.

    Args:
        path: File that `create` wrote.

    Returns:
        Digests of both checkpoints, files, and numbers of tensors, items, changed items and bytes. `items` are
        coordinates (halves of 16-byte elements, bytes of elements that share one). `density` is the fraction of items
        that changed, `fraction` the size of the patch relative to the trained checkpoint.

    Raises:
        InputError: The file is damaged or not a patch.
    """
    with contextlib.closing(Patch(path)) as patch:
        return summary(patch)


def summary(patch: Patch) -> dict[str, Any]:
    """Returns the result of `info` for an open patch."""
    tensors = patch.manifest.tensors
    infos = [info for file in patch.files.values() for info in file]
    changed = [info for info in infos if tensors[info.name].base is not None]
    items, bytes_trained = sum(info.items for info in changed), sum(info.nbytes for info in infos)
    n_changed = sum(tensors[info.name].changed for info in changed)
    return {
        "path": patch.path,
        "version": int(VERSION),
        "base_digest": patch.manifest.base_digest,
        "trained_digest": patch.manifest.digest,
        "files": list(patch.files),
        "extra_files": {
            name: "stored" if extra.stored else "from the base" for name, extra in patch.manifest.extra_files.items()
        },
        "tensors": len(infos),
        "tensors_unchanged": sum(not tensors[info.name].changed for info in changed),
        "tensors_whole": sorted(info.name for info in infos if tensors[info.name].base is None),
        "items": items,
        "changed": n_changed,
        "density": n_changed / items if items else 0.0,
        "values": patch.manifest.values,
        "bytes": patch.nbytes,
        "bytes_trained": bytes_trained,
        "fraction": patch.nbytes / bytes_trained if bytes_trained else 0.0,
    }


def format_text(result: dict[str, Any]) -> list[str]:
    """Returns the lines of text that show a result of `info` or `create`."""
    stored_in_full = result["tensors_whole"]
    text = [
        f"{printable(result['path'])}: {byte_size(result['bytes'])}, {percent(result['fraction'])} of the"
        f" {byte_size(result['bytes_trained'])} checkpoint that it restores",
        f"from   {result['base_digest']}",
        f"result {result['trained_digest']}: {', '.join(map(printable, result['files']))}",
        f"changed {result['changed']:,} of {result['items']:,} ({percent(result['density'])}),"
        f" {result['tensors']} tensors, {result['tensors_unchanged']} of them unchanged",
    ]
    if stored_in_full:
        text.append(
            f"in full {', '.join(map(printable, stored_in_full[:4]))}"
            + (f" and {len(stored_in_full) - 4} more" if len(stored_in_full) > 4 else "")
        )
    return [*text, *extra_file_lines(result)]


def format_applied(result: dict[str, Any], out: str) -> list[str]:
    """Returns the lines of text that show a result of `apply`, which wrote the folder `out`."""
    files = ", ".join(map(printable, result["files"]))
    return [
        f"{printable(out)}: restored {files}, {byte_size(result['bytes_trained'])}",
        f"verified: the output has the digest of the trained checkpoint, {result['trained_digest']}",
        *extra_file_lines(result),
        *(
            f"left out: {printable(name)}, which the base folder lacks or has otherwise; copy it yourself"
            for name in result["left_out"]
        ),
    ]


def extra_file_lines(result: dict[str, Any]) -> list[str]:
    """The files next to the weights, and where they come from, on one line; no line if there are none. Files that
    `apply` left out are not among them."""
    left_out = result.get("left_out", ())
    written = [(name, how) for name, how in result["extra_files"].items() if name not in left_out]
    files = ", ".join(f"{printable(name)} ({how})" for name, how in written)
    return [f"files   {files}"] if files else []
