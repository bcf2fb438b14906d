"""ROME, MEMIT and its relatives against their published dense formulas (tests/reference/closed_form.py)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import closed_form as dense

from editlib.algorithms.closed_form import alphaedit, emmet, memit, rome
from editlib.algorithms.covariance import JITTERS, covariance, covariance_of
from editlib.algorithms.low_rank import LowRank
from editlib.algorithms.memit import relatively_largest, restrained
from editlib.algorithms.null_space import everything, null_space_of
from editlib.algorithms.past_keys import PastKeys
from editlib.errors import EditError, StatsError
from editlib.stats.file import LayerStats, StatsHeader
from editlib.stats.store import save_stats


def problem(seed, d_ff, d_model, n, n_past, tokens, repeat=False):
    """Keys, residual, past keys, and a second moment that has full rank when there are tokens enough."""
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    c = dense.moment(rand(d_ff, tokens) * torch.logspace(0, -1, d_ff, dtype=torch.float64)[:, None])
    keys, residual = rand(d_ff, n), rand(d_model, n)
    if repeat:
        keys, residual = torch.cat([keys, keys], 1), torch.cat([residual, residual], 1)
    return keys, residual, rand(d_ff, n_past), c


def relative(got, wanted):
    return float((got.double() - wanted).norm() / wanted.norm())


SIZES = st.tuples(
    st.integers(0, 2**31),
    st.integers(3, 24),  # d_ff
    st.integers(1, 10),
    st.integers(1, 40),  # new keys, fewer and more than d_ff
    st.integers(0, 40),  # past keys
    st.integers(60, 90),  # tokens
    st.booleans(),
)


@settings(max_examples=200)
@given(SIZES, st.sampled_from([0.5, 20.0, 15000.0]))
def test_memit_agrees_with_the_published_formula(sizes, weight):
    keys, residual, past, c = problem(*sizes)
    known = covariance(c)
    assert known.jitter == 0
    wanted = dense.memit(keys, residual, c, weight)
    assert relative(memit(keys, residual, known, weight=weight).dense(), wanted) < 1e-8
    wanted = dense.memit(keys, residual, c, weight, past)
    got = memit(keys, residual, known, weight=weight, past=past)
    assert relative(got.dense(), wanted) < 1e-8
    assert got.rank == keys.shape[1]
    if weight > 1:  # below, the condition of the system and not the way to solve it decides what fp32 can give
        single = memit(keys.float(), residual.float(), known, weight=weight, past=past.float())
        assert single.left.dtype == single.right.dtype == torch.float32
        # Of the factors and not of their product, which may nearly cancel (3 x 1 with 25 keys was 1.5e-4 off).
        assert float((single.dense().double() - wanted).norm()) < 2.2e-5 * float(got.left.norm() * got.right.norm())


@settings(max_examples=100)
@given(SIZES, st.sampled_from([0.1, 1.0]), st.sampled_from([1.0, 20.0]))
def test_emmet_agrees_with_the_published_formula(sizes, ridge, weight):
    keys, residual, _, c = problem(*sizes)
    wanted = dense.emmet(keys, residual, c, weight, ridge)
    assert relative(emmet(keys, residual, covariance(c), weight=weight, ridge=ridge).dense(), wanted) < 1e-8


def test_emmet_without_a_ridge_meets_the_requests_exactly():
    keys, residual, _, c = problem(1, 20, 5, 6, 0, 90)
    delta = emmet(keys, residual, covariance(c), weight=1.0, ridge=0.0)
    torch.testing.assert_close(delta @ keys, residual, rtol=1e-9, atol=1e-9)
    with pytest.raises(EditError, match="repeated requests"):
        emmet(keys[:, [0, 0]], residual[:, [0, 1]], covariance(c), weight=1.0, ridge=0.0)


@settings(max_examples=100)
@given(SIZES, st.booleans())
def test_rome_agrees_with_the_published_formula(sizes, adjusted):
    keys, values, _, c = problem(*sizes)
    generator = torch.Generator().manual_seed(sizes[0])
    weight = torch.randn(len(values), len(keys), generator=generator, dtype=torch.float64)
    mean = keys.mean(dim=1)
    plain = mean + 0.1 * keys[:, 0]
    wanted = dense.rome(mean, plain, values[:, 0], weight, c if adjusted else None)
    change = values[:, :1] - weight @ plain[:, None]
    got = rome(mean[:, None], plain[:, None], change, covariance(c) if adjusted else None)
    assert got.rank == 1
    assert relative(got.dense(), wanted) < 1e-8
    torch.testing.assert_close((weight + got.dense()) @ plain, values[:, 0], rtol=1e-7, atol=1e-7)


def test_rome_with_keys_at_right_angles_is_refused():
    across = torch.eye(4, dtype=torch.float64)
    with pytest.raises(EditError, match="rephrase"):
        rome(across[:, :1], across[:, 1:2], across[:3, :1], None)


@pytest.mark.parametrize("tokens", [3, 11])
def test_a_covariance_without_full_rank_is_raised_and_said(tokens, caplog):
    """The published solve fails on it ("singular matrix"); with the same jitter both ways agree."""
    keys, residual, _, c = problem(2, 12, 5, 4, 0, tokens)
    known = covariance(c, "model.layers.3.mlp.down_proj")
    assert known.jitter in [pytest.approx(share * float(c.diagonal().mean())) for share in JITTERS[1:]]
    assert "model.layers.3.mlp.down_proj has no full rank" in caplog.text
    raised = c + known.jitter * torch.eye(12, dtype=torch.float64)
    wanted = dense.memit(keys, residual, raised, 20.0)
    assert relative(memit(keys, residual, known, weight=20.0).dense(), wanted) < 1e-8


@pytest.mark.parametrize("bad", ["negative", "nan"])
def test_what_is_no_second_moment_is_refused(bad):
    c = torch.eye(4, dtype=torch.float64)
    c[2, 2] = -1.0 if bad == "negative" else float("nan")
    with pytest.raises(StatsError, match="compute it again"):
        covariance(c)


@settings(max_examples=50)
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 12), st.sampled_from([10, 40, 100]))
def test_rect_keeps_the_relatively_largest(seed, d_model, d_ff, percent):
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(d_model, 2, generator=generator), torch.randn(2, d_ff, generator=generator)
    weight = torch.randn(d_model, d_ff, generator=generator)
    delta = LowRank(left.double(), right.double())
    got = relatively_largest(delta, weight, percent / 100).dense()
    torch.testing.assert_close(got, dense.rect(delta.dense(), weight.double(), percent))
    assert int((got != 0).sum()) == max(1, round(percent / 100 * d_model * d_ff))


@settings(max_examples=50)
@given(
    st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 12), st.integers(1, 20), st.sampled_from([0.1, 3.0, 50.0])
)
def test_prune_bounds_the_spectrum(seed, d_model, d_ff, rank, size):
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    weight, total = rand(d_model, d_ff), LowRank(size * rand(d_model, rank), rand(rank, d_ff))
    got = restrained(total, weight)
    torch.testing.assert_close(got.dense(), dense.prune(total.dense(), weight), rtol=1e-8, atol=1e-8)


@settings(max_examples=60)
@given(st.integers(0, 2**31), st.integers(2, 12), st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_past_keys_are_worth_all_keys_so_far(seed, d_ff, sizes):
    """As many columns as keys while they fit in d_ff, never more, and the Gram matrix of all."""
    generator = torch.Generator().manual_seed(seed)
    past, every = PastKeys.none(d_ff), []
    for size in sizes:
        every.append(torch.randn(d_ff, size, generator=generator, dtype=torch.float64))
        past = past.with_keys(every[-1])
    whole = torch.cat(every, 1)
    assert past.count == whole.shape[1]
    assert past.block.shape[1] == min(d_ff, whole.shape[1]) or past.block.shape[1] <= d_ff
    torch.testing.assert_close(past.block @ past.block.T, whole @ whole.T, rtol=1e-9, atol=1e-9)
    if whole.shape[1] <= d_ff:
        assert torch.equal(past.block, whole)
    keys, residual = torch.randn(d_ff, 2, generator=generator).double(), torch.randn(3, 2, generator=generator).double()
    got = alphaedit(keys, residual, everything(keys), l2=1.0, constraints=[past.block])
    wanted = dense.alphaedit(keys, residual, torch.eye(d_ff, dtype=torch.float64), 1.0, whole)
    torch.testing.assert_close(got.dense(), wanted, rtol=1e-7, atol=1e-9)


def stored(folder, seed=3):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(40, 8, generator=generator)
    header = StatsHeader("m", "model.layers.1.mlp.down_proj", 8, 40, 4, "c", "", 512, 1)
    stats = LayerStats(keys.T @ keys, 40, 4, header)
    save_stats(folder, stats)
    return stats


@pytest.mark.parametrize("made", [covariance_of, lambda stats: null_space_of(stats, 0.7)], ids=["factor", "basis"])
def test_what_is_made_of_statistics_is_kept_beside_them(tmp_path, made):
    stats = stored(tmp_path)
    first = made(stats)
    (kept,) = tmp_path.rglob("*.safetensors")
    written = kept.stat().st_mtime_ns
    again = made(stats)
    assert kept.stat().st_mtime_ns == written
    for name, value in vars(first).items():
        other = getattr(again, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
    kept.write_bytes(b"damaged")
    made(stats)
    assert kept.stat().st_size > 100
    old = kept.read_bytes()
    changed = made(stored(tmp_path, seed=4))
    assert kept.read_bytes() != old  # other statistics under the same name are not served the old ones
    assert not torch.equal(next(iter(vars(changed).values())), next(iter(vars(first).values())))


def test_a_folder_that_cannot_be_written_costs_time_only(tmp_path, monkeypatch):
    stats = stored(tmp_path)
    stats.path = tmp_path / "gone" / "x.npz"
    assert covariance_of(stats).jitter == 0
    assert not list(tmp_path.rglob("*.safetensors"))
