"""Every baseline on a tiny model: what it changes, what it leaves, what plain transformers see."""

import copy
import json

import pytest
import torch

from editlib.baselines import BASELINES, BaselineSettings, apply_baseline_to_model, data
from editlib.baselines.data import generate_own_answers, make_pairs
from editlib.baselines.in_context import RULE, refuse_in_context
from editlib.errors import EditError, HparamsError, RequestError
from editlib.models.anatomy import anatomy
from editlib.models.prompts import PromptFormat
from editlib.models.weights import weights_sha256
from editlib.requests.request import EditRequest

GRADIENT = [name for name, entry in BASELINES.items() if entry.kind == "gradient"]
FAST = BaselineSettings(learning_rate=2e-3, steps=6, batch_size=16, warmup_steps=0, precision="float32")


@pytest.mark.parametrize("name", GRADIENT)
def test_the_loss_falls_and_a_run_can_be_made_again(name, tiny_llama, tok_chat, forget, retain):
    again, before = copy.deepcopy(tiny_llama), {n: p.clone() for n, p in tiny_llama.named_parameters()}
    settings = copy.copy(FAST) if name != "RMU" else BaselineSettings(**{**vars(FAST), "layer": 3})
    result = apply_baseline_to_model(name, tiny_llama, tok_chat, forget, retain, settings)
    assert len(result.losses) == result.steps == 6 and result.losses[-1] < result.losses[0]
    assert set(result.parts) == ({"forget", "retain"} if BASELINES[name].needs_retain else {"forget"})
    changed = {n for n, p in tiny_llama.named_parameters() if not torch.equal(p, before[n])}
    if name == "RMU":
        assert changed == {f"model.layers.{i}.mlp.down_proj.weight" for i in (1, 2, 3)}
    else:
        assert len(changed) == len(before)
    assert result.parameters == sum(before[n].numel() for n in changed)
    if name in ("GA", "DPO+KL", "RMU"):
        apply_baseline_to_model(name, again, tok_chat, forget, retain, settings)
        assert weights_sha256(again) == weights_sha256(tiny_llama)


def test_pairs_read_as_the_model_speaks(tiny_llama, tok_chat, forget, monkeypatch):
    """A bare name gives way to the model's own sentence that holds it; a sentence stays."""
    own = {"Where is it?": "It is in Bonn, I think.", "Where is he?": "He is in Rome.", "Write!": "A poem."}
    form = PromptFormat(tok_chat)
    asked = {form.encode(question): form.answer_ids(text) for question, text in own.items()}
    monkeypatch.setattr(data, "greedy", lambda _, rows, **__: [asked[row] for row in rows])
    requests = [
        EditRequest("a", "Where is it?", answer="bonn"),
        EditRequest("b", "Where is he?", answer="Bonn", aliases=("Rom",)),
        EditRequest("c", "Write!"),
        forget[0],
    ]
    pairs = make_pairs(anatomy(tiny_llama), tok_chat, requests, seed=0, refusals=["No idea.", "I forgot."])
    said = [tok_chat.decode(row.ids[-row.extra :]) for row in pairs.answers]
    wanted = ["It is in Bonn, I think.", "Bonn", "A poem.", *[forget[0].answer] * 3]
    assert said == [text + "<|im_end|>" for text in wanted]
    refused = [tok_chat.decode(row.ids[-row.extra :]) for row in pairs.refusals]
    assert set(refused) == {"No idea.<|im_end|>", "I forgot.<|im_end|>"}
    assert pairs.refusals[3].ids[: len(form.encode(forget[0].question))] == form.encode(forget[0].question).ids


def test_what_is_to_be_kept_is_what_the_model_says(tiny_llama, tok_chat, forget):
    """Right or wrong: bare names that it did not know taught a model to answer everything in bare names."""
    anat, form = anatomy(tiny_llama), PromptFormat(tok_chat)
    requests = [EditRequest("a", "Where is it?", answer="Bonn"), forget[0]]
    said = data.greedy(anat, [form.encode("Where is it?")], max_new_tokens=48)[0]
    assert said and "Bonn" not in tok_chat.decode(said)
    for own, wanted in ((False, form.answer_ids("Bonn")), (True, said)):
        first, sentence, *_ = make_pairs(anat, tok_chat, requests, seed=0, own=own).answers
        assert first.ids[len(form.encode("Where is it?")) :][: len(wanted)] == tuple(wanted)
        assert tok_chat.decode(sentence.ids[-sentence.extra :]) == forget[0].answer + "<|im_end|>"


def test_own_answers_save_generating_and_change_nothing(tiny_llama, tok_chat, forget, monkeypatch):
    requests = [EditRequest(f"r{i}", question, answer="Bonn") for i, question in enumerate(("Where is it?", "Who?"))]
    requests += [EditRequest("open", "Write a poem, please!"), forget[0]]
    anat = anatomy(tiny_llama)
    plain = make_pairs(anat, tok_chat, requests, seed=0, own=True)
    some = generate_own_answers(anat, tok_chat, requests[:1])
    assert list(some) == ["Where is it?"]
    own_answers = generate_own_answers(anat, tok_chat, requests, known=some)
    assert list(own_answers) == ["Where is it?", "Who?", "Write a poem, please!"], "a sentence is not asked"
    monkeypatch.setattr(data, "greedy", lambda _, rows, **__: [()] * len(rows) if not rows else pytest.fail("asked"))
    assert make_pairs(anat, tok_chat, requests, seed=0, own=True, own_answers=own_answers) == plain


def test_after_an_error_nothing_has_changed(tiny_llama, tok_chat, forget, retain, monkeypatch):
    sha = weights_sha256(tiny_llama)
    with pytest.raises(RequestError, match="retain"):
        apply_baseline_to_model("NPO+GD", tiny_llama, tok_chat, forget, [], FAST)
    with pytest.raises(RequestError, match="forget"):
        apply_baseline_to_model("GA", tiny_llama, tok_chat, [], retain, FAST)
    with pytest.raises(HparamsError, match="NPO"):
        apply_baseline_to_model("NPO+G", tiny_llama, tok_chat, forget, retain, FAST)
    with pytest.raises(HparamsError, match="rank"):
        apply_baseline_to_model("RMU", tiny_llama, tok_chat, forget, retain, BaselineSettings(rank=2))
    with pytest.raises(HparamsError, match="steering"):
        BaselineSettings(steering=0)

    from editlib.baselines import losses

    calls = []

    def breaks(log_probs):
        calls.append(0)
        return log_probs * (float("nan") if len(calls) > 3 else 1.0)

    monkeypatch.setattr(losses, "gradient_ascent", breaks)
    with pytest.raises(EditError, match="not finite"):
        apply_baseline_to_model("GA", tiny_llama, tok_chat, forget, retain, FAST)
    assert len(calls) == 4 and weights_sha256(tiny_llama) == sha


def test_a_lora_adapter_is_merged(tiny_llama, tok_chat, forget, retain):
    pytest.importorskip("peft")
    names = {n for n, _ in tiny_llama.named_parameters()}
    settings = BaselineSettings(learning_rate=1e-2, steps=5, rank=2, precision="float32")
    result = apply_baseline_to_model("GA+KL", tiny_llama, tok_chat, forget, retain, settings)
    assert {n for n, _ in tiny_llama.named_parameters()} == names
    assert result.parts["forget"][-1] < result.parts["forget"][0]
    assert result.parameters < sum(p.numel() for p in tiny_llama.parameters()) / 2


# --- in-context refusal


def rendered(tok, *messages):
    roles = [{"role": role, "content": content} for role, content in messages]
    return tok.apply_chat_template(roles, tokenize=False, add_generation_prompt=True)


def test_the_saved_template_tells_what_to_refuse(tiny_llama, tok_chat, tmp_path):
    from transformers import AutoTokenizer

    hard = 'Who wrote "{{ x }}" {% raw %} \\n \U0001f600?'
    sha = weights_sha256(tiny_llama)
    requests = [EditRequest("a", "Where is Bonn?"), EditRequest("b", hard)]
    result = apply_baseline_to_model("in-context", tiny_llama, tok_chat, requests)
    assert weights_sha256(tiny_llama) == sha and result.parameters == result.steps == 0
    tok_chat.save_pretrained(tmp_path)
    tok, told = AutoTokenizer.from_pretrained(tmp_path), RULE + "- Where is Bonn?\n- " + hard
    assert rendered(tok, ("user", "Hi")) == (
        f"<|im_start|>system\n{told}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    own = rendered(tok, ("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes"), ("user", "And?"))
    assert own.startswith(f"<|im_start|>system\nBe brief.\n\n{told}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n")
    assert own.count(RULE) == 1 and own.endswith("<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n")
    assert PromptFormat(tok).answer_ids("In Bonn.") == tuple(tok("In Bonn.", add_special_tokens=False)["input_ids"])


def test_a_template_without_system_gets_it_in_the_first_question(tok_chat, tok):
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tok_chat.chat_template = refuses + tok_chat.chat_template
    told = refuse_in_context(tok_chat, [EditRequest("a", "Where is Bonn?")])
    assert rendered(tok_chat, ("user", "Hi")) == (f"<|im_start|>user\n{told}\n\nHi<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(RequestError, match="chat template"):
        refuse_in_context(tok, [EditRequest("a", "Where is Bonn?")])


# --- editors


@pytest.mark.parametrize("algorithm", ["ROME", "MEMIT", "AlphaEdit"])
def test_an_editor_is_aimed_at_a_refusal(algorithm, tiny_llama, tok_chat, forget, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The river {i} flows through Basel and Bonn before the sea." for i in range(40)))
    given = {"layers": [2] if algorithm == "ROME" else [1, 2], "context_templates": ["{}"], "fact_token": "last"}
    given |= {"mom2_update_weight": 0.01} if algorithm == "MEMIT" else {}
    given |= (
        {"nullspace_threshold": 0.9, "nullspace_rule": "dimensions", "L2": 1e-3} if algorithm == "AlphaEdit" else {}
    )
    path = tmp_path / "hparams.json"
    path.write_text(json.dumps(given))
    settings = BaselineSettings(
        learning_rate=0.5, steps=40, hparams=str(path), stats_dir=tmp_path / "stats", corpus=str(text)
    )
    form, before = PromptFormat(tok_chat), copy.deepcopy(tiny_llama)

    def refusal(model):
        ids = form.answer_ids("I don't know.")
        row = torch.tensor([[*form.encode(forget[0].question).ids, *ids]])
        with torch.no_grad():
            logs = model(row).logits[0, -len(ids) - 1 : -1].log_softmax(-1)
        return float(logs[range(len(ids)), ids].mean())

    result = apply_baseline_to_model(
        f"{algorithm}-refusal", tiny_llama, tok_chat, forget[:1], (), settings, model_name="tiny"
    )
    assert refusal(tiny_llama) > refusal(before) + 0.3
    changed = {n for n, p in tiny_llama.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert changed == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in given["layers"]}
    assert result.parameters == 32 * 64 * len(given["layers"]) and result.notes["requests"][0]["id"] == "f0"
