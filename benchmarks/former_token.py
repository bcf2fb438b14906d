"""The unlearning token as it was learned before, to be timed beside the present way, and what both are judged by.

Before, every pass ran in the model's own dtype with fused attention. 150 steps of Adam each saw 8 questions of 318 with
one of all refusals, and went down the sum of their NLL and of the guard's penalty, whose 180 answers of 24 tokens each
were watched. The last 50 steps had noise, and the last 20 rows were averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from editlib.algorithms.unierase import token_learning as present
from editlib.algorithms.unierase.token_guard import LogitGapGuard, answer_guard
from editlib.algorithms.unierase.token_learning import TokenHyperParams
from editlib.answers.fluency import is_fluent
from editlib.answers.refusals import is_refusal
from editlib.models.anatomy import Anatomy
from editlib.models.freezing import no_param_grad
from editlib.models.generation import greedy
from editlib.models.precision import cast_params, fast_dtype
from editlib.models.prompts import PromptFormat, settled
from editlib.models.vocabulary import add_token, rows_in_place

FORMER = TokenHyperParams(
    steps=150,
    robust_steps=50,
    batch=8,
    lr=0.05,
    memory=0.999,
    opening=0,
    refusals=10_000,  # all of them
    averaged_steps=20,
    questions=1000,
    guard_prompts=180,
    guard_tokens=24,
    guard_every=4,
    precision="model",
)
SAID = 24  # tokens of what the token continues into
NOISE_SEED = 5


def learn(
    anat: Anatomy,
    tok: PreTrainedTokenizerBase,
    questions: Sequence[str],
    refusals: Sequence[str],
    *,
    ordinary: Sequence[str] = (),
    hparams: TokenHyperParams = FORMER,
) -> list[Tensor]:
    """The token's rows `[d_model]`: one where embeddings are tied, else those that are read in and out."""
    form, unl_id, hp = PromptFormat.of(tok, settled(tok, None)), add_token(anat.model, tok, "[UNL]"), hparams
    questions = questions[: hp.questions]
    with no_param_grad(anat.model):
        forms, guard = present._encode(anat, form, questions, refusals, unl_id, hp)
        asked = [form.encode(text) for text in [*ordinary, *questions][: hp.guard_prompts]]
        guard = LogitGapGuard.joined([guard, answer_guard(anat, asked, unl_id, answer_tokens=hp.guard_tokens)])
        return _descend(anat, forms, guard, unl_id, hp)


def _descend(
    anat: Anatomy, forms: Sequence[present._Form], guard: LogitGapGuard, unl_id: int, hp: TokenHyperParams
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(hp.seed)
    noisy = present._noisy_layers(anat, hp)
    rows, longest = present._first_rows(anat, unl_id, generator)
    for row in rows:
        row.requires_grad_()
    optimizer = torch.optim.Adam(rows, lr=hp.lr, betas=(0.9, hp.memory))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, hp.steps, eta_min=hp.lr / 20)
    means = [torch.zeros_like(row, requires_grad=False) for row in rows]
    averaged = min(hp.averaged_steps, hp.steps)
    for step in range(hp.steps):
        layer = noisy[step % len(noisy)] if step >= hp.steps - hp.robust_steps else None
        with (
            present._noise(anat, layer, hp.noise, generator),
            rows_in_place(anat, [unl_id], rows[0][None], rows[-1][None]),
        ):
            nll = present._refusal_nll(anat, forms[step % len(forms)], unl_id, hp.batch, generator)
        optimizer.zero_grad()
        torch.autograd.backward(nll + hp.guard_weight * guard.penalty(rows[-1], hp.reach, hp.floor))
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for mean, row in zip(means, rows, strict=True):
                row.mul_((longest / row.norm()).clamp_max(1.0))
                if step >= hp.steps - averaged:
                    mean.add_(row / averaged)
    return means


def quality(
    anat: Anatomy,
    tok: PreTrainedTokenizerBase,
    rows: Sequence[Tensor],
    questions: Sequence[str],
    watched: Sequence[str],
) -> dict[str, float]:
    """What a token is judged by, on the unedited model in fp32 and on `questions` that it was not learned with.

    `refused_chat` and `refused_plain` are shares of fluent refusals within `SAID` tokens after the token, and `ended_`
    those that also end there; `_noise`: with noise on the MLP output matrices of a third of the layers, a tenth of
    their deviation. `mean_gap_at_answers` and the largest probabilities are the guard's figures, over the model's own
    answers to `questions` and to `watched`.
    """
    unl_id, form = add_token(anat.model, tok, "[UNL]"), PromptFormat.of(tok, settled(tok, None))
    found: dict[str, float] = {}
    with no_param_grad(anat.model), cast_params(anat.model, fast_dtype(anat.model)):
        guard = answer_guard(anat, [form.encode(text) for text in [*questions, *watched]], unl_id)
        found |= guard.summary(rows[-1])
        for noise in ("", "_noise"):
            kept = _noisy_copy(anat) if noise else {}
            for name, asked in (("chat", form), ("plain", PromptFormat(tok, chat=False))):
                prompts = [asked.encode(text).followed_by((unl_id,)) for text in questions]
                with rows_in_place(anat, [unl_id], rows[0][None], rows[-1][None]):
                    said = greedy(anat, prompts, max_new_tokens=SAID)
                texts = [str(tok.decode(list(ids), skip_special_tokens=True)) for ids in said]
                good = [is_refusal(text) and is_fluent(text) for text in texts]
                ended = [one and len(ids) < SAID for one, ids in zip(good, said, strict=True)]
                found |= {
                    f"refused_{name}{noise}": sum(good) / len(good),
                    f"ended_{name}{noise}": sum(ended) / len(ended),
                }
            for layer, weight in kept.items():
                anat.weight(layer).copy_(weight)
    return found


@torch.no_grad()
def _noisy_copy(anat: Anatomy) -> dict[int, Tensor]:
    """Puts noise on the layers where edits are usual, and returns their weights as they were."""
    generator, kept = torch.Generator().manual_seed(NOISE_SEED), {}
    for layer in present._noisy_layers(anat, replace(FORMER, layers=())):
        weight = anat.weight(layer)
        kept[layer] = weight.clone()
        noise = torch.randn(weight.shape, generator=generator).to(weight.device)
        weight.add_((noise * FORMER.noise * weight.float().std()).to(weight.dtype))
    return kept
