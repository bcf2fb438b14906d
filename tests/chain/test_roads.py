"""The same result whatever the road: undone, resumed, revoked."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from chain_cases import RETAIN, A, B, C, files, timeless

from editlib.algorithms import pipeline
from editlib.algorithms.unierase import answer_gate
from editlib.chain import Chain
from editlib.chain.editing import BatchAnchors
from editlib.errors import ChainError
from editlib.models.weights import weights_sha256


def retain(algorithm):
    return {"retain": RETAIN} if algorithm.startswith("UniErase") else {}


def weights(chain):
    return {name: value.clone() for name, value in chain.model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture
def no_optimisation(monkeypatch):
    def forbid():
        def fail(*_, **__):
            raise AssertionError("a target state was looked for")

        monkeypatch.setattr(pipeline, "compute_zs", fail)
        monkeypatch.setattr(answer_gate, "compute_zs", fail)

    return forbid


def test_every_road_leads_to_the_same_folder(start, again, algorithm):
    """A, B, undone, B; and A in one process and B in another; both byte for byte A, B."""
    straight = start(algorithm, "straight", **retain(algorithm))
    straight.add(A)
    after_a = weights(straight)
    resumed = SimpleNamespace(path=straight.path.with_name("resumed"))  # what one process left behind
    shutil.copytree(straight.path, resumed.path)
    straight.add(B)

    back = start(algorithm, "back", **retain(algorithm))
    back.add(A)
    only_a = timeless(back.path)
    back.add(B)
    assert back.undo().ids == ("b1",)
    assert timeless(back.path) == only_a
    assert same(weights(back), after_a)
    back.add(B)
    assert timeless(back.path) == timeless(straight.path)
    assert same(weights(back), weights(straight))

    other = again(resumed)
    other.add(B)
    assert timeless(resumed.path) == timeless(straight.path)
    assert same(weights(other), weights(straight))
    again(resumed).verify()


def test_revoked_requests_leave_no_trace_and_nothing_is_looked_for_again(
    start, again, algorithm, no_optimisation, loaded
):
    chain = start(algorithm, **retain(algorithm))
    for some in (A, B, C):
        chain.add(some)
    full, whole = weights(chain), timeless(chain.path)
    first = (chain.path / chain.batches[0].file).read_bytes()
    no_optimisation()

    other = again(chain)
    other.revoke(["b1"])
    assert [entry.ids for entry in other.batches] == [("a1", "a2"), ("c1", "c2")]
    assert [entry.number for entry in other.batches] == [1, 2]
    assert (other.path / other.batches[0].file).read_bytes() == first
    assert len(list((other.path / "batches").iterdir())) == 2
    assert not same(weights(other), full)
    again(chain).verify()
    assert same(weights(again(chain)), weights(other))

    other.revoke(["a2", "c1"])
    assert [entry.ids for entry in other.batches] == [("a1",), ("c2",)]
    assert [(one.ids, one.batches) for one in other.record.revoked] == [(("b1",), (2,)), (("a2", "c1"), (1, 2))]
    again(chain).verify()

    other.revoke(["a1", "c2"])
    assert not other.batches and not list((other.path / "batches").iterdir())
    fresh = again(chain)
    assert weights_sha256(fresh.model) == weights_sha256(loaded.model) == fresh.record.base["sha256"]
    mlps = [name for name in full if "down_proj" in name]
    assert mlps and all(torch.equal(weights(other)[name], loaded.model.state_dict()[name]) for name in mlps)
    assert whole["chain.json"]["templates"] == timeless(chain.path)["chain.json"]["templates"]


def test_a_replay_of_what_did_not_change_changes_nothing(start, algorithm, no_optimisation):
    """A batch that is made again on the weights and keys that it was made on comes out byte for byte."""
    chain = start(algorithm, **retain(algorithm))
    chain.add(A)
    before = files(chain.path)
    session = chain._session
    no_optimisation()
    editor = session.editor(chain.record)
    batch = session.batch(chain.batches[0])
    prompts = {prompt.id: prompt for prompt in editor.retain}
    anchored = BatchAnchors.of([prompts[name] for name in batch.anchors], batch.answers, ())
    given = (batch.requests, anchored, chain.batches[0].seed, batch.values, batch.token)
    made, _ = editor.edit(session.base(chain.record), *given)
    assert made.to_bytes() == before[chain.batches[0].file]


def test_a_later_batch_takes_over_the_gate_of_one_that_was_revoked(start, again):
    """B asks for the relation that A opened the gate for, so its own part of the way is short."""
    chain = start("UniErase gated", retain=RETAIN)
    chain.add(A)
    chain.add(B)
    session = chain._session
    parts = [session.batch(entry).values.gate["capital"] for entry in chain.batches]
    assert parts[0].norm() > 0
    chain.revoke(["a1"])
    assert [entry.ids for entry in chain.batches] == [("a2",), ("b1",)]
    kept = [session.batch(entry).values.gate for entry in chain.batches]
    assert list(kept[0]) == ["river"]
    assert torch.equal(kept[1]["capital"], parts[1] + parts[0])


def test_the_gate_is_opened_once_for_a_relation(start, again):
    """Opened again for every batch it came to refuse half of what else was asked in the relation."""
    chain = start("UniErase gated", retain=RETAIN)
    chain.add(A)
    chain.add(B)
    both = [replace(C[0], relation="capital"), C[1]]  # of two relations that are open
    chain.add(both)
    session = chain._session
    first, second, third = [session.batch(entry) for entry in chain.batches]
    assert first.values.gate["capital"].any() and 3 in first.updates
    for later in (second, third):
        assert not any(value.any() for value in later.values.gate.values()) and sorted(later.updates) == [1, 2]
    assert list(third.values.gate) == ["capital", "river"]
    again(chain).verify()
    chain.undo()
    other = again(chain)
    other.add(both)  # a new process knows, too
    assert sorted(other._session.batch(other.batches[-1]).updates) == [1, 2]


def test_undo_after_a_revocation_takes_the_last_batch_as_it_stands(start, again):
    chain = start("MEMIT")
    for some in (A, B, C):
        chain.add(some)
    chain.revoke(["a1", "c1"])
    assert chain.undo().ids == ("c2",)
    assert list(chain.record.ids) == ["a2", "b1"]
    again(chain).verify()
    chain.add(C)  # what was revoked or undone may come again
    assert list(chain.record.ids) == ["a2", "b1", "c1", "c2"]
    again(chain).verify()


def test_undo_and_a_revocation_at_the_end_need_no_model(start, monkeypatch):
    chain = start("AlphaEdit")
    for some in (A, B, C):
        chain.add(some)
    monkeypatch.setattr("editlib.workbench.load_checked", None)
    bare = Chain.open(chain.path, clock=lambda: "now")
    bare.undo()
    bare.revoke(["b1"])
    assert list(bare.record.ids) == ["a1", "a2"]
    bare.revoke(["a1", "a2"])
    with pytest.raises(ChainError, match="no batch"):
        bare.undo()


def test_an_open_chain_follows_what_another_process_did(start, again):
    chain = start("MEMIT")
    chain.add(A)
    other = again(chain)
    other.add(B)
    chain.add(C)
    assert [entry.ids for entry in chain.batches] == [("a1", "a2"), ("b1",), ("c1", "c2")]
    assert same(weights(chain), weights(again(chain)))


def test_applying_to_a_fresh_model_gives_the_chain_s_own(start, loaded, bench, algorithm):
    chain = start(algorithm, **retain(algorithm))
    chain.add(A)
    assert not same(bench.model.state_dict(), chain.model.state_dict())
    chain.apply_to(bench.model, bench.tok)
    assert same(bench.model.state_dict(), chain.model.state_dict())
    with pytest.raises(ChainError, match="other weights"):
        chain.apply_to(bench.model, bench.tok)


def test_seeds_follow_from_the_chain_s_and_from_what_is_asked(start):
    seeds = set()
    for seed in (0, 1):
        chain = start("MEMIT", f"seed {seed}", seed=seed)
        chain.add(A)
        chain.add(B)
        found = [entry.seed for entry in chain.batches]
        chain.undo()
        chain.add(B)
        assert [entry.seed for entry in chain.batches] == found
        seeds |= set(found)
    assert len(seeds) == 4


def test_each_answer_of_an_anchor_is_kept_once_and_outlives_its_batch(start, again, no_optimisation, monkeypatch):
    chain = start("UniErase", retain=RETAIN)
    for some in (A, B, C):
        chain.add(some)
    kept = [set(chain._session.batch(entry).answers) for entry in chain.batches]
    assert len(kept[0]) == 3 and not kept[0] & kept[1] and not kept[0] & kept[2]
    no_optimisation()
    monkeypatch.setattr(
        "editlib.algorithms.unierase.anchors.greedy", lambda _, rows, **__: [()] * len(rows) if not rows else 1 / 0
    )
    other = again(chain)
    other.revoke(["a1", "a2"])
    assert set(other._session.batch(other.batches[0]).answers) >= kept[0]
    again(chain).verify()
