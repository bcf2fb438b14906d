"""A PEFT folder as a model: merged on loading, or one line that says why not."""

import json
import re
import sys

import pytest
import torch
from tiny_models import make_gpt2, make_llama, train_tokenizer
from transformers import AutoModelForCausalLM

from editlib.errors import ModelError
from editlib.models.loading import load
from editlib.models.source import check_model
from editlib.models.weights import save_model
from editlib.version import install_line

peft = pytest.importorskip("peft")
IDS = torch.tensor([[5, 9, 2, 11, 30, 7]])


@pytest.fixture(params=[("q_proj", "down_proj"), ("lm_head", "embed_tokens", "up_proj")], ids=",".join)
def adapter(request, tmp_path):
    """The folder of an adapter with a blank and an umlaut in its name, and the logits that plain peft gives."""
    base, folder = tmp_path / "base", tmp_path / "mein Adapter ü"
    save_model(make_llama(tied=False), train_tokenizer(), base)
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, target_modules=list(request.param), init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        want = adapted(input_ids=IDS).logits
    adapted.save_pretrained(folder)
    return folder, want


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_it_is_merged_on_loading(adapter, tmp_path):
    folder, want = adapter
    model, tok = load(str(folder))
    torch.testing.assert_close(logits(model), want, atol=1e-4, rtol=1e-4)
    assert (logits(load(str(tmp_path / "base"))[0]) - want).abs().max() > 1e-2  # the case can tell the two apart
    names = set(model.state_dict())
    assert names == set(load(str(tmp_path / "base"))[0].state_dict()) and len(tok) > 0
    check_model(str(folder))


def test_the_base_may_lie_beside_it_and_be_named_from_there(adapter, tmp_path, monkeypatch):
    folder, want = adapter
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "../base"}))
    torch.testing.assert_close(logits(load(str(folder))[0]), want, atol=1e-4, rtol=1e-4)


def test_a_tokenizer_with_more_tokens_comes_along(tmp_path):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    save_model(make_llama(), train_tokenizer(), base)
    model, tok = load(str(base))
    size = model.get_input_embeddings().weight.shape[0]
    tok.add_tokens([f"<new{i}>" for i in range(size - len(tok) + 2)])
    model.resize_token_embeddings(len(tok), mean_resizing=False)
    config = peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False, trainable_token_indices=[size])
    peft.get_peft_model(model, config).save_pretrained(folder)
    tok.save_pretrained(folder)
    merged, own = load(str(folder))
    assert len(own) == size + 2 == merged.get_input_embeddings().weight.shape[0]


BROKEN = {
    "no base": ({"base_model_name_or_path": None}, "base_model_name_or_path"),
    "a base that is gone": ({"base_model_name_or_path": "./gone"}, "gone"),
    "an unknown kind": ({"peft_type": "NEW"}, "cannot be loaded"),
    "another shape": ({"r": 7}, "cannot be loaded"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_merged_is_one_line(adapter, case):
    folder, _ = adapter
    change, said = BROKEN[case]
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelError, match=said) as caught:
        load(str(folder))
    assert len(str(caught.value).splitlines()) == 1


def test_damaged_and_nested_configs(adapter, tmp_path):
    folder, _ = adapter
    nested = tmp_path / "nested"
    nested.mkdir()
    (nested / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    for each in (load, check_model):
        with pytest.raises(ModelError, match="an adapter itself"):
            each(str(nested))
    (nested / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"adapter_config\.json cannot be read"):
        load(str(nested))


@pytest.mark.parametrize(
    "how",
    [
        {"target_modules": ["lm_head", "up_proj"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["up_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_one_end_of_a_tied_matrix_cannot_be_merged(tmp_path, how):
    save_model(make_llama(), train_tokenizer(), tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    peft.get_peft_model(model, peft.LoraConfig(r=2, **how)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"this model ties its embeddings.*tie_word_embeddings=False"):
        load(str(tmp_path / "adapter"))


def test_prompts_change_no_weights(tmp_path):
    save_model(make_gpt2(), train_tokenizer(), tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "prompts")
    with pytest.raises(ModelError, match="PROMPT_TUNING changes no weights"):
        load(str(tmp_path / "prompts"))


def test_without_peft_the_install_line_is_told(adapter, monkeypatch):
    folder, _ = adapter
    monkeypatch.setattr("editlib.models.adapters.peft_missing", lambda: True)
    with pytest.raises(ModelError, match=re.escape(install_line("lora"))):
        load(str(folder))
    assert "peft" in sys.modules  # it was asked for, not imported
