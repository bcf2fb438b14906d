"""Models and adapters by the Hub's id, found in its cache; without a network one line, at once."""

import json
import logging
import shutil
import socket

import pytest
import torch
from tiny_models import make_llama, train_tokenizer

from editlib.errors import ModelError
from editlib.models import hub, source
from editlib.models.loading import load
from editlib.models.source import check_model, read_config
from editlib.models.weights import save_model

IDS = torch.tensor([[5, 9, 2, 11, 30, 7]])


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """`cached(id)` -> the folder of this id in the Hub's cache, used as the Hub: no network is there."""
    from huggingface_hub import constants

    root = tmp_path / "hub"

    def no_address(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    def snapshot(name):
        repo = root / f"models--{name.replace('/', '--')}"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text("0" * 40, encoding="utf-8")
        return repo / "snapshots" / ("0" * 40)

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", no_address)
    monkeypatch.setattr(hub, "getproxies", dict)
    hub.in_reach.cache_clear()
    source._hub_adapter.cache_clear()
    yield snapshot
    hub.in_reach.cache_clear()
    source._hub_adapter.cache_clear()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_an_unknown_id_is_one_line_without_a_try(cached, caplog):
    with caplog.at_level(logging.WARNING), pytest.raises(ModelError) as told:
        load("nobody/nothing")
    assert "nobody/nothing" in str(told.value) and "\n" not in str(told.value)
    assert not caplog.records  # the library's own: "Retrying in 1s"


@pytest.mark.parametrize("name", ["", "a b/c d", "../../etc", "x" * 300, "模型"])
def test_what_is_no_id_is_one_line(cached, name):
    with pytest.raises(ModelError) as told:
        check_model(name)
    assert "\n" not in str(told.value)


def test_an_adapter_by_its_id_is_merged(cached, tmp_path, monkeypatch):
    def never(_):
        raise AssertionError("the Hub was asked again and again")

    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", never)
    peft = pytest.importorskip("peft")
    save_model(make_llama(), train_tokenizer(), cached("someone/base"))
    base, _ = load("someone/base")
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, config).eval()
    want = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    given = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    given["base_model_name_or_path"] = "someone/base"
    folder = cached("someone/adapter")
    shutil.copytree(tmp_path / "adapter", folder)
    (folder / "adapter_config.json").write_text(json.dumps(given), encoding="utf-8")
    torch.testing.assert_close(logits(load("someone/adapter")[0]), want, atol=1e-4, rtol=1e-4)
    assert read_config("someone/adapter").model_type == "llama"  # its base's, before any weight is read


def test_an_adapter_of_a_model_that_is_not_there_is_refused_by_its_config(cached):
    pytest.importorskip("peft")
    folder = cached("someone/adapter")
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": "nobody/nothing"}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match="nobody/nothing"):
        check_model("someone/adapter")
