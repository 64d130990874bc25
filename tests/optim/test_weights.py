"""Weights that changed under the optimizer, are given twice or share memory: refused by name before anything moves."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opdkernels.optim import MaskedAdamW, MaskedParameters, MaskedSGD, gather_active_grads

OPTIMIZERS = {"adamw": MaskedAdamW, "sgd": MaskedSGD}
with_optimizers = pytest.mark.parametrize("kind", OPTIMIZERS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def flags(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


def two_layers(dtype: torch.dtype = torch.float32) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)).to(dtype)


def optimizer_of(model: torch.nn.Module, kind: str, **options) -> MaskedAdamW | MaskedSGD:
    masks = {name: torch.arange(p.numel()).view(p.shape) % 3 == 0 for name, p in model.named_parameters()}
    return OPTIMIZERS[kind](model.named_parameters(), masks=masks, lr=0.25, **options)


def give_ones(model: torch.nn.Module) -> None:
    for param in model.parameters():
        param.grad = torch.ones_like(param)


def state_copy(optimizer) -> list:
    return [{k: v.clone() for k, v in state.items()} for state in optimizer.state_dict()["state"].values()]


@with_optimizers
@pytest.mark.parametrize("precision", ["split_master", "kahan", "stochastic", "nearest"])
@pytest.mark.parametrize("start", DTYPES[:2], ids=str)
@pytest.mark.parametrize("then", DTYPES, ids=str)
@pytest.mark.parametrize("first_steps", [0, 2])
def test_weights_of_another_dtype_raise_before_anything_moves(kind, precision, start, then, first_steps):
    """Before the first step a cast between float32 and bfloat16 is valid: trainers cast what they are given."""
    model = two_layers(start)
    optimizer = optimizer_of(model, kind, precision=precision)
    for _ in range(first_steps):
        give_ones(model)
        optimizer.step()
    optimizer.zero_grad()
    model[1].weight.data = model[1].weight.data.to(then)
    give_ones(model)
    before, state = [p.detach().clone() for p in model.parameters()], state_copy(optimizer)
    if then == start or (not first_steps and then in DTYPES[:2]):
        optimizer.step()
        assert not torch.equal(model[1].weight, before[1])
        assert bool((model[1].weight == before[1]).view(-1)[1::3].all())
        return
    with pytest.raises((TypeError, ValueError), match=r"1\.weight (is now|was) torch\.\w+.*cast"):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    after = state_copy(optimizer)
    assert all(torch.equal(a[k], b[k]) for a, b in zip(after, state, strict=True) for k in b)
    assert len(after) == len(state)
    with torch.no_grad():
        model[1].weight.data = model[1].weight.data.to(start)
    give_ones(model)
    optimizer.step()


def set_other_masks(pair):
    model, optimizer = pair
    optimizer.set_masks({name: torch.arange(p.numel()).view(p.shape) % 2 == 0 for name, p in model.named_parameters()})
    return pair


@with_optimizers
def test_dtype_is_kept_by_copies_and_state_dicts(kind):
    for how in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair)), set_other_masks, None):
        model = two_layers()
        optimizer = optimizer_of(model, kind)
        give_ones(model)
        optimizer.step()
        if how is not None:
            model, optimizer = how((model, optimizer))
        else:
            state, model = optimizer.state_dict(), two_layers()
            optimizer = optimizer_of(model, kind)
            optimizer.load_state_dict(state)
        optimizer.zero_grad()
        model.bfloat16()
        give_ones(model)
        with pytest.raises(ValueError, match=r"0\.weight was torch\.float32 on cpu in its last step"):
            optimizer.step()


@with_optimizers
def test_weights_of_another_shape_raise_before_anything_moves(kind):
    model = two_layers()
    optimizer = optimizer_of(model, kind)
    give_ones(model)
    optimizer.step()
    model[1].weight.data, model[1].weight.grad = torch.zeros(4, 8), None
    give_ones(model)
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"1\.weight is now \[4, 8\]; its mask is \[8, 8\]"):
        optimizer.step()
    assert torch.equal(model[0].weight, before)


def test_weights_without_data_raise_before_anything_moves():
    model = two_layers()
    optimizer = optimizer_of(model, "adamw")
    give_ones(model)
    optimizer.step()
    before = model[0].weight.detach().clone()
    model[1].weight = torch.nn.Parameter(torch.empty(8, 8, device="meta"))
    optimizer.param_groups[0]["params"][1] = model[1].weight
    model[1].weight.grad = torch.empty(8, 8, device="meta")
    with pytest.raises(ValueError, match=r"1\.weight is on the meta device"):
        optimizer.step()
    assert torch.equal(model[0].weight, before)


def misaligned(*shape: int) -> torch.Tensor:
    memory = torch.zeros(4 * torch.Size(shape).numel() + 1, dtype=torch.uint8)
    return torch.frombuffer(memory.numpy(), dtype=torch.float32, offset=1).view(shape)


def free(tensor: torch.Tensor, size: int = 0) -> None:
    tensor.untyped_storage().resize_(size)


def free_view(tensor: torch.nn.Parameter) -> None:
    """The address of a view of freed memory is its offset, which is not 0."""
    tensor.data = torch.zeros(9, 8)[1:]
    free(tensor.data)


@with_optimizers
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: setattr(p, "data", torch.zeros(1, 1).expand(8, 8)), r"elements of 1\.weight share memory"),
        (lambda p: setattr(p, "data", misaligned(8, 8)), r"1\.weight is not aligned"),
        (lambda p: free(p.data), r"1\.weight has no memory"),
        (lambda p: setattr(p, "grad", misaligned(8, 8)), r"the gradient of 1\.weight is not aligned"),
        (lambda p: free(p.grad), r"the gradient of 1\.weight has no memory"),
        (lambda p: free(p.data, 255), r"1\.weight needs 256 bytes, and its storage was resized to 255"),
        (free_view, r"1\.weight needs 288 bytes, and its storage was resized to 0"),
        (lambda p: free(p.grad, 255), r"the gradient of 1\.weight needs 256 bytes, and its storage was resized to 255"),
    ],
    ids=[
        "expanded",
        "misaligned",
        "freed",
        "misaligned gradient",
        "freed gradient",
        "partly freed",
        "view of freed memory",
        "partly freed gradient",
    ],
)
@pytest.mark.parametrize("first_steps", [0, 1])
def test_unusable_memory_of_a_later_group_raises_before_anything_moves(kind, change, message, first_steps):
    model = two_layers()
    masks = {name: flags(8, 8) for name, _ in model.named_parameters()}
    optimizer = OPTIMIZERS[kind]([{"params": [item]} for item in model.named_parameters()], masks=masks, lr=0.25)
    give_ones(model)
    for _ in range(first_steps):
        optimizer.step()
    before = model[0].weight.detach().clone()
    change(model[1].weight)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert torch.equal(model[0].weight, before)


@with_optimizers
def test_gathered_gradients_of_weights_of_another_dtype_raise(kind):
    model = two_layers()
    optimizer = optimizer_of(model, kind)
    gather_active_grads(model, optimizer)
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    model.half()
    before = model[0].weight.detach().clone()
    for param in model.parameters():
        param.grad = None
    model(torch.ones(1, 8).half()).sum().backward()
    with pytest.raises(TypeError, match=r"\.weight is now torch\.float16"):
        optimizer.step()
    assert torch.equal(model[0].weight, before)


def test_masked_parameters_of_weights_of_another_dtype_raise_before_anything_moves():
    model = two_layers()
    compact = MaskedParameters(model, {"0.weight": flags(8, 8), "1.weight": flags(8, 8)})
    optimizer = compact.attach(torch.optim.SGD(compact.parameters(), lr=1.0))
    model[1].half()
    before = model[0].weight.detach().clone()
    for value in compact.values:
        value.grad = torch.ones_like(value)
    with pytest.raises(TypeError, match=r"1\.weight is now torch\.float16"):
        optimizer.step()
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: setattr(p, "data", torch.zeros(1, 1).expand(8, 8)), r"elements of 1\.weight share memory"),
        (lambda p: setattr(p, "data", misaligned(8, 8)), r"1\.weight is not aligned"),
        (lambda p: free(p.data), r"1\.weight has no memory"),
    ],
    ids=["expanded", "misaligned", "freed"],
)
def test_masked_parameters_of_unusable_weights_raise_before_anything_moves(change, message):
    model = two_layers()
    compact = MaskedParameters(model, {"0.weight": flags(8, 8), "1.weight": flags(8, 8)})
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        for value in compact.values:
            value += 1
    change(model[1].weight)
    with pytest.raises(ValueError, match=message):
        compact.push_to_model()
    assert torch.equal(model[0].weight, before)


@with_optimizers
def test_same_parameter_twice_raises_and_names_both(kind):
    weight, other = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(4))
    make, masks = OPTIMIZERS[kind], {"emb": flags(4), "head": flags(4), "other": flags(4)}
    for params, names in (
        ([("emb", weight), ("other", other), ("head", weight)], "emb and head"),
        ([{"params": [("emb", weight)]}, {"params": [("head", weight), ("other", other)]}], "emb and head"),
    ):
        with pytest.raises(ValueError, match=f"{names} are the same parameter.*tied weight once"):
            make(params, masks=masks)
    for params in ([weight, weight], [{"params": weight}, {"params": [weight]}]):
        with pytest.raises(ValueError, match="parameter 0 and parameter 1 are the same parameter"):
            make(params, masks=[flags(4), flags(4)])
    optimizer = make([("emb", weight)], masks={"emb": flags(4)}, unmasked="train")
    with pytest.raises(ValueError, match="emb and head are the same parameter"):
        optimizer.add_param_group({"params": iter([("head", weight)])})
    assert len(optimizer.param_groups) == 1


@with_optimizers
def test_parameters_that_share_memory_raise(kind):
    make = OPTIMIZERS[kind]
    buffer = torch.zeros(64)
    matrix = buffer.view(8, 8)
    shared = {
        "the same data": (buffer, buffer.view(8, 8)),
        "a part of it": (buffer, buffer[10:20]),
        "one element": (buffer[:11], buffer[10:]),
        "a row and a column": (matrix[3], matrix[:, 5]),
        "another dtype": (buffer[:16], buffer.view(torch.bfloat16)[16:40]),
        "transposed": (matrix, matrix.t()),
    }
    for first, second in shared.values():
        for params in ((first, second), (second, first)):
            params = [torch.nn.Parameter(p, requires_grad=False).requires_grad_() for p in params]
            with pytest.raises(ValueError, match=r"(a and b|b and a) share memory"):
                make(zip("ab", params, strict=True), masks={"a": flags(*params[0].shape), "b": flags(*params[1].shape)})
    with pytest.raises(ValueError, match="elements of a share memory"):
        make([("a", torch.nn.Parameter(torch.zeros(1).expand(4)))], masks={"a": flags(4)})
    for params in ([buffer[:32], buffer[32:]], [matrix[:, :3], matrix[:, 3:]], [matrix[::2], matrix[1::2]]):
        params = [torch.nn.Parameter(p) for p in params]
        optimizer = make(params, masks=[flags(*p.shape) for p in params], lr=1.0)
        buffer.zero_()
        for param in params:
            param.grad = torch.ones(param.shape)
        optimizer.step()
        assert torch.allclose(buffer, -torch.ones(64))  # the first step of both optimizers at a rate of 1


@with_optimizers
def test_weights_tied_after_construction_raise_before_anything_moves(kind):
    model = two_layers()
    optimizer = optimizer_of(model, kind)
    model[1].weight.data = model[0].weight.data
    before = model[0].weight.detach().clone()
    give_ones(model)
    with pytest.raises(ValueError, match=r"0\.weight and 1\.weight share memory.*create the optimizer again"):
        optimizer.step()
    assert torch.equal(model[0].weight, before)
    assert not optimizer.state


@with_optimizers
@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.parametrize("views", ["shifted", "interleaved and shared"])
def test_weights_that_share_a_part_after_construction_raise_before_anything_moves(kind, num_groups, views):
    params = [torch.nn.Parameter(torch.zeros(4, 4)) for _ in range(2)]
    masks = [torch.ones(4, 4, dtype=torch.bool)] * 2
    if num_groups == 1:
        optimizer = OPTIMIZERS[kind](params, masks=masks, lr=1.0)
    else:
        optimizer = OPTIMIZERS[kind]([{"params": [param]} for param in params], masks=masks, lr=1.0)
    buffer = torch.zeros(40)
    matrix = buffer[:32].view(4, 8)
    shared = {
        "shifted": (buffer[:16].view(4, 4), buffer[1:17].view(4, 4)),
        "interleaved and shared": (matrix[:, :4], matrix[:, 3:7]),
    }
    for param, view in zip(params, shared[views], strict=True):
        param.data = view
        param.grad = torch.ones(4, 4)
    with pytest.raises(ValueError, match=r"parameter 0 and parameter 1 share memory.*create the optimizer again"):
        optimizer.step()
    assert not buffer.any()
    for param, view in zip(params, (matrix[:, :4], matrix[:, 4:]), strict=True):
        param.data = view
    optimizer.step()
    assert torch.allclose(matrix, torch.full((4, 8), -1.0))


@with_optimizers
def test_an_older_pickle_without_an_option_has_its_default(kind):
    model = two_layers()
    optimizer = optimizer_of(model, kind)
    state = optimizer.__getstate__()
    state["defaults"] = {name: value for name, value in state["defaults"].items() if name != "precision"}
    state["param_groups"] = [{k: v for k, v in group.items() if k != "precision"} for group in state["param_groups"]]
    older = OPTIMIZERS[kind].__new__(OPTIMIZERS[kind])
    older.__setstate__(state)
    assert older.param_groups[0]["precision"] == "split_master"
    give_ones(model)
    older.step()


class CountTransfers(TorchDispatchMode):
    """Counts conversions of tensors, such as those that copy from a device to the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._to_copy.default, torch.ops.aten._local_scalar_dense.default)
        return func(*args, **(kwargs or {}))


def test_clipping_copies_once_per_device():
    """A copy per parameter would wait for the device once per parameter."""
    counts = []
    for layers in (2, 20):
        model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(layers)))
        optimizer = optimizer_of(model, "adamw")
        give_ones(model)
        optimizer.clip_grad_norm_(1.0)  # reads the masks once
        with CountTransfers() as transfers:
            optimizer.clip_grad_norm_(1.0)
        counts.append(transfers.count)
    assert counts[0] == counts[1]


def test_set_masks_discards_the_clip_factor():
    """It was computed from the gradients of the old masks."""
    model = two_layers()
    masks = {"0.weight": flags(8, 8), "1.weight": flags(8, 8)}
    optimizer = MaskedSGD(model.named_parameters(), masks=masks, lr=1.0)
    before = model[0].weight.detach().clone()
    give_ones(model)
    optimizer.clip_grad_norm_(0.001)
    optimizer.set_masks({**masks, "1.weight": ~flags(8, 8)})
    optimizer.step()
    assert torch.allclose(model[0].weight, before - 1)
