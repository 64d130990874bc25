"""Operators refuse tensors that a kernel must not follow, before anything is written: whoever calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from opdkernels.ops import arguments, patch
from opdkernels.ops.delta import delta
from opdkernels.ops.gram import gram
from opdkernels.ops.overlap import overlap
from opdkernels.ops.quantile import quantile
from tests.ops.conformance import Allocator, inputs_of, load_families

OPERATORS = [operator for family in load_families().values() for operator in family.operators]
# Outputs that may be larger than they need to be, inputs of any stride, and tensors whose size is not given by others.
ANY_SIZE = {("patch_gather_", 4), ("patch_gather_", 5), ("patch_check", 1), ("patch_digest", 0), ("quantile", 0)}
ANY_SIZE |= {("masked_gather_", 0), ("masked_scatter_", 0), ("patch_scatter_", 2), ("patch_scatter_", 3)}
ANY_STRIDE = {("gram_", 0), ("gram_", 1), ("masked_adamw_", 11), ("masked_sgd_", 9)}
ANY_STRIDE |= {(name, i) for name in OPERATORS if name.startswith("divergence") for i in range(5)}


class Recorded(Exception):
    """Carries the arguments of the first call of an operator that gives every tensor some elements."""


def arguments_of(operator: str) -> list[Any]:
    """Arguments with which a conformance case calls an operator."""
    family = next(family for family in load_families().values() if operator in family.operators)

    def kernel(name: str) -> Callable:
        def record(*flat: Any) -> Any:
            if name == operator and all(tensor.numel() for _, tensor in tensors_of(flat[:3])):
                raise Recorded(flat)
            return getattr(torch.ops.opdkernels, name)(*flat)

        return record

    for case in family.collect([1025], special=True):
        try:
            allocator = Allocator()
            case.call(kernel, allocator, *allocator.put(inputs_of(case)))
        except Recorded as recorded:
            return list(recorded.args[0])
    raise AssertionError(f"no case calls {operator}")


def tensors_of(flat: Any) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
    """The tensors among arguments with elements, and where they are: (argument,) or (argument, element of a list)."""
    for i, argument in enumerate(flat):
        for j, item in enumerate(argument if isinstance(argument, (list, tuple)) else [argument]):
            if isinstance(item, torch.Tensor) and item.numel():
                yield (i, j) if isinstance(argument, (list, tuple)) else (i,), item


def cloned(flat: list[Any]) -> list[Any]:
    def copy(item: Any) -> Any:
        return item.clone() if isinstance(item, torch.Tensor) else item

    return [[copy(item) for item in a] if isinstance(a, (list, tuple)) else copy(a) for a in flat]


def freed(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def partly_freed(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(tensor.nbytes - 1)
    return tensor


MUTATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "dtype": lambda tensor: torch.zeros_like(tensor, dtype=torch.complex64),
    "one more": lambda tensor: torch.cat([tensor.flatten(), tensor.flatten()[:1]]),
    "one fewer": lambda tensor: tensor.flatten()[:-1].clone(),
    "stride": lambda tensor: torch.stack([tensor, tensor], -1)[..., 0],
    "freed": freed,
    "partly freed": partly_freed,
    "meta": lambda tensor: tensor.to("meta"),
}


def applies(operator: str, at: tuple[int, ...], mutation: str, tensor: torch.Tensor) -> bool:
    """Whether a mutation makes an argument invalid."""
    if mutation in ("one more", "one fewer"):
        return (operator, at[0]) not in ANY_SIZE
    return mutation != "stride" or ((operator, at[0]) not in ANY_STRIDE and tensor.numel() > 1)


@pytest.mark.parametrize("operator", OPERATORS)
def test_invalid_tensors_raise_before_any_write(operator):
    call, flat = getattr(torch.ops.opdkernels, operator), arguments_of(operator)
    for at, tensor in tensors_of(flat):
        for mutation, mutate in MUTATIONS.items():
            is_only_tensor = len(list(tensors_of(flat))) == 1  # alone on the meta device, it has a meta result
            if not applies(operator, at, mutation, tensor) or (mutation == "meta" and is_only_tensor):
                continue
            changed = cloned(flat)
            if len(at) == 1:
                changed[at[0]] = mutate(tensor)
            else:
                changed[at[0]][at[1]] = mutate(tensor)
            before = cloned(changed) if mutation not in ("freed", "partly freed", "meta") else None
            try:
                call(*changed)
            except (TypeError, ValueError, NotImplementedError):
                pass
            else:
                pytest.fail(f"argument {at} with {mutation} is accepted")
            for (_, a), (_, b) in zip(tensors_of(changed), tensors_of(before or changed), strict=True):
                assert before is None or torch.equal(a.nan_to_num(), b.nan_to_num()), f"{at} {mutation}: written"


# Arguments of the operators of divergence that are numbers, and values that no kernel can take.
INVALID_NUMBERS = {
    "divergence_scan": {3: (-1, 100), 4: (-1, 0, 1 << 62), 5: ([], [1.0] * 4), 6: ([1.0],)},
    "divergence_means": {3: (0, 1 << 62), 4: ([],), 5: ([],), 7: (-1, 0, 1, 4)},
    "divergence_backward": {5: (0, 1 << 62), 6: ([],), 7: ([],), 9: (-1, 5), 10: ([], [True] * 4)},
    "divergence_top": {1: (0, 1 << 62), 2: (-1, 1 << 62), 3: ([],)},
}
INVALID_NUMBERS |= {"masked_adamw_": {14: (-1, 1 << 32)}, "masked_sgd_": {12: (-1, 1 << 32)}}


@pytest.mark.parametrize("operator", INVALID_NUMBERS)
def test_numbers_out_of_range_raise(operator):
    call, flat = getattr(torch.ops.opdkernels, operator), arguments_of(operator)
    for i, values in INVALID_NUMBERS[operator].items():
        for value in values:
            changed = cloned(flat)
            changed[i] = (
                [value] * len(flat[i]) if isinstance(flat[i], (list, range)) and value in (-1, 1 << 32) else value
            )
            with pytest.raises(ValueError, match=r"must be|needs"):
                call(*changed)


@pytest.mark.parametrize("operator", [name for name in OPERATORS if name.endswith("_")])
def test_shared_memory_raises(operator):
    """Each tensor that is written, replaced by a view of an input that overlaps it."""
    call, flat = getattr(torch.ops.opdkernels, operator), arguments_of(operator)
    schema = call.default._schema
    written = [i for i, argument in enumerate(schema.arguments) if argument.alias_info]
    for i in written:
        is_list = isinstance(flat[i], (list, tuple))
        for at, _ in tensors_of(flat):
            if at[0] == i or (operator, i, at[0]) == ("patch_scatter_", 5, 0):
                continue
            changed = cloned(flat)
            if is_list and not changed[i]:
                continue
            target = changed[i][-1] if is_list else changed[i]
            other = changed[at[0]][at[1]] if len(at) > 1 else changed[at[0]]
            if not target.numel() or not other.is_contiguous():
                continue
            num_bytes = max(target.numel() * target.itemsize, other.numel() * other.itemsize)
            memory = torch.zeros(num_bytes + 8, dtype=torch.uint8)
            shared = [memory[: t.numel() * t.itemsize].view(t.dtype).view(t.shape).copy_(t) for t in (other, target)]
            for place, view in ((at, shared[0]), ((i, len(changed[i]) - 1) if is_list else (i,), shared[1])):
                if len(place) == 1:
                    changed[place[0]] = view
                else:
                    changed[place[0]][place[1]] = view
            with pytest.raises(
                ValueError, match=r"share memory|do not fit|prefix popcounts|must ascend|beyond the last"
            ):
                call(*changed)


def test_shared_memory_is_found_between_any_two_ranges():
    memory = torch.zeros(100)
    arguments.validate_memory([memory[:10], memory[10:20]], [memory[20:40], memory[25:30]])  # reads may overlap
    for written, read in (
        ([memory[:10], memory[9:12]], []),
        ([memory[30:31]], [memory[:50]]),
        ([memory[:50]], [memory[30:31]]),
        ([memory[0:1], memory[60:70]], [memory[1:60], memory[40:61]]),
    ):
        with pytest.raises(ValueError, match="share memory"):
            arguments.validate_memory(written, read)


def test_misaligned_tensors_of_a_step_raise():
    memory = torch.zeros(41, dtype=torch.uint8)
    misaligned = torch.frombuffer(memory.numpy(), dtype=torch.float32, offset=1, count=10)
    with pytest.raises(ValueError, match="not aligned"):
        arguments.validate_memory([misaligned], aligned=True)
    arguments.validate_memory([misaligned])


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy whose address is no multiple of the size of an element."""
    memory = torch.zeros(tensor.nbytes + 1, dtype=torch.uint8)
    memory[1:] = tensor.flatten().view(torch.uint8)
    view = torch.frombuffer(memory.numpy(), dtype=tensor.dtype, offset=1, count=tensor.numel())
    assert view.data_ptr() % tensor.element_size()
    return view


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_misaligned_tensors_give_the_same_results(dtype):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(70_001, generator=generator).to(dtype)
    trained = base.clone()
    trained[::7] += 1
    pair = misaligned(base), misaligned(trained)
    assert delta(*pair) == delta(base, trained)
    assert overlap(pair[0], [pair[1], pair[0]]) == overlap(base, [trained, base])
    assert quantile(pair[0], 700) == quantile(base, 700)
    matrices = [tensor[:70_000].view(100, 700) for tensor in (*pair, base, trained)]
    assert torch.equal(gram(*matrices[:2]), gram(*matrices[2:]))
    changes, digests = patch.gather(*pair)
    expected, expected_digests = patch.gather(base, trained)
    assert torch.equal(digests, expected_digests)
    assert torch.equal(changes.values, expected.values)
    out = misaligned(base)
    restored, digest = patch.scatter(pair[0], changes, out=out)
    assert restored is out
    assert torch.equal(out, trained)
    assert torch.equal(digest, expected_digests[1])
    in_place = misaligned(base)
    patch.scatter(in_place, changes, out=in_place)
    assert torch.equal(in_place, trained)
    assert torch.equal(patch.digest(in_place), expected_digests[1])
