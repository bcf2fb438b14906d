"""Rules, the thinner basis, and the projector against the dense one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.closed_form import moment, projector

from editlib.algorithms.null_space import null_space
from editlib.errors import EditlibError, HparamsError
from editlib.stats.spectrum import eigen, kept_dimensions


def with_eigenvalues(*values):
    q = torch.linalg.qr(torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(0)).double()).Q
    return q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T


C = with_eigenvalues(5.0, 1e-4, 0.5, 1e-3, 2.0, 0.1, 0.01, 1.0)


@pytest.mark.parametrize("threshold", [2e-4, 5e-3, 0.05, 0.3, 0.7, 1.5, 3.0, 9.0])
def test_equals_the_dense_projector_through_the_thinner_basis(threshold):
    space = null_space(C, threshold)
    p = projector(C, threshold)
    got = space.project(torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close(got, p, rtol=0, atol=1e-12)
    torch.testing.assert_close(got, got.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(space.project(got), got, rtol=0, atol=1e-12)
    assert space.dim == round(float(torch.trace(p)))
    assert space.basis.shape[1] == min(space.dim, 8 - space.dim)


@given(st.integers(0, 999), st.integers(2, 12), st.integers(1, 30))
def test_projects_random_keys_as_the_dense_one_does(seed, d_ff, tokens):
    generator = torch.Generator().manual_seed(seed)
    c = moment(torch.randn(d_ff, tokens, generator=generator))
    values = torch.linalg.eigvalsh(c)
    threshold = float(values[d_ff // 2].clamp_min(1e-9)) * 1.5
    if (values / threshold - 1).abs().min() < 1e-3:
        return
    keys = torch.randn(d_ff, 3, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        null_space(c, threshold).project(keys), projector(c, threshold) @ keys, rtol=0, atol=1e-7
    )


def test_rules():
    values, vectors = eigen(C)
    assert values.tolist() == pytest.approx([1e-4, 1e-3, 0.01, 0.1, 0.5, 1.0, 2.0, 5.0])
    torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.T, C)
    assert [kept_dimensions(values, t) for t in (1e-5, 0.02, 0.6, 10)] == [0, 3, 5, 8]
    # Shares of the trace 8.6111: 1.2e-5, 1.3e-4, 1.3e-3, .0129, .0710, .187, .419, 1.
    assert [kept_dimensions(values, t, "energy") for t in (1e-5, 1e-3, 0.02, 0.2, 0.5)] == [0, 2, 4, 6, 7]
    assert [kept_dimensions(values, t, "dimensions") for t in (0, 0.25, 0.5, 1)] == [0, 2, 4, 8]
    with pytest.raises(HparamsError, match=r"'mean'.*absolute.*energy.*dimensions"):
        kept_dimensions(values, 0.5, "mean")


def test_all_directions_and_none():
    space = null_space(C, 9.0)
    keys = torch.randn(8, 2, dtype=torch.float64)
    assert torch.equal(space.project(keys), keys)
    with pytest.raises(HparamsError, match=r"nullspace_threshold 1e-05 .* none of 8 .*0\.0001"):
        null_space(C, 1e-5)


def test_half_precision_and_negative_rounding_do_not_matter():
    singular = with_eigenvalues(1.0, 1.0, 0.0, 0.0)
    assert float(eigen(singular)[0].min()) >= 0
    assert null_space(singular.float(), 1e-3).dim == 2
    assert null_space(singular, 1e-3, "energy").dim == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_damaged_moment_is_an_error_of_ours(bad):
    c = C.clone()
    c[2, 3] = c[3, 2] = bad
    with pytest.raises(EditlibError):
        null_space(c, 0.02)
