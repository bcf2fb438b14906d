"""Values from rows against the dense formula, plain forward passes and hand-computed goals."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.rows import least_norm

from editlib.algorithms import rows as rows_module
from editlib.algorithms.left_metric import inverse_root, output_moment
from editlib.algorithms.rows import Goals, Row, RowBatch, find_row_values, least_norm_step
from editlib.errors import EditError
from editlib.models.anatomy import anatomy
from editlib.models.prompts import TokenRow

LAYER = 1
PROMPT = (5, 9, 20, 31, 44, 8, 61)
ROWS = [
    Row("erase", 0, PROMPT, (2,), (6,), (70,), (80, 81, 82)),
    Row("keep", 0, (7, 9, 20, 12, 13, 14), (2, 4), (3, 4, 5), (13, 14, 15)),
    Row("erase", 1, (6, 11, 25, 30), (1,), (3,), (99,), (85, 86)),
    Row("keep", 1, (6, 11, 26, 33, 35), (1,), (4,), (99,)),
    Row("erase", 1, (0, 11, 26), (0,), (2,), (71,), (90, 91)),  # a subject at the very start: nothing to cache
]


@given(st.integers(1, 8), st.integers(2, 12), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_the_step_is_the_dense_formulas(m, d, seed):
    rng = np.random.default_rng(seed)
    jacobian, residual, half = rng.normal(size=(m, d)), rng.normal(size=m), rng.normal(size=(d, d))
    moment = half @ half.T
    root = inverse_root(torch.tensor(moment), 2.0)
    step = least_norm_step(torch.tensor(jacobian), torch.tensor(residual), ridge=0.01, metric=root)
    wanted = least_norm(jacobian, residual, np.eye(d) + 2.0 * moment, 0.01)
    np.testing.assert_allclose(step.numpy(), wanted, rtol=1e-6, atol=1e-8)


def test_without_a_ridge_rows_are_met_by_the_shortest_change():
    jacobian, residual = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    step = least_norm_step(jacobian, residual, ridge=0.0)
    torch.testing.assert_close(jacobian @ step, residual)
    torch.testing.assert_close(step, torch.linalg.pinv(jacobian) @ residual)


def test_the_inverse_root_is_one():
    half = torch.randn(6, 6, dtype=torch.float64)
    moment = half @ half.T
    root = inverse_root(moment, 3.0)
    torch.testing.assert_close(root @ root @ (torch.eye(6).double() + 3.0 * moment), torch.eye(6).double())


def plain(model, row, change):
    """What a row reads when whole prompts are run, with the change added by a hook."""

    def add(_, __, output):
        hidden = output[0] if isinstance(output, tuple) else output
        mask = torch.zeros(hidden.shape[1], 1)
        mask[list(row.places)] = 1
        changed = hidden + mask * change
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = model.model.layers[LAYER].register_forward_hook(add)
    try:
        logits = model(torch.tensor([row.ids])).logits[0, list(row.columns)]
    finally:
        handle.remove()
    if row.kind == "erase":
        return logits[0, row.targets[0]] - torch.log(sum(logits[0, rival].exp() for rival in row.rivals))
    if row.kind == "say":
        return logits[0].log_softmax(0)[row.targets[0]].exp().logit()
    return sum(logits[i].log_softmax(0)[token] for i, token in enumerate(row.targets))


def test_rows_and_their_gradients_are_those_of_whole_passes(tiny_llama):
    anat = anatomy(tiny_llama)
    delta = 0.3 * torch.randn(2, anat.d_model, generator=torch.Generator().manual_seed(1))
    y, jacobian = RowBatch(anat, ROWS, LAYER).read(delta)
    for i, row in enumerate(ROWS):
        change = delta[row.owner].clone().requires_grad_()
        value = plain(tiny_llama, row, change)
        value.backward()
        torch.testing.assert_close(y[i], value.detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(jacobian[i], change.grad, rtol=1e-3, atol=1e-4)


@pytest.fixture
def with_tokens(tiny_llama):
    """(output rows of two new tokens, a model that has them, rows that read one of them and answers to keep)."""
    tokens = torch.randn(2, 32, generator=torch.Generator().manual_seed(3))
    model, size = copy.deepcopy(tiny_llama), tiny_llama.config.vocab_size
    model.resize_token_embeddings(size + 2, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[size:] = tokens
    says = [Row("say", 0, PROMPT, (2,), (6,), (size + 1,)), Row("say", 1, (6, 11, 25, 30), (1,), (3,), (size,))]
    return tokens, model, [*ROWS[:4], *says]


def test_new_tokens_are_read_as_in_a_model_that_has_them(tiny_llama, with_tokens):
    tokens, model, rows = with_tokens
    delta = 0.3 * torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    y, jacobian = RowBatch(anatomy(tiny_llama), rows, LAYER, tokens).read(delta)
    for i, row in enumerate(rows):
        change = delta[row.owner].clone().requires_grad_()
        value = plain(model, row, change)
        value.backward()
        torch.testing.assert_close(y[i], value.detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(jacobian[i], change.grad, rtol=1e-3, atol=1e-4)


def test_values_are_moved_until_new_tokens_are_said(tiny_llama, with_tokens):
    """What was kept without any change is still kept, wherever the steps start from."""
    tokens, model, rows = with_tokens
    anat, names, goals = anatomy(tiny_llama), ["a", "b"], Goals(said=2.0)
    first = find_row_values(anat, rows[:4], LAYER, names, goals, steps=30, step_limit=0.2)
    found = find_row_values(
        anat, rows, LAYER, names, goals, steps=40, step_limit=0.2, start=first.deltas, tokens=tokens
    )
    read = [plain(model, row, found.deltas[row.owner]).item() for row in rows]
    before = [plain(model, row, torch.zeros(32)).item() for row in rows]
    np.testing.assert_allclose(found.before, before, rtol=1e-3, atol=1e-3)
    assert min(read[4:]) > 1.5 > max(before[4:])
    assert read[0] < -2.7 and read[2] < -2.7
    assert abs(read[1] - before[1]) < 0.5 and abs(read[3] - before[3]) < 0.5


def test_the_rows_of_some_subjects_are_read_alone(tiny_llama):
    anat = anatomy(tiny_llama)
    delta = 0.3 * torch.randn(2, anat.d_model, generator=torch.Generator().manual_seed(2))
    y, jacobian = RowBatch(anat, ROWS, LAYER).read(delta)
    for subjects in ([True, False], [False, True]):
        mine = torch.tensor([subjects[row.owner] for row in ROWS])
        some, slopes = RowBatch(anat, ROWS, LAYER).read(delta, subjects=torch.tensor(subjects))
        torch.testing.assert_close(some[mine], y[mine], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(slopes[mine], jacobian[mine], rtol=1e-3, atol=1e-4)
        assert not some[~mine].any() and not slopes[~mine].any()


def test_rivals_are_the_likeliest_others_where_none_are_given(tiny_llama):
    anat = anatomy(tiny_llama)
    batch = RowBatch(anat, [Row("erase", 0, PROMPT, (2,), (6,), (70,))], LAYER)
    logits = tiny_llama(torch.tensor([PROMPT])).logits[0, 6]
    wanted = [i for i in logits.argsort(descending=True).tolist() if i != 70][:20]
    assert set(batch.chunks[0].rows[0].rivals) == set(wanted)


def test_values_meet_their_rows(tiny_llama):
    anat = anatomy(tiny_llama)
    goals = Goals(erased=-3.0)
    found = find_row_values(anat, ROWS[:4], LAYER, ["a", "b"], goals, steps=30, step_limit=0.2)
    # Read again by whole passes: the change that was found does what it says.
    erase, keep, other, held = (plain(tiny_llama, row, found.deltas[row.owner]).item() for row in ROWS[:4])
    before = [plain(tiny_llama, row, torch.zeros(anat.d_model)).item() for row in ROWS[:4]]
    assert erase < min(before[0], -3.0) + 0.3 and other < min(before[2], -3.0) + 0.3
    assert abs(keep - before[1]) < 0.5 and abs(held - before[3]) < 0.5
    assert not found.missed(0.5)


def test_subjects_do_not_influence_one_another(tiny_llama):
    anat = anatomy(tiny_llama)
    both = find_row_values(anat, ROWS[:4], LAYER, ["a", "b"], Goals())
    alone = find_row_values(anat, ROWS[:2], LAYER, ["a"], Goals())
    torch.testing.assert_close(both.deltas[0], alone.deltas[0], rtol=1e-3, atol=1e-4)


def test_subjects_may_be_read_in_turns(tiny_llama, monkeypatch):
    """One at a time, with rows in any order, they end as together: each report is of its own row."""
    anat, order = anatomy(tiny_llama), [2, 0, 3, 1]
    together = find_row_values(anat, ROWS[:4], LAYER, ["a", "b"], Goals())
    monkeypatch.setattr(rows_module, "TOGETHER", 1)
    start = together.deltas.flip(0) / 2
    for begun in (None, start):
        found = find_row_values(anat, [ROWS[i] for i in order], LAYER, ["a", "b"], Goals(), start=begun)
        monkeypatch.setattr(rows_module, "TOGETHER", 64)
        wanted = find_row_values(anat, ROWS[:4], LAYER, ["a", "b"], Goals(), start=begun)
        monkeypatch.setattr(rows_module, "TOGETHER", 1)
        torch.testing.assert_close(found.deltas, wanted.deltas, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.before, wanted.before[order], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.after, wanted.after[order], rtol=1e-2, atol=1e-3)
        assert found.steps == wanted.steps and found.missed() == [order.index(i) for i in wanted.missed()]


def test_a_jacobian_serves_while_the_residual_halves(tiny_llama, monkeypatch):
    """With a Jacobian read at every step the rows end where they end with few of them."""
    anat, reads, genuine = anatomy(tiny_llama), [], RowBatch.read

    def read(self, delta, *, grad=True, subjects=None):
        reads.append((grad, subjects.tolist()))
        return genuine(self, delta, grad=grad, subjects=subjects)

    monkeypatch.setattr(RowBatch, "read", read)
    monkeypatch.setattr(rows_module, "MET", 1e-3)
    goals, names = Goals(erased=-2.2), ["a", "b"]
    rows = [*ROWS[:2], ROWS[3]]  # the second subject has nothing to do
    found = find_row_values(anat, rows, LAYER, names, goals, steps=12, step_limit=10.0)
    assert reads[0] == (True, [True, True]) and all(subjects == [True, False] for _, subjects in reads[1:])
    assert [grad for grad, _ in reads][:3] == [True, True, False]
    assert not found.deltas[1].any() and not found.missed(0.01)
    reads.clear()
    monkeypatch.setattr(rows_module, "HALVED", 0.0)
    always = find_row_values(anat, rows, LAYER, names, goals, steps=12, step_limit=10.0)
    assert all(grad for grad, _ in reads)
    torch.testing.assert_close(found.after, always.after, rtol=0, atol=0.01)
    torch.testing.assert_close(found.deltas, always.deltas, rtol=0.05, atol=0.01)


def test_batches_keep_to_tokens_and_logits():
    rows = [Row("keep", 0, tuple(range(10, 30)), (2,), tuple(range(10)), tuple(range(10))) for _ in range(50)]
    for most, longest in ((25, 2), (10_000, rows_module.BATCH_TOKENS // 18), (1, 1)):
        groups = rows_module._chunks(rows, most)
        assert sorted(i for group in groups for i in group) == list(range(50))
        assert max(len(group) for group in groups) == min(longest, 50)


def test_goals_by_hand():
    before, y = torch.tensor([5.0, -9.0, -2.0]), torch.tensor([1.0, -9.5, -2.5])
    wanted = Goals(erased=-3.0).wanted(["erase", "erase", "keep"], y, before)
    assert wanted.tolist() == [-3.0, -9.5, -2.0]


def test_a_row_that_is_not_finite_is_named(tiny_llama):
    anat = anatomy(tiny_llama)
    with torch.no_grad():
        tiny_llama.lm_head.weight[70] = float("nan")
    with pytest.raises(EditError, match="a row of Gaul is not finite"):
        find_row_values(anat, ROWS[:1], LAYER, ["Gaul"], Goals())


def test_the_output_moment_is_the_mean_of_gradients(tiny_llama):
    anat = anatomy(tiny_llama)
    rows = [TokenRow(PROMPT, 2).followed_by((70, 71)), TokenRow((9, 8, 7), 1).followed_by((60,)), TokenRow((3, 4), 1)]
    total = torch.zeros(anat.d_model, anat.d_model)
    for row in rows[:2]:
        hidden = []
        layer = tiny_llama.model.layers[LAYER]

        def keep(_, __, output, hidden=hidden):
            state = output[0] if isinstance(output, tuple) else output
            state = state.detach().requires_grad_()
            hidden.append(state)
            return (state, *output[1:]) if isinstance(output, tuple) else state

        handle = layer.register_forward_hook(keep)
        logits = tiny_llama(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        handle.remove()
        start = len(row) - row.extra
        sum(logits[start - 1 + j, row.ids[start + j]] for j in range(row.extra)).backward()
        gradient = hidden[0].grad[0]
        total += gradient.T @ gradient
    found = output_moment(anat, rows, LAYER)
    torch.testing.assert_close(found, total / (total.trace() / anat.d_model), rtol=1e-3, atol=1e-4)
    assert not output_moment(anat, rows[2:], LAYER).any()
