"""Every loss against its formula, written straight down over hand-made numbers and over plain transformers' logits."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from editlib.baselines import BASELINES, BaselineSettings, losses
from editlib.baselines.data import make_pairs
from editlib.baselines.gradient import LossInputs
from editlib.baselines.references import Likeliest, collect
from editlib.models.anatomy import anatomy
from editlib.training import mean_loss
from editlib.training.settings import TrainSettings

FP32 = TrainSettings(precision="float32")
NOW, BEFORE, LENGTHS = [-3.0, -0.5], [-1.0, -2.0], [4.0, 2.0]


def sigma(x):
    return 1 / (1 + math.exp(-x))


def close(got, wanted):
    torch.testing.assert_close(got, torch.tensor(wanted), rtol=1e-5, atol=1e-6)


def test_by_hand():
    now, before, lengths = torch.tensor(NOW), torch.tensor(BEFORE), torch.tensor(LENGTHS)
    pairs = list(zip(NOW, BEFORE, strict=True))
    close(losses.gradient_ascent(now), NOW)
    close(losses.negative_log_likelihood(now), [3.0, 0.5])
    # 2/β log(1 + (p/p_ref)^β), the other way that the paper writes it
    wanted = [2 / 0.1 * math.log(1 + math.exp(p - r) ** 0.1) for p, r in pairs]
    close(losses.negative_preference(now, before, 0.1), wanted)
    wanted = [-2 / 2.5 * math.log(sigma(-2.5 / n * p - 0.3)) for p, n in zip(NOW, LENGTHS, strict=True)]
    close(losses.simple_negative_preference(now, lengths, 2.5, 0.3), wanted)
    wanted = [
        -1 / 0.1 * math.log(sigma(0.1 * ((w - -1.5) - (p - r)))) for w, (p, r) in zip([-2.0, -7.0], pairs, strict=True)
    ]
    close(losses.direct_preference(torch.tensor([-2.0, -7.0]), now, torch.tensor([-1.5, -1.5]), before, 0.1), wanted)
    wanted = [-1 / 0.1 * math.log(sigma(-0.1 * (r - p))) for p, r in pairs]
    close(losses.answer_preservation(now, before, 0.1), wanted)
    p = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    close(losses.to_uniform(p.log()), [sum(0.25 * math.log(0.25 / x) for x in p[0].tolist())])
    q = [0.1, 0.2, 0.3, 0.4]
    every = torch.arange(4)[None]
    wanted = sum(a * math.log(a / b) for a, b in zip(p[0].tolist(), q, strict=True))
    close(losses.to_reference(torch.tensor([q]).log(), every, p.log()), [wanted])
    some = losses.to_reference(torch.tensor([q]).log(), every[:, :2], p.log()[:, :2])
    close(some, [0.5 * math.log(0.5 / 0.1) + 0.25 * math.log(0.25 / 0.2) + 0.25 * math.log(0.25 / 0.7)])
    states, other = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 5.0]])
    close(losses.to_direction(states, other[0]), [10.0])
    close(losses.to_states(states, other), [10.0])


def test_npo_becomes_gradient_ascent_for_small_beta():
    now = torch.tensor(NOW, requires_grad=True)
    losses.negative_preference(now, torch.tensor(BEFORE), 1e-4).sum().backward()
    torch.testing.assert_close(now.grad, torch.ones(2), rtol=0, atol=1e-3)


def logits(model, row):
    """Log-probabilities at the learned tokens, by plain transformers, and these tokens."""
    ids = torch.tensor([row.ids])
    with torch.no_grad():
        return model(ids).logits[0, -row.extra - 1 : -1].log_softmax(-1), ids[0, -row.extra :]


def states(model, row, layer):
    with torch.no_grad():
        found = model(torch.tensor([row.ids]), output_hidden_states=True).hidden_states[layer + 1]
    return found[0, -row.extra - 1 : -1]


def log_p(model, row):
    logs, wanted = logits(model, row)
    return float(logs.gather(1, wanted[:, None]).sum())


def mean(values):
    return sum(values) / len(values)


def straight(name, base, model, forget, retain):
    """(forget loss, retain loss or None) by the formulas, answer by answer."""
    tokens = sum(row.extra for row in forget.answers)
    kept = sum(row.extra for row in retain.answers)
    answers = list(zip(forget.answers, forget.refusals, strict=True))
    ratios = [(log_p(model, a) - log_p(base, a), log_p(model, r) - log_p(base, r)) for a, r in answers]
    first = {
        "GA": lambda: sum(log_p(model, a) for a in forget.answers) / tokens,
        "NPO": lambda: mean([-2 / 0.1 * math.log(sigma(-0.1 * ratio)) for ratio, _ in ratios]),
        "SimNPO": lambda: mean([-2 / 2.5 * math.log(sigma(-2.5 / a.extra * log_p(model, a))) for a in forget.answers]),
        "DPO": lambda: mean([-10 * math.log(sigma(0.1 * (chosen - rejected))) for rejected, chosen in ratios]),
        "IDK": lambda: -sum(log_p(model, r) for r in forget.refusals) / sum(r.extra for r in forget.refusals),
        "ME": lambda: sum(float(-logits(model, a)[0].mean(-1).sum()) for a in forget.answers) / tokens - math.log(300),
    }

    def divergence():
        total = 0.0
        for row in retain.answers:
            before, now = logits(base, row)[0], logits(model, row)[0]
            top = before.topk(256).indices
            mask = torch.zeros_like(before, dtype=torch.bool).scatter(1, top, True)
            p, q = before.exp().double(), now.exp().double()
            rest_p, rest_q = (p * ~mask).sum(-1), (q * ~mask).sum(-1)
            total += float((p * (p / q).log() * mask).sum() + (rest_p * (rest_p / rest_q).log()).sum())
        return total / kept

    pairs = list(zip(retain.answers, retain.refusals, strict=True))
    second = {
        "GD": lambda: -sum(log_p(model, a) for a in retain.answers) / kept,
        "KL": divergence,
        "AP": lambda: mean([-10 * math.log(sigma(-0.1 * (log_p(model, r) - log_p(model, a)))) for a, r in pairs]),
    }
    head, _, tail = name.partition("+")
    return first[head](), second[tail]() if tail else None


def stage_of(base, tok, forget, retain, **settings):
    anat = anatomy(base)
    pairs = make_pairs(anat, tok, forget, seed=0), make_pairs(anat, tok, retain, seed=1)
    return LossInputs(anat, *pairs, BaselineSettings(**settings), 0.1, 1.0, 0, None)


def shaken(model):
    generator = torch.Generator().manual_seed(9)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return other


@pytest.mark.parametrize(
    "name", [name for name, entry in BASELINES.items() if entry.kind == "gradient" and name != "RMU"]
)
def test_parts_against_plain_transformers(name, tiny_llama, tok_chat, forget, retain):
    """References are those of the model before, the rest of the model as it is now."""
    entry, base = BASELINES[name], copy.deepcopy(tiny_llama)
    inputs = stage_of(tiny_llama, tok_chat, forget[:2], retain[:2])
    inputs = replace(inputs, beta=entry.beta)
    parts = [make(inputs) for make in (entry.forget, entry.retain) if make is not None]
    now = shaken(base)
    tiny_llama.load_state_dict(now.state_dict())
    got = [mean_loss(inputs.anat, part, FP32) for part in parts]
    wanted = [value for value in straight(name, base, now, inputs.forget, inputs.retain) if value is not None]
    assert got == pytest.approx(wanted, rel=2e-3, abs=2e-4)


def test_rmu_against_plain_transformers(tiny_llama, tok_chat, forget, retain):
    base, layer = copy.deepcopy(tiny_llama), 2
    inputs = stage_of(tiny_llama, tok_chat, forget[:2], retain[:2], layer=layer, steering=3.0)
    parts = [BASELINES["RMU"].forget(inputs), BASELINES["RMU"].retain(inputs)]
    now = shaken(base)
    tiny_llama.load_state_dict(now.state_dict())
    direction = torch.rand(32, generator=torch.Generator().manual_seed(0))
    before = torch.cat([states(base, row, layer) for row in inputs.forget.answers])
    control = 3.0 * before.norm(dim=-1).mean() * direction / direction.norm()
    after = torch.cat([states(now, row, layer) for row in inputs.forget.answers])
    held = [states(now, row, layer) - states(base, row, layer) for row in inputs.retain.answers]
    wanted = [float((after - control).square().sum(-1).mean()), float(torch.cat(held).square().sum(-1).mean())]
    assert [mean_loss(inputs.anat, part, FP32) for part in parts] == pytest.approx(wanted, rel=1e-3)


def test_the_likeliest_of_a_reference(tiny_llama, tok_chat, forget):
    items = make_pairs(anatomy(tiny_llama), tok_chat, forget, seed=0).known
    few = Likeliest.of(anatomy(tiny_llama), items, k=5)
    tokens, logs = few.at([3, 0])
    for at, item in zip((0, items[3][0].extra), (3, 0), strict=True):
        wanted = logits(tiny_llama, items[item][0])[0].topk(5)
        n = items[item][0].extra
        torch.testing.assert_close(logs[at : at + n], wanted.values, rtol=1e-4, atol=1e-5)
    assert tokens.shape == logs.shape == (items[3][0].extra + items[0][0].extra, 5)
    counts = collect(anatomy(tiny_llama), items, lambda reading: (reading.items, reading.counts))
    assert counts == [((i,), (item[0].extra,)) for i, item in enumerate(items)]
