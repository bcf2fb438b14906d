"""The factored update against the dense one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from editlib.algorithms.low_rank import LowRank
from editlib.errors import EditError


def update(seed=0, rows=5, rank=3, columns=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(rows, rank, generator=generator, dtype=dtype),
        torch.randn(rank, columns, generator=generator, dtype=dtype),
    )


@given(st.integers(0, 999), st.integers(1, 6), st.integers(0, 9), st.integers(1, 7))
def test_agrees_with_the_dense_matrix(seed, rows, rank, columns):
    delta, other = update(seed, rows, rank, columns), update(seed + 1, rows, 2, columns)
    dense = torch.einsum("ir,rj->ij", delta.left, delta.right)
    keys = torch.randn(columns, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert (delta.rank, delta.shape) == (rank, dense.shape)
    torch.testing.assert_close(delta.dense(), dense)
    torch.testing.assert_close(delta @ keys, dense @ keys)
    assert delta.norm() == pytest.approx(float(dense.square().sum().sqrt()))
    torch.testing.assert_close((delta + other).dense(), dense + other.dense())
    assert (delta + other).rank == rank + 2


@given(st.integers(0, 999), st.integers(1, 6), st.integers(1, 9), st.integers(1, 7), st.integers(1, 9))
def test_truncation_is_the_nearest_matrix_of_that_rank(seed, rows, rank, columns, most):
    """Eckart and Young: what is lost are the singular values behind the first ones of the dense matrix."""
    delta = update(seed, rows, rank, columns)
    delta = delta + LowRank(delta.left, delta.right)  # twice the inner dimension, the same true rank
    u, s, v = delta.svd()
    torch.testing.assert_close(u * s @ v, delta.dense())
    dense = torch.linalg.svdvals(delta.dense())
    small, lost = delta.truncated(most)
    assert small.rank == min(most, rank, rows, columns)
    assert lost == pytest.approx(float(dense[small.rank :].norm() / dense.norm()), abs=1e-9)
    assert float((small.dense() - delta.dense()).norm()) == pytest.approx(lost * delta.norm(), abs=1e-6)
    whole, nothing = delta.truncated()
    assert nothing == 0 and whole.rank == min(rank, rows, columns)
    torch.testing.assert_close(whole.dense(), delta.dense())


def test_truncating_nothing():
    zero, lost = LowRank(torch.zeros(4, 2), torch.zeros(2, 3)).truncated()
    assert zero.rank == 1 and lost == 0 and not zero.dense().any()


def test_norm_of_parts_that_cancel():
    delta = update()
    assert (delta + LowRank(-delta.left, delta.right)).norm() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounds_once(dtype):
    """Each entry is the exact sum, rounded to the nearest number that the weight's dtype has."""
    delta = update(rank=4)
    delta = LowRank(delta.left * 0.02, delta.right)
    weight = update(7, rank=5).dense().to(dtype)
    exact = weight.double() + delta.dense()
    before = weight.clone()
    delta.add_to(weight)
    assert weight.dtype == dtype
    assert torch.equal(weight, exact.to(dtype))
    one_by_one = before
    for r in range(delta.rank):
        one_by_one = one_by_one + (delta.left[:, r : r + 1] @ delta.right[r : r + 1]).to(dtype)
    if dtype != torch.float32:
        assert not torch.equal(weight, one_by_one)  # the case tells the two apart


def test_adds_through_a_transposed_view():
    stored = torch.zeros(8, 5)
    delta = update()
    delta.add_to(stored.T)
    torch.testing.assert_close(stored, delta.dense().T.float())


@pytest.mark.parametrize(("left", "right"), [((5, 3), (2, 8)), ((5,), (1, 8)), ((5, 8), (8,)), ((5, 1), (5, 8))])
def test_factors_that_do_not_fit_are_refused(left, right):
    """When it is built, with both shapes, not in a product later on."""
    with pytest.raises(EditError) as error:
        LowRank(torch.zeros(left), torch.zeros(right))
    assert str(list(left)) in str(error.value) and str(list(right)) in str(error.value)


def test_updates_of_other_matrices_do_not_add_up():
    with pytest.raises(RuntimeError):
        update(rows=5) + update(rows=6)
