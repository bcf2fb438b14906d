"""Statistics under torchrun: two real processes give what one gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed_job import CORPUS, PROMPTS, SELF, header
from tiny_models import SENTENCES

from editlib.distributed import ALONE, Process, backend, processes
from editlib.models.anatomy import anatomy
from editlib.models.loading import load
from editlib.models.weights import save_model
from editlib.stats.corpus import load_corpus
from editlib.stats.layer_stats import layer_stats
from editlib.stats.self_stats import self_stats
from editlib.stats.store import find_layers
from editlib.workbench import Workbench


@pytest.fixture
def folder(tiny_llama, tok_chat, tmp_path):
    path = tmp_path / "tiny"
    path.mkdir()
    save_model(tiny_llama, tok_chat, path)
    return path


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "c.jsonl"
    texts = [" ".join(SENTENCES[i % 4 :] * (1 + i % 7)) + f" That was {i}." for i in range(150)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def torchrun(*command):
    """Two processes with a thread each."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def same(found, wanted):
    for layer, stats in wanted.items():
        assert (found[layer].count, found[layer].sample_size) == (stats.count, stats.sample_size)
        assert float((found[layer].mom2 - stats.mom2).abs().max()) < 1e-6 * float(stats.mom2.abs().max())


def test_two_processes_give_what_one_gives_and_speak_as_one(folder, corpus, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    torchrun(Path(__file__).with_name("distributed_job.py"), folder, corpus, out)
    saw = [json.loads((out / f"saw.{rank}.json").read_text()) for rank in (0, 1)]
    assert [(one["rank"], one["world"], one["progress"]) for one in saw] == [(0, 2, True), (1, 2, False)]

    # The command: the result of one process, one table, no checkpoint left.
    alone = Workbench.of(*load(str(folder)), tmp_path / "one", name=str(folder), progress=False)
    wanted = alone.make_stats([2, 3], corpus=str(corpus), tokens=9001)
    found = find_layers(out / "command", str(folder), alone.anat, [2, 3], model_sha256=alone.sha256)
    same(found, wanted)
    assert [found[layer].header for layer in (2, 3)] == [wanted[layer].header for layer in (2, 3)]
    assert [(one["good"]["code"], one["good"]["out"].count("┏")) for one in saw] == [(0, 1), (0, 0)]
    kept = {path.name for path in (out / "command").rglob("*") if path.is_file()}
    assert kept == {stats.path.name for stats in wanted.values()}

    # The command with a layer that the model has not got: one line from one of them.
    assert [one["bad"]["code"] for one in saw] == [2, 2]
    assert saw[0]["bad"]["err"].startswith("editlib: layer 9 is not in") and saw[0]["bad"]["err"].count("\n") == 1
    assert saw[1]["bad"]["err"] == ""

    model, tok = load(str(folder))
    anat = anatomy(model)
    documents = load_corpus(str(corpus)).documents
    alone = {
        "c": layer_stats(anat, tok, [1, 3], documents, header=header("c", 64, "corpus"), **CORPUS),
        "self": self_stats(anat, tok, [1, 3], PROMPTS, header=header("self", 64, "self"), **SELF),
    }
    same(find_layers(out, "corpus", anat, [1, 3]), alone["c"])
    same(find_layers(out, "self", anat, [1, 3]), alone["self"])
    for one in saw:
        assert one["checkpoint"] and one["resumed"]
        assert one["error"] == "line 7 is bad"
        assert one["corpus"] == saw[0]["corpus"]
        assert one["self"] == one["self again"] == one["self, one lost"] == saw[0]["self"]
    assert [one["said"] for one in saw] == [True, False]


# --- without other processes --------------------------------------------------------------------------


def test_one_process_is_the_whole():
    with processes() as shard:
        assert shard is ALONE and shard.first
        assert list(shard.share(range(5))) == [0, 1, 2, 3, 4]
        assert shard.gather("x") == ["x"]
        assert shard.own(Path("a/.c.partial.npz")) == Path("a/.c.partial.npz")
        total = torch.ones(3)
        shard.add_up(total)
        assert torch.equal(total, torch.ones(3))


@pytest.mark.parametrize("world", [2, 3, 8])
def test_together_the_shares_are_everything_once(world):
    shards = [Process(rank, world) for rank in range(world)]
    dealt = [list(shard.share(iter(range(20)))) for shard in shards]
    assert sorted(np.concatenate(dealt).tolist()) == list(range(20))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    assert len({shard.own(Path("a/.c.partial.npz")) for shard in shards}) == world


def test_backends():
    assert backend("cpu") == "gloo"
    kinds = {
        kind: name for kind, name in torch.distributed.Backend.default_device_backend_map.items() if name != "gloo"
    }
    assert "nccl" in kinds.values()
    for kind, name in kinds.items():
        assert backend(kind) == f"cpu:gloo,{kind}:{name}"  # messages go by gloo, sums by the device's own


def test_processes_that_do_not_find_each_other(monkeypatch):
    from editlib.errors import EditlibError

    for name, value in {"RANK": "7", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "nowhere"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EditlibError, match="cannot reach each other"), processes():
        pass


def test_a_group_that_is_there_is_used_and_left_alone():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with processes() as shard:
            assert (shard.rank, shard.world, shard.device) == (0, 1, None)
        assert torch.distributed.is_initialized()
    finally:
        torch.distributed.destroy_process_group()
