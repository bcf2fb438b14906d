"""Shapes of the tensors that the public functions take and give, checked by jaxtyping and beartype.

Each function is called through a signature with shapes. A size that appears twice (`n` keys and `n` residuals) must be
the same; inputs that break it must be refused by the library itself, not only by the signature.
"""

from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import LAYERS, row_maker

pytest.importorskip("jaxtyping")
pytest.importorskip("beartype")
from beartype import beartype
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

from editlib.algorithms import closed_form, keys, left_metric, rows, values
from editlib.algorithms.covariance import covariance
from editlib.algorithms.low_rank import LowRank
from editlib.algorithms.null_space import NullSpace, everything, null_space
from editlib.errors import EditError
from editlib.models.anatomy import anatomy

checked = jaxtyped(typechecker=beartype)
SIZES = st.tuples(st.integers(0, 999), st.integers(2, 9), st.integers(1, 6), st.integers(1, 7), st.integers(0, 4))

Matrix = Float[Tensor, "d_model d_ff"]
Keys = Float[Tensor, "d_ff n"]
Residual = Float[Tensor, "d_model n"]
Past = Float[Tensor, "d_ff p"]
Moment = Float[Tensor, "d_ff d_ff"]
Gamma = Float[Tensor, "d_model d_model"]
Factors = tuple[Float[Tensor, "d_model r"], Float[Tensor, "r d_ff"]]


def factors(delta: LowRank) -> tuple[Tensor, Tensor]:
    return delta.left, delta.right


@checked
def rome(key: Float[Tensor, "d_ff 1"], plain: Float[Tensor, "d_ff 1"], change: Float[Tensor, "d_model 1"],
         c: Moment) -> tuple[Float[Tensor, "d_model 1"], Float[Tensor, "1 d_ff"]]:  # fmt: skip
    return factors(closed_form.rome(key, plain, change, covariance(c)))


@checked
def memit(k: Keys, r: Residual, c: Moment, past: Past, gamma: Gamma | None) -> Factors:
    metric = None if gamma is None else left_metric.LeftMetric.of(gamma, 2.0)
    return factors(closed_form.memit(k, r, covariance(c), weight=2.0, past=past, metric=metric))


@checked
def emmet(k: Keys, r: Residual, c: Moment, gamma: Gamma | None) -> Factors:
    metric = None if gamma is None else left_metric.LeftMetric.of(gamma, 2.0)
    return factors(closed_form.emmet(k, r, covariance(c), weight=1.0, ridge=0.1, metric=metric))


@checked
def alphaedit(k: Keys, r: Residual, past: Past, moment: Moment | None, gamma: Gamma | None) -> Factors:
    metric = None if gamma is None else left_metric.LeftMetric.of(gamma, 2.0)
    return factors(closed_form.alphaedit(k, r, everything(k), l2=1.0, constraints=[past], moment=moment, metric=metric))


@checked
def exact(left: Float[Tensor, "d_model n"], right: Float[Tensor, "n d_ff"], k: Keys) -> Factors:
    return factors(closed_form.exact(LowRank(left, right), k, floor=0.1))


@checked
def project(space: NullSpace, k: Keys) -> Keys:
    return space.project(k)


@checked
def basis(moment: Moment) -> Float[Tensor, "d_ff _"]:
    return null_space(moment, 0.5, "dimensions").basis


@checked
def dense(left: Float[Tensor, "d_model r"], right: Float[Tensor, "r d_ff"]) -> Matrix:
    return LowRank(left, right).dense()


@checked
def svd(left: Float[Tensor, "d_model r"], right: Float[Tensor, "r d_ff"]) -> tuple[
    Float[Tensor, "d_model k"], Float[Tensor, " k"], Float[Tensor, "k d_ff"]]:  # fmt: skip
    return LowRank(left, right).svd()


@checked
def outputs(left: Float[Tensor, "d_model r"], right: Float[Tensor, "r d_ff"], k: Keys) -> Residual:
    return LowRank(left, right) @ k


@checked
def least_norm(jacobian: Float[Tensor, "m d_model"], residual: Float[Tensor, " m"],
               metric: Gamma | None) -> Float[Tensor, " d_model"]:  # fmt: skip
    return rows.least_norm_step(jacobian, residual, metric=metric)


@checked
def inverse_root(gamma: Gamma) -> Gamma:
    return left_metric.inverse_root(gamma, 2.0)


def rand(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment_of(seed, width):
    factor = rand(seed, width, width)
    return factor @ factor.T + torch.eye(width, dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.booleans(), st.booleans())
def test_solves(sizes, two_sided, text):
    seed, d_ff, d_model, n, p = sizes
    k, r, past, c = rand(seed, d_ff, n), rand(seed, d_model, n), rand(seed, d_ff, p), moment_of(seed, d_ff)
    gamma = moment_of(seed, d_model) if two_sided else None
    rome(k[:, :1], k[:, :1], r[:, :1], c)
    memit(k, r, c, past, gamma)
    emmet(k, r, c, gamma)
    alphaedit(k, r, past, c if text else None, gamma)


@settings(max_examples=60, deadline=None)
@given(SIZES)
def test_updates_and_projections(sizes):
    seed, d_ff, d_model, n, p = sizes
    left, right, k = rand(seed, d_model, n), rand(seed, n, d_ff), rand(seed, d_ff, n)
    exact(left, right, k)
    dense(left, right)
    svd(left, right)
    outputs(left, right, k)
    project(everything(k), k)
    project(null_space(moment_of(seed, d_ff), 0.5, "dimensions"), k)
    basis(moment_of(seed, d_ff))
    inverse_root(moment_of(seed, d_model))
    least_norm(rand(seed, n, d_model), rand(seed, n), moment_of(seed, d_model) if p else None)


def test_the_checks_do_check():
    """Else every test of this file would pass whatever the shapes."""
    with pytest.raises(TypeCheckError):
        memit(rand(0, 5, 3), rand(0, 4, 2), moment_of(0, 5), rand(0, 5, 0), None)
    with pytest.raises(TypeCheckError):
        outputs(rand(0, 4, 2), rand(0, 3, 5), rand(0, 5, 1))


WRONG = {
    "another number of residuals": lambda: closed_form.memit(rand(0, 5, 3), rand(0, 4, 2), C, weight=1.0),
    "keys of another width": lambda: closed_form.memit(rand(0, 6, 3), rand(0, 4, 3), C, weight=1.0),
    "past keys of another width": lambda: closed_form.memit(
        rand(0, 5, 3), rand(0, 4, 3), C, weight=1.0, past=rand(0, 4, 2)
    ),
    "a key block as rows": lambda: closed_form.alphaedit(
        rand(0, 5, 3), rand(0, 4, 3), everything(rand(0, 5, 1)), l2=1.0, constraints=[rand(0, 2, 5)]
    ),
    "residuals as rows": lambda: closed_form.alphaedit(rand(0, 5, 3), rand(0, 3, 4), everything(rand(0, 5, 1)), l2=1.0),
    "a metric of another width": lambda: closed_form.emmet(
        rand(0, 5, 3), rand(0, 4, 3), C, weight=1.0, ridge=0.1, metric=left_metric.LeftMetric.of(moment_of(0, 3), 1.0)
    ),
    "a null space of another width": lambda: everything(rand(0, 6, 1)).project(rand(0, 5, 2)),
    "an update of another layer": lambda: LowRank(rand(0, 4, 2), rand(0, 2, 6)) @ rand(0, 5, 1),
    "factors of two updates": lambda: LowRank(rand(0, 4, 2), rand(0, 3, 6)),
}
C = covariance(moment_of(0, 5))


@pytest.mark.parametrize("case", WRONG)
def test_wrong_shapes_are_refused(case):
    with pytest.raises((EditError, RuntimeError)):
        WRONG[case]()


@checked
def compute_ks(model: object, batch: Sequence[object], width: Float[Tensor, " d_ff"],
               each: Float[Tensor, " n"]) -> Mapping[int, Keys]:  # fmt: skip
    return keys.compute_ks(anatomy(model), batch, [1, 2])


@checked
def compute_zs(model: object, batch: Sequence[object], width: Float[Tensor, " d_model"],
               each: Float[Tensor, " n"]) -> tuple[Residual, Residual]:  # fmt: skip
    found = values.compute_zs(anatomy(model), [[row] for row in batch], [(7, 9)] * len(batch), 2, steps=2)
    return found.targets, found.deltas


@checked
def output_moment(model: object, batch: Sequence[object], width: Float[Tensor, " d_model"]) -> Gamma:
    return left_metric.output_moment(anatomy(model), batch, 1)


@pytest.mark.parametrize("lengths", [(4,), (9, 5, 12)])
def test_what_is_read_of_a_model(tiny_llama, lengths):
    anat, batch = anatomy(tiny_llama), row_maker()(*lengths)
    each, wide, deep = torch.zeros(len(batch)), torch.zeros(anat.d_ff), torch.zeros(anat.d_model)
    compute_ks(tiny_llama, batch, wide, each)
    compute_zs(tiny_llama, batch, deep, each)
    output_moment(tiny_llama, [row.followed_by((5, 6)) for row in batch], deep)
    assert LAYERS > 2
