"""`randomized_svd`: the bounds hold whatever the spectrum, seed and rounding; the figures meet the tolerance."""

from __future__ import annotations

import dataclasses
import doctest
import math

import pytest
import torch

from opdkernels.spectral import randomized
from opdkernels.spectral.randomized import RandomizedSVD, orthonormalise, randomized_svd

FP32, FP64 = torch.float32, torch.float64


def noise(m: int, n: int, seed=0) -> torch.Tensor:
    return torch.randn(m, n, dtype=FP64, generator=torch.Generator().manual_seed(seed))


def with_spectrum(m: int, n: int, sigma, seed=0) -> torch.Tensor:
    """fp64 [m, n] with given singular values and random vectors."""
    sigma = torch.as_tensor(sigma, dtype=FP64)
    u, v = (torch.linalg.qr(noise(side, len(sigma), seed + i)).Q for i, side in enumerate((m, n)))
    return u * sigma @ v.T


def sparse(m: int, n: int, seed=0) -> torch.Tensor:
    """An update that touches one weight in twenty."""
    return noise(m, n, seed) * (torch.rand(m, n, generator=torch.Generator().manual_seed(seed)) < 0.05)


def spikes(m: int, n: int, seed=0) -> torch.Tensor:
    return with_spectrum(m, n, torch.linspace(20, 5, min(8, m, n)), seed) + noise(m, n, seed + 2) / math.sqrt(m)


def decay(m: int, n: int, seed=0) -> torch.Tensor:
    return with_spectrum(m, n, 1 / torch.arange(1, min(m, n) + 1), seed)


SPECTRA = {"sparse": sparse, "flat": noise, "spikes": spikes, "decay": decay}


def truth(a: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(a.double())


def assert_sound(a: torch.Tensor, found: RandomizedSVD, sigma: torch.Tensor | None = None) -> torch.Tensor:
    """Asserts what holds whether or not the search converged. Returns the true singular values."""
    sigma, k = truth(a) if sigma is None else sigma, len(found.sigma)
    error = 4 * (sum(a.shape)) * 2.0**-53 * sigma[0]  # of the oracle itself
    true, norm = sigma[:k], float(sigma.square().sum().sqrt())
    assert (found.lower <= true + error).all()
    assert (found.upper >= true - error).all()
    assert (found.lower <= found.sigma).all()
    assert (found.sigma <= found.upper).all()
    assert ((found.lower < found.sigma) | (found.sigma == 0)).all()  # rounding has its share
    assert found.sigma.dtype == FP64
    assert found.frobenius == pytest.approx(norm, rel=1e-12)
    assert 0 <= found.remainder <= 1
    for i in range(1, k + 1) if norm else ():
        low, high = found.energy(i)
        share = float((true[:i] / norm).square().sum())
        assert low <= share * (1 + 1e-12)
        assert share <= high * (1 + 1e-12)
    kind = FP64 if a.dtype == FP64 else FP32
    assert (found.u.dtype, found.v.dtype) == (kind, kind)
    tolerance = 100 * torch.finfo(kind).eps
    for vectors, side in ((found.u.double(), a.shape[0]), (found.v.double(), a.shape[1])):
        assert vectors.shape == (side, k)
        assert (vectors.T @ vectors - torch.eye(k)).abs().max() < tolerance
    long, left, right = (a, found.u, found.v) if a.shape[0] >= a.shape[1] else (a.T, found.v, found.u)
    assert (long.double() @ right.double() - left.double() * found.sigma).abs().max() <= tolerance * norm
    return true


@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_sparse_update_meets_tolerance_unlike_svd_lowrank(dtype):
    a = sparse(1536, 1024).to(dtype)
    sigma = truth(a)
    result = randomized_svd(a, 64)
    true = assert_sound(a, result, sigma)
    assert result.converged
    assert (1 - result.sigma / true).abs().max() < 1e-4
    share = float(true.square().sum() / sigma.square().sum())
    assert result.energy(64)[0] == pytest.approx(share, rel=1e-5)
    other = torch.svd_lowrank(a, q=64, niter=2)[1].double()
    assert other[0] < 0.98 * true[0]
    assert other.square().sum() < 0.9 * true.square().sum()


@pytest.mark.parametrize("method", randomized.METHODS)
@pytest.mark.parametrize("dtype", [FP32, FP64])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_each_sigma_meets_the_tolerance(spectrum, dtype, method):
    a = SPECTRA[spectrum](240, 200).to(dtype)
    for rank in (1, 10):
        result = randomized_svd(a, rank, method=method, max_passes=1000)
        true = assert_sound(a, result)
        assert (result.converged, result.method) == (True, method)
        assert (1 - result.sigma / true).abs().max() < 1e-4


def test_krylov_needs_fewer_passes_on_flat_spectrum():
    a = sparse(600, 400)
    krylov, subspace = (randomized_svd(a, 8, method=method, block=24, max_passes=400) for method in randomized.METHODS)
    assert 3 * krylov.passes < subspace.passes


def test_a_tighter_tolerance_is_met():
    a = spikes(300, 200)
    for tolerance in (1e-2, 1e-6, 1e-10):
        result = randomized_svd(a, 12, block=12, tolerance=tolerance)
        assert result.converged
        assert (1 - result.sigma / assert_sound(a, result)).abs().max() < tolerance


@pytest.mark.parametrize("dtype", [FP32, FP64])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_bounds_hold_on_200_seeds(spectrum, dtype):
    """Also if the search stops before it converges, and for any start."""
    a = SPECTRA[spectrum](48, 36).to(dtype)
    sigma = truth(a)
    for max_passes, method in ((4, "krylov"), (8, "subspace"), (100, "krylov")):
        options = {"block": 4, "max_passes": max_passes, "method": method}
        seeds = [str(seed) for seed in range(200)]
        for result in randomized_svd([a] * 200, 3, names=seeds, **options)[:: 1 if max_passes == 4 else 4]:
            assert_sound(a, result, sigma)


def test_bounds_are_tight_for_small_remainder():
    a = with_spectrum(400, 300, [5, 4, 3, 2, 1]) + 1e-6 * noise(400, 300)
    result = randomized_svd(a, 5)
    true = assert_sound(a, result)
    assert (result.upper / true - 1).max() < 1e-9
    assert (1 - result.lower / true).max() < 1e-9
    assert result.remainder < 1e-8
    result = randomized_svd(decay(400, 300), 20)
    assert result.upper[0] / assert_sound(decay(400, 300), result)[0] - 1 < 1e-9


def test_truncated_search_is_not_converged():
    result = randomized_svd(noise(300, 200), 5, max_passes=8)
    assert not result.converged
    assert result.passes <= 8
    assert_sound(noise(300, 200), result)


def test_more_passes_never_increase_the_error():
    a = sparse(300, 200)
    captured = [float(randomized_svd(a, 6, block=6, max_passes=p).sigma.square().sum()) for p in (4, 6, 10, 20, 40)]
    assert captured == sorted(captured)


@pytest.mark.parametrize("dtype", [FP32, FP64])
@pytest.mark.parametrize("rank", [1, 20, 37, 50])
def test_any_rank_up_to_the_smaller_side(rank, dtype):
    a = sparse(70, 50, seed=3).to(dtype)
    for block in (None, rank):
        result = randomized_svd(a, rank, block=block, tolerance=1e-9)
        assert result.sigma.numpy() == pytest.approx(assert_sound(a, result).numpy(), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_full_rank_rebuilds_the_matrix(dtype):
    a = noise(40, 64).to(dtype)
    result = randomized_svd(a, 40)
    assert_sound(a, result)
    assert result.converged
    assert result.remainder < 1e-9
    assert torch.allclose(result.u * result.sigma.to(dtype) @ result.v.T, a, atol=1e-5 if dtype == FP32 else 1e-12)


@pytest.mark.parametrize("method", randomized.METHODS)
@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_rank_deficient(dtype, method):
    a = (noise(120, 3) @ noise(3, 90)).to(dtype)
    for block in (8, 30):
        result = randomized_svd(a, 8, block=block, method=method)
        true = assert_sound(a, result)
        assert result.converged
        assert (1 - result.sigma / true)[:3].abs().max() < 1e-9
        assert result.upper[3] < 1e-5 * true[0]


@pytest.mark.parametrize("method", randomized.METHODS)
@pytest.mark.parametrize("multiplicity", [3, 30])
def test_repeated_singular_values(multiplicity, method):
    for dtype in (FP32, FP64):
        a = with_spectrum(100, 80, [2.0] * multiplicity + [1.0] * (80 - multiplicity)).to(dtype)
        result = randomized_svd(a, 6, block=8, method=method)
        assert result.converged
        assert (result.sigma - assert_sound(a, result)).abs().max() < 2e-4


def test_identity():
    for a in (torch.eye(100), torch.eye(100)[:, :70]):
        result = randomized_svd(a, 5, block=5)
        assert result.sigma.numpy() == pytest.approx(assert_sound(a, result).numpy(), rel=1e-6)


@pytest.mark.parametrize("dtype", [FP32, FP64])
@pytest.mark.parametrize("shape", [(9, 7), (200, 100), (100, 200), (1, 1)])
def test_zero_matrix(shape, dtype):
    result = randomized_svd(torch.zeros(shape, dtype=dtype), 1)
    assert_sound(torch.zeros(shape, dtype=dtype), result)
    assert (result.sigma.item(), result.lower.item(), result.upper.item()) == (0, 0, 0)
    assert (result.frobenius, result.remainder, result.converged) == (0, 0, True)
    assert all(math.isnan(x) for x in result.energy(1))


@pytest.mark.parametrize("n", [1, 2, 17, 3000])
def test_one_row_or_column(n):
    for a in (noise(1, n), noise(n, 1).float()):
        result = randomized_svd(a, 1)
        assert_sound(a, result)
        assert result.sigma.item() == pytest.approx(float(a.double().norm()), rel=1e-12)


def test_condition_of_1e8():
    sigma = torch.logspace(0, -8, 60, dtype=FP64)
    for dtype, resolved in ((FP32, 1e-7), (FP64, 1e-14)):
        a = with_spectrum(150, 120, sigma).to(dtype)
        for rank, block in ((20, None), (60, 60), (60, 80), (60, 120)):
            result = randomized_svd(a, rank, block=block)
            assert result.converged
            assert (result.sigma - assert_sound(a, result)).abs().max() < resolved


@pytest.mark.parametrize("method", randomized.METHODS)
def test_fp32_resolves_distant_singular_values(method):
    """Singular values down to 1e-6 of the largest: their squares differ by more than fp32 resolves."""
    a = with_spectrum(150, 120, torch.logspace(0, -12, 24)).float()
    result = randomized_svd(a, 12, block=14, method=method)
    assert (1 - result.sigma / assert_sound(a, result)).abs().max() < 1e-4


@pytest.mark.parametrize("scale", [1e-30, 1e-38, 1e30, 1e37])
def test_scales(scale):
    for spectrum in (sparse, decay):
        a = (spectrum(150, 120) * scale).float()
        result = randomized_svd(a, 5)
        assert result.converged
        assert (1 - result.sigma / assert_sound(a, result)).abs().max() < 1e-4


def test_power_of_two_scales_exactly():
    a = sparse(150, 120).float()
    expected_one = randomized_svd(a, 5)
    for dtype, exponents in ((FP32, (-90, 3, 90)), (FP64, (-900, 900))):
        plain = randomized_svd(a.to(dtype), 5)
        for exponent in exponents:
            other = randomized_svd(a.to(dtype) * 2.0**exponent, 5)
            assert torch.equal(other.sigma, plain.sigma * 2.0**exponent)
            assert torch.equal(other.v, plain.v)
            assert (other.passes, other.remainder) == (plain.passes, plain.remainder)
    assert expected_one.passes == randomized_svd(a * 2.0**-90, 5).passes


@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_transpose_swaps_vectors(dtype):
    a = spikes(150, 100).to(dtype)
    tall, wide = randomized_svd(a, 4, block=8), randomized_svd(a.T.contiguous(), 4, block=8)
    assert_sound(a.T, wide)
    assert wide.passes == tall.passes
    assert wide.sigma.numpy() == pytest.approx(tall.sigma.numpy(), rel=1e-9)
    assert ((tall.u * wide.v).sum(0).abs() - 1).abs().max() < 1e-5


def test_orthogonal_invariance():
    a = decay(90, 80)
    left, right = (torch.linalg.qr(noise(side, side, seed)).Q for side, seed in ((90, 5), (80, 6)))
    for rotated in (left @ a, a @ right, left @ a @ right):
        result = randomized_svd(rotated, 5, block=5, tolerance=1e-8)
        assert result.sigma.numpy() == pytest.approx(1 / torch.arange(1, 6).numpy(), rel=1e-7)


def assert_same(one: RandomizedSVD, other: RandomizedSVD) -> None:
    """Equal but for the last bits."""
    assert (one.passes, one.converged, one.frobenius) == (other.passes, other.converged, other.frobenius)
    assert one.sigma.numpy() == pytest.approx(other.sigma.numpy(), rel=1e-9)
    assert one.upper.numpy() == pytest.approx(other.upper.numpy(), rel=1e-6)
    assert ((one.v * other.v).sum(0).abs() - 1).abs().max() < 1e-4


def test_order_and_grouping_do_not_matter(monkeypatch):
    shapes = [(60, 50), (50, 60), (64, 40), (60, 50), (30, 90), (60, 50)]
    named = {f"layer.{i}": spikes(*shape, seed=i).float() for i, shape in enumerate(shapes)}
    forward = dict(zip(named, randomized_svd(list(named.values()), 4, block=6, names=list(named)), strict=True))
    order = ["layer.3", "layer.5", "layer.0", "layer.2", "layer.4", "layer.1"]
    backward = dict(zip(order, randomized_svd([named[name] for name in order], 4, block=6, names=order), strict=True))
    monkeypatch.setitem(randomized.GROUP_BYTES, "cpu", 1)
    apart = dict(zip(order, randomized_svd([named[name] for name in order], 4, block=6, names=order), strict=True))
    for name, a in named.items():
        assert_sound(a, forward[name])
        alone = randomized_svd(a, 4, block=6, names=[name])
        for other in (backward[name], apart[name], alone, randomized_svd(a, 4, block=6, names=name)):
            assert_same(forward[name], other)


def test_batch_members_finish_independently():
    members = [spectrum(90, 70, seed=7) for spectrum in SPECTRA.values()] + [torch.zeros(90, 70, dtype=FP64)]
    result = randomized_svd(torch.stack(members), 3, block=4)
    assert len({expected_one.passes for expected_one in result}) > 2
    for a, expected_one in zip(members, result, strict=True):
        assert expected_one.converged
        assert (expected_one.sigma - assert_sound(a, expected_one)).abs().max() <= 1e-4 * truth(a)[0]


def test_start_depends_only_on_name_and_seed():
    a = noise(200, 150)
    options = {"block": 4, "max_passes": 8}
    plain = randomized_svd(a, 4, **options)
    assert torch.equal(plain.sigma, randomized_svd(a, 4, **options).sigma)
    others = [randomized_svd(a, 4, **options, names=name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("a", 1))]
    assert len({float(expected_one.sigma.sum()) for expected_one in (plain, *others)}) == 4
    assert torch.equal(randomized.start("a", 1, 20, 3), randomized.start("a", 1, 20, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_exactly(dtype):
    a = sparse(120, 90).to(dtype)
    result, wide = randomized_svd(a, 4), randomized_svd(a.float(), 4)
    for field in dataclasses.fields(result):
        expected_one, other = getattr(result, field.name), getattr(wide, field.name)
        assert torch.equal(expected_one, other) if isinstance(expected_one, torch.Tensor) else expected_one == other


def test_strided_and_grad_inputs_are_unchanged():
    base = sparse(300, 200).float()
    view = base[::2, 1::2].requires_grad_()
    before = base.clone()
    assert_same(randomized_svd(view, 4), randomized_svd(view.detach().contiguous(), 4))
    assert_same(randomized_svd(view * 2.0**60, 4, names=["x"]), randomized_svd(view.detach() * 2.0**60, 4, names=["x"]))
    assert torch.equal(base, before)


@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_cholesky_qr_handles_rank_deficient_blocks(dtype):
    """Zero, repeated, nearly parallel or already spanned columns: the result is orthonormal, others are unchanged."""
    n, width = 60, 8
    basis = torch.linalg.qr(noise(n, 20)).Q
    good = noise(n, width, 1)
    blocks = [good, torch.zeros(n, width, dtype=FP64), good[:, :1].expand(n, width), basis[:, :width]]
    blocks += [good * torch.logspace(0, -30, width), good[:, :1] + 1e-9 * good]
    blocks += [torch.cat([good[:, :4], basis[:, :4]], 1)]
    w, bases = torch.stack(blocks).to(dtype), basis.to(dtype).expand(len(blocks), -1, -1)
    q = orthonormalise(w, bases).double()
    eps = torch.finfo(dtype).eps
    assert (q.mT @ q - torch.eye(width)).abs().max() < 50 * eps
    assert (basis.T @ q).abs().max() < 50 * eps
    alone = orthonormalise(w[:1], bases[:1]).double()
    assert (q[0] - alone[0]).abs().max() < 50 * eps
    for block in (good, good * torch.logspace(0, -6, width)):  # spans what it was given
        rest = block - basis @ (basis.T @ block)
        q = orthonormalise(block[None].to(dtype), bases[:1])[0].double()
        assert (rest - q @ (q.T @ rest)).abs().max() < 200 * eps


def test_basis_grows_beyond_the_rank():
    """With a tolerance that cannot be met, random directions are added to the basis until it spans the space."""
    steps = torch.diag(torch.arange(60, dtype=FP64) // 20)
    for a in (noise(80, 2) @ noise(2, 60), torch.eye(80, 60, dtype=FP64), steps):
        result = randomized_svd(a, 5, block=7, tolerance=1e-300)
        true = assert_sound(a, result)
        assert (result.sigma - true).abs().max() < 1e-7 * true[0]


@pytest.mark.parametrize(("setting", "kept"), [("tf32", 10), ("bf16", 7)])
def test_bounds_account_for_matmul_precision(monkeypatch, setting, kept):
    """A GPU that rounds the factors of fp32 products to TF32 or bf16 is made up here."""

    def coarse(x: torch.Tensor) -> torch.Tensor:
        fraction, exponent = torch.frexp(x)
        return torch.ldexp((fraction * 2.0 ** (kept + 1)).round() / 2.0 ** (kept + 1), exponent)

    exact, before = randomized.multiply, torch.backends.mkldnn.matmul.fp32_precision
    matrices = [spectrum(120, 90).float() for spectrum in SPECTRA.values()]
    plain = randomized_svd(matrices, 4, block=8)
    monkeypatch.setattr(randomized, "multiply", lambda a, x: exact(coarse(a), coarse(x)))
    torch.backends.mkldnn.matmul.fp32_precision = setting
    try:
        result = randomized_svd(matrices, 4, block=8)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    for a, expected_one, other in zip(matrices, result, plain, strict=True):
        true = assert_sound(a, expected_one)
        assert (1 - expected_one.sigma / true).abs().max() < 0.02
        assert expected_one.remainder >= other.remainder * (1 - 1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_cuda_agrees_with_the_cpu(dtype):
    matrices = [spectrum(300, 200).to(dtype) for spectrum in SPECTRA.values()]
    for here, there in zip(randomized_svd(matrices, 8), randomized_svd([a.cuda() for a in matrices], 8), strict=True):
        assert there.sigma.is_cuda
        assert there.sigma.cpu().numpy() == pytest.approx(here.sigma.numpy(), rel=1e-5)
        assert there.upper.cpu().numpy() == pytest.approx(here.upper.numpy(), rel=1e-3)


def test_examples_run():
    assert doctest.testmod(randomized) == (0, 2)


def test_empty_list_has_no_results():
    assert randomized_svd([], 1) == []
    assert randomized_svd(torch.zeros(0, 3, 3), 1) == []


@pytest.mark.parametrize(
    ("matrices", "error", "message"),
    [
        (torch.zeros(3), ValueError, r"matrices has shape \[3\]; pass \[m, n\]"),
        (torch.zeros(0, 3), ValueError, r"matrix 0 has shape \[0, 3\]; randomized_svd takes matrices of at least 1"),
        ([torch.zeros(3, 3), torch.zeros(3)], ValueError, r"matrix 1 has shape \[3\]"),
        (torch.zeros(3, 3, dtype=torch.int64), TypeError, "matrix 0 is torch.int64; randomized_svd takes bfloat16"),
        (torch.zeros(3, 3, dtype=torch.complex64), TypeError, "matrix 0 is torch.complex64"),
        ([torch.zeros(3, 3), None], TypeError, "matrix 1 is NoneType"),
        ([torch.zeros(3, 3), torch.zeros(3, 3).double()], TypeError, "matrix 1 is torch.float64, matrix 0 torch"),
        ([torch.zeros(3, 3), torch.zeros(3, 3, device="meta")], ValueError, "matrix 1 is on meta, matrix 0 on cpu"),
        (torch.tensor([[1.0, math.nan]]), ValueError, "matrix 0 contains NaN or Inf; replace them, or omit the matrix"),
        ([torch.ones(2, 2), torch.tensor([[-math.inf, 1.0]])], ValueError, "matrix 1 contains NaN or Inf"),
        ([torch.zeros(3, 3), torch.zeros(0, 5)], ValueError, "matrix 1 has shape"),
    ],
)
def test_invalid_matrices_are_errors(matrices, error, message):
    with pytest.raises(error, match=message):
        randomized_svd(matrices, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, r"rank must be in 1 \.\. 5, the smaller side of first, not 0"),
        ({"rank": 5}, r"rank must be in 1 \.\. 4, the smaller side of second, not 5"),
        ({"rank": -1}, "not -1"),
        ({"names": ["one"]}, "1 names for 2 matrices; give one for each"),
        ({"tolerance": 0}, "tolerance must be between 0 and 1, not 0"),
        ({"tolerance": math.nan}, "tolerance must be between 0 and 1, not nan"),
        ({"method": "lanczos"}, "method must be one of krylov, subspace, not lanczos"),
        ({"block": 1}, "block must be at least the rank, 2, not 1"),
        ({"max_passes": 3}, "max_passes must be at least 4, not 3"),
    ],
)
def test_invalid_arguments_are_errors(arguments, message):
    settings = {"rank": 2, "names": ["first", "second"], **arguments}
    with pytest.raises(ValueError, match=message):
        randomized_svd([torch.zeros(5, 6), torch.zeros(4, 9)], **settings)
    with pytest.raises(TypeError):
        randomized_svd(torch.zeros(5, 6), 1.5)


def test_energy_beyond_the_rank_is_error():
    result = randomized_svd(torch.ones(3, 3), 2)
    for k in (0, 3):
        with pytest.raises(ValueError, match=rf"k must be in 1 \.\. 2, the computed rank, not {k}"):
            result.energy(k)
