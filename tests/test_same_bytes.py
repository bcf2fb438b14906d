"""The same seed gives the same update, from one version of the library to the next."""

import hashlib

import pytest
import torch
from tiny_models import make_gpt2, make_llama, train_tokenizer

from editlib import (
    AlphaEditHyperParams,
    EditRequest,
    MEMITHyperParams,
    ROMEHyperParams,
    UniEraseHyperParams,
    UnlearningToken,
    apply_alphaedit_to_model,
    apply_memit_to_model,
    apply_rome_to_model,
    apply_unierase_to_model,
)
from editlib.algorithms.unierase.token import TokenHeader
from editlib.models.anatomy import anatomy
from editlib.stats.file import LayerStats

# What is hashed, for every edited layer: two random projections `u^T update v / |update|`, rounded to three decimals.
# Values are optimised in float32, so that other processors give updates that differ by some 1e-5 of their size; the
# seed of the projections was chosen so that none of the numbers lies near the middle between two rounded ones.
PROBES = 9068
EXPECTED = {
    ("ROME", "llama"): "4e9a71802cf28116a88ba0ddd9177036c99e2aeed14715913c70933b659f6677",
    ("ROME", "gpt2"): "788e5d28242978922d3dec0bc27c71c830bf7e6752429ca2b1794a88aa84ef89",
    ("MEMIT", "llama"): "05b7a0af3c2a14f50f599ee210580ae0ddca884aea3ec15ac49513bf05785ddb",
    ("MEMIT", "gpt2"): "745cce015e4431961aac20cbb3c3a3b97a023209551f566139ef9fc779146563",
    ("AlphaEdit", "llama"): "98f6a5150460ecf354bc98042310c93e76d7432ee61a992a5c9106db0363ab27",
    ("AlphaEdit", "gpt2"): "3d22a00aca343b14e4448903fcbe3e8419f2a4b28cdcf7e6c4bf7abfc6f123b7",
    ("UniErase", "llama"): "a46fa20ca15190498ead099de564177ce00586e53b52e7a4a31cf751d3626325",
    ("UniErase", "gpt2"): "b15593cbe3fb098fd26077994b69ef3963d490275568da9b4c4147056bff8326",
}
STEPS = {"v_num_grad_steps": 8, "v_lr": 0.3}
PLACES = ("France", "Peru", "Basel")
FACTS = [
    EditRequest(id=place, prompt="The capital of {} is", subject=place, target_new="Bonn", answer="Paris")
    for place in PLACES
]
FORGET = [
    EditRequest(id=place, prompt="What is the capital of {}?", subject=place, answer="x", relation="capital")
    for place in PLACES
]
RETAIN = [
    EditRequest(id=f"river/{place}", prompt="Which river flows through {}?", subject=place, relation="river")
    for place in ("Bonn", "Rotterdam", "Chad")
]
EDITS = {
    "ROME": (
        apply_rome_to_model,
        ROMEHyperParams(layers=[1], context_templates=["{}", "So. {}"], mom2_adjustment=True, **STEPS),
    ),
    "MEMIT": (
        apply_memit_to_model,
        MEMITHyperParams(layers=[1, 2], context_templates=["{}", "So. {}"], mom2_update_weight=10, **STEPS),
    ),
    "AlphaEdit": (
        apply_alphaedit_to_model,
        AlphaEditHyperParams(
            layers=[1, 2],
            context_template_length_params=[[3, 2]],
            nullspace_threshold=0.8,
            nullspace_rule="dimensions",
            L2=1e-3,
            **STEPS,
        ),
    ),
    "UniErase": (
        apply_unierase_to_model,
        UniEraseHyperParams(
            layers=[0, 1],
            nullspace_threshold=1.0,
            nullspace_rule="dimensions",
            solve="exact",
            L2=1e-3,
            gate_layer=3,
            gate_nll=2.0,
            **STEPS,
        ),
    ),
}


def updates(name, model, tok):
    """The dense update of every layer, on seeded statistics."""
    generator = torch.Generator().manual_seed(7)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    anat = anatomy(model)
    stats = {}
    for layer in range(3):
        keys = drawn(anat.d_ff, 200)
        stats[layer] = LayerStats(keys @ keys.T / 200, 200, 1)
    function, hparams = EDITS[name]
    if name == "UniErase":
        row = 0.1 * drawn(32).to(model.dtype)
        token = UnlearningToken(row, row, TokenHeader("[UNL]", "", "", 0, 0, 0))
        result = function(model, tok, FORGET, hparams, token=token, retain=RETAIN, stats=stats, seed=3)
    else:
        result = function(model, tok, FACTS[: 1 if name == "ROME" else 3], hparams, stats=stats, seed=3)
    return {layer: delta.dense() for layer, delta in sorted(result.deltas.items())}


def projections(deltas, seed=PROBES):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for delta in deltas.values():
        left, right = (torch.randn(2, size, generator=generator, dtype=torch.float64) for size in delta.shape)
        found += ((left @ delta.double() @ right.T).diagonal() / delta.norm()).tolist()
    return found


def fingerprint(deltas):
    told = f"{list(deltas)} {[round(1000 * number) for number in projections(deltas)]}"
    return hashlib.sha256(told.encode()).hexdigest()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", EDITS)
def test_the_update_is_the_stored_one(name, kind):
    model = make_llama() if kind == "llama" else make_gpt2()
    deltas = updates(name, model.double(), train_tokenizer())
    assert fingerprint(deltas) == EXPECTED[name, kind]
