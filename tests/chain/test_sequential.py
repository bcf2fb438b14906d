"""Chains of a benchmark: measured on the way, gone on with after an interruption, never mistaken for others."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from chain_cases import RETAIN, A, B, C, hparams_of
from test_cli import refused

from editlib.benches import sequential as module
from editlib.benches.report import sequential_rows, write_sequential
from editlib.benches.sequential import bench_sequential, check_plan
from editlib.chain import Chain
from editlib.errors import EditError, HparamsError, OutputError, RequestError
from editlib.facts.sampling import FactSplit
from editlib.hparams import ALGORITHMS, ModelShape, derive

PARTS = FactSplit([*A, *B, *C], RETAIN[:2], RETAIN[2:])
SETTINGS = [hparams_of("MEMIT"), hparams_of("AlphaEdit")]


def runner(loaded, folder):
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"The river {i} flows by Basel and Bonn before it meets the sea." for i in range(60)))

    def go(out="out", settings=SETTINGS, sizes=(2, 1), **options):
        given = {"parts": PARTS, "points": 5, "text": str(text), **options}
        return bench_sequential(lambda: copy.deepcopy(loaded), settings, sizes, folder / out, **given)

    return go


@pytest.fixture
def run(loaded, tmp_path):
    return runner(loaded, tmp_path)


@pytest.fixture(scope="module")
def whole(loaded, tmp_path_factory):
    """(points, folder) of a run that nothing disturbed; not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    return runner(loaded, folder)(), folder / "out"


def untimed(points):
    return [replace(point, seconds=0.0) for point in points]


def test_every_chain_is_measured_on_its_way(whole, tmp_path):
    points, out = whole
    found = [(point.algorithm, point.size, point.edits) for point in points]
    wanted = [[(name, 2, n) for n in (2, 4, 5)] + [(name, 1, n) for n in (1, 2, 3, 4, 5)] for name in
              ("MEMIT", "AlphaEdit")]  # fmt: skip
    assert found == [place for some in wanted for place in some]
    for size in (1, 2):
        chain = Chain.open(out / "chains" / f"MEMIT-{size}")
        assert [request.id for request in chain.requests] == ["a1", "a2", "b1", "c1", "c2"]
        assert {request.target_new for request in chain.requests} == {"I don't know."}
        assert len(chain.batches) == (5 if size == 1 else 3)
    assert all(0 <= point.gone <= 1 and point.perplexity_ratio > 0 for point in points)
    assert len({point.perplexity_ratio for point in points}) > 3  # the edited models were measured, not the base
    table, plot = write_sequential(points, tmp_path)
    assert plot.stat().st_size > 1000
    rows = table.read_text().splitlines()
    assert len(rows) == 2 + len(points) and rows[0].startswith("| algorithm | batches of | edits | efficacy |")
    assert len(sequential_rows(points)[1]) == len(sequential_rows(points)[0])


def test_facts_that_are_too_long_are_refused_before_any_is_asked(run, tmp_path, monkeypatch):
    monkeypatch.setattr("editlib.evaluation.answer_cache.greedy", None)
    long = replace(A[0], id="long", prompt="{} " + "very " * 300)
    for parts in (replace(PARTS, forget=[*A, long]), replace(PARTS, held_out=[long]), replace(PARTS, anchors=[long])):
        with pytest.raises(RequestError, match=r"'long'.* positions of this model"):
            run(parts=parts)
    monkeypatch.setattr("editlib.data.facts", lambda: [replace(long, relation="capital")])
    with pytest.raises(RequestError, match=r"'long'.* positions of this model"):
        run(parts=None)
    assert not (tmp_path / "out").exists()


def test_derived_settings_are_fitted_to_the_loaded_model(run, loaded, tmp_path, monkeypatch):
    shape = ModelShape.of(loaded.model.config, "tiny")
    monkeypatch.setattr("editlib.workbench.causal_trace", lambda *_: SimpleNamespace(read_at=2))
    fitted = derive("MEMIT", shape, read_at=2)
    followed = []
    monkeypatch.setattr(module._SequentialRun, "follow", lambda self, load, hparams, size: followed.append(hparams))
    run(settings=[derive("MEMIT", shape), SETTINGS[1]], sizes=[5])
    assert followed == [fitted, SETTINGS[1]]
    assert derive("MEMIT", shape).layers != fitted.layers


def test_it_goes_on_where_it_was_stopped(run, whole, monkeypatch):
    """AlphaEdit, whose later edits need the keys of those before."""
    given, added, measured = {"settings": SETTINGS[1:]}, [], []
    undisturbed = untimed(point for point in whole[0] if point.algorithm == "AlphaEdit")
    usual, usual_measure = Chain.add, module.evaluate

    def add(self, requests):
        if len(added) == 4:
            raise KeyboardInterrupt
        added.append(requests)
        return usual(self, requests)

    def measure(*args, **kwargs):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(1)
        return usual_measure(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, "evaluate", measure)
        with pytest.raises(KeyboardInterrupt):  # between an edit and its point
            run(**given)
        patch.setattr(module, "evaluate", usual_measure)
        patch.setattr(Chain, "add", add)
        with pytest.raises(KeyboardInterrupt):  # between a point and the next edit
            run(**given)
    assert untimed(run(**given)) == undisturbed

    def never(*_):
        raise AssertionError("edited again")

    monkeypatch.setattr(Chain, "add", never)
    monkeypatch.setattr(Chain, "create", never)
    assert untimed(run(**given)) == undisturbed


def test_an_edit_that_fails_is_not_the_end(run, monkeypatch, caplog):
    usual = Chain.add

    def add(self, requests):
        if requests[0].id == "b1":
            raise EditError("no finite solution")
        return usual(self, requests)

    monkeypatch.setattr(Chain, "add", add)
    points = run(settings=SETTINGS[:1], sizes=[1])
    assert [point.edits for point in points] == [1, 2, 3, 4, 5]
    assert "edits 3 to 3: no finite solution" in caplog.text


def test_chains_of_another_job_are_refused(run, tmp_path):
    run(settings=SETTINGS[:1], sizes=[2])
    other = replace(SETTINGS[0], mom2_update_weight=2.0)
    before = (tmp_path / "out" / "chains" / "MEMIT-2" / "chain.json").read_bytes()
    for options in ({"settings": [other]}, {"seed": 1}, {"parts": replace(PARTS, forget=[*B, *C])}):
        with pytest.raises(OutputError, match="MEMIT-2 holds a chain of other facts, settings or prompts"):
            run(**{"settings": SETTINGS[:1], "sizes": [2], **options})
    assert (tmp_path / "out" / "chains" / "MEMIT-2" / "chain.json").read_bytes() == before


def test_unierase_holds_the_anchors(run, base, tmp_path, monkeypatch):
    usual = Chain.create

    def create(*args, **kwargs):
        return usual(*args, token=base / "token.safetensors", **kwargs)  # not learned here

    monkeypatch.setattr(Chain, "create", create)
    points = run(settings=[hparams_of("UniErase")], sizes=[5])
    assert [point.edits for point in points] == [5]
    chain = Chain.open(tmp_path / "out" / "chains" / "UniErase-5")
    batch = next(batch for _, batch in chain.contents())
    assert set(batch.anchors) <= {prompt.id for prompt in PARTS.anchors} and batch.anchors
    assert torch.isfinite(batch.values.targets).all()


def test_algorithms_with_the_same_settings_are_all_followed(run):
    same = [ALGORITHMS[name].from_dict(SETTINGS[0].to_dict()) for name in ("PRUNE", "MEMIT")]
    points = run(settings=same, sizes=[5], points=1)
    assert {point.algorithm for point in points if point.edits} == {"PRUNE", "MEMIT"}


def test_bad_plans():
    with pytest.raises(HparamsError, match=r"--sizes '10,x'"):
        check_plan("smollm2-135m", "MEMIT", [], "10,x")
    with pytest.raises(HparamsError, match="--sizes '0'"):
        check_plan("smollm2-135m", "MEMIT", [], "0")
    with pytest.raises(HparamsError, match="not among --algorithms MEMIT"):
        check_plan("smollm2-135m", "MEMIT", ["ROME/smollm2-135m"], "10")
    settings, sizes = check_plan("smollm2-135m", "UniErase, MEMIT,", [], "10,1,10")
    assert [one.algorithm for one in settings] == ["UniErase", "MEMIT"] and sizes == [10, 1]


def test_from_the_command_line(call, tmp_path):
    out = tmp_path / "out"
    refused(call("bench", "sequential", "--sizes", "-1", "--out", out), "--sizes")
    refused(call("bench", "sequential", "--algorithms", "FT", "--model", "smollm2-135m", "--out", out), "FT")
    assert not out.exists()
