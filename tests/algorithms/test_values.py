"""The batched values against one request at a time, straight down (tests/reference/values.py)."""

import copy

import pytest
import torch
from reference.values import compute_z
from tiny_models import make_llama, row_maker

from editlib.algorithms.values import compute_zs
from editlib.errors import EditError
from editlib.models.anatomy import anatomy
from editlib.models.prompts import TokenRow

LAYER = 2
OPTIONS = {
    "steps": 8,
    "lr": 0.1,
    "weight_decay": 0.5,
    "clamp_norm_factor": 4.0,
    "kl_factor": 0.0625,
    "stop_loss": 0.05,
}
TARGETS = [(40,), (9, 77, 130), (55, 56)]


def contexts(row):
    return row if isinstance(row, list) else [row]


def zs(anat, rows, *args, **options):
    """A row by itself is a request with one context."""
    return compute_zs(anat, [contexts(row) for row in rows], *args, **options)


def reference(anat, rows, targets, kl_prompts=None, **options):
    """One request after the other."""
    return [
        compute_z(
            anat.model,
            anat.layers[LAYER],
            [(list(context.ids), context.lookup) for context in contexts(row)],
            list(target),
            kl_prompts=[(list(prompt.ids), prompt.lookup, prompt.extra) for prompt in kl],
            **{**OPTIONS, **options},
        )
        for row, target, kl in zip(rows, targets, kl_prompts or [()] * len(rows), strict=True)
    ]


def check(found, wanted, bound=1e-3):
    for i, want in enumerate(wanted):
        assert float((found.targets[:, i] - want.z).norm() / want.z.norm()) < bound, f"request {i}"
        assert found.steps[i] == want.steps
        assert found.nll[i] == pytest.approx(want.nll, rel=bound, abs=bound)
        assert found.relative_norm[i] == pytest.approx(want.relative_norm, rel=bound, abs=bound)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"lr": 0.5, "clamp_norm_factor": 0.4},
        {"weight_decay": 20.0},
        {"steps": 1},
        {"optimizer": "normalised", "lr": 0.03},
    ],
)
def test_equals_one_request_at_a_time(anat, draw, change):
    rows = draw(9, 5, 12)
    found = zs(anat, rows, TARGETS, LAYER, **{**OPTIONS, **change})
    check(found, reference(anat, rows, TARGETS, **change))
    if "clamp_norm_factor" in change:
        assert found.relative_norm == pytest.approx([0.4] * 3, rel=1e-4)
    if "steps" not in change:
        assert min(found.relative_norm) > 0.005


def test_contexts_share_one_value(anat, draw):
    """The mean over a request's contexts; `h` is that of the first; the others' number differs by request."""
    rows = [at_the_end(draw(5, 9, 7)), draw(6), at_the_end(draw(8, 3))]
    options = {"steps": 10, "lr": 0.3, "stop_loss": 3.0, "weight_decay": 0.01}
    wanted = reference(anat, rows, TARGETS, **options)
    check(zs(anat, rows, TARGETS, LAYER, **{**OPTIONS, **options}), wanted)
    plain = zs(anat, [row[0] for row in rows], TARGETS, LAYER, **{**OPTIONS, **options})
    assert float((plain.targets[:, 0] - wanted[0].z).norm() / wanted[0].z.norm()) > 5e-3


def test_no_option_is_idle(tiny_llama, draw):
    """The options of the test above each change the outcome, so that agreement means something."""
    anat, rows = anatomy(tiny_llama), draw(9, 5, 12)
    base = zs(anat, rows, TARGETS, LAYER, **OPTIONS).targets
    for change in (
        {"lr": 0.5},
        {"clamp_norm_factor": 0.1},
        {"weight_decay": 20.0},
        {"steps": 5},
        {"optimizer": "normalised"},
    ):
        other = zs(anat, rows, TARGETS, LAYER, **{**OPTIONS, **change}).targets
        assert float((other - base).norm() / base.norm()) > 5e-3, change


@pytest.mark.parametrize("change", [{}, {"kl_factor": 1.0, "lr": 0.5}])
def test_kl_prompts(anat, draw, change):
    """The direction of the divergence tells with the larger steps."""
    rows = at_the_end(draw(9, 5, 12))
    kl_prompts = [at_the_end(draw(6)), (), at_the_end(draw(4, 7, 2))]
    found = zs(anat, rows, TARGETS, LAYER, kl_prompts=kl_prompts, **{**OPTIONS, **change})
    check(found, reference(anat, rows, TARGETS, kl_prompts, **change))


@pytest.mark.parametrize("optimizer", ["adam", "normalised"])
def test_kl_prompts_with_answers(anat, draw, optimizer):
    """Behind a prompt that carries an answer every token counts; answers of different lengths, and none."""
    rows = at_the_end(draw(9, 5, 12))
    told = [row.followed_by((7 + i, 9, 11)[: i + 1]) for i, row in enumerate(draw(6, 5, 8))]
    kl_prompts = [[told[0], *draw(5)], [], told[1:]]
    change = {"kl_factor": 10.0, "optimizer": optimizer, "lr": 0.5 if optimizer == "adam" else 0.1}
    found = zs(anat, rows, TARGETS, LAYER, kl_prompts=kl_prompts, **{**OPTIONS, **change})
    check(found, reference(anat, rows, TARGETS, kl_prompts, **change))
    ends = [[TokenRow(row.ids[: len(row) - row.extra], row.lookup) for row in rows] for rows in kl_prompts]
    other = zs(anat, rows, TARGETS, LAYER, kl_prompts=ends, **{**OPTIONS, **change})
    assert float((found.targets - other.targets).norm()) > 1e-3 * float(other.targets.norm())


def test_kl_holds_the_next_token_of_its_prompt(tiny_llama, draw):
    anat, rows, kl_prompts = anatomy(tiny_llama), draw(9), [draw(6)]
    free = zs(anat, rows, TARGETS[:1], LAYER, **OPTIONS).targets
    held = zs(anat, rows, TARGETS[:1], LAYER, kl_prompts=kl_prompts, **{**OPTIONS, "kl_factor": 3.0}).targets
    assert float((free - held).norm() / free.norm()) > 5e-3


def at_the_end(rows):
    """The same rows with their last token as lookup: there a value has most to say."""
    return [TokenRow(row.ids, len(row) - 1) for row in rows]


def likely(anat, row, rank):
    """A target that the model says anyway, `rank` places down its list: few steps away, or many."""
    with torch.no_grad():
        return (int(anat.model(torch.tensor([row.ids])).logits[0, -1].argsort(descending=True)[rank]),)


def test_each_request_stops_by_itself(anat, draw):
    rows = at_the_end(draw(9, 5, 12, 7))
    targets = [likely(anat, rows[0], 0), (9, 77), likely(anat, rows[2], 3), likely(anat, rows[3], 12)]
    options = {"steps": 14, "lr": 0.5, "weight_decay": 0.01, "stop_loss": 1.5}
    wanted = reference(anat, rows, targets, **options)
    assert len({want.steps for want in wanted}) > 2  # they do not stop together
    check(zs(anat, rows, targets, LAYER, **{**OPTIONS, **options}), wanted)


def test_stopping_with_normalised_steps(anat, draw):
    rows = at_the_end(draw(9, 5, 12))
    targets = [likely(anat, rows[0], 0), (9, 77), likely(anat, rows[2], 3)]
    options = {"steps": 10, "lr": 0.1, "weight_decay": 0.01, "stop_loss": 1.5, "optimizer": "normalised"}
    wanted = reference(anat, rows, targets, **options)
    assert len({want.steps for want in wanted}) > 1
    check(zs(anat, rows, targets, LAYER, **{**OPTIONS, **options}), wanted)


def test_stopping_with_kl_prompts_of_some(anat, draw):
    """The requests with a KL prompt rest before those without."""
    rows, kl_prompts = at_the_end(draw(9, 5)), [draw(6), []]
    targets = [likely(anat, rows[0], 0), (9, 77)]
    options = {"lr": 0.5, "stop_loss": 2.0, "weight_decay": 0.01}
    wanted = reference(anat, rows, targets, kl_prompts, **options)
    assert wanted[0].steps < wanted[1].steps
    check(zs(anat, rows, targets, LAYER, kl_prompts=kl_prompts, **{**OPTIONS, **options}), wanted)


def test_a_batch_equals_its_parts(anat, draw):
    rows, kl_prompts = draw(9, 5, 12, 3, 7), [draw(5, 3), draw(8), [], draw(4), draw(6)]
    targets = [*TARGETS, (8,), (7, 7, 7, 7)]
    batch = zs(anat, rows, targets, LAYER, kl_prompts=kl_prompts, **OPTIONS)
    for i in range(5):
        one = zs(anat, rows[i : i + 1], targets[i : i + 1], LAYER, kl_prompts=kl_prompts[i : i + 1], **OPTIONS)
        torch.testing.assert_close(one.targets[:, 0], batch.targets[:, i], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("lookup", [0, 4])
def test_lookup_at_either_end_of_the_prompt(anat, draw, lookup):
    """At position 0 no token stands in front to make a prefix of; also beside one that has."""
    rows = [TokenRow(draw(5)[0].ids, lookup), *draw(9)]
    check(zs(anat, rows, TARGETS[1:], LAYER, **OPTIONS), reference(anat, rows, TARGETS[1:]))


@pytest.mark.parametrize("layer", [0, 4])
def test_first_and_last_layer(tiny_llama, draw, layer):
    anat, rows = anatomy(tiny_llama), at_the_end(draw(9, 5))
    found = zs(anat, rows, [(40,), (55,)], layer, **OPTIONS)
    for i, target in enumerate([40, 55]):
        want = compute_z(tiny_llama, anat.layers[layer], [(list(rows[i].ids), rows[i].lookup)], [target], **OPTIONS)
        torch.testing.assert_close(found.targets[:, i], want.z, rtol=1e-3, atol=1e-4)


def test_the_value_makes_the_model_say_the_target(tiny_llama, draw):
    """`z` written into a full forward pass, with a hook of our own."""
    anat, rows = anatomy(tiny_llama), at_the_end(draw(9, 5))
    found = zs(anat, rows, [(40,), (55,)], LAYER, **{**OPTIONS, "lr": 0.5, "steps": 40, "weight_decay": 0.0})
    for i, target in enumerate([40, 55]):

        def put(_, __, output, i=i):
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            hidden[0, rows[i].lookup] = found.targets[:, i]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        hook = anat.layers[LAYER].register_forward_hook(put)
        logits = tiny_llama(torch.tensor([rows[i].ids])).logits[0, -1]
        hook.remove()
        assert int(logits.argmax()) == target


def test_the_model_is_left_alone(anat, draw):
    before = copy.deepcopy(anat.model.state_dict())
    zs(anat, draw(9, 5), TARGETS[:2], LAYER, **OPTIONS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in anat.model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in anat.model.parameters())


def test_training_mode_does_not_matter(tiny_gpt2, draw):
    rows = draw(9, 5)
    wanted = zs(anatomy(tiny_gpt2), rows, TARGETS[:2], LAYER, **OPTIONS).targets
    found = zs(anatomy(tiny_gpt2.train()), rows, TARGETS[:2], LAYER, **OPTIONS).targets
    torch.testing.assert_close(found, wanted)
    assert tiny_gpt2.training


def test_bf16_is_near_fp32(draw):
    rows, model = row_maker()(6, 4), make_llama()
    wanted = zs(anatomy(model), rows, TARGETS[:2], LAYER, **{**OPTIONS, "steps": 3})
    found = zs(anatomy(model.to(torch.bfloat16)), rows, TARGETS[:2], LAYER, **{**OPTIONS, "steps": 3})
    assert found.targets.dtype == torch.float32
    assert float((found.targets - wanted.targets).norm() / wanted.targets.norm()) < 0.05


def test_a_loss_that_is_not_finite_names_the_request(tiny_llama, draw):
    anat = anatomy(tiny_llama)
    rows = [*draw(5, 6), TokenRow((299, 5, 6), 1)]
    with torch.no_grad():
        anat.embedding.weight[299] = float("nan")
        # The head is tied: only rows that read token 299 shall be damaged.
        tiny_llama.lm_head.weight = torch.nn.Parameter(anat.embedding.weight.nan_to_num())
    with pytest.raises(EditError, match="request Peru is not finite"):
        zs(anat, rows, TARGETS, LAYER, names=["France", "Chad", "Peru"], **OPTIONS)
    with pytest.raises(EditError, match="number 3"):
        zs(anat, rows, TARGETS, LAYER, **OPTIONS)
