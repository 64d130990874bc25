"""What is fuzzed: valid files, their damage, and what has to hold for a damaged file.

A file is refused with an error of the package, of one line, or accepted; then its tensors must equal those of an
independent decoding.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import random
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch

from opdkernels.api import analyze, write_report
from opdkernels.checkpoint.io import Buffer
from opdkernels.checkpoint.open import open_checkpoint
from opdkernels.checkpoint.safetensors import SafetensorsFile
from opdkernels.errors import InputError, UsageError
from opdkernels.masks import Mask, MaskSet
from opdkernels.outputs import EXPERIMENT
from opdkernels.patch import apply_to, create
from tests.robustness.mutations import damage_bytes, damage_json, json_text

Check = Callable[[random.Random], bool]
"""Makes one damaged file and reads it; whether it was accepted. Raises AssertionError for wrong content."""


class Wrong(AssertionError):
    """A file was accepted with other content than an independent reader finds."""


def refused(call: Callable[[], Any]) -> bool:
    """Whether a call raises one of the package's errors, which must be one printable line."""
    try:
        call()
    except (InputError, UsageError) as error:
        message = str(error)
        if not message.isprintable() or len(message) > 2000:
            raise Wrong(f"the message is not one short line: {message[:3000]!r}") from None
        return True
    return False


def tensors_of(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.embed_tokens.weight": torch.randn(6, 4, generator=generator).bfloat16(),
        "model.layers.0.mlp.up_proj.weight": torch.randn(5, 4, generator=generator),
        "model.norm.weight": torch.ones(4, dtype=torch.float16),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "steps": torch.arange(3),
    }


def raw(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def damage_safetensors(rng: random.Random, content: bytes) -> bytes:
    """Damage of the header's JSON, of its length, or of any byte."""
    kind = rng.randrange(8)
    if kind == 0:
        return damage_bytes(rng, content)
    header, data = split(content)
    if kind <= 2:
        length = int.from_bytes(content[:8], "little")
        damaged = damage_bytes(rng, content[8 : 8 + length])
        return raw(damaged, data)
    if kind == 3:
        text = json.dumps(header).encode()
        return raw(text, data, rng.choice((0, 1, len(text) - 1, len(text) + 1, 2**31, 2**63, 2**64 - 1)))
    return raw(json_text(rng, damage_json(rng, header)).encode("utf-8", "surrogatepass"), data)


class Headers:
    """Headers of safetensors files."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "model.safetensors"
        self.valid = [
            safetensors.torch.save(tensors_of(0), {"format": "pt", "note": "a, b [c] {d}"}),
            safetensors.torch.save({"w": torch.ones(2, 3)}),
            safetensors.torch.save({}),
        ]

    def __call__(self, rng: random.Random) -> bool:
        content = damage_safetensors(rng, rng.choice(self.valid))
        self.path.write_bytes(content)
        opened: list[SafetensorsFile] = []
        if refused(lambda: opened.append(SafetensorsFile(str(self.path), "read"))):
            return False
        (file,) = opened
        try:
            header, data = split(content)
            header.pop("__metadata__", None)
            if sorted(header) != sorted(file.tensors):
                raise Wrong(f"names {sorted(file.tensors)}, not {sorted(header)}")
            for name, entry in header.items():
                info = file.tensors[name]
                begin, end = entry["data_offsets"]
                if (list(info.shape), info.nbytes) != (entry["shape"], end - begin):
                    raise Wrong(f"{name} is {info}, not {entry}")
                bits = file.read_bits(name, 0, info.items, Buffer()).view(torch.uint8).numpy().tobytes()
                if bits != data[begin:end]:
                    raise Wrong(f"{name} has other bytes")
        finally:
            file.close()
        if rng.randrange(16) == 0:
            refused(lambda: open_checkpoint(self.path, io="read").close())
        return True


class Patches:
    """Patches, with new values and with differences; manifests are signed again after their damage."""

    def __init__(self, folder: Path) -> None:
        base, trained = tensors_of(0), tensors_of(0)
        trained["model.embed_tokens.weight"][2:4] += 1
        trained["model.layers.0.mlp.up_proj.weight"][0, 1] = 9.0
        for name, tensors in (("base", base), ("trained", trained)):
            (folder / name).mkdir(exist_ok=True)
            safetensors.torch.save_file(tensors, folder / name / "model.safetensors")
        self.base, self.trained = base, trained
        self.path = folder / "damaged.patch"
        self.valid = []
        for i, options in enumerate(({}, {"zstd": True})):
            create(folder / "base", folder / "trained", folder / f"{i}.patch", **options)
            self.valid.append((folder / f"{i}.patch").read_bytes())

    def damage(self, rng: random.Random, content: bytes) -> bytes:
        if rng.randrange(3):
            return damage_safetensors(rng, content)
        header, data = split(content)
        metadata = header["__metadata__"]
        manifest = json_text(rng, damage_json(rng, json.loads(metadata["manifest"])))
        metadata["manifest"] = manifest
        digest = hashlib.blake2b(manifest.encode("utf-8", "surrogatepass"), digest_size=16)
        metadata["manifest_digest"] = digest.hexdigest()
        return raw(json.dumps(header).encode(), data)

    def __call__(self, rng: random.Random) -> bool:
        self.path.write_bytes(self.damage(rng, rng.choice(self.valid)))
        live = {name: tensor.clone() for name, tensor in self.base.items()}
        if refused(lambda: apply_to(live, self.path)):
            if any(not torch.equal(live[name], tensor) for name, tensor in self.base.items()):
                raise Wrong("a patch that was refused changed a tensor")
            return False
        for name, tensor in self.trained.items():
            if not torch.equal(live[name], tensor):
                raise Wrong(f"{name} is not the trained tensor")
        return True


class Masks:
    """Files of masks; the digest of the list is computed again after its damage."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "damaged.masks.safetensors"
        generator = torch.Generator().manual_seed(0)
        masks = {
            "a.weight": Mask.from_bool(torch.rand(9, 7, generator=generator) < 0.5),
            "b.weight": Mask.from_indices(torch.tensor([3, 900, 3999]), (40, 100)),
            "empty": Mask.from_bool(torch.zeros(0, 3, dtype=torch.bool)),
            "none": Mask.from_indices(torch.zeros(0, dtype=torch.int64), (50,)),
        }
        MaskSet(masks).save(folder / "valid.masks.safetensors")
        self.valid = (folder / "valid.masks.safetensors").read_bytes()

    def damage(self, rng: random.Random) -> bytes:
        if rng.randrange(3) == 0:
            return damage_safetensors(rng, self.valid)
        header, data = split(self.valid)
        metadata = header["__metadata__"]
        entries = damage_json(rng, json.loads(metadata["masks"]))
        metadata["masks"] = json_text(rng, entries)
        try:
            parts = [[entry["name"], entry["digest"]] for entry in entries]
            metadata["digest"] = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()
        except (TypeError, KeyError, IndexError):
            pass
        if rng.randrange(4) == 0:
            data = damage_bytes(rng, data)
        return raw(json.dumps(header).encode(), data)

    def __call__(self, rng: random.Random) -> bool:
        content = self.damage(rng)
        self.path.write_bytes(content)
        loaded: list[dict[str, Mask]] = []
        if refused(lambda: loaded.append(dict(MaskSet.load(self.path).items()))):
            return False
        header, data = split(content)
        for i, entry in enumerate(json.loads(header["__metadata__"]["masks"])):
            numel = math.prod(entry["shape"])
            layout = "bitmap" if f"{i}.bitmap" in header else "indices"
            stored = header[f"{i}.{layout}"]
            payload = data[slice(*stored["data_offsets"])]
            active = np.zeros(numel, bool)
            if layout == "bitmap":
                active[:] = np.unpackbits(np.frombuffer(payload, np.uint8), bitorder="little", count=numel)
            else:
                active[np.frombuffer(payload, {"I32": np.int32, "I64": np.int64}[stored["dtype"]])] = True
            mask = loaded[0][entry["name"]]
            if list(mask.shape) != entry["shape"] or not np.array_equal(mask.to_bool().numpy().reshape(-1), active):
                raise Wrong(f"the mask of {entry['name']} has other coordinates")
        return True


class TorchFiles:
    """PyTorch files, as archives and as torch wrote them before 1.6; pickles are damaged inside intact archives too."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "pytorch_model.bin"
        weights = tensors_of(0)
        weights["transposed"] = torch.arange(12.0).view(3, 4).T
        weights["tied"] = weights["model.embed_tokens.weight"]
        training = {
            "model": OrderedDict(weights),
            "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"betas": (0.9, 0.99)}]},
            "step": 3,
            "loss": np.float64(1.5),
        }
        self.valid = []
        for content in (weights, training):
            for options in ({}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}):
                buffer = io.BytesIO()
                torch.save(content, buffer, **options)
                self.valid.append(buffer.getvalue())

    def damage(self, rng: random.Random) -> bytes:
        content = rng.choice(self.valid)
        if content[:2] != b"PK" or rng.randrange(3) == 0:
            return damage_bytes(rng, content)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            records = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, record in records:
                archive.writestr(name, damage_bytes(rng, record, first=2) if name.endswith("data.pkl") else record)
        return buffer.getvalue()

    def __call__(self, rng: random.Random) -> bool:
        self.path.write_bytes(self.damage(rng))
        opened: list[Any] = []
        if refused(lambda: opened.append(open_checkpoint(self.path, io="read", any_tensors=True))):
            return False
        checkpoint = opened[0]
        try:
            expected = load_with_torch(self.path)
            for name, info in checkpoint.tensors.items():
                bits = checkpoint.read_bits(name, 0, info.items).view(torch.uint8).numpy().tobytes()
                tensor = expected.get(name)
                if tensor is None:
                    continue  # torch refuses the file, or names differ by what is no text
                plain = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
                if tuple(tensor.shape) != info.shape or plain.view(torch.uint8).numpy().tobytes() != bits:
                    raise Wrong(f"{name} differs from torch.load")
        finally:
            checkpoint.close()
        return True


def load_with_torch(path: Path) -> dict[str, torch.Tensor]:
    """The tensors that torch.load finds; none if it refuses the file."""
    try:
        table = torch.load(path, weights_only=True)
        table = table["model"] if isinstance(table.get("model"), dict) else table
        return {name: value for name, value in table.items() if isinstance(value, torch.Tensor)}
    except Exception:
        return {}


def experiment_results() -> dict[str, Any]:
    def row(arm: str, score: float, **more: float | None) -> dict[str, Any]:
        spread = {"score": score, "score_low": score - 0.05, "score_high": score + 0.05}
        return {"arm": arm, **spread, **more}

    gain = {"gain_retained": 0.8, "gain_retained_low": 0.7, "gain_retained_high": 0.9}
    snapshot = {"changed_visible": 0.1, "changed_stored": 0.2, "recall_vs_final": 0.5, "precision_vs_final": None}
    return {
        "experiment": "masks",
        "about": "Why?",
        "seeds": 2,
        "prompts": 50,
        "steps": 10,
        "density": 0.2,
        "reference_arm": "full",
        "student": "a",
        "teacher": "b",
        "task": "addition",
        "options": {"learning_rate": 0.1, "seed": 3},
        "rows": [
            row("start", 0.2),
            row("full", 0.7, trained=1.0, changed_visible=0.3, **gain),
            row("changed", 0.6, trained=0.2, mask_recall=None, **gain),
        ],
        "snapshots": [{"step": step, **snapshot} for step in (0, 5, 10)],
    }


class Results:
    """results.json of each experiment."""

    KINDS = ("masks", "sgd", "on-policy", "precision", "trajectory", "subspace", "grafts")

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "experiment"
        self.folder.mkdir()
        (self.folder / "run.json").write_text(json.dumps({"format": EXPERIMENT.format, "experiment": "masks"}))

    def __call__(self, rng: random.Random) -> bool:
        results = {**experiment_results(), "experiment": rng.choice(self.KINDS)}
        text = json_text(rng, damage_json(rng, results)) if rng.randrange(10) else json.dumps(results)
        content = text.encode("utf-8", "surrogatepass")
        (self.folder / "results.json").write_bytes(damage_bytes(rng, content) if rng.randrange(4) == 0 else content)
        return not refused(lambda: write_report(self.folder))


class Runs:
    """run.json, summary.json and tables of a run of analyze."""

    FILES = ("run.json", "summary.json", "tensors.parquet", "groups.parquet", "spectra.parquet")

    def __init__(self, folder: Path) -> None:
        base, trained = tensors_of(0), tensors_of(0)
        trained["model.layers.0.mlp.up_proj.weight"][0, 1] = 9.0
        for name, tensors in (("run-base", base), ("run-trained", trained)):
            safetensors.torch.save_file(tensors, folder / f"{name}.safetensors")
        self.folder = folder / "run"
        analyze(folder / "run-base.safetensors", folder / "run-trained.safetensors", self.folder)
        self.valid = {name: (self.folder / name).read_bytes() for name in self.FILES}
        self.records = {path: path.read_bytes() for path in self.folder.glob("*/*.arrow")}

    def __call__(self, rng: random.Random) -> bool:
        if rng.randrange(8) == 0:
            path = rng.choice(sorted(self.records))
            content, damaged = self.records[path], damage_bytes(rng, self.records[path])
        else:
            name = rng.choice(self.FILES)
            path, content = self.folder / name, self.valid[name]
            if name.endswith(".json") and rng.randrange(5):
                damaged = json_text(rng, damage_json(rng, json.loads(content))).encode("utf-8", "surrogatepass")
            else:
                damaged = damage_bytes(rng, content)
        path.write_bytes(damaged)
        if path.name == "summary.json":  # with its digest, so that its content is read
            run = json.loads(self.valid["run.json"])
            run["outputs"][path.name] = hashlib.blake2b(damaged, digest_size=16).hexdigest()
            (self.folder / "run.json").write_text(json.dumps(run))
        try:
            return not refused(lambda: write_report(self.folder))
        finally:
            path.write_bytes(content)
            (self.folder / "run.json").write_bytes(self.valid["run.json"])


class Target(NamedTuple):
    """A kind of file, and how many damaged ones `make fuzz` reads."""

    make: Callable[[Path], Check]
    count: int


TARGETS = {
    "safetensors headers": Target(Headers, 1_000_000),
    "patches": Target(Patches, 100_000),
    "mask files": Target(Masks, 20_000),
    "torch files": Target(TorchFiles, 20_000),
    "results.json": Target(Results, 5_000),
    "run folders": Target(Runs, 5_000),
}
