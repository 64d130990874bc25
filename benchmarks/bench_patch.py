"""`patch`: gather and scatter of 17 % changed coordinates, share of the read bandwidth, against eager PyTorch."""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness import paired
from opdkernels.backends.cpu import _C
from opdkernels.ops.patch import Room, bits, gather, scatter

DENSITY = 0.17


@pytest.fixture(scope="session")
def pair(embedding) -> tuple[torch.Tensor, torch.Tensor]:
    """The embedding before and after training, some changes taken back so that 17 % are left."""
    source, trained, _ = embedding
    changed = bits(source) != bits(trained)
    keep = torch.rand(source.numel(), generator=torch.Generator().manual_seed(0)) < DENSITY * source.numel() / int(changed.sum())
    return source, torch.where(keep, trained, source)


def eager_gather(source: torch.Tensor, trained: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices as int32 and values: what one would write in PyTorch."""
    changed = (bits(source) != bits(trained)).nonzero().flatten()
    return changed.int(), trained[changed]


def eager_scatter(source: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return source.clone().index_copy_(0, indices.long(), values)


@pytest.mark.parametrize("isa", _C.available_isas())
@pytest.mark.parametrize("threads", [1, 2])
def test_gather_and_scatter_of_a_bf16_pair(benchmark, row, pair, bandwidth, isa, threads):
    """Bytes: both sides read and the changes written; the source and the changes read and the trained side written."""
    source, trained = pair
    before, cores = _C.current_isa(), torch.get_num_threads()
    _C.use_isa(isa)
    torch.set_num_threads(threads)
    room, out = Room.of(source.numel(), 2), torch.empty_like(source)
    changes, digests = gather(source, trained, room=room)
    seconds = paired({"gather": lambda: gather(source, trained, room=room), "scatter": lambda: scatter(source, changes, out=out)})
    _, after = benchmark.pedantic(lambda: scatter(source, changes, out=out), rounds=3)
    _C.use_isa(before)
    torch.set_num_threads(cores)
    assert torch.equal(bits(out), bits(trained))
    assert torch.equal(after, digests[1])
    stored = changes.positions.nbytes + changes.values.nbytes
    moved = 2 * source.nbytes + stored
    row(
        gather_s=seconds["gather"],
        scatter_s=seconds["scatter"],
        changed=changes.changed / source.numel(),
        stored_over_trained=stored / trained.nbytes,
        gather_bytes_per_s=moved / seconds["gather"],
        gather_share_of_read=moved / seconds["gather"] / bandwidth[threads],
        scatter_bytes_per_s=moved / seconds["scatter"],
        scatter_share_of_read=moved / seconds["scatter"] / bandwidth[threads],
    )


def test_gather_and_scatter_against_eager(benchmark, row, pair, one_thread):
    source, trained = (side[:4_358_144] for side in pair)
    room, out = Room.of(source.numel(), 2), torch.empty_like(source)
    changes, _ = gather(source, trained, room=room)
    indices, values = eager_gather(source, trained)
    seconds = paired(
        {
            "gather": lambda: gather(source, trained, room=room),
            "eager gather": lambda: eager_gather(source, trained),
            "scatter": lambda: scatter(source, changes, out=out),
            "eager scatter": lambda: eager_scatter(source, indices, values),
        }
    )
    benchmark.pedantic(lambda: gather(source, trained, room=room), rounds=3)
    assert torch.equal(bits(values), changes.values)
    assert torch.equal(bits(eager_scatter(source, indices, values)), bits(out))
    row(
        gather_s=seconds["gather"],
        scatter_s=seconds["scatter"],
        over_eager_gather=seconds["eager gather"] / seconds["gather"],
        over_eager_scatter=seconds["eager scatter"] / seconds["scatter"],
        stored_over_eager=(changes.positions.nbytes + changes.values.nbytes) / (indices.nbytes + values.nbytes),
    )
