"""The adapter, opened with plain peft on the base, is the edited model."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from test_delta import KINDS, edited_by_hand, token, update
from tiny_models import VOCAB, make_llama, train_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from editlib.algorithms.low_rank import LowRank
from editlib.errors import DeltaError, EditError, ModelError, OutputError
from editlib.export import Delta, save_edited
from editlib.export.apply import apply_delta
from editlib.export.lora import lora_from_file, save_lora
from editlib.models.loading import load
from editlib.models.weights import save_model

peft = pytest.importorskip("peft")
IDS = torch.tensor([[5, 9, 200, 17, 33, 8]])


@pytest.fixture(params=[(kind, with_token) for kind in KINDS for with_token in (True, False)], ids=str)
def handed_on(request, tmp_path):
    """(base folder, edited folder, delta file, whether there is a token)."""
    kind, with_token = request.param
    base = tmp_path / "base"
    save_model(KINDS[kind](), train_tokenizer(chat=True), base)
    model, tok = load(str(base))
    updates = {1: update(3), 2: update(1, 1) + update(1, 1), 4: update(5, 2)}
    delta, receipt = edited_by_hand(model, tok, updates, token() if with_token else None, base=str(base))
    delta.save(tmp_path / "d.safetensors")
    save_edited(model, tok, tmp_path / "edited", receipt)
    return base, tmp_path / "edited", tmp_path / "d.safetensors", with_token


def seen(model, ids):
    with torch.no_grad():
        new = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        return model(input_ids=ids).logits, new


def test_plain_peft_gives_the_edited_model(handed_on, tmp_path):
    base, edited, delta, with_token = handed_on
    report = lora_from_file(str(base), delta, tmp_path / "lora")
    assert {layer: one.rank for layer, one in report.layers.items()} == {1: 3, 2: 1, 4: 5} and report.error == 0
    want = AutoModelForCausalLM.from_pretrained(edited).eval()
    ids = torch.cat([IDS, torch.tensor([[VOCAB, 7]])], dim=1) if with_token else IDS
    logits, text = seen(want, ids)
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        before = plain(input_ids=IDS).logits
    assert (before - seen(want, IDS)[0][..., :VOCAB]).abs().max() > 0.1  # the case can tell the two apart
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft warns of keys that it misses or does not know
        tok = AutoTokenizer.from_pretrained(tmp_path / "lora")
        if len(tok) > plain.get_input_embeddings().weight.shape[0]:
            plain.resize_token_embeddings(len(tok), mean_resizing=False)
        by_hand = peft.PeftModel.from_pretrained(plain, tmp_path / "lora").eval()
    by_itself = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora").eval()
    for got in (by_hand, by_itself):
        found, said = seen(got, ids)
        torch.testing.assert_close(found, logits, atol=1e-4, rtol=0)
        assert torch.equal(said, text)
    merged = by_hand.merge_and_unload()
    torch.testing.assert_close(seen(merged, ids)[0], logits, atol=1e-4, rtol=0)
    again = AutoTokenizer.from_pretrained(edited)
    assert tok.get_vocab() == again.get_vocab()


def test_the_adapter_keeps_one_row_of_the_vocabulary(tmp_path):
    """With a vocabulary of 5000 the adapter does not grow."""
    sizes = []
    for vocab in (VOCAB, 5000):
        base = tmp_path / f"base{vocab}"
        save_model(make_llama(vocab=vocab, tied=False), train_tokenizer(), base)
        model, tok = load(str(base))
        delta, _ = edited_by_hand(model, tok, {1: update(2)}, token())
        model, tok = load(str(base))
        save_lora(model, tok, delta, tmp_path / f"out{vocab}")
        sizes.append((tmp_path / f"out{vocab}" / "adapter_model.safetensors").stat().st_size)
    assert sizes[1] == sizes[0] < 4 * (2 * (32 + 64) + 2 * 32) + 1000


def test_truncation_is_the_best_one_and_its_error_the_true_one(tmp_path):
    base = tmp_path / "base"
    save_model(make_llama(), train_tokenizer(), base)
    model, tok = load(str(base))
    updates = {1: update(6), 3: LowRank.full(update(2, 4).dense())}
    delta, _ = edited_by_hand(model, tok, updates, None)
    assert 3 in delta.matrices
    model, tok = load(str(base))
    report = save_lora(model, tok, delta, tmp_path / "lora", rank=2)
    got = peft.PeftModel.from_pretrained(load(str(base))[0], tmp_path / "lora").merge_and_unload().state_dict()
    lost = []
    for layer, given in updates.items():
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        dense = given.dense()
        kept = (got[name] - model.state_dict()[name]).double()
        spectrum = torch.linalg.svdvals(dense)
        error = spectrum[2:].norm() / spectrum.norm()
        assert report.layers[layer].rank == 2
        assert report.layers[layer].error == pytest.approx(float(error), abs=1e-6)
        assert float((kept - dense).norm() / dense.norm()) == pytest.approx(float(error), abs=1e-5)
        lost.append(((dense - kept).norm(), dense.norm()))
    total = sum(a**2 for a, _ in lost) ** 0.5 / sum(b**2 for _, b in lost) ** 0.5
    assert report.error == pytest.approx(float(total), abs=1e-5)
    assert "share of" in (tmp_path / "lora" / "README.md").read_text()


def test_an_adapter_of_half_precision_base_keeps_fp32_factors(tmp_path):
    base = tmp_path / "base"
    save_model(make_llama().to(torch.bfloat16), train_tokenizer(), base)
    model, tok = load(str(base))
    delta, _ = edited_by_hand(model, tok, {1: update(1)}, token())
    model, tok = load(str(base))
    save_lora(model, tok, delta, tmp_path / "lora")
    apply_delta(model, tok, delta)
    plain = load(str(base))[0]
    plain.resize_token_embeddings(VOCAB + 1, mean_resizing=False)
    got = peft.PeftModel.from_pretrained(plain, tmp_path / "lora")
    near, far = seen(got, IDS)[0].float(), seen(load(str(base))[0], IDS)[0].float()
    want = seen(model, IDS)[0].float()
    assert (near - want).norm() < 0.05 * (far - want[..., :VOCAB]).norm()


def test_bad_input_writes_nothing(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    save_model(make_llama(), train_tokenizer(), base)
    model, tok = load(str(base))
    delta, _ = edited_by_hand(model, tok, {1: update(1)}, token())
    delta.save(tmp_path / "d")
    with pytest.raises(EditError, match="--rank 0"):
        lora_from_file(str(base), tmp_path / "d", out, rank=0)
    with pytest.raises(DeltaError, match="d2: "):
        lora_from_file(str(base), tmp_path / "d2", out)
    other = tmp_path / "other"
    save_model(make_llama(seed=9), train_tokenizer(), other)
    with pytest.raises(DeltaError, match="other weights"):
        lora_from_file(str(other), tmp_path / "d", out)
    assert not out.exists()
    with pytest.raises(OutputError, match="--overwrite"):
        lora_from_file(str(base), tmp_path / "d", base)


def test_a_head_with_a_bias_is_refused_with_a_token_only(tmp_path):
    from transformers import PhiConfig, PhiForCausalLM

    config = PhiConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    base = tmp_path / "base"
    save_model(PhiForCausalLM(config), train_tokenizer(), base)
    for given, fine in ((token(), False), (None, True)):
        model, tok = load(str(base))
        delta, _ = edited_by_hand(model, tok, {1: update(1)}, given)
        model, tok = load(str(base))
        if fine:
            assert save_lora(model, tok, delta, tmp_path / "out").error == 0
        else:
            with pytest.raises(ModelError, match="bias"):
                save_lora(model, tok, delta, tmp_path / "out")
            assert not (tmp_path / "out").exists()
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.mlp.fc2"] and config["trainable_token_indices"] is None


def test_delta_objects_and_files_give_the_same_adapter(tmp_path):
    base = tmp_path / "base"
    save_model(make_llama(), train_tokenizer(), base)
    model, tok = load(str(base))
    delta, _ = edited_by_hand(model, tok, {1: update(2)}, token(), base=str(base))
    delta.save(tmp_path / "d")
    assert Delta.load(tmp_path / "d").token.header == delta.token.header
    lora_from_file(str(base), tmp_path / "d", tmp_path / "one")
    model, tok = load(str(base))
    save_lora(model, tok, delta, tmp_path / "two")
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
