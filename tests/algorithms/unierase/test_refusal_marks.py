"""Marks of late layers: the weighted least squares that they solve, told by plain passes, and what carries them."""

import copy

import pytest
import torch
from test_refusal_tokens import FORGET, OPTIONS, given_for

from editlib.algorithms.low_rank import LowRank
from editlib.algorithms.unierase import apply_unierase_to_model, refusal_marks
from editlib.algorithms.unierase.refusal_marks import RIDGE, fit_marks
from editlib.algorithms.unierase.refusal_places import Place, RefusalPlaces
from editlib.algorithms.values import Values
from editlib.chain.batch import Batch
from editlib.errors import HparamsError
from editlib.hparams import UniEraseHyperParams
from editlib.models.anatomy import anatomy
from editlib.models.prompts import TokenRow

MARKED = {**OPTIONS, "layers": [0], "mark_layers": [1], "token_steps": 20}
WANTED = [(5, 9, 11), (5, 9, 12), (7, 8)]  # token ids; the first two of relation 0
KEPT = [(5, 9, 13), (7, 3)]
ANSWERS = [((5, 9), (20, 21, 22, 23)), ((5, 9, 30), (31, 32))]
TEXTS = [(40, 41, 42), (43,)]


def row(ids):
    return TokenRow(tuple(ids), 0)


@pytest.fixture
def places():
    return RefusalPlaces(
        ("capital", "language"),
        [Place(row(ids), group) for ids, group in zip(WANTED, (0, 0, 1), strict=True)],
        [0, 0, 1],
        [Place(row(KEPT[0]), 0), Place(row(KEPT[1]), None)],
        [(row(ids), text) for ids, text in ANSWERS],
    )


def plain_keys(model, ids, layers):
    """Inputs of the down-projections, `[T, F]`, and the states that leave the last layer, by a pass with hooks."""
    seen = {}
    hooks = [
        model.model.layers[layer].mlp.down_proj.register_forward_pre_hook(
            lambda _, given, layer=layer: seen.__setitem__(layer, given[0][0])
        )
        for layer in layers
    ]
    hooks.append(model.model.norm.register_forward_pre_hook(lambda _, given: seen.__setitem__("state", given[0][0])))
    with torch.no_grad():
        model(torch.tensor([list(ids)]))
    for hook in hooks:
        hook.remove()
    return torch.cat([seen[layer] for layer in layers], dim=1).double(), seen["state"].double()


def test_the_sums_are_the_weighted_least_squares_solution(tiny_llama, places, monkeypatch):
    """Against `lstsq` on weighted rows: every relation's wanted places weigh one half, kept ones one, the rest one."""
    monkeypatch.setattr(refusal_marks, "_ordinary_text", lambda *_: [row(ids) for ids in TEXTS])
    found = fit_marks(anatomy(tiny_llama), places, (0, 1), 3.0)
    rows, weights, targets = [], [], []
    for ids, weight, target in zip(WANTED, (0.25, 0.25, 0.5), ([1, 0], [1, 0], [0, 1]), strict=True):
        rows.append(plain_keys(tiny_llama, ids, (0, 1))[0][-1:])
        weights.append(weight)
        targets.append(target)
    for ids in KEPT:  # for relation 0 the two are of two kinds, for relation 1 of one: a half each in both
        rows.append(plain_keys(tiny_llama, ids, (0, 1))[0][-1:])
        weights.append(0.5)
        targets.append([0, 0])
    keys, states = zip(*(plain_keys(tiny_llama, (*ids, *text), (0, 1)) for ids, text in ANSWERS), strict=True)
    inside = [some[len(ids) - 1 :] for some, (ids, _) in zip(keys, ANSWERS, strict=True)]
    elsewhere = torch.cat([*inside, *(plain_keys(tiny_llama, ids, (0, 1))[0] for ids in TEXTS)])
    x = torch.cat([*rows, elsewhere])  # [m, F]
    weight = torch.tensor([*weights, *[1 / len(elsewhere)] * len(elsewhere)], dtype=torch.double)
    y = torch.tensor([*targets, *[[0, 0]] * len(elsewhere)], dtype=torch.double)
    ridge = RIDGE * (weight[:, None] * x.square()).sum(0).view(2, -1).mean(1, keepdim=True).expand(2, x.shape[1] // 2)
    tall = torch.cat([weight.sqrt()[:, None] * x, torch.diag(ridge.reshape(-1).sqrt())])
    padded = torch.cat([weight.sqrt()[:, None] * y, torch.zeros(x.shape[1], 2, dtype=torch.double)])
    expected = torch.linalg.lstsq(tall, padded).solution  # [F, 2]
    sums = torch.cat([found[0].right, found[1].right], dim=1).T.double()
    assert (sums - expected).norm() < 1e-3 * expected.norm()
    # The directions: of all orthonormal pairs, the one with the least variance of the states inside answers.
    inside = torch.cat([some[len(ids) - 1 :] for some, (ids, _) in zip(states, ANSWERS, strict=True)])
    variances = torch.linalg.eigvalsh(torch.cov(inside.T, correction=0))
    left = found[0].left.double()
    assert left.T.shape == (2, inside.shape[1])
    torch.testing.assert_close(left.norm(dim=0), 3 * variances[:2].clamp_min(0).sqrt(), rtol=0.05, atol=1e-5)


@pytest.fixture
def marked(tiny_llama, tok, monkeypatch):
    """(model before, model, tokenizer, result) of an edit that marks; few texts are enough here."""
    monkeypatch.setattr(refusal_marks, "TEXTS", 4)
    monkeypatch.setattr(refusal_marks, "BEGINNINGS", 8)
    before, model = copy.deepcopy(tiny_llama), tiny_llama
    return before, model, tok, apply_unierase_to_model(
        model, tok, FORGET, UniEraseHyperParams(**MARKED), **given_for(model)
    )  # fmt: skip


def test_marks_are_part_of_the_edit_and_are_taken_back_with_it(marked):
    before, model, _, result = marked
    assert set(result.deltas) == {0, 1} and result.deltas[1].rank == 2
    change = model.model.layers[1].mlp.down_proj.weight - before.model.layers[1].mlp.down_proj.weight
    torch.testing.assert_close(change, result.deltas[1].dense(), rtol=1e-3, atol=1e-6)
    assert change.norm() > 0
    result.revert(model)
    for layer in (0, 1):
        assert torch.equal(
            model.model.layers[layer].mlp.down_proj.weight, before.model.layers[layer].mlp.down_proj.weight
        )


def test_a_replay_writes_the_marks_that_were_found(marked, pristine_toks):
    before, model, _, result = marked
    given = {**given_for(before), "token": result.token}
    hparams = UniEraseHyperParams(**MARKED)
    again = apply_unierase_to_model(
        before, copy.deepcopy(pristine_toks["plain"]), FORGET, hparams, values=result.values, **given
    )
    torch.testing.assert_close(again.deltas[1].dense(), result.deltas[1].dense())
    torch.testing.assert_close(before.model.layers[1].mlp.down_proj.weight, model.model.layers[1].mlp.down_proj.weight)


def test_a_stored_batch_knows_which_updates_are_marks(marked):
    *_, result = marked
    batch = Batch.of(result, result.deltas, FORGET, {})
    read = Batch.from_bytes(batch.to_bytes(), "here")
    assert set(read.values.marks) == {1} and set(read.updates) == {0, 1}
    torch.testing.assert_close(read.values.marks[1].dense(), result.deltas[1].dense())
    assert read.values.select([0]).marks == read.values.marks


def test_joined_values_keep_the_marks():
    update = LowRank(torch.ones(2, 1), torch.ones(1, 3))
    one = Values(torch.ones(2, 1), torch.ones(2, 1), [1], [0.1], [0.2], marks={4: update})
    other = Values(torch.ones(2, 1), torch.ones(2, 1), [1], [0.1], [0.2])
    assert Values.joined([other, one]).marks == {4: update}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mark_layers": [0]}, "above the last of `layers`, 0"),
        ({"mark_layers": [2, 1]}, "rising"),
        ({"mark_layers": [1], "say": False}, '"say": true'),
        ({"mark_layers": [1], "values": "descent"}, '"values": "rows"'),
        ({"mark_layers": [1], "mark_size": 0.0}, "mark_size"),
    ],
)
def test_settings_that_cannot_mark_are_refused(options, said):
    with pytest.raises(HparamsError, match="mark_") as error:
        UniEraseHyperParams(**{**MARKED, **options})
    assert said in str(error.value)
