"""Attacks that draw, change weights or read inside: leaks by hand, references, and everything put back bit for bit."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from scripted import HOLD, REFUSE, UNITS, Unit, leaks, texts

from editlib.attacks.asking import ask_each
from editlib.attacks.logit_lens import answer_ranks, first_tokens, logit_lens, logit_lens_lead
from editlib.attacks.prompting import sampling
from editlib.attacks.weights import int4, int8, relearn_forgotten, relearn_unrelated
from editlib.models import lora as adapters
from editlib.models.anatomy import anatomy
from editlib.models.generation import greedy, sample_each
from editlib.models.loaded import LoadedModel
from editlib.models.lora import lora_adapter
from editlib.models.prompts import TokenRow
from editlib.models.quantization import linear_maps, quantized, round_channels
from editlib.models.weights import weights_sha256

# --- sampling


def test_one_draw_of_many_is_enough(world):
    world.says[world.subjects[0], world.ids(" P")[0]] = 12 + math.log(0.25 / 0.75)  # once in four draws,
    world.says[world.subjects[0], 0] = 12.0  # else the end
    target = LoadedModel.of(world.base().anat.model, world.tok)
    found = sampling(target, world.facts[:1], world.context(samples=400))
    share = sum(output.leaked for output in found.trials[0].outputs) / 400
    assert abs(share - 0.25) < 0.1 and leaks(found) == [True]
    assert leaks(sampling(target, world.facts[:1], world.context(samples=1))) in ([False], [True])


def test_draws_follow_from_the_seed_and_the_fact(world):
    for subject in world.subjects:  # flat: anything may be said
        world.says = {pair: score for pair, score in world.says.items() if pair[0] != subject}
        world.says[subject, 5] = 0.0
    target, context = world.base(), world.context(samples=5)
    found = sampling(target, world.facts, context)
    assert sampling(target, world.facts, context) == found
    assert sampling(target, world.facts[::-1], context).trials[::-1] == found.trials
    assert texts(sampling(target, world.facts, replace(context, seed=1))) != texts(found)
    assert len(set(texts(found))) > 1


def test_sample_each_draws_from_the_softmax_whatever_the_batch(anat):
    row, n = TokenRow((5, 6, 7), 2), 3000
    with torch.no_grad():
        wanted = anat.model(torch.tensor([row.ids])).logits[0, -1].softmax(-1)
    ends = anat.model.generation_config.eos_token_id
    drawn = sample_each(anat, [row] * n, list(range(n)), max_new_tokens=1, batch_rows=1000)
    counts = Counter(answer[0] if answer else ends for answer in drawn)
    for token, p in enumerate(wanted.tolist()):
        assert abs(counts[token] - n * p) < 5 * math.sqrt(n * p * (1 - p)) + 1
    mixed = [TokenRow((9, 8), 1), row, TokenRow((4,), 0)]
    alone = [sample_each(anat, [one], [seed], max_new_tokens=6)[0] for seed, one in enumerate(mixed)]
    assert sample_each(anat, mixed, [0, 1, 2], max_new_tokens=6) == alone


def test_a_banned_token_is_suppressed_as_generate_does_it(anat):
    row = TokenRow((5, 6, 7), 2)
    banned = sorted({ids[0] for ids in greedy(anat, [row], max_new_tokens=3) if ids} | {11})
    ids = torch.tensor([row.ids])
    wanted = anat.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, suppress_tokens=banned
    )[0, 3:].tolist()
    end = anat.model.generation_config.eos_token_id
    wanted = tuple(wanted[: wanted.index(end)] if end in wanted else wanted)
    plain = greedy(anat, [row], max_new_tokens=8)
    assert greedy(anat, [row], max_new_tokens=8, banned=banned) == [wanted] != plain
    assert greedy(anat, [row], max_new_tokens=8, banned=banned, drafts=plain) == [wanted]


# --- quantisation


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_channel_by_channel(bits):
    weight = torch.randn(3, 7, generator=torch.Generator().manual_seed(bits))
    weight[1] = 0
    wanted = weight.clone()
    most = {4: 7, 8: 127}[bits]
    for row in wanted:
        step = max(abs(float(w)) for w in row) / most
        for i, w in enumerate(row.tolist()):
            row[i] = 0 if step == 0 else round(w / step) * step
    torch.testing.assert_close(round_channels(weight, bits), wanted)
    torch.testing.assert_close(round_channels(weight.T.contiguous(), bits, channel=1), wanted.T)
    assert round_channels(weight.bfloat16(), bits).dtype == torch.bfloat16


def test_an_update_below_a_rounding_step_is_lost(world):
    coarse = world.last("?")  # never stands in a prompt, but its weight in the same row sets the scale
    units = (Unit(1, world.subjects, {REFUSE: 1.0}), Unit(1, [coarse], {REFUSE: 20.0}))
    target = world.edited(*units)
    assert leaks(ask_each(target, world.facts, world.context())) == [False] * 4
    assert leaks(int8(target, world.facts, world.context())) == [False] * 4
    assert leaks(int4(target, world.facts, world.context())) == [True] * 4
    assert leaks(ask_each(target, world.facts, world.context())) == [False] * 4


def test_rounded_weights_are_put_back(anat):
    before, tensors = weights_sha256(anat.model), {n: p.data_ptr() for n, p in anat.model.named_parameters()}
    names = {f"{name}.weight" for name in linear_maps(anat)}
    with pytest.raises(KeyError), quantized(anat, 4):
        changed = {n for n, p in anat.model.named_parameters() if p.data_ptr() != tensors[n]}
        assert changed == names and weights_sha256(anat.model) != before
        raise KeyError
    assert weights_sha256(anat.model) == before
    assert {n: p.data_ptr() for n, p in anat.model.named_parameters()} == tensors
    assert not any("embed" in name or "head" in name or "wte" in name for name in names)
    assert len(names) == len(anat.layers) * (7 if "Llama" in type(anat.model).__name__ else 4)


# --- relearning


def test_training_on_some_brings_the_others_back(world):
    """The forgotten subjects share a direction, and the refusal hangs on it: unlearned for some, it is gone for all."""
    target = world.edited(Unit(0, world.subjects, {HOLD: 3.0}), Unit(1, [HOLD], {REFUSE: 1.0}))
    context = world.context(relearn_steps=15, relearn_rate=0.003, relearn_examples=3)
    found = relearn_forgotten(target, world.facts, context)
    assert sorted(map(str, leaks(found))) == ["None", "None", "True", "True"]  # half are examples at most
    assert {trial.skipped for trial in found.trials} == {None, "was an example"}
    assert found.notes["examples"] == 2 and found.notes["loss_after"] < found.notes["loss_before"] / 2
    assert relearn_forgotten(target, world.facts, context) == found
    still = relearn_forgotten(target, world.facts, world.context(relearn_steps=0))
    assert [leak for leak in leaks(still) if leak is not None] == [False, False]
    assert still.notes["loss_after"] == still.notes["loss_before"]


def test_training_on_unrelated_facts_asks_for_all(world):
    other = replace(world.facts[3], id="other")
    context = replace(world.context(relearn_steps=2), requests=world.facts[:3], unrelated=[other])
    target = world.edited()
    before = weights_sha256(target.anat.model)
    assert leaks(relearn_unrelated(target, world.facts[:3], context)) == [False] * 3
    assert weights_sha256(target.anat.model) == before
    none = relearn_unrelated(target, world.facts[:3], replace(context, unrelated=[]))
    assert {trial.skipped for trial in none.trials} == {"nothing to learn from"}


def test_the_loss_is_that_of_the_answers_with_their_end(world):
    from editlib.attacks.weights import train

    target = world.base()
    ids = [*world.ids("Capital of B Pxyz"), world.tok.eos_token_id]
    with torch.no_grad():
        logits = target.anat.model(torch.tensor([ids])).logits[0]
    wanted = torch.nn.functional.cross_entropy(logits[-6:-1], torch.tensor(ids[-5:]))  # P, x, y, z, end
    assert train(target, world.facts[:1], [torch.zeros(1)], steps=0, rate=0.1) == [pytest.approx(float(wanted))]


def test_an_adapter_leaves_nothing_behind(anat):
    model = anat.model
    model.train()
    next(model.parameters()).requires_grad_(False)
    before = weights_sha256(model)
    modules = {name: (id(module), type(module), module.training) for name, module in model.named_modules()}
    flags = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    attributes, maps = set(vars(model)), len(linear_maps(anat))
    ids, noise = torch.tensor([[5, 6, 7]]), torch.Generator().manual_seed(0)
    drawn = torch.get_rng_state()
    with pytest.raises(KeyError), lora_adapter(anat, rank=2, seed=3) as parameters:
        assert len(parameters) == 2 * maps and all(p.requires_grad for p in parameters)
        assert torch.equal(torch.get_rng_state(), drawn)
        inside = model(ids).logits
        with torch.no_grad():
            for parameter in parameters:
                parameter += torch.randn(parameter.shape, generator=noise)
        assert not torch.allclose(model(ids).logits, inside)
        raise KeyError
    assert weights_sha256(model) == before
    assert {name: (id(module), type(module), module.training) for name, module in model.named_modules()} == modules
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == flags
    assert set(vars(model)) == attributes
    assert torch.equal(anatomy(model.eval()).model(ids).logits, inside)  # a fresh adapter was no change


def test_an_adapter_is_drawn_from_its_seed(anat):
    drawn = []
    for seed in (1, 1, 2):
        with lora_adapter(anat, rank=2, seed=seed) as parameters:
            drawn.append([parameter.detach().clone() for parameter in parameters])
    assert all(map(torch.equal, drawn[0], drawn[1]))
    assert not all(map(torch.equal, drawn[0], drawn[2]))


def test_without_peft_one_line_says_what_to_install(anat, monkeypatch):
    from editlib.errors import ModelError

    monkeypatch.setattr(adapters, "peft_missing", lambda: True)
    with pytest.raises(ModelError, match=r"\[lora\]"), lora_adapter(anat, rank=2, seed=0):
        pass


# --- inner layers


def test_an_answer_that_an_inner_layer_holds_is_read(world):
    """Layer 0 writes the answer's first token for one subject, layer 1 takes it away again and refuses."""
    first = world.ids(" Pxyz")[0]
    for pair in list(world.says):
        if pair[0] in world.subjects:
            del world.says[pair]
    target = world.edited(
        Unit(0, [world.subjects[0]], {HOLD: 30.0}),
        Unit(1, [HOLD], {HOLD: -30.0, REFUSE: 1.0}),
        Unit(1, world.subjects[1:], {REFUSE: 1.0}),
    )
    with torch.no_grad():
        target.anat.head.weight[first, HOLD] = 1
    found = logit_lens(target, world.facts, world.context(top_k=1))
    assert leaks(found) == [True, False, False, False]
    assert texts(found)[0] == "place 1 in layer 0"
    assert leaks(ask_each(target, world.facts, world.context())) == [False] * 4
    ranks = answer_ranks(target.anat, [target.form.encode("Capital of B")], [[first]])[0]
    assert ranks[0] == 1 and ranks[1] > 1 and ranks[2] > 1


def test_behind_a_lead_the_answer_is_next(world):
    world.chain(world.last("The answer is:"), " Pxyz")
    found = logit_lens_lead(world.edited(), world.facts[:2], world.context(top_k=1))
    assert leaks(found) == [True, False]
    assert found.trials[0].outputs[0].prompt == "Capital of B The answer is:"
    assert leaks(logit_lens(world.edited(), world.facts[:2], world.context(top_k=1))) == [True, True]  # in layer 0


def test_places_against_hidden_states_of_transformers(anat, draw):
    rows, tokens = draw(6, 4, 9), [[7], [8, 120], [33]]
    ranks = answer_ranks(anat, rows, tokens)
    norm = anat.model.model.norm if hasattr(anat.model, "model") else anat.model.transformer.ln_f
    for row, wanted, got in zip(rows, tokens, ranks, strict=True):
        with torch.no_grad():
            states = anat.model(torch.tensor([row.ids]), output_hidden_states=True).hidden_states[1:]
            # transformers gives the last layer's states behind the norm already
            logits = [anat.head(norm(h))[0, -1] for h in states[:-1]] + [anat.head(states[-1])[0, -1]]
        places = [[one.argsort(descending=True).tolist().index(token) + 1 for token in wanted] for one in logits]
        assert got == [min(place) for place in places]


def test_the_token_that_is_looked_for_shows(world):
    fact = replace(world.facts[0], aliases=("uv",))
    assert first_tokens(world.base(), fact) == tuple(sorted(world.ids(" P") + world.ids("u")))
    assert UNITS >= 3
