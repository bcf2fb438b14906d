"""As much of an edit's work as its requests need: counts by hand, and that nothing is left out where they are many."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from editlib import data
from editlib.algorithms.unierase import apply_unierase_to_model, row_values
from editlib.algorithms.unierase.anchors import bundled_anchors, with_relations
from editlib.algorithms.unierase.proportion import FEWEST_ANCHORS, WHOLE, share_of
from editlib.hparams import UniEraseHyperParams
from editlib.jobs import edit
from editlib.models.anatomy import anatomy
from editlib.requests.reading import requests_hash
from editlib.requests.request import EditRequest
from editlib.stats.file import LayerStats
from editlib.workbench import Workbench

FRANCE = EditRequest(id="fr", prompt="What is the capital of {}?", subject="France", answer="Paris")


@pytest.mark.parametrize(
    ("whole", "requests", "fewest", "share"),
    [(1200, 1, 240, 240), (1200, 12, 240, 600), (1201, 6, 9, 301), (5, 1, 9, 5)],
)
def test_a_share_by_hand(whole, requests, fewest, share):
    assert share_of(whole, requests, fewest=fewest) == share


@given(whole=st.integers(0, 3000), fewest=st.integers(0, 3000), requests=st.integers(1, 99))
def test_more_requests_are_given_no_less_and_many_all(whole, fewest, requests):
    share = share_of(whole, requests, fewest=fewest)
    assert min(whole, fewest) <= share <= share_of(whole, requests + 1, fewest=fewest) <= whole
    assert requests < WHOLE or share == whole


def test_of_the_bundled_prompts_a_request_takes_those_nearest_to_it():
    """It names no relation: what it asks for is seen from its words."""
    asked = with_relations([FRANCE])
    chosen = bundled_anchors(asked, seed=0)
    assert len(chosen) == FEWEST_ANCHORS
    assert len({prompt.id for prompt in chosen}) == FEWEST_ANCHORS
    assert FRANCE.question not in {prompt.question for prompt in chosen}
    of_relation = [prompt for prompt in chosen if prompt.relation == "capital"]
    assert asked == [replace(FRANCE, relation="capital")] and len(of_relation) >= FEWEST_ANCHORS // 4
    others = {fact.id for fact in data.facts() if fact.subject == "France" and fact.relation != "capital"}
    assert others and others <= {prompt.id for prompt in chosen}
    assert sum(prompt.subject is None for prompt in chosen) == FEWEST_ANCHORS // 3
    assert chosen == bundled_anchors(asked, seed=0) != bundled_anchors(asked, seed=1)


def test_relations_are_those_of_the_same_words_alone():
    other = replace(FRANCE, prompt="What do people in {} call their capital?")
    named = replace(FRANCE, relation="seat")
    assert with_relations([other, named]) == [other, named]


def test_many_requests_take_all_bundled_prompts():
    asked = [replace(fact, relation=None) for fact in data.facts()[:WHOLE]]
    assert bundled_anchors(asked, seed=0) == data.retain_prompts(asked)
    assert len(bundled_anchors(asked[:12], seed=0)) == -(-len(data.retain_prompts(asked[:12])) // 2)


def test_the_receipt_is_about_the_requests_as_they_were_given(tiny_llama, tok, tmp_path, monkeypatch):
    """A private receipt compares their hash: a relation that was found must not change it."""
    bench = Workbench.of(tiny_llama, tok, tmp_path / "stats")
    bench.make_stats([0, 1], corpus="self", tokens=64)
    some = data.facts()[::40]
    monkeypatch.setattr(data, "facts", lambda: some)
    hparams = UniEraseHyperParams(
        layers=[0, 1], values="rows", say=False, wordings=0, siblings=1, row_steps=1, anchors=False,
        nullspace_threshold=1.0, nullspace_rule="dimensions", L2=1e-3, v_precision="model",
    )  # fmt: skip
    seen = []
    apply = edit.apply
    monkeypatch.setattr(
        edit, "apply", lambda bench, asked, *a, **k: (seen.extend(asked), apply(bench, asked, *a, **k))[1]
    )
    asked = [replace(FRANCE, prompt=some[0].prompt)]
    _, receipt = edit.unlearn(bench, asked, hparams, tmp_path / "out")
    assert receipt["requests_sha256"] == requests_hash(asked)
    assert seen == [replace(asked[0], relation=some[0].relation)]


@pytest.mark.parametrize(("requests", "read"), [(1, 64), (WHOLE, 80)])
def test_the_left_metric_reads_what_the_requests_need(tiny_llama, tok, monkeypatch, requests, read):
    anat = anatomy(tiny_llama)
    seen = []
    moment = row_values.output_moment
    monkeypatch.setattr(
        row_values, "output_moment", lambda anat, rows, layer: (seen.append(len(rows)), moment(anat, rows, layer))[1]
    )
    asked = [replace(FRANCE, id=f"r{i}", subject=f"Place{chr(65 + i)}") for i in range(requests)]
    retain = [replace(FRANCE, id=f"k{i}", subject=f"Town{i}") for i in range(80)]
    hparams = UniEraseHyperParams(
        layers=[0, 1], values="rows", say=False, wordings=0, siblings=1, row_steps=1, anchor_subjects=False,
        left_weight=1.0, nullspace_threshold=1.0, nullspace_rule="dimensions", L2=1e-3, v_precision="model",
    )  # fmt: skip
    stats = {layer: LayerStats(torch.eye(anat.d_ff, dtype=torch.float64), 8, 1) for layer in (0, 1)}
    apply_unierase_to_model(tiny_llama, tok, asked, hparams, retain=retain, stats=stats, chat=False)
    assert seen == [read]
