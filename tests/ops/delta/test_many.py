"""`delta_many`: the tallies of many pairs are those of `delta`, one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from opdkernels.backends.layout import BINS
from opdkernels.ops.delta import delta, many
from opdkernels.ops.delta.many import SparseTally, delta_many
from tests.ops.conformance import DTYPES, make_pair
from tests.ops.delta.cases import many_pairs

SIZES = (0, 1, 63, 64, 65, 1000, 4096, 65_535, 65_536, 70_000, 300_000)


def assert_same(tallies: list[SparseTally], base: list[torch.Tensor], trained: list[torch.Tensor]) -> None:
    assert len(tallies) == len(base)
    for tally, w, v in zip(tallies, base, trained, strict=True):
        expected = delta(w, v, threshold_bits=tally.threshold_bits)
        assert tally.dense() == expected
        assert (tally.bin_bits == SparseTally.of(expected).bin_bits).all()


def test_equals_delta_of_each(isa, threads):
    assert_same(delta_many(*many_pairs(SIZES)), *many_pairs(SIZES))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-5, 1.0, 1e30], ids=str)
def test_bins_of_values_of_every_scale(isa, dtype, scale):
    """The bins in use are found from the range of magnitudes; also with zeros, NaN and Inf among them."""
    generator = torch.Generator().manual_seed(0)
    base, trained = (scale * torch.randn(2, 500, generator=generator, dtype=torch.float64)).to(dtype)
    nearby = torch.nextafter(base, torch.full_like(base, torch.inf)) if dtype.itemsize > 2 else trained
    zeros = base.clone()
    zeros[::3] = 0
    infinite = base.clone()
    infinite[7], infinite[8] = torch.inf, torch.nan
    w, v = [base, base, base, zeros, infinite, base], [trained, nearby, base, base, trained, infinite]
    assert_same(delta_many(w, v), w, v)


def test_several_calls_where_one_has_too_few_bins(monkeypatch):
    base, trained = many_pairs([3000] * 40)
    assert sum(len(tally.bin_bits) for tally in delta_many(base, trained)) > BINS
    monkeypatch.setattr(many, "CAPACITY", BINS)
    assert_same(delta_many(base, trained), base, trained)


def test_thresholds_shapes_and_strides():
    base, trained = make_pair(600, hostile=False)
    w, v = [base.view(20, 30).T, base[::2]], [trained.view(20, 30).T, trained[::2]]
    tallies = delta_many(w, v, threshold_bits=(0, 5))
    assert_same(tallies, w, v)
    assert tallies[0].threshold_bits == (0, 5)
    assert delta_many([], []) == []


def test_arguments_that_do_not_fit():
    w, v = torch.ones(4), torch.ones(4)
    with pytest.raises(ValueError, match="2 base tensors but 1 trained ones"):
        delta_many([w, w], [v])
    with pytest.raises(ValueError, match="shapes differ"):
        delta_many([w], [v[:3]])
    with pytest.raises(TypeError, match="int64"):
        delta_many([w.long()], [v])


def test_counts_are_kept_in_the_narrowest_integers():
    for numel, dtype in ((100, np.uint16), (70_000, np.uint32)):
        (tally,) = delta_many([torch.ones(numel)], [torch.ones(numel)])
        assert tally.tables.dtype == dtype
        assert tally.bin_bits.dtype == np.uint16
        assert tally.table(0).dtype == np.int64
        assert tally.hist_base.tolist() == [0, numel]
