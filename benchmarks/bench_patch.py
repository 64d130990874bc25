"""`patch` at 17 % changed coordinates.

Gather and scatter against eager PyTorch, create and apply against copying, sizes against zstd.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.harness import paired
from opdkernels import patch
from opdkernels.backends.cpu import native
from opdkernels.benchmark.eager import eager_gather, eager_scatter
from opdkernels.ops.patch import GatherBuffers, bits, gather, scatter

DENSITY = 0.17


@pytest.fixture(scope="session")
def pair(embedding) -> tuple[torch.Tensor, torch.Tensor]:
    """The embedding before and after training."""
    return embedding[0], thinned(*embedding[:2])


def thinned(base: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
    """The trained tensor with changes reverted until 17 % of the coordinates are changed."""
    changed = bits(base) != bits(trained)
    fraction = DENSITY * base.numel() / max(int(changed.sum()), 1)
    keep = torch.rand(base.shape, generator=torch.Generator().manual_seed(0)) < fraction
    return torch.where(keep, trained, base)


@pytest.fixture(scope="session")
def checkpoints(folder, tmp_path_factory) -> tuple[Path, Path]:
    """The base, and a trained checkpoint with 17 % of the coordinates changed; 1 GB each."""
    out = tmp_path_factory.mktemp("thinned")
    for file in sorted((folder / "source").glob("*.safetensors")):
        base, trained = load_file(file), load_file(folder / "run_a" / file.name)
        save_file(
            {name: thinned(base[name], trained[name]) for name in base}, out / file.name, metadata={"format": "pt"}
        )
    for name in ("config.json", "model.safetensors.index.json"):
        shutil.copy(folder / "run_a" / name, out / name)
    return folder / "source", out


@pytest.mark.parametrize("isa", native.available_isas())
@pytest.mark.parametrize("threads", [1, 2])
def test_gather_and_scatter_of_a_bf16_pair(benchmark, row, pair, bandwidth, isa, threads):
    """Bytes: both tensors read, changes written; the base and the changes read, the trained tensor written."""
    base, trained = pair
    before, cores = native.current_isa(), torch.get_num_threads()
    native.use_isa(isa)
    torch.set_num_threads(threads)
    buffers, out = GatherBuffers.of(base.numel(), 2), torch.empty_like(base)
    changes, digests = gather(base, trained, buffers=buffers)
    seconds = paired(
        {"gather": lambda: gather(base, trained, buffers=buffers), "scatter": lambda: scatter(base, changes, out=out)}
    )
    _, after = benchmark.pedantic(lambda: scatter(base, changes, out=out), rounds=3)
    native.use_isa(before)
    torch.set_num_threads(cores)
    assert torch.equal(bits(out), bits(trained))
    assert torch.equal(after, digests[1])
    stored = changes.positions.nbytes + changes.values.nbytes
    total_bytes = 2 * base.nbytes + stored
    row(
        gather_s=seconds["gather"],
        scatter_s=seconds["scatter"],
        changed=changes.changed / base.numel(),
        stored_over_trained=stored / trained.nbytes,
        gather_bytes_per_s=total_bytes / seconds["gather"],
        gather_fraction_of_read=total_bytes / seconds["gather"] / bandwidth[threads],
        scatter_bytes_per_s=total_bytes / seconds["scatter"],
        scatter_fraction_of_read=total_bytes / seconds["scatter"] / bandwidth[threads],
    )


def test_gather_and_scatter_against_eager(benchmark, row, pair, one_thread):
    base, trained = (side[:4_358_144] for side in pair)
    buffers, out = GatherBuffers.of(base.numel(), 2), torch.empty_like(base)
    changes, _ = gather(base, trained, buffers=buffers)
    w, v = bits(base), bits(trained)
    indices, values = eager_gather(w, v)
    seconds = paired(
        {
            "gather": lambda: gather(base, trained, buffers=buffers),
            "eager gather": lambda: eager_gather(w, v),
            "scatter": lambda: scatter(base, changes, out=out),
            "eager scatter": lambda: eager_scatter(w, indices.long(), values),
        }
    )
    benchmark.pedantic(lambda: gather(base, trained, buffers=buffers), rounds=3)
    assert torch.equal(values, changes.values)
    assert torch.equal(eager_scatter(w, indices.long(), values), bits(out))
    row(
        gather_s=seconds["gather"],
        scatter_s=seconds["scatter"],
        over_eager_gather=seconds["eager gather"] / seconds["gather"],
        over_eager_scatter=seconds["eager scatter"] / seconds["scatter"],
        stored_over_eager=(changes.positions.nbytes + changes.values.nbytes) / (indices.nbytes + values.nbytes),
    )


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def zstd_bytes(folder: Path) -> int:
    """The weights, compressed as they are, 8 MiB at a time."""
    codec, size = pa.Codec("zstd"), 0
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            while piece := file.read(1 << 23):
                size += len(codec.compress(piece, asbytes=True))
    return size


@pytest.mark.parametrize("zstd", [False, True], ids=["plain", "zstd"])
def test_create_and_apply_a_checkpoint(benchmark, row, checkpoints, bandwidth, tmp_path, zstd):
    """The complete call, files in memory.

    Bytes: both checkpoints or base and patch read, patch or trained tensor written, each once.
    """
    base, trained = checkpoints
    path, out, copy = tmp_path / "p", tmp_path / "out", tmp_path / "copy"

    def create():
        return patch.create(base, trained, path, zstd=zstd, overwrite=True)

    def apply():
        shutil.rmtree(out, ignore_errors=True)
        return patch.apply(base, path, out)

    def copied():
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(trained, copy)

    seconds = paired({"create": create, "apply": apply, "copy": copied}, rounds=5)
    summary = benchmark.pedantic(apply, rounds=1)
    assert hashes(out) == hashes(trained)
    total_bytes = 2 * summary["bytes_trained"] + summary["bytes"]
    row(
        create_s=seconds["create"],
        apply_s=seconds["apply"],
        create_fraction_of_read=total_bytes / seconds["create"] / bandwidth[2],
        apply_fraction_of_read=total_bytes / seconds["apply"] / bandwidth[2],
        copy_s=seconds["copy"],
        density=summary["density"],
        patch_over_trained=summary["fraction"],
        zstd_of_trained_over_trained=zstd_bytes(trained) / summary["bytes_trained"],
    )
