"""What is computed: one folder per kernel family, and the registration of operators with PyTorch.

`opdkernels/ops/<family>/__init__.py` holds the schema, the reference in plain PyTorch (the definition; NumPy where no
tensor arithmetic is needed) and the public function. `cpu.py`, `cuda.py` and `triton.py` hold the kernels of those
backends, `layout.py` their common constants.
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from opdkernels.backends import dispatch

LIBRARY = torch.library.Library("opdkernels", "DEF")


@dataclass(frozen=True)
class Operator:
    """A registered operator of a kernel family."""

    name: str
    family: str
    schema: str
    reference: Callable[..., Any]


OPERATORS: dict[str, Operator] = {}


def no_outputs(*arguments: Any) -> None:
    """The fake of an operator that only writes to its arguments."""


def on_one_device(fake: Callable[..., Any]) -> Callable[..., Any]:
    """A fake that raises ValueError where only some tensors are on the meta device: PyTorch then calls the fake, and
    the operator would return without computing anything."""

    @functools.wraps(fake)
    def checked(*arguments: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
        others = [tensor.device for tensor in tensors if not tensor.is_meta]
        if others and len(others) < len(tensors):
            raise ValueError(f"some tensors are on {others[0]}, others on meta; move one of them")
        return fake(*arguments)

    return checked


def validated(implementation: Callable[..., Any], validate: Callable[..., None]) -> Callable[..., Any]:
    """An implementation that validates its arguments first."""

    @functools.wraps(implementation)
    def operator(*arguments: Any) -> Any:
        validate(*arguments)
        return implementation(*arguments)

    return operator


def register(
    family: str,
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any] | None = None,
    *,
    validate: Callable[..., None] | None = None,
) -> None:
    """Register an operator of a kernel family with PyTorch.

    Args:
        family: Name of the folder under `opdkernels/ops` that holds the kernels.
        schema: Schema of the operator, as `torch.library.define` takes it.
        reference: The definition, in plain PyTorch or NumPy; runs on every device without a kernel.
        fake: Computes the shapes and dtypes of the outputs. Not needed for an operator that returns nothing.
        validate: Takes the operator's arguments and raises where a kernel must not follow them. Needed where kernels
            take addresses.

    Raises:
        ValueError: The operator returns something and has no fake.
    """
    name = schema.split("(", 1)[0]
    if fake is None:
        if not schema.endswith("-> ()"):
            raise ValueError(f"{name} returns something; give register() a fake")
        fake = no_outputs
    OPERATORS[name] = Operator(name, family, schema, reference)
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    checked = functools.partial(validated, validate=validate) if validate else (lambda implementation: implementation)
    LIBRARY.impl(name, checked(reference), "CompositeExplicitAutograd")
    torch.library.register_fake(f"opdkernels::{name}", on_one_device(fake), lib=LIBRARY)
    for key, kernel in dispatch.kernels(family, name).items():
        LIBRARY.impl(name, checked(kernel), key)


def all_operators() -> dict[str, Operator]:
    """Every operator of the package by name; imports all kernel families."""
    for module in pkgutil.iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
    return dict(OPERATORS)


def to_local(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, or the local shard of a DTensor, detached and contiguous."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.detach().contiguous()
