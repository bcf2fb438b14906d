"""Bad input: one line each, nothing written."""

import copy
import shutil
from dataclasses import replace

import pytest
import torch
from chain_cases import HPARAMS, RETAIN, A, B, files, hparams_of
from tiny_models import make_llama, train_tokenizer

from editlib.algorithms.unierase.anchors import answers_to
from editlib.chain import Chain, editing
from editlib.errors import ChainError, EditError, HparamsError, ModelError, OutputError, RequestError, StatsError
from editlib.hparams import FTHyperParams, MEMITHyperParams
from editlib.models.prompts import PromptFormat
from editlib.requests.request import EditRequest
from editlib.stats.file import read_stats
from editlib.stats.store import save_stats
from editlib.workbench import Workbench


@pytest.fixture
def chain(start):
    made = start("MEMIT")
    made.add(A)
    return made


def refused(chain, error, wanted, change):
    before = files(chain.path)
    weights = {name: value.clone() for name, value in chain.model.state_dict().items()}
    with pytest.raises(error, match=wanted) as caught:
        change()
    assert "\n" not in str(caught.value)
    assert files(chain.path) == before
    assert all(torch.equal(value, weights[name]) for name, value in chain.model.state_dict().items())


def test_requests_that_cannot_be_added(chain):
    twin = replace(B[0], id="b2")
    cases = [
        ([], RequestError, "no request"),
        ([replace(B[0], id="a1")], RequestError, r"'a1' is in the chain already \(batch 1\)"),
        ([replace(A[0], id="new")], RequestError, "asks the same as request 'a1'"),
        ([B[0], twin], RequestError, "request b2: asks the same as request 'b1'"),
        ([B[0], replace(A[1], id="b1", subject="Oslo")], RequestError, r"'b1' is in the chain already \(this batch\)"),
        ([EditRequest(id="n", prompt="Who?", subject=None)], RequestError, "target_new"),
    ]
    for requests, error, wanted in cases:
        refused(chain, error, wanted, lambda requests=requests: chain.add(requests))
    refused(chain, ChainError, "request 'b1' is not in .*chain log", lambda: chain.revoke(["a1", "b1"]))
    refused(chain, ChainError, "at least one", lambda: chain.revoke([]))
    chain.undo()
    refused(chain, ChainError, "holds no batch", chain.undo)


@pytest.mark.parametrize("at", ["editlib.chain.state.ChainState.weights", "editlib.chain.editing.digest"])
def test_an_edit_that_fails_leaves_all_as_it_was(chain, monkeypatch, at):
    before = chain._session.state.weights()
    calls = []

    def fail(self):
        # The first call puts the model where the chain stands.
        calls.append(self)
        if len(calls) == (2 if "weights" in at else 1):
            raise EditError("no finite solution")
        return before

    monkeypatch.setattr(at, fail)
    refused(chain, EditError, "no finite solution", lambda: chain.add(B))


def test_a_replay_that_fails_leaves_all_as_it_was(chain, monkeypatch):
    chain.add(B)
    real, calls = editing.digest, []

    def fail(weight):
        calls.append(weight)
        if len(calls) == 3:  # in the second of the two batches that are made again
            raise EditError("no finite solution")
        return real(weight)

    monkeypatch.setattr(editing, "digest", fail)
    refused(chain, EditError, "no finite solution", lambda: chain.revoke(["a1"]))
    assert len(calls) == 3 and list(chain.record.ids) == ["a1", "a2", "b1"]


def test_where_no_chain_can_start(bench, tmp_path, chain, base):
    hparams = hparams_of("MEMIT")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    cases = [
        (chain.path, hparams, {}, OutputError, "holds a chain already"),
        (tmp_path / "full", hparams, {}, OutputError, "exists and is not empty"),
        (tmp_path / "file", hparams, {}, OutputError, "exists and is not empty"),
        (tmp_path / "new", FTHyperParams(layers=[1]), {}, HparamsError, "FT trains weights"),
        (tmp_path / "new", MEMITHyperParams(layers=[1, 9]), {}, ModelError, "layer 9"),
        (tmp_path / "new", MEMITHyperParams(layers=[1], v_loss_layer=31), {}, HparamsError, "another depth"),
        (tmp_path / "new", hparams, {"retain": RETAIN}, HparamsError, "MEMIT takes no retain prompts"),
        (tmp_path / "new", hparams, {"token": base / "token.safetensors"}, HparamsError, "MEMIT takes no token"),
    ]
    for path, given, options, error, wanted in cases:
        with pytest.raises(error, match=wanted):
            Chain.create(path, bench, given, **options)
    with torch.no_grad():
        bench.anat.weight(1)[0, 0] += 1
    with pytest.raises(ModelError, match="changed since it was loaded"):
        Chain.create(tmp_path / "new", bench, hparams)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(ChainError, match="is not a chain"):
        Chain.open(tmp_path / "full")
    with pytest.raises(ChainError, match="is not a chain"):
        Chain.open(tmp_path / "nowhere")


def test_another_base_model(chain, base, tmp_path, bench):
    other = Workbench.of(make_llama(seed=9), train_tokenizer(), base / "stats", name="other", progress=False)
    given = Chain.open(chain.path, other)
    for change in (lambda: given.add(B), lambda: given.revoke(["a1"]), given.verify, lambda: given.model):
        with pytest.raises(ChainError, match="other: has other weights than the chain's base model"):
            change()
    used = copy.deepcopy(bench)
    with torch.no_grad():
        used.anat.weight(2)[0, 0] += 1
    with pytest.raises(ChainError, match="layer 2 are not those of the chain's base model"):
        Chain.open(chain.path, used).add(B)
    gone = Chain.open(chain.path, model=str(tmp_path / "gone"))
    with pytest.raises(ModelError, match="gone: no such folder"):
        gone.verify()
    assert gone.status()["requests"] == 2
    Chain.open(chain.path, model=str(base / "tiny")).verify()


def test_statistics_that_are_gone_or_changed(base, loaded, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(base, home)
    bench = Workbench.load(str(home / "tiny"), home / "stats", progress=False)
    chain = Chain.create(tmp_path / "chain", bench, hparams_of("MEMIT"))
    chain.add(A)
    (home / "stats").rename(tmp_path / "moved")
    anew = Chain.open(chain.path, copy.deepcopy(loaded))
    refused(anew, StatsError, "statistics of layer 1 are gone", lambda: anew.add(B))
    anew.verify()  # needs none
    anew = Chain.open(chain.path, copy.deepcopy(loaded), stats_dir=tmp_path)
    refused(anew, StatsError, "are gone, and no layer statistics found", lambda: anew.add(B))
    anew = Chain.open(chain.path, copy.deepcopy(loaded), stats_dir=tmp_path / "moved")
    anew.add(B)

    path = next((tmp_path / "moved").rglob("*layers.2*.npz"))
    stats = read_stats(path)
    stats.mom2 *= 2
    save_stats(tmp_path / "moved", stats)
    anew = Chain.open(chain.path, copy.deepcopy(loaded), stats_dir=tmp_path / "moved")
    refused(anew, StatsError, "layer 2 are not those that the chain was started with", lambda: anew.revoke(["a1"]))


def test_retain_prompts_that_are_forgotten_later_are_no_anchors_any_more(start):
    """Neither those that ask the same question nor those about the same answer of the same subject."""
    chain = start("UniErase", retain=RETAIN)
    chain.add(A)  # asks which river flows through Basel
    assert set(chain._session.batch(chain.batches[0]).anchors) <= {"river/Rotterdam", "river/Mali", "river/Oslo"}
    oslo = replace(A[1], id="oslo", prompt="Which water runs through {}?", subject="Oslo", answer=None)
    chain.add([replace(oslo, paraphrases=("Which river flows through {}?",))])
    assert chain._session.batch(chain.batches[1]).anchors == ("river/Rotterdam", "river/Mali")


def test_the_anchors_answers_are_the_base_model_s(start, bench, monkeypatch):
    """Also those of prompts that are anchored first when earlier batches have changed the model already."""
    monkeypatch.setitem(HPARAMS, "UniErase", {**HPARAMS["UniErase"], "max_anchors": 1})
    chain = start("UniErase", retain=RETAIN)
    for request in (*A, *B):
        chain.add([request])
    found = {k: v for entry in chain.batches for k, v in chain._session.batch(entry).answers.items()}
    chain._session.put_token(chain.record, bench)
    wanted = answers_to(bench.anat, PromptFormat(bench.tok), RETAIN)
    assert len(found) > 1
    assert found == {question: list(wanted[question]) for question in found}
