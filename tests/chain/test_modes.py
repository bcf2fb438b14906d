"""The three ways of asking, over a protocol that writes down what it is asked, and over real ones."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from chain_cases import RETAIN, A, B, C, hparams_of

from editlib.chain import Chain
from editlib.chain.state import digest
from editlib.errors import ChainError, RequestError
from editlib.facts.protocol import FactsProtocol
from editlib.jobs.evaluate import evaluate_models
from editlib.models.weights import save_model, weights_sha256
from editlib.requests.reading import write_requests

EVERYTHING = [*A, *B, *C]


class Notebook:
    """A protocol that remembers which requests it measured, and on which weights."""

    name = "notebook"

    def __init__(self, requests):
        self.requests, self.seen = requests, []

    def check(self, model, form):
        assert all(weight.is_meta for weight in model.parameters())  # before any is read

    def measure(self, base, edited, requests, kept=()):
        self.seen.append(([one.id for one in requests], [one.id for one in kept], edited.sha256))
        return {"asked": len(requests)}

    def headline(self, metrics):
        return {"asked twice": metrics["asked"] * 2.0}

    def write(self, metrics, out):
        (out / "metrics.json").write_text(json.dumps({k: v for k, v in metrics.items() if k != "receipt"}))

    def finish(self):
        self.seen.append("finished")


@pytest.fixture(scope="module")
def chain(loaded, tmp_path_factory):
    """Three batches; not to be changed."""
    path = tmp_path_factory.mktemp("modes") / "chain"
    made = Chain.create(path, copy.deepcopy(loaded), hparams_of("MEMIT"))
    for batch in (A, B, C):
        made.add(batch)
    return made


def evaluate(base, chain, protocol, tmp_path, **options):
    return evaluate_models(protocol, str(base / "tiny"), str(chain.path), tmp_path / "out", **options)


def test_steps_are_the_weights_that_were_recorded(chain, again):
    """Against the hashes that each batch was recorded with when it was edited."""
    fresh = again(chain)
    seen = []
    for entry, requests in fresh.steps():
        seen.append([one.id for one in requests])
        for layer, was in entry.layers.items():
            assert digest(fresh.anat.weight(int(layer))) == was["sha256"]
    assert seen == [[one.id for one in batch] for batch in (A, B, C)]
    end = weights_sha256(fresh.model)
    assert end == weights_sha256(chain.model)
    steps = fresh.steps()
    next(steps)
    assert weights_sha256(fresh.model) != end
    steps.close()  # whoever stops on the way finds the model at its end
    assert weights_sha256(fresh.model) == end


def test_sequential_measures_all_requests_so_far(chain, base, tmp_path):
    book = Notebook(EVERYTHING[::-1])
    metrics = evaluate(base, chain, book, tmp_path, mode="sequential")
    *points, finished = book.seen
    assert [set(ids) for ids, _, _ in points] == [
        {one.id for one in requests} for requests in (A, [*A, *B], EVERYTHING)
    ]
    assert [kept for _, kept, _ in points] == [[], [], []]
    assert len({sha for _, _, sha in points}) == 3 and points[-1][2] == metrics["edited"]["sha256"]
    assert metrics["points"][1] == {"batch": 2, "requests": 3, "asked twice": 6.0}
    assert finished == "finished"
    table = (tmp_path / "out" / "points.md").read_text().splitlines()
    assert table[0] == "| batch | requests | asked twice |" and table[3] == "| 2 | 3 | 6.000 |"


def test_batch_measures_a_chain_at_its_end(chain, base, tmp_path):
    book = Notebook(EVERYTHING)
    metrics = evaluate(base, chain, book, tmp_path)
    assert book.seen[0] == ([one.id for one in EVERYTHING], [], weights_sha256(chain.model))
    assert metrics["mode"] == "batch" and "points" not in metrics
    assert not (tmp_path / "out" / "points.md").exists()


def test_single_keeps_all_others(chain, base, tmp_path):
    book = Notebook(EVERYTHING)
    metrics = evaluate(base, chain, book, tmp_path, mode="single", request="b1")
    others = [one.id for one in EVERYTHING if one.id != "b1"]
    assert book.seen[0][:2] == (["b1"], others) and metrics["request"] == "b1"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "sideways"}, "batch, sequential, single"),
        ({"mode": "single"}, "--request"),
        ({"mode": "single", "request": "zz"}, "'zz'"),
        ({"request": "b1"}, "--mode single"),
        ({"mode": "sequential", "request": "b1"}, "--mode single"),
    ],
)
def test_what_does_not_go_together(chain, base, tmp_path, options, words):
    with pytest.raises(RequestError, match=words):
        evaluate(base, chain, Notebook(EVERYTHING), tmp_path, **options)
    assert not (tmp_path / "out").exists()


def test_a_chain_of_other_requests(chain, base, tmp_path):
    with pytest.raises(RequestError, match="2 of its requests are not among"):
        evaluate(base, chain, Notebook([*B, *C]), tmp_path, mode="sequential")


def test_a_folder_has_no_batches(base, tmp_path):
    with pytest.raises(RequestError, match="is not a chain"):
        evaluate_models(
            Notebook(EVERYTHING), str(base / "tiny"), str(base / "tiny"), tmp_path / "out", mode="sequential"
        )


def test_a_chain_of_another_base(chain, base, loaded, tmp_path):
    other = copy.deepcopy(loaded)
    with torch.no_grad():
        other.anat.weight(0).add_(0.1)
    (tmp_path / "other").mkdir()
    save_model(other.model, other.tok, tmp_path / "other")
    with pytest.raises(ChainError, match="other weights"):
        evaluate_models(Notebook(EVERYTHING), str(tmp_path / "other"), str(chain.path), tmp_path / "out")


def test_facts_along_a_chain(chain, base, tmp_path, call):
    pytest.importorskip("matplotlib")
    write_requests(tmp_path / "keep.jsonl", RETAIN)
    out = tmp_path / "out"
    given = ("--retain", tmp_path / "keep.jsonl", "--text", "none", "--mode", "sequential", "--out", out)
    code, _, err = call("eval", base / "tiny", chain.path, *given)
    assert code == 0, err
    metrics = json.loads((out / "metrics.json").read_text())
    assert [point["requests"] for point in metrics["points"]] == [2, 3, 5]
    assert metrics["points"][-1]["efficacy"] == metrics["efficacy"]
    assert {item["id"] for item in metrics["items"] if item["kind"] == "request"} == {one.id for one in EVERYTHING}
    assert (out / "report.html").is_file()


def test_facts_precisely(base, loaded):
    """The other requests are asked as prompts to keep."""
    from editlib.evaluation.protocol import NamedModel

    side = NamedModel(loaded.anat, loaded.tok, name="tiny", sha256=loaded.sha256)
    metrics = FactsProtocol(EVERYTHING, RETAIN).measure(side, side, A[:1], [*A[1:], *B])
    kinds = {item["id"]: item["kind"] for item in metrics["items"]}
    assert [name for name, kind in kinds.items() if kind == "request"] == [A[0].id]
    assert kinds["b1"] != "request" and kinds.keys() >= {one.id for one in (*A, *B, *RETAIN)}
