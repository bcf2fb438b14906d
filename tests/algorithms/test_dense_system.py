"""Systems factored in place, in blocks, beside `torch.linalg` on a copy."""

import pytest
import torch

from editlib.algorithms import closed_form, dense_system
from editlib.algorithms.dense_system import factor_in_place, solve_factored
from editlib.algorithms.low_rank import LowRank
from editlib.algorithms.null_space import NullSpace, everything


def definite(m):
    roots = torch.randn(m, 2 * m, dtype=torch.float64, generator=torch.Generator().manual_seed(m))
    return roots @ roots.T / m + 0.1 * torch.eye(m, dtype=torch.float64)


@pytest.mark.parametrize("m", [1, 7, 8, 9, 24, 37])
def test_in_blocks_as_at_once(m, monkeypatch):
    monkeypatch.setattr(dense_system, "WHOLE", 4)
    monkeypatch.setattr(dense_system, "BLOCK", 8)
    gram, right = definite(m), torch.randn(m, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted, place = torch.linalg.solve(gram, right), gram.data_ptr()
    factor = gram.clone()
    assert factor_in_place(factor)
    torch.testing.assert_close(factor.tril(), torch.linalg.cholesky(gram), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(solve_factored(factor, right), wanted, rtol=1e-10, atol=1e-12)
    assert gram.data_ptr() == place


@pytest.mark.parametrize("bad", [0, 9, 36])
def test_a_system_that_is_not_definite_is_said(bad, monkeypatch):
    monkeypatch.setattr(dense_system, "WHOLE", 4)
    monkeypatch.setattr(dense_system, "BLOCK", 8)
    gram = definite(37)
    gram[bad, bad] = -1.0
    assert not factor_in_place(gram)


@pytest.mark.parametrize("spans_kept", [True, False])
def test_a_moment_is_projected_on_both_sides_in_its_own_memory(spans_kept):
    gram = definite(12)
    q = torch.linalg.qr(torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    p = q @ q.T if spans_kept else torch.eye(12, dtype=torch.float64) - q @ q.T
    wanted, place = p @ gram @ p, gram.data_ptr()
    got = NullSpace(q, spans_kept, 5 if spans_kept else 7).project_both(gram)
    assert got.data_ptr() == place
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_the_solve_is_that_of_a_copy_and_takes_the_moments_memory(monkeypatch):
    monkeypatch.setattr(dense_system, "WHOLE", 4)
    monkeypatch.setattr(dense_system, "BLOCK", 8)
    generator = torch.Generator().manual_seed(2)
    keys, residual, held = (
        torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((30, 3), (5, 3), (30, 9))
    )
    moment = definite(30)
    system = keys @ keys.T + held @ held.T + moment + 2.0 * torch.eye(30, dtype=torch.float64)
    wanted = residual @ torch.linalg.solve(system, keys).T
    got = closed_form.alphaedit(keys, residual, everything(keys), l2=2.0, constraints=[held], moment=moment)
    torch.testing.assert_close(got.dense(), wanted, rtol=1e-10, atol=1e-12)
    assert not torch.equal(moment, definite(30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_is_added_in_slabs_as_at_once(dtype, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((7, 2), (2, 6)))
    weight = torch.randn(7, 6, generator=generator).to(dtype)
    wanted = (weight.double() + left @ right).to(dtype)
    monkeypatch.setattr("editlib.algorithms.low_rank.SLAB", 13)  # two rows at once, the last alone
    LowRank(left, right).add_to(weight)
    torch.testing.assert_close(weight, wanted, rtol=0, atol=0)
