"""The additive digest equals its definition, whatever the order, the shards, the strides or the set of changes."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch

from opdkernels.sync import additive_digest, digest_at, model_digest, update_digest
from opdkernels.sync.digest import CHUNK, WORD
from tests.patch.conftest import changed, some
from tests.sync.conftest import DTYPES, copied, make_model, oracle_digest

ALL_DTYPES = [*DTYPES, torch.bool, torch.uint8, torch.int64, torch.complex64, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 31, 1023, 1025, 70_001])
def test_digest_equals_definition(dtype, n):
    tensor = some((n,), dtype, n)
    assert additive_digest(tensor) == oracle_digest(tensor)


def test_known_value():
    """The first output of splitmix64 with seed 0 is that of the word 0: position 0, bits 0."""
    assert additive_digest(torch.zeros(1)) == 0xE220A8397B1DCDAF
    assert additive_digest(torch.zeros(0)) == 0


def test_strides_do_not_matter():
    tensor = some((70, 300), torch.bfloat16, 0)
    assert additive_digest(tensor.t().contiguous().t()) == additive_digest(tensor) == oracle_digest(tensor)
    assert additive_digest(tensor.t()) != additive_digest(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shards_add_up(dtype):
    tensor = some((CHUNK + 5000,), dtype, 1)
    for cuts in ([0], [1], [4999, 5000, CHUNK], [CHUNK + 1]):
        starts = [0, *cuts]
        shards = torch.tensor_split(tensor, cuts)
        total = sum(additive_digest(shard, start) for start, shard in zip(starts, shards, strict=True))
        assert total & WORD == additive_digest(tensor)


def test_columns_of_a_matrix_add_up():
    """The shards of tensor parallelism along the second dimension."""
    tensor = some((40, 60), torch.float16, 2)
    positions = torch.arange(tensor.numel()).view(40, 60)
    shards = zip(positions.chunk(4, 1), tensor.chunk(4, 1), strict=True)
    total = sum(digest_at(at.flatten(), shard.flatten()) for at, shard in shards)
    assert total & WORD == oracle_digest(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_order_does_not_matter(dtype):
    tensor = some((CHUNK + 9,), dtype, 3)
    order = torch.randperm(len(tensor), generator=torch.Generator().manual_seed(0))
    assert digest_at(order, tensor[order]) == additive_digest(tensor)
    assert additive_digest(tensor[order]) != additive_digest(tensor)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_changes_update_the_digest(dtype):
    """Also with positions that did not change, of which the terms cancel."""
    base = some((5000,), dtype, 4)
    trained = changed(base, 0.1, 5)
    width = dtype.itemsize
    differs = (base.view(torch.uint8).view(-1, width) != trained.view(torch.uint8).view(-1, width)).any(1)
    exact = differs.nonzero().flatten()
    superset = torch.cat([exact, (~differs).nonzero().flatten()[:700]])
    assert len(exact)
    for positions in (exact, superset, torch.arange(5000)):
        updated = update_digest(additive_digest(base), positions, base[positions], trained[positions])
        assert updated == oracle_digest(trained)


@pytest.mark.parametrize("dtype", ALL_DTYPES[:5], ids=str)
def test_every_flipped_bit_changes_the_digest(dtype):
    tensor = some((64,), dtype, 6)
    digests = {additive_digest(tensor)}
    for bit in range(tensor.nbytes * 8):
        flipped = tensor.clone()
        flipped.view(torch.uint8)[bit // 8] ^= 1 << bit % 8
        digests.add(additive_digest(flipped))
    assert len(digests) == 1 + tensor.nbytes * 8


def test_zeros_of_both_signs_and_nan_payloads_differ():
    bits = torch.tensor([0, -(1 << 15), 0x7FC0, 0x7FC1, 0x7F80], dtype=torch.int16)
    digests = {additive_digest(value.view(torch.bfloat16)) for value in bits.view(-1, 1)}
    assert len(digests) == 5


def test_positions_beyond_int32():
    tensor = some((100,), torch.bfloat16, 7)
    start = (1 << 33) + 5
    assert additive_digest(tensor, start) == oracle_digest(tensor, start)


def test_digest_of_a_model_depends_on_every_tensor_and_name():
    model = make_model()
    digests = {name: additive_digest(tensor) for name, tensor in model.items()}
    assert model_digest(dict(reversed(digests.items()))) == model_digest(digests)
    assert model_digest(digests | {"scalar": digests["scalar"] ^ 1}) != model_digest(digests)
    other_name = {name.replace("scalar", "other"): value for name, value in digests.items()}
    assert model_digest(other_name) != model_digest(digests)
    assert digests == {name: additive_digest(tensor) for name, tensor in copied(model).items()}


@pytest.mark.parametrize("module", ["sync", "sync.digest", "sync.patch"])
def test_examples_of_docstrings_run(module):
    results = doctest.testmod(importlib.import_module(f"opdkernels.{module}"))
    assert results.attempted
    assert not results.failed
