"""A step whose arguments were valid before is validated again: what changed since is refused, and nothing moves."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch

from opdkernels.ops import step
from opdkernels.ops.step import validation
from tests.ops.step.cases import BETAS, EPS, mask_tensors

N = 4096


class Arguments:
    """Two tensors of 64 x 64, one with a bitmap and one with indices, and step groups."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        flags = [torch.rand(N, generator=generator) < 0.3 for _ in range(2)]
        masks = [mask_tensors(flag, dtype) for flag, dtype in zip(flags, (None, torch.int32), strict=True)]
        counts = [int(flag.sum()) for flag in flags]
        self.memory = torch.randn(2 * N, generator=generator)  # of the first param and, after it, its gradient
        self.bits = torch.zeros(N // 8 + 4 * N, dtype=torch.uint8)  # those of the first param and, after them, more
        self.values = {
            "params": [self.memory[:N].view(64, 64), torch.randn(64, 64, generator=generator).bfloat16()],
            "grads": [torch.randn(64, 64, generator=generator) for _ in range(2)],
            "masks": [mask for mask, _ in masks],
            "block_counts": [block_counts for _, block_counts in masks],
            "exp_avgs": [torch.zeros(count) for count in counts],
            "exp_avg_sqs": [torch.zeros(count) for count in counts],
            "residuals": [torch.empty(0, dtype=torch.int16), torch.zeros(counts[1], dtype=torch.int16)],
            "changed": [self.bits[: N // 8], torch.zeros(-(-counts[1] // 8), dtype=torch.uint8)],
            "step_groups": [torch.zeros(counts[0], dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)],
            "scalars": step.adamw_scalars([1, 2], 0.1, BETAS, EPS, 0.0),
            "scalar_rows": [0, 1],
            "shard_offsets": [0, 0],
            "param_ids": [0, 1],
            "precision": "split_master",
        }

    def run(self) -> None:
        step.masked_adamw(**self.values)

    def replace(self, name: str, i: int, tensor: torch.Tensor) -> None:
        self.values[name][i] = tensor


def shrink(tensor: torch.Tensor, size: int) -> None:
    tensor.untyped_storage().resize_(size)


CHANGES = {
    "another dtype at the same address": lambda a: a.replace("params", 0, a.values["params"][0].view(torch.int32)),
    "another shape at the same address": lambda a: a.replace("params", 0, a.values["params"][0][:32]),
    "transposed at the same address": lambda a: a.replace("params", 0, a.values["params"][0].T),
    "a gradient of another dtype": lambda a: a.replace("grads", 0, a.values["grads"][0].double()),
    "a gradient of another shape": lambda a: a.replace("grads", 0, a.values["grads"][0][:32]),
    "a transposed gradient": lambda a: a.replace("grads", 1, a.values["grads"][1].T),
    "a gradient in the param's memory": lambda a: a.replace("grads", 0, a.memory[1 : N + 1].view(64, 64)),
    "a gradient in a moment's memory": lambda a: a.replace(
        "grads", 1, torch.as_strided(a.values["exp_avgs"][1], (len(a.values["exp_avgs"][1]),), (1,))
    ),
    "a gradient without memory": lambda a: shrink(a.values["grads"][1], 0),
    "a gradient that ends after its storage": lambda a: shrink(a.values["grads"][1], 64),
    "a param that ends after its storage": lambda a: shrink(a.values["params"][1], 64),
    "a moment of another length": lambda a: a.replace("exp_avgs", 0, a.values["exp_avgs"][0][:-1]),
    "bits of another length": lambda a: a.replace("changed", 0, a.values["changed"][0][:-1]),
    "bits of another layout": lambda a: a.replace("changed", 1, torch.zeros(N // 8, dtype=torch.uint8)),
    "bits of another dtype": lambda a: a.replace("changed", 0, a.values["changed"][0].view(torch.int8)),
    "bits of both params in one memory": lambda a: a.replace(
        "changed", 1, a.values["changed"][0][: len(a.values["changed"][1])]
    ),
    "bits that end after their storage": lambda a: shrink(a.values["changed"][0], 64),
    "a gradient in the memory of bits": lambda a: a.replace(
        "grads", 1, a.bits[4 : 4 + 4 * N].view(torch.float32).view(64, 64)
    ),
    "two params in one memory": lambda a: a.replace("params", 1, a.values["params"][0]),
    "a changed bitmap": lambda a: a.values["masks"][0].fill_(255),
    "an index out of range": lambda a: a.values["masks"][1][-1:].fill_(N),
    "a step group without scalars": lambda a: a.values["step_groups"][0].fill_(2),
    "fewer rows of scalars": lambda a: a.values.update(scalars=a.values["scalars"][:1]),
    "scalars in the param's memory": lambda a: a.values.update(
        scalars=torch.as_strided(a.memory, tuple(a.values["scalars"].shape), a.values["scalars"].stride())
    ),
    "another precision": lambda a: a.values.update(precision="kahan"),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_what_changed_since_the_last_step_is_refused(change):
    arguments = Arguments()
    arguments.run()
    CHANGES[change](arguments)
    before = arguments.memory.clone()
    with pytest.raises((TypeError, ValueError)):
        arguments.run()
    assert torch.equal(arguments.memory, before)


def test_a_step_at_the_same_addresses_is_not_validated_anew():
    arguments = Arguments()
    arguments.run()
    arguments.values["grads"] = [torch.randn(64, 64) for _ in range(2)]
    with mock.patch.object(validation, "validate_tensors", side_effect=AssertionError):
        arguments.run()
        with pytest.raises(AssertionError):
            Arguments().run()


@pytest.mark.parametrize(("name", "i", "value"), [("masks", 0, None), ("masks", 1, N), ("step_groups", 0, 2)])
def test_a_new_tensor_in_the_memory_of_a_freed_one_is_read(name, i, value):
    """It has the same address, shape and version as the freed tensor, and other contents."""
    arguments = Arguments()
    first = arguments.values[name][i].numpy().copy()
    block_counts = arguments.values["block_counts"][0].numpy().copy()
    arguments.replace(name, i, torch.from_numpy(first))
    arguments.replace("block_counts", 0, torch.from_numpy(block_counts))
    arguments.run()
    if value is None:  # another mask, with block counts that fit it: more active coordinates than moments
        mask, counts = mask_tensors(torch.ones(N, dtype=torch.bool))
        first[:], block_counts[:] = mask.numpy(), counts.numpy()
    else:
        first[-1] = value
    arguments.replace(name, i, torch.from_numpy(first))
    arguments.replace("block_counts", 0, torch.from_numpy(block_counts))
    before = arguments.memory.clone()
    with pytest.raises(ValueError, match=r"exp_avgs of param 0|indices of its mask|step group 2"):
        arguments.run()
    assert torch.equal(arguments.memory, before)


@pytest.mark.parametrize("name", ["params", "exp_avgs", "exp_avg_sqs", "residuals"])
def test_a_storage_that_became_smaller_at_the_same_address_is_refused(name):
    arguments = Arguments()
    arguments.run()
    tensor = arguments.values[name][1]
    nbytes = mock.patch.object(torch.UntypedStorage, "nbytes", smaller_at(tensor.untyped_storage().data_ptr()))
    with nbytes, pytest.raises(ValueError, match="its storage was resized"):
        arguments.run()


def smaller_at(address: int) -> Callable[[torch.UntypedStorage], int]:
    """`nbytes` for a storage at an address that was resized: whether the allocator gives it the same address twice
    depends on what else is in memory."""
    nbytes = torch.UntypedStorage.nbytes
    return lambda storage: 8 if storage.data_ptr() == address else nbytes(storage)


def test_another_thread_may_have_forgotten_the_oldest_call():
    class Shared(dict):
        def __iter__(self):  # with a key that another thread has removed since
            return iter([0, *self.keys()])

    with mock.patch.multiple(validation, REMEMBERED=Shared(), MAX_REMEMBERED=1):
        kept = [Arguments(), Arguments()]
        for arguments in kept:
            before = arguments.memory[:N].clone()
            arguments.run()
            assert not torch.equal(arguments.memory[:N], before)
        assert validation.REMEMBERED


def test_few_calls_are_remembered():
    kept = [Arguments() for _ in range(validation.MAX_REMEMBERED + 3)]
    for arguments in kept:
        arguments.run()
    assert len(validation.REMEMBERED) <= validation.MAX_REMEMBERED
