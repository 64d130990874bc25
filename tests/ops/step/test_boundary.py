"""The C++ edge of `step` refuses a table of tensors that it cannot serve, and writes nothing then."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from opdkernels.backends import cpu
from opdkernels.ops import step
from opdkernels.ops.step import cpu as step_cpu
from opdkernels.ops.step.args import StepArgs
from opdkernels.ops.step.layout import (
    HAS_CHANGED,
    HAS_INIT_VALUE,
    HAS_STEP_GROUP,
    MASK_INDICES,
    MASK_INDICES_64,
    STEP_ROW,
)
from opdkernels.ops.step.rows import step_rows
from tests.ops.step.cases import BETAS, EPS, mask_tensors

pytestmark = pytest.mark.skipif(cpu.native is None, reason="the compiled kernels are not built")
ADAMW = 0


class Table:
    """The arguments of the compiled step of one tensor of 5,000 coordinates."""

    def __init__(self, index_dtype: torch.dtype | None = None, dtype: torch.dtype = torch.float32):
        generator = torch.Generator().manual_seed(0)
        flags = torch.rand(5000, generator=generator) < 0.3
        self.mask, self.block_counts = mask_tensors(flags, index_dtype)
        self.param = torch.randn(5000, generator=generator).to(dtype)
        self.grad = torch.randn(5000, generator=generator)
        self.moments = torch.zeros(int(flags.sum())), torch.zeros(int(flags.sum()))
        self.scalars = step.adamw_scalars([1], 0.1, BETAS, EPS, 0.0)
        self.args = StepArgs(
            params=[self.param],
            grads=[self.grad],
            masks=[self.mask],
            block_counts=[self.block_counts],
            exp_avgs=[self.moments[0]],
            exp_avg_sqs=[self.moments[1]],
            scalar_rows=[0],
            shard_offsets=[0],
            param_ids=[0],
        )
        self.rows = step_rows(self.args)

    def run(self, *, row_bytes: int = STEP_ROW.itemsize, kind: int = ADAMW, precision: int = 0) -> None:
        rows = np.ascontiguousarray(self.rows)
        scalars = self.scalars.data_ptr(), len(self.scalars)
        step_cpu.KERNEL(rows.ctypes.data, len(rows), row_bytes, *scalars, 0, 0, False, kind, False, precision, 0, 1)

    def check_refused(self, message: str, **options: int) -> None:
        before = self.param.clone(), self.moments[0].clone()
        with pytest.raises(ValueError, match=message):
            self.run(**options)
        assert torch.equal(self.param, before[0])
        assert torch.equal(self.moments[0], before[1])


def test_table_as_built_is_accepted():
    table = Table()
    before = table.param.clone()
    table.run()
    assert not torch.equal(table.param, before)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        *((name, 0, "null pointer") for name in ("param", "grad", "mask", "block_counts", "exp_avg", "exp_avg_sq")),
        *((name, 1, "misaligned") for name in ("param", "grad", "block_counts", "exp_avg", "exp_avg_sq")),
        ("flags", 1 << 20, "unknown flags"),
        ("flags", MASK_INDICES_64, "unknown flags"),
        ("flags", HAS_INIT_VALUE, "its flags do not announce"),
        ("flags", HAS_STEP_GROUP, "its flags do not announce"),
        ("flags", HAS_CHANGED, "its flags do not announce"),
        ("size", -1, "sizes"),
        ("size", 5001, "sizes"),
        ("numel", 4999, "sizes"),
        ("scalar_row", -1, "no row of scalars"),
        ("scalar_row", 1, "no row of scalars"),
    ],
)
def test_invalid_row_raises(field, value, message):
    table = Table()
    table.rows[field] = table.rows[field] + 1 if message == "misaligned" else value
    table.check_refused(message)


@pytest.mark.parametrize("precision", [1, 2])
def test_missing_residual_raises(precision):
    Table(dtype=torch.bfloat16).check_refused("null pointer", precision=precision)


def test_unknown_kind_or_precision_raises():
    for options in ({"kind": -1}, {"kind": 5}, {"precision": 4}, {"precision": -1}):
        Table().check_refused("unknown kind, precision", **options)


def test_row_of_another_version_raises():
    """An extension of another version of the package has another row; it must not read one as the other."""
    Table().check_refused("of another version", row_bytes=STEP_ROW.itemsize - 8)


@pytest.mark.parametrize("index_dtype", [None, torch.int32, torch.int64], ids=str)
def test_mask_that_changed_in_memory_raises(index_dtype):
    """NumPy can change a mask without PyTorch's knowledge; the version by which Python remembers it stays the same."""
    for i, value in ((0, None), (-1, 4999 if index_dtype else None), (-1, 5000)):
        table = Table(index_dtype)
        if index_dtype is None:
            table.mask.numpy()[i] ^= 1
        else:
            table.mask.numpy()[i] = -1 if value is None else value
            if value == 4999:
                table.mask.numpy()[-2] = 4999
        table.check_refused("changed after they were validated")


def test_flags_of_indices_without_block_counts_are_accepted():
    table = Table(torch.int64)
    assert table.rows["flags"][0] & MASK_INDICES
    table.run()


@pytest.mark.parametrize("name", ["grad_scale", "clip", "found_inf"])
@pytest.mark.parametrize(
    "factor",
    [
        torch.tensor(2.0, dtype=torch.float64),
        torch.tensor(2.0, dtype=torch.bfloat16),
        torch.tensor(2),
        torch.zeros(0),
        torch.ones(2),
        torch.ones(1, 1),
        torch.tensor(2.0, device="meta"),
    ],
    ids=str,
)
def test_factor_that_is_not_one_fp32_element_raises(name, factor):
    args = Table().args
    tensors = args.params, args.grads, args.masks, args.block_counts, args.exp_avgs, args.exp_avg_sqs
    with pytest.raises(ValueError, match=f"{name} must be float32 with one element|others on meta"):
        step.masked_adamw(*tensors, Table().scalars, **{name: factor})
