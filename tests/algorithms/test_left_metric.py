"""The two-sided solve against its dense formula, and as a setting of MEMIT and AlphaEdit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.closed_form import alphaedit as dense_alphaedit
from reference.closed_form import memit as dense_memit
from reference.closed_form import moment, projector, two_sided
from tiny_models import LAYERS

from editlib.algorithms.closed_form import alphaedit, emmet, memit
from editlib.algorithms.covariance import covariance
from editlib.algorithms.left_metric import LeftMetric
from editlib.algorithms.null_space import everything, null_space
from editlib.algorithms.registry import apply_function
from editlib.errors import EditError, HparamsError
from editlib.hparams import AlphaEditHyperParams, EMMETHyperParams, MEMITHyperParams, MEMITSeqHyperParams
from editlib.models.anatomy import anatomy
from editlib.requests.request import EditRequest
from editlib.stats.file import LayerStats

SIZES = st.tuples(st.integers(0, 2**31), st.integers(3, 9), st.integers(1, 5), st.integers(1, 12), st.integers(0, 12))
WEIGHTS = st.sampled_from([0.3, 30.0])
OPTIONS = {"context_templates": ["{}"], "v_num_grad_steps": 4, "v_lr": 0.1, "layers": [1, 2]}
REQUESTS = [
    EditRequest(id="a", prompt="The capital of {} is", subject="France", target_new="Rotterdam"),
    EditRequest(id="b", prompt="In {} people speak", subject="Peru", target_new="Basel"),
]


def problem(seed, d_ff, d_model, n, n_held):
    """Keys, residual, held keys, second moment of text and `Γ`."""
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    gradients = rand(d_model, d_model) * torch.logspace(0, -2, d_model, dtype=torch.float64)
    return rand(d_ff, n), rand(d_model, n), rand(d_ff, n_held), moment(rand(d_ff, 40)), gradients @ gradients.T


def identity_plus(gamma, weight):
    return torch.eye(len(gamma), dtype=gamma.dtype) + weight * gamma


def relative(got, wanted):
    return float((got.dense() - wanted).norm() / wanted.norm())


@settings(max_examples=60, deadline=None)
@given(SIZES, WEIGHTS)
def test_memit_and_emmet_equal_the_dense_formula(sizes, weight):
    keys, residual, held, c, gamma = problem(*sizes)
    metric, left = LeftMetric.of(gamma, weight), identity_plus(gamma, weight)
    got = memit(keys, residual, covariance(c), weight=3.0, past=held, metric=metric)
    assert relative(got, two_sided(keys, residual, left, 3.0 * c + held @ held.T)) < 1e-8
    got = emmet(keys, residual, covariance(c), weight=2.0, ridge=0.1, metric=metric)
    assert relative(got, two_sided(keys, residual, left, 2.0 * c, ridge=0.1)) < 1e-7


@settings(max_examples=60, deadline=None)
@given(SIZES, WEIGHTS, st.booleans(), st.booleans())
def test_alphaedit_equals_the_dense_formula(sizes, weight, whole, text):
    keys, residual, held, c, gamma = problem(*sizes)
    values = torch.linalg.eigvalsh(c)
    cut = len(values) // 2
    threshold = 1e9 if whole else float((values[cut - 1] * values[cut]).sqrt())
    p, space = projector(c, threshold), null_space(c, threshold)
    cost = torch.eye(len(c), dtype=c.dtype) + p @ held @ held.T @ p + (0.5 * p @ c @ p if text else 0)
    got = alphaedit(
        keys,
        residual,
        space,
        l2=1.0,
        constraints=[held],
        moment=0.5 * c if text else None,
        metric=LeftMetric.of(gamma, weight),
    )
    assert relative(got, two_sided(p @ keys, residual, identity_plus(gamma, weight), cost)) < 1e-7
    torch.testing.assert_close(got.dense() @ p, got.dense())


def test_without_weight_it_is_the_published_formula():
    keys, residual, held, c, gamma = problem(5, 9, 5, 4, 3)
    none = LeftMetric.of(gamma, 0.0)
    got = memit(keys, residual, covariance(c), weight=3.0, past=held, metric=none)
    assert relative(got, dense_memit(keys, residual, c, 3.0, held)) < 1e-10
    p = torch.eye(9, dtype=c.dtype)
    got = alphaedit(keys, residual, everything(keys), l2=2.0, constraints=[held], metric=none)
    assert relative(got, dense_alphaedit(keys, residual, p, 2.0, held)) < 1e-10


def test_output_moves_least_where_others_read_it():
    """More weight, less of the residual along the first direction of `Γ`; across it the residual is met as before."""
    keys, residual, _, c, _ = problem(6, 9, 5, 3, 0)
    gamma = torch.zeros(5, 5, dtype=c.dtype)
    gamma[0, 0] = 1.0
    moved = []
    for weight in (0.0, 10.0, 1000.0):
        delta = memit(keys, residual, covariance(c), weight=3.0, metric=LeftMetric.of(gamma, weight))
        moved.append(float((delta @ keys)[0].norm()))
        torch.testing.assert_close((delta @ keys)[1:], (memit(keys, residual, covariance(c), weight=3.0) @ keys)[1:])
    assert moved[0] > 2 * moved[1] > 20 * moved[2]


def test_an_exact_edit_has_no_choice():
    keys, residual, _, c, gamma = problem(7, 9, 5, 3, 0)
    delta = emmet(keys, residual, covariance(c), weight=1.0, ridge=0.0, metric=LeftMetric.of(gamma, 30.0))
    torch.testing.assert_close(delta @ keys, residual)
    with pytest.raises(EditError):
        alphaedit(keys, residual, everything(keys), l2=0.0, metric=LeftMetric.of(gamma, 30.0))


@pytest.fixture
def stats(anat):
    generator = torch.Generator().manual_seed(8)
    keys = [torch.randn(200, anat.d_ff, generator=generator, dtype=torch.float64) for _ in range(LAYERS)]
    return {layer: LayerStats(k.T @ k, 200, 10) for layer, k in enumerate(keys)}


@pytest.mark.parametrize("kind", [MEMITHyperParams, MEMITSeqHyperParams, EMMETHyperParams, AlphaEditHyperParams])
def test_as_a_setting(tiny_llama, tok, stats, kind):
    """The weight changes the update, zero and leaving it out do not; the model can be taken back bit for bit."""
    own = {"nullspace_threshold": 0.9} if kind is AlphaEditHyperParams else {}
    original = anatomy(tiny_llama).weight(1).clone()
    deltas = {}
    for weight in (None, 0.0, 30.0):
        given = {} if weight is None else {"left_weight": weight}
        hparams = kind(**OPTIONS, **own, **given)
        result = apply_function(hparams)(tiny_llama, tok, REQUESTS, hparams, stats=stats)
        deltas[weight] = result.deltas[1].dense()
        result.revert(tiny_llama)
        assert torch.equal(anatomy(tiny_llama).weight(1), original)
    assert torch.equal(deltas[None], deltas[0.0])
    assert float((deltas[30.0] - deltas[0.0]).norm()) > 1e-3 * float(deltas[0.0].norm())
    assert float(deltas[30.0].norm()) < float(deltas[0.0].norm())


def test_a_metric_that_nothing_is_known_of_is_refused(tiny_llama, tok, stats):
    hparams = MEMITHyperParams(**OPTIONS, left_weight=30.0, fact_token="last")
    request = EditRequest(id="a", prompt="What is the capital of France?", target_new="Rotterdam")
    with pytest.raises(HparamsError, match="left_weight"):
        apply_function(hparams)(tiny_llama, tok, [request], hparams, stats=stats)
