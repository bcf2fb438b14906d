"""The factored solve against the published dense formula (tests/reference/closed_form.py)."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference.closed_form import alphaedit as dense_alphaedit
from reference.closed_form import moment, projector

from editlib.algorithms.closed_form import alphaedit, exact
from editlib.algorithms.null_space import NullSpace, null_space
from editlib.errors import EditError


def problem(seed, d_ff, d_model, n, n_held, tokens):
    """Keys, residual, held keys and a second moment with eigenvalues over some orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    spread = torch.logspace(0, -3, d_ff, dtype=torch.float64)
    mixing = torch.linalg.qr(rand(d_ff, d_ff)).Q
    c = moment(mixing @ (spread[:, None] * rand(d_ff, tokens)))
    return rand(d_ff, n), rand(d_model, n), rand(d_ff, n_held), c


def relative(got, wanted):
    return float((got.double() - wanted).norm() / wanted.norm())


SIZES = st.tuples(
    st.integers(0, 2**31),
    st.integers(4, 24),
    st.integers(1, 10),
    st.integers(1, 40),
    st.integers(0, 40),
    st.integers(2, 60),
)


@settings(max_examples=300)
@given(SIZES, st.sampled_from([0.1, 1.0, 10.0]), st.integers(1, 4))
def test_agrees_with_the_published_formula(sizes, l2, share):
    keys, residual, held, c = problem(*sizes)
    values = torch.linalg.eigvalsh(c)
    cut = (len(values) - 1) * share // 5  # between two eigenvalues, where no rounding decides
    threshold = float((values[cut].clamp_min(1e-14) * values[cut + 1].clamp_min(2e-14)).sqrt())
    if values[cut + 1] - values[cut] < 1e-5 * values[-1]:  # too near for two ways of rounding: cut above the zeros
        threshold = 1e-9 * float(values[-1])
        assume(
            (values < 1e-12 * values[-1]).any() and not ((values > threshold / 1e3) & (values < threshold * 1e3)).any()
        )
    wanted = dense_alphaedit(keys, residual, projector(c, threshold), l2, held)
    space = null_space(c, threshold)
    got = alphaedit(keys, residual, space, l2=l2, constraints=[held])
    assert relative(got.dense(), wanted) < 1e-8
    if l2 < 1:  # the condition of the system, not the way to solve it, decides what fp32 can give
        return
    single = NullSpace(space.basis.float(), space.spans_kept, space.dim)
    got = alphaedit(keys.float(), residual.float(), single, l2=l2, constraints=[held.float()])
    assert got.left.dtype == got.right.dtype == torch.float32
    # Where the factors' product cancels, ten roundings of its terms are all that fp32 can give.
    rounding = 10 * torch.finfo(torch.float32).eps * got.left.norm() * got.right.norm()
    assert (got.dense() - wanted).norm() < 1e-4 * wanted.norm() + rounding


@pytest.mark.parametrize(("n", "n_held"), [(3, 4), (3, 40), (40, 0), (40, 7), (10, 6), (10, 7)])
def test_both_branches(n, n_held):
    """Few keys (an m x m system), more than d_ff = 16 (a d_ff x d_ff one), and the border between."""
    keys, residual, held, c = problem(1, 16, 5, n, n_held, 50)
    wanted = dense_alphaedit(keys, residual, projector(c, 1e-2), 1.0, held)
    got = alphaedit(keys, residual, null_space(c, 1e-2), l2=1.0, constraints=[held] if n_held else [])
    assert relative(got.dense(), wanted) < 1e-10
    assert got.rank == n


def test_repeated_keys():
    keys, residual, held, c = problem(2, 16, 5, 4, 3, 50)
    keys, held = torch.cat([keys, keys[:, :2]], 1), torch.cat([held, held], 1)
    residual = torch.cat([residual, residual[:, :2]], 1)
    wanted = dense_alphaedit(keys, residual, projector(c, 1e-2), 1.0, held)
    got = alphaedit(keys, residual, null_space(c, 1e-2), l2=1.0, constraints=[held])
    assert relative(got.dense(), wanted) < 1e-10


def test_constraints_add_up_with_their_weights():
    """Past keys and anchors of weight w (as columns times sqrt(w)) enter the Gram matrix together."""
    keys, residual, held, c = problem(3, 20, 5, 4, 9, 50)
    past, anchors, weight = held[:, :3], held[:, 3:], 5.0
    p = projector(c, 1e-2)
    gram = keys @ keys.T + past @ past.T + weight * anchors @ anchors.T
    wanted = torch.linalg.solve(p @ gram + 2.0 * torch.eye(20, dtype=torch.float64), p @ keys @ residual.T).T
    blocks = [past, keys[:, :0], weight**0.5 * anchors]
    got = alphaedit(keys, residual, null_space(c, 1e-2), l2=2.0, constraints=blocks)
    assert relative(got.dense(), wanted) < 1e-10
    free = alphaedit(keys, residual, null_space(c, 1e-2), l2=2.0)
    assert (got.dense() @ anchors).norm() < 0.5 * (free.dense() @ anchors).norm()


@pytest.mark.parametrize("threshold", [1e-2, 1e9], ids=["null space", "everything"])
@pytest.mark.parametrize("n_held", [0, 3, 30])
def test_a_moment_is_held_as_the_keys_that_it_sums_up(threshold, n_held):
    """`M = w K_t K_t^T` costs what the columns of `sqrt(w) K_t` cost as constraints."""
    keys, residual, held, c = problem(4, 20, 5, 4, n_held, 50)
    seen = problem(5, 20, 5, 4, 12, 50)[2]
    space = null_space(c, threshold)
    got = alphaedit(keys, residual, space, l2=2.0, constraints=[held], moment=3.0 * seen @ seen.T)
    columns = torch.cat([held, 3.0**0.5 * seen], dim=1)
    wanted = dense_alphaedit(keys, residual, projector(c, threshold), 2.0, columns)
    assert relative(got.dense(), wanted) < 1e-10


def test_rank_deficient_moment_leaves_what_text_takes_untouched():
    """Fewer tokens than dimensions: what the layer has seen is not moved; the edit is exact as L2 -> 0."""
    generator = torch.Generator().manual_seed(4)
    seen = torch.randn(24, 10, generator=generator, dtype=torch.float64)
    keys = torch.randn(24, 3, generator=generator, dtype=torch.float64)
    residual = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    delta = alphaedit(keys, residual, null_space(moment(seen), 1e-9), l2=1e-10)
    torch.testing.assert_close(delta @ keys, residual, rtol=1e-7, atol=1e-7)
    assert float((delta @ seen).abs().max()) < 1e-9


@pytest.mark.parametrize("case", ["twice the same key", "more keys than dimensions", "a key outside the null space"])
def test_singular_systems_are_refused(case):
    keys, residual, held, c = problem(5, 12, 4, 3, 20, 50)
    constraints = []
    space = null_space(c, 1e-2)
    if case == "twice the same key":
        keys = torch.cat([keys, keys[:, :1]], 1)
        residual = torch.cat([residual, -residual[:, :1]], 1)  # and they contradict one another
    elif case == "more keys than dimensions":
        constraints = [held]
    else:
        keys = keys - space.project(keys)
    with pytest.raises(EditError, match="model is unchanged"):
        alphaedit(keys, residual, space, l2=0.0, constraints=constraints)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad):
    keys, residual, _, c = problem(6, 12, 4, 3, 0, 50)
    keys[3, 1] = bad
    with pytest.raises(EditError, match="model is unchanged"):
        alphaedit(keys, residual, null_space(c, 1e-2), l2=1.0)


@pytest.mark.parametrize("n_held", [0, 5, 40])
def test_exact_is_the_least_cost_update_that_meets_every_residual(n_held):
    """EMMET's `R (K^T G^-1 K)^-1 K^T G^-1`, dense, with `G = P K_c K_c^T P + L2 I`."""
    keys, residual, held, c = problem(7, 20, 5, 4, n_held, 50)
    p, l2 = projector(c, 1e-2), 2.0
    inside = p @ keys
    inverse = torch.linalg.inv(p @ held @ held.T @ p + l2 * torch.eye(20, dtype=torch.float64))
    wanted = residual @ torch.linalg.inv(inside.T @ inverse @ inside) @ inside.T @ inverse
    space = null_space(c, 1e-2)
    ridge = alphaedit(keys, residual, space, l2=l2, constraints=[held])
    got = exact(ridge, keys)
    assert relative(got.dense(), wanted) < 1e-8
    torch.testing.assert_close(got @ keys, residual)
    assert float((ridge @ keys - residual).norm()) > 0.1


def test_exact_refuses_keys_that_are_the_same():
    keys, residual, held, c = problem(8, 20, 5, 4, 3, 50)
    keys[:, 3] = keys[:, 0]
    ridge = alphaedit(keys, residual, null_space(c, 1e-2), l2=1.0, constraints=[held])
    with pytest.raises(EditError, match="same key"):
        exact(ridge, keys)


def test_with_a_floor_equal_keys_share_the_mean_of_their_residuals():
    """TOFU: "What did <author> write?" and "What did <author> win?" have one key, up to the author."""
    keys, residual, held, c = problem(8, 20, 5, 4, 3, 50)
    keys[:, 3] = keys[:, 0]
    ridge = alphaedit(keys, residual, null_space(c, 1e-2), l2=1e-6, constraints=[1e-3 * held])
    wanted = residual.clone()
    wanted[:, [0, 3]] = residual[:, [0, 3]].mean(dim=1, keepdim=True)
    torch.testing.assert_close(exact(ridge, keys, floor=0.1) @ keys, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("floor", [0.01, 0.3, 1.0])
def test_no_direction_is_scaled_up_by_more_than_the_floor_allows(floor):
    """In the directions of `M = U S V^T` the update reaches `S / max(S, floor)` of what was asked."""
    keys, residual, held, c = problem(9, 20, 5, 6, 8, 50)
    keys[:, 1] = keys[:, 0] + 0.02 * keys[:, 1]
    ridge = alphaedit(keys, residual, null_space(c, 1e-2), l2=1.0, constraints=[held])
    values, vectors = torch.linalg.eigh(ridge.right @ keys)  # symmetric: K^T G^-1 K
    reached = vectors @ torch.diag(values / values.clamp_min(floor)) @ vectors.T
    assert values.min() < 0.01 < values.max()
    torch.testing.assert_close(exact(ridge, keys, floor=floor) @ keys, residual @ reached, rtol=1e-6, atol=1e-8)


def test_a_floor_does_not_hide_what_is_not_finite():
    keys, residual, held, c = problem(8, 20, 5, 4, 3, 50)
    ridge = alphaedit(keys, residual, null_space(c, 1e-2), l2=1.0, constraints=[held])
    keys[0, 0] = float("inf")
    with pytest.raises(EditError, match="not finite"):
        exact(ridge, keys, floor=0.1)
