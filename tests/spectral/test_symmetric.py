"""Symmetric eigenproblems by NumPy's OpenBLAS, compared with torch's."""

from __future__ import annotations

import contextlib

import pytest
import torch

from opdkernels import UsageError, doctor
from opdkernels.backends import lapack
from opdkernels.runs.run_dir import describe_run
from opdkernels.spectral import symmetric

pytestmark = pytest.mark.skipif(lapack.load_openblas() is None, reason="NumPy carries no OpenBLAS here")
FP64 = torch.float64


@pytest.fixture(autouse=True)
def _openblas(monkeypatch):
    monkeypatch.setenv(lapack.VARIABLE, "openblas")


def random_gram(n: int, rank: int | None = None) -> torch.Tensor:
    x = torch.randn(2 * n, rank or n, generator=torch.Generator().manual_seed(n), dtype=FP64)
    x = x @ torch.randn(rank, n, generator=torch.Generator().manual_seed(1), dtype=FP64) if rank else x
    gram = x.T @ x
    return (gram + gram.T) / 2


def block_diagonal(n: int) -> torch.Tensor:
    """Two equal blocks: every eigenvalue twice, and a tridiagonal form that splits."""
    return torch.block_diag(random_gram(n // 2), random_gram(n // 2))


def with_eigenvalues(values: torch.Tensor) -> torch.Tensor:
    vectors = torch.linalg.qr(
        torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(2), dtype=FP64)
    ).Q
    matrix = vectors * values @ vectors.T
    return (matrix + matrix.T) / 2


MATRICES = {
    "gram": random_gram(200),
    "odd": random_gram(65),
    "cluster": with_eigenvalues(1 + 1e-12 * torch.linspace(-1, 1, 120, dtype=FP64)),
    "clusters": with_eigenvalues(torch.arange(120, dtype=FP64) // 10 + 1e-9 * torch.linspace(-1, 1, 120, dtype=FP64)),
    "graded": with_eigenvalues(10.0 ** torch.linspace(-20, 0, 100, dtype=FP64)),
    "low rank": random_gram(128, rank=7),
    "equal blocks": block_diagonal(160),
    "identity": torch.eye(96, dtype=FP64),
    "zero": torch.zeros(80, 80, dtype=FP64),
    "diagonal": torch.diag(torch.arange(100, dtype=FP64) - 50),
    "tiny": 1e-200 * random_gram(70),
    "huge": 1e200 * random_gram(70),
}


@pytest.mark.parametrize("name", MATRICES)
def test_eigenvalues_are_those_of_torch(name):
    matrix = MATRICES[name]
    expected = torch.linalg.eigvalsh(matrix)
    before = matrix.clone()
    values = symmetric.eigenvalues(matrix)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-13 * float(expected.abs().max()))
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("keep", [1, 13, 64])
@pytest.mark.parametrize("name", MATRICES)
def test_top_eigenvectors_are_orthogonal_and_belong_to_the_largest_values(name, keep):
    matrix = MATRICES[name]
    values, vectors = symmetric.top_eigenvectors(matrix, keep)
    expected = torch.linalg.eigvalsh(matrix)
    scale = float(expected.abs().max())
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-13 * scale)
    assert vectors.shape == (len(matrix), keep)
    assert float((vectors.T @ vectors - torch.eye(keep, dtype=FP64)).abs().max()) < 1e-13
    residual = matrix @ vectors - vectors * values[-keep:]
    assert float(residual.abs().max()) <= 1e-13 * scale


@pytest.mark.parametrize("n", [5, 80])
def test_arguments_that_do_not_fit(n):
    for matrix in (torch.eye(n), torch.eye(n, dtype=FP64)[1:], torch.eye(n, dtype=FP64)[None]):
        with pytest.raises(ValueError, match=r"must be float64 \[n, n\], not torch\.float"):
            symmetric.eigenvalues(matrix)
    for keep in (-1, 0, n + 1):
        with pytest.raises(ValueError, match=f"keep must be 1 to {n}, not {keep}"):
            symmetric.top_eigenvectors(torch.eye(n, dtype=FP64), keep)


def test_vectors_of_eigenvalues_that_fp64_cannot_hold():
    """The largest eigenvalue overflows; those below it, and the vectors, are right."""
    matrix = torch.full((80, 80), 1e308, dtype=FP64) + torch.diag(torch.arange(80, dtype=FP64) * 1e306)
    values, vectors = symmetric.top_eigenvectors(matrix, 3)
    expected = symmetric.top_eigenvectors(matrix * 2.0**-100, 3)
    assert values[-1] == torch.inf
    assert torch.equal(values[:-1], expected[0][:-1] * 2.0**100)
    torch.testing.assert_close(vectors.abs(), expected[1].abs())
    subnormal = torch.diag(torch.arange(1, 81, dtype=FP64) * 5e-324)
    values, vectors = symmetric.top_eigenvectors(subnormal, 3)
    assert torch.equal(values, subnormal.diagonal())
    assert torch.equal(vectors.abs(), torch.eye(80, dtype=FP64)[:, -3:])


def test_subspace_is_that_of_torch():
    matrix = random_gram(300)
    _, vectors = symmetric.top_eigenvectors(matrix, 60)
    expected = torch.linalg.eigh(matrix).eigenvectors[:, -60:]
    assert float((vectors @ vectors.T - expected @ expected.T).abs().max()) < 1e-11


def test_results_are_the_same_each_time():
    matrix = random_gram(150)
    first, second = (symmetric.top_eigenvectors(matrix, 30) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_small_matrices_and_other_strides():
    small = random_gram(5)
    assert torch.equal(symmetric.eigenvalues(small), torch.linalg.eigvalsh(small))
    matrix = random_gram(100)
    torch.testing.assert_close(symmetric.eigenvalues(matrix.T), torch.linalg.eigvalsh(matrix))
    wide = torch.zeros(100, 200, dtype=FP64)
    wide[:, ::2] = matrix
    torch.testing.assert_close(symmetric.eigenvalues(wide[:, ::2]), torch.linalg.eigvalsh(matrix))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_is_an_error(value):
    matrix = random_gram(80)
    matrix[3, 5] = matrix[5, 3] = value
    with pytest.raises(RuntimeError, match="NaN or Inf"):
        symmetric.eigenvalues(matrix)
    with pytest.raises(RuntimeError, match="NaN or Inf"):
        symmetric.top_eigenvectors(matrix, 3)


def test_vectors_that_do_not_converge_come_from_torch(monkeypatch):
    monkeypatch.setattr(symmetric.Tridiagonal, "top_vectors", lambda self, values, keep: None)
    matrix = random_gram(90)
    values, vectors = symmetric.top_eigenvectors(matrix, 4)
    expected = torch.linalg.eigh(matrix)
    assert torch.equal(values, expected.eigenvalues)
    assert torch.equal(vectors, expected.eigenvectors[:, -4:])


def test_the_environment_chooses(monkeypatch):
    assert lapack.chosen_library() == "openblas"
    monkeypatch.setenv(lapack.VARIABLE, "torch")
    assert lapack.chosen_library() == "torch"
    assert not symmetric.uses_openblas(random_gram(80))
    monkeypatch.delenv(lapack.VARIABLE)
    for is_amd, library in ((True, "openblas"), (False, "torch")):
        monkeypatch.setattr(lapack, "is_amd", lambda is_amd=is_amd: is_amd)
        assert lapack.chosen_library() == library
    monkeypatch.setenv(lapack.VARIABLE, "mkl")
    with pytest.raises(UsageError, match="OPDKERNELS_LAPACK is mkl; set it to one of auto, torch, openblas"):
        symmetric.eigenvalues(random_gram(80))
    monkeypatch.setenv(lapack.VARIABLE, "openblas")
    monkeypatch.setattr(lapack, "load_openblas", lambda: None)
    with pytest.raises(UsageError, match="NumPy carries none here; unset it"):
        lapack.openblas()


def test_doctor_and_runs_name_the_library(monkeypatch):
    assert any("NumPy's OpenBLAS" in line for line in doctor.format_text(doctor.examine()))
    monkeypatch.setenv(lapack.VARIABLE, "torch")
    assert any("torch's LAPACK" in line for line in doctor.format_text(doctor.examine()))
    assert describe_run("analyze", {}, {}, schema_version=1)["machine"]["lapack"] == "torch"


def test_the_last_context_of_one_thread_restores_the_number_of_threads():
    library = lapack.load_openblas()

    def num_threads():
        return library.scipy_openblas_get_num_threads64_()

    before = num_threads()
    first, second = contextlib.ExitStack(), contextlib.ExitStack()
    first.enter_context(lapack.ONE_THREAD)
    second.enter_context(lapack.ONE_THREAD)
    first.close()
    assert num_threads() == 1
    second.close()
    assert num_threads() == before
    with pytest.raises(RuntimeError, match="inside"), lapack.ONE_THREAD:
        raise RuntimeError("inside")
    assert num_threads() == before
