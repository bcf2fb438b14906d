"""Each algorithm on tiny models against the published procedure, dense and with full forward passes."""

import copy

import pytest
import torch
from reference import closed_form as dense
from reference import family
from tiny_models import LAYERS, VOCAB

from editlib.algorithms.alphaedit import apply_alphaedit_to_model
from editlib.algorithms.contexts import context_templates
from editlib.algorithms.ft import apply_ft_to_model
from editlib.algorithms.memit import apply_memit_to_model
from editlib.algorithms.registry import apply_function
from editlib.algorithms.rome import apply_rome_to_model
from editlib.errors import EditError, HparamsError, ModelError, RequestError, StatsError
from editlib.hparams import (
    ALGORITHMS,
    AlphaEditHyperParams,
    ClosedFormHyperParams,
    EMMETHyperParams,
    FTHyperParams,
    MEMITHyperParams,
    MEMITSeqHyperParams,
    NASHyperParams,
    PRUNEHyperParams,
    RECTHyperParams,
    ROMEHyperParams,
    UniEraseHyperParams,
    finds_values,
    takes_retain,
)
from editlib.models.anatomy import anatomy
from editlib.models.prompts import PromptFormat
from editlib.requests.request import EditRequest
from editlib.stats.file import LayerStats

TEMPLATES = ["{}", "The river. {}", "I am not sure. {}"]
Z = {
    "steps": 6, "lr": 0.1, "weight_decay": 0.5, "clamp_norm_factor": 0.6, "kl_factor": 0.0625, "stop_loss": 0.05,
}  # fmt: skip
OPTIONS = {
    "context_templates": TEMPLATES, "v_num_grad_steps": 6, "v_lr": 0.1, "clamp_norm_factor": 0.6,
}  # fmt: skip
REQUESTS = [
    EditRequest(id="a", prompt="The capital of {} is", subject="France", target_new="Rotterdam"),
    EditRequest(id="b", prompt="In {} people speak", subject="Peru", target_new="Basel"),
    EditRequest(id="c", prompt="{} flows through", subject="The Rhine", target_new="Bonn and Paris"),
]
WHERE = [1, 2, 3]


@pytest.fixture
def stats(anat):
    """Moments with full rank, as of 200 tokens."""
    generator = torch.Generator().manual_seed(8)
    found = {}
    for layer in range(LAYERS):
        keys = torch.randn(200, anat.d_ff, generator=generator, dtype=torch.float64)
        keys = keys * torch.logspace(0, -1.5, anat.d_ff, dtype=torch.float64)
        found[layer] = LayerStats(keys.T @ keys, 200, 10)
    return found


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def encoded(tok, requests=REQUESTS, templates=TEMPLATES):
    """Requests as the reference takes them, encoded here by hand."""

    def row(text, subject):
        found = tok(text, return_offsets_mapping=True)
        end = text.rindex(subject) + len(subject)
        at = next(i for i, (first, behind) in enumerate(found["offset_mapping"]) if first < end <= behind)
        return list(found["input_ids"]), at

    return [
        (
            [row(template.replace("{}", request.question), request.subject) for template in templates],
            tok(" " + request.target_new, add_special_tokens=False)["input_ids"],
            row(f"{request.subject} is a", request.subject),
        )
        for request in requests
    ]


def parts(model):
    """How the reference finds a layer and its matrix."""
    anat = anatomy(model)
    return (lambda layer: anat.layers[layer]), anat.mlp_output


def same_weights(got, wanted, tolerance=2e-4):
    """Every matrix moved the same way; the edited ones did move."""
    for (name, mine), its in zip(got.state_dict().items(), wanted.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, its, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: name + text)


FORMULAS = {
    "MEMIT": (MEMITHyperParams, {"mom2_update_weight": 50.0}, lambda k, r, c, w: dense.memit(k, r, c, 50.0)),
    "EMMET": (
        EMMETHyperParams,
        {"mom2_update_weight": 2.0, "emmet_lambda": 0.1},
        lambda k, r, c, w: dense.emmet(k, r, c, 2.0, 0.1),
    ),
    "RECT": (
        RECTHyperParams,
        {"mom2_update_weight": 50.0, "rect_share": 0.4},
        lambda k, r, c, w: dense.rect(dense.memit(k, r, c, 50.0), w, 40),
    ),
    "AlphaEdit": (
        AlphaEditHyperParams,
        {"nullspace_threshold": 0.1, "L2": 1.0},
        lambda k, r, c, w: dense.alphaedit(k, r, dense.projector(c, 0.1), 1.0),
    ),
}


def weight_of(module):
    return (module.weight if isinstance(module, torch.nn.Linear) else module.weight.T).detach().double()


@pytest.mark.parametrize("name", FORMULAS)
def test_equals_the_published_procedure(tiny_model, tok, stats, name):
    kind, own, formula = FORMULAS[name]
    twin, before = copy.deepcopy(tiny_model), weights(tiny_model)
    layer_of, matrix_of = parts(twin)
    moments = {layer: one.moment() for layer, one in stats.items()}
    family.edit_at_once(
        twin,
        WHERE,
        layer_of,
        matrix_of,
        encoded(tok),
        lambda layer, k, r: formula(k, r, moments[layer], weight_of(matrix_of(layer))),
        Z,
    )
    hparams = kind(layers=WHERE, **OPTIONS, **own)
    result = apply_function(hparams)(tiny_model, tok, REQUESTS, hparams, stats=stats)
    same_weights(tiny_model, twin)
    for layer in WHERE:
        moved = anatomy(tiny_model).weight(layer) - result.originals[layer]
        assert float(moved.norm()) > 0.01
        torch.testing.assert_close(moved, result.deltas[layer].dense().float(), rtol=1e-3, atol=1e-5)
    assert [entry["id"] for entry in result.diagnostics] == ["a", "b", "c"]
    result.revert(tiny_model)
    assert all(torch.equal(value, before[key]) for key, value in weights(tiny_model).items())


@pytest.mark.parametrize("adjusted", [True, False])
def test_rome_equals_the_published_procedure(tiny_model, tok, stats, adjusted):
    twin, before = copy.deepcopy(tiny_model), weights(tiny_model)
    layer_of, matrix_of = parts(twin)
    c = stats[2].moment() if adjusted else None
    family.rome(twin, 2, layer_of, matrix_of, encoded(tok), c, Z)
    hparams = ROMEHyperParams(layers=[2], mom2_adjustment=adjusted, **OPTIONS)
    result = apply_rome_to_model(tiny_model, tok, REQUESTS, hparams, stats=stats)
    same_weights(tiny_model, twin)
    assert result.deltas[2].rank == 3 and result.norms[2]["update"] > 0.01
    result.revert(tiny_model)
    assert all(torch.equal(value, before[key]) for key, value in weights(tiny_model).items())


@pytest.mark.parametrize("kind", [AlphaEditHyperParams, MEMITSeqHyperParams])
def test_a_second_edit_holds_the_keys_of_the_first(tiny_model, tok, stats, kind):
    """As the published code's `cache_c`, whose keys are taken through the model with all updates written."""
    twin = copy.deepcopy(tiny_model)
    layer_of, matrix_of = parts(twin)
    past = {layer: torch.zeros(anatomy(twin).d_ff, 0, dtype=torch.float64) for layer in WHERE}

    def formula(layer, k, r):
        if kind is AlphaEditHyperParams:
            return dense.alphaedit(k, r, dense.projector(stats[layer].moment(), 0.1), 1.0, past[layer])
        return dense.memit(k, r, stats[layer].moment(), 50.0, past[layer])

    for batch in (REQUESTS[:2], REQUESTS[2:]):
        keys = family.edit_at_once(twin, WHERE, layer_of, matrix_of, encoded(tok, batch), formula, Z)
        past = {layer: torch.cat([past[layer], keys[layer]], 1) for layer in WHERE}
    own = {"nullspace_threshold": 0.1, "L2": 1.0} if kind is AlphaEditHyperParams else {"mom2_update_weight": 50.0}
    hparams = kind(layers=WHERE, **OPTIONS, **own)
    apply = apply_function(hparams)
    first = apply(tiny_model, tok, REQUESTS[:2], hparams, stats=stats)
    second = apply(tiny_model, tok, REQUESTS[2:], hparams, stats=stats, state=first.state)
    same_weights(tiny_model, twin)
    assert {layer: held.count for layer, held in second.state.past.items()} == dict.fromkeys(WHERE, 3)
    for layer in WHERE:
        torch.testing.assert_close(second.state.past[layer].block, past[layer], rtol=1e-3, atol=1e-3)
    assert {held.count for held in first.state.past.values()} == {2}  # a state is never changed


def test_nothing_is_carried_without_a_state(tiny_llama, tok, stats):
    """A cache in a module once leaked from one edit to the next."""
    hparams = AlphaEditHyperParams(layers=WHERE, **OPTIONS)
    twin = copy.deepcopy(tiny_llama)
    apply_alphaedit_to_model(tiny_llama, tok, REQUESTS[:1], hparams, stats=stats).revert(tiny_llama)
    apply_alphaedit_to_model(tiny_llama, tok, REQUESTS[1:], hparams, stats=stats)
    apply_alphaedit_to_model(twin, tok, REQUESTS[1:], hparams, stats=stats)
    assert all(torch.equal(a, b) for a, b in zip(weights(tiny_llama).values(), weights(twin).values(), strict=True))


@pytest.mark.parametrize("kind", [MEMITHyperParams, ROMEHyperParams])
def test_known_values_are_not_found_again(tiny_llama, tok, stats, kind):
    hparams = kind(layers=[2], **OPTIONS)
    apply = apply_function(hparams)
    first = apply(tiny_llama, tok, REQUESTS, hparams, stats=stats)
    after = weights(tiny_llama)
    first.revert(tiny_llama)
    again = apply(tiny_llama, tok, REQUESTS, hparams, stats=stats, values=first.values)
    assert "values" not in again.timings
    assert all(torch.equal(value, after[name]) for name, value in weights(tiny_llama).items())


def test_prune_counts_an_update_once(tiny_llama, tok, stats):
    """The published code adds the cut update on top of the uncut one. Here the weight is the base and the cut total,
    after every batch, and the next batch is found on the uncut one."""
    plain = MEMITSeqHyperParams(layers=[2], **OPTIONS, mom2_update_weight=0.001)
    hparams = PRUNEHyperParams(layers=[2], **OPTIONS, mom2_update_weight=0.001)
    anat, twin = anatomy(tiny_llama), copy.deepcopy(tiny_llama)
    with torch.no_grad():
        for model in (tiny_llama, twin):
            anatomy(model).weight(2).mul_(0.05)  # so that the update's spectrum is the larger one
    base, state, total = anat.weight(2).double().clone(), None, 0
    for batch in (REQUESTS[:2], REQUESTS[2:]):
        uncut = apply_memit_to_model(twin, tok, batch, MEMITHyperParams(**plain.to_dict()), stats=stats)
        total = total + uncut.deltas[2].dense()
        before = weights(tiny_llama)
        result = apply_memit_to_model(tiny_llama, tok, batch, hparams, stats=stats, state=state)
        state = result.state
        assert float((dense.prune(total, base) - total).norm()) > 0.05 * float(total.norm())
        torch.testing.assert_close(anat.weight(2).double() - base, dense.prune(total, base), rtol=1e-3, atol=1e-4)
        moved = anat.weight(2) - before["model.layers.2.mlp.down_proj.weight"]
        torch.testing.assert_close(moved, result.deltas[2].dense().float(), rtol=1e-3, atol=1e-4)
    result.revert(tiny_llama)
    assert all(torch.equal(value, before[name]) for name, value in weights(tiny_llama).items())


def test_nas_keeps_the_norm_of_states(tiny_llama, tok, stats):
    hparams = NASHyperParams(layers=WHERE, **OPTIONS)
    result = apply_memit_to_model(tiny_llama, tok, REQUESTS, hparams, stats=stats)
    before = result.values.targets - result.values.deltas
    torch.testing.assert_close(result.values.targets.norm(dim=0), before.norm(dim=0), rtol=1e-5, atol=1e-5)
    result.revert(tiny_llama)
    free = apply_memit_to_model(tiny_llama, tok, REQUESTS, MEMITHyperParams(layers=WHERE, **OPTIONS), stats=stats)
    ratio = free.values.targets.norm(dim=0) / before.norm(dim=0)
    assert float((ratio - 1).abs().max()) > 0.01
    turned = free.values.targets / ratio
    torch.testing.assert_close(result.values.targets, turned, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ft_trains_within_its_limit(tiny_model, tok, dtype):
    tiny_model.to(dtype)
    anat, before = anatomy(tiny_model), weights(tiny_model)
    hparams = FTHyperParams(layers=[3], lr=0.01, norm_constraint=0.02, num_steps=15, batch_size=2)
    result = apply_ft_to_model(tiny_model, tok, REQUESTS, hparams)
    changed = {name for name, value in weights(tiny_model).items() if not torch.equal(value, before[name])}
    assert changed == {f"{anat.mlp_output_names[3]}.weight"}
    moved = (anat.weight(3).float() - result.originals[3].float()).abs()
    assert 0.015 < float(moved.max()) < 0.02 + (0 if dtype == torch.float32 else 0.01) + 1e-6

    def nll(state):
        tiny_model.load_state_dict(state)
        total = 0.0
        for contexts, target, _ in encoded(tok, templates=["{}"]):
            ids = [*contexts[0][0], *target]
            with torch.no_grad():
                logits = tiny_model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            total -= sum(float(logits[len(ids) - len(target) + j - 1, t]) for j, t in enumerate(target)) / len(target)
        return total / 3

    after = weights(tiny_model)
    assert nll(after) < nll(before) - 0.1
    tiny_model.load_state_dict(after)
    result.revert(tiny_model)
    assert all(torch.equal(value, before[name]) for name, value in weights(tiny_model).items())


def test_ft_is_torchs_adam(tiny_llama, tok):
    """Three steps over one batch, against autograd through the plain model."""
    hparams = FTHyperParams(layers=[1], lr=0.003, norm_constraint=0.005, num_steps=3, batch_size=8, early_stop_loss=0)
    twin = copy.deepcopy(tiny_llama)
    parameter = twin.model.layers[1].mlp.down_proj.weight
    start, adam = parameter.detach().clone(), torch.optim.Adam([parameter], lr=0.003)
    for _ in range(3):
        loss = 0.0
        for contexts, target, _ in encoded(tok, templates=["{}"]):
            ids = [*contexts[0][0], *target]
            logits = twin(torch.tensor([ids])).logits[0].log_softmax(-1)
            each = [logits[len(ids) - len(target) + j - 1, token] for j, token in enumerate(target)]
            loss = loss - sum(each) / len(target) / 3
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            parameter.copy_(torch.clamp(parameter, start - 0.005, start + 0.005))
    apply_ft_to_model(tiny_llama, tok, REQUESTS, hparams)
    same_weights(tiny_llama, twin)


@pytest.mark.parametrize("lengths", [None, [[3, 4], [6, 2]]])
def test_context_templates_are_written_by_the_model(tiny_llama, tok, lengths):
    anat, form = anatomy(tiny_llama), PromptFormat(tok)
    found = context_templates(anat, form, lengths, seed=1)
    assert found[0] == "{}" and len(found) == 1 + (5 if lengths is None else 6)
    assert all(text.endswith(". {}") and text.count("{") == text.count("}") == 1 for text in found[1:])
    assert found == context_templates(anat, form, lengths, seed=1)
    assert found != context_templates(anat, form, lengths, seed=2)
    if lengths is None:
        for text, start in zip(found[1:], ("The", "Therefore", "Because", "I", "You"), strict=True):
            assert text.startswith(start)


def test_every_algorithm_has_a_function_but_unierase():
    for name, kind in ALGORITHMS.items():
        assert kind.paper and kind.summary and kind.algorithm == name
        if kind is UniEraseHyperParams:
            with pytest.raises(HparamsError, match="editlib unlearn"):
                apply_function(kind(layers=[1]))
        else:
            assert callable(apply_function(kind(layers=[1])))


def test_traits_agree_with_the_classes():
    for kind in ALGORITHMS.values():
        hparams = kind(layers=[1])
        assert takes_retain(hparams) == isinstance(hparams, UniEraseHyperParams)
        assert finds_values(hparams) == isinstance(hparams, ClosedFormHyperParams)
        assert issubclass(kind, ALGORITHMS[kind.procedure])
        assert hparams.uses_statistics == (kind is not FTHyperParams)
        assert set(hparams.wanted_statistics) == ({"dataset", "samples"} if finds_values(hparams) else set())
    assert UniEraseHyperParams(layers=[1], gate_layer=3).gate_at == 3


BAD = [
    ({"target_new": None}, {}, RequestError, r'request a: has no "target_new"; .* UniErase'),
    ({"prompt": "What?", "subject": None}, {}, RequestError, r'request a: has no "subject"; .* "last"'),
    ({}, {"layers": [1, 9]}, ModelError, r"layer 9 was asked for, but the model has layers 0-4"),
    ({}, {"v_loss_layer": 31}, HparamsError, r"v_loss_layer.* layer 31 .* a model of another depth"),
    ({}, {"v_loss_layer": 2}, HparamsError, r"v_loss_layer is 2; .* a model of another depth"),
    ({}, {"rewrite_module_tmp": "h.{}.c"}, HparamsError, r"rewrite_module_tmp.*leave the key out"),
    ({}, {"layers": []}, HparamsError, "at least one"),
]


@pytest.mark.parametrize(("changed", "options", "error", "message"), BAD)
@pytest.mark.parametrize("kind", [ROMEHyperParams, MEMITHyperParams, AlphaEditHyperParams])
def test_bad_input_is_one_line_and_changes_nothing(tiny_llama, tok, stats, kind, changed, options, error, message):
    if kind is ROMEHyperParams and options.get("layers"):
        options = {"layers": [9]}
    before = weights(tiny_llama)
    request = EditRequest(**{**REQUESTS[0].to_dict(), **changed})
    with pytest.raises(error, match=message) as caught:
        hparams = kind(**{"layers": [1], **OPTIONS, **options})
        apply_function(hparams)(tiny_llama, tok, [request], hparams, stats=stats)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in weights(tiny_llama).items())


@pytest.mark.parametrize("kind", [ROMEHyperParams, MEMITHyperParams, AlphaEditHyperParams])
def test_statistics_of_other_layers_are_named(tiny_llama, tok, stats, kind):
    options = {"layers": [0], **({"mom2_adjustment": True} if kind is ROMEHyperParams else {})}
    given = {9: next(iter(stats.values()))}
    before = weights(tiny_llama)
    with pytest.raises(StatsError, match=r"given for layers \[9\]; .* need layers \[0\]"):
        apply_function(kind(**options))(tiny_llama, tok, [REQUESTS[0]], kind(**options), stats=given)
    assert all(torch.equal(value, before[name]) for name, value in weights(tiny_llama).items())


def test_no_request_at_all(tiny_llama, tok, stats):
    for kind in (ROMEHyperParams, MEMITHyperParams, AlphaEditHyperParams, FTHyperParams):
        hparams = kind(layers=[1])
        given = {} if kind is FTHyperParams else {"stats": stats}
        with pytest.raises(RequestError, match="give at least one"):
            apply_function(hparams)(tiny_llama, tok, [], hparams, **given)


def test_rome_takes_one_layer():
    with pytest.raises(HparamsError, match=r"layers.*one layer"):
        ROMEHyperParams(layers=[1, 2])


@pytest.mark.parametrize("kind", [ROMEHyperParams, MEMITHyperParams, FTHyperParams])
def test_a_model_that_blows_up_is_left_as_it_was(tiny_llama, tok, stats, kind):
    with torch.no_grad():
        tiny_llama.model.norm.weight.fill_(float("inf"))
    before = weights(tiny_llama)
    hparams = kind(layers=[1]) if kind is FTHyperParams else kind(layers=[1], **OPTIONS)
    given = {} if kind is FTHyperParams else {"stats": stats}
    with pytest.raises(EditError, match="the model is unchanged"):
        apply_function(hparams)(tiny_llama, tok, REQUESTS, hparams, **given)
    for name, value in weights(tiny_llama).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_bf16_models_are_edited_in_fp64_and_rounded_once(tiny_llama, tok, stats):
    tiny_llama.to(torch.bfloat16)
    hparams = MEMITHyperParams(layers=WHERE, **OPTIONS)
    result = apply_memit_to_model(tiny_llama, tok, REQUESTS, hparams, stats=stats)
    for layer in WHERE:
        whole = (result.originals[layer].double() + result.deltas[layer].dense()).to(torch.bfloat16)
        assert torch.equal(anatomy(tiny_llama).weight(layer), whole)
        assert result.deltas[layer].left.dtype == torch.float64
    assert tiny_llama.config.vocab_size == VOCAB
