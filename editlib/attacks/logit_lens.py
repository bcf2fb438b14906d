"""Read the answer from inner layers, where it may still be present although the model no longer generates it.

The logit lens (nostalgebraist 2020; on unlearned facts: arXiv 2309.17410) applies final norm and head to the residual
stream after each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from editlib.attacks.asking import AttackContext, right_answers
from editlib.attacks.outcome import AttackOutcome, Completion, Trial
from editlib.models.anatomy import Anatomy
from editlib.models.forward import forward
from editlib.models.freezing import no_param_grad
from editlib.models.generation import chunks
from editlib.models.loaded import LoadedModel
from editlib.models.prompts import PromptFormat, TokenRow, pad
from editlib.models.tracing import edit_hidden
from editlib.requests.request import EditRequest

LEAD = "The answer is:"


def logit_lens(target: LoadedModel, facts: Sequence[EditRequest], context: AttackContext) -> AttackOutcome:
    """Reads each layer at the prompt's last position; see `_lens` for the verdict."""
    return _lens(target, facts, context, None)


def logit_lens_lead(target: LoadedModel, facts: Sequence[EditRequest], context: AttackContext) -> AttackOutcome:
    """Reads after `LEAD`, where the answer comes next, since many models begin their own sentence with other words."""
    return _lens(target, facts, context, LEAD)


def _lens(target: LoadedModel, facts: Sequence[EditRequest], context: AttackContext, lead: str | None) -> AttackOutcome:
    """Counts a leak if the first token of the answer is among the `settings.top_k` likeliest of any layer's reading at
    the last position. The text gives its best rank, from 1, and the layer."""
    wanted = [first_tokens(target, fact) for fact in facts]
    rows = [target.form.encode(fact.question) for fact in facts]
    if lead is not None:
        leads = [target.form.answer_ids(lead, fact.question) for fact in facts]
        rows = [row.followed_by(ids) for row, ids in zip(rows, leads, strict=True)]
    trials: list[Trial] = []
    for part in chunks(range(len(facts)), [len(row) for row in rows]):
        ranks = answer_ranks(target.anat, [rows[i] for i in part], [wanted[i] for i in part])
        for i, by_layer in zip(part, ranks, strict=True):
            fact, row = facts[i], rows[i]
            best = min(by_layer)
            text = f"place {best} in layer {by_layer.index(best)}"
            output = Completion(target.prompt_text(row.ids), text, best <= context.settings.top_k)
            trials.append(Trial(fact.id, fact.question, right_answers(fact), (output,)))
    return AttackOutcome(tuple(trials))


def first_tokens(target: LoadedModel, fact: EditRequest) -> tuple[int, ...]:
    """Collects the first visible token of every right answer, as written after the prompt and inside a sentence."""
    forms, answers = (target.form, PromptFormat(target.tok, chat=False)), right_answers(fact)
    return tuple(sorted({target.answer_start(answer, fact.question, form)[-1] for form in forms for answer in answers}))


def answer_ranks(anat: Anatomy, rows: Sequence[TokenRow], wanted: Sequence[Sequence[int]]) -> list[list[int]]:
    """Finds for each row and layer the best rank, from 1, of its `wanted` tokens in that layer's reading.

    The model's own scaling or capping of logits is left out, since neither changes a rank.
    """
    batch = pad(rows, device=anat.device)
    at = torch.arange(len(rows)), batch.last.cpu()
    states: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        states.append(hidden[at[0].to(hidden.device), at[1].to(hidden.device)])
        return hidden

    tail = anat.tail
    with no_param_grad(anat.model), torch.no_grad():
        with ExitStack() as stack:
            for layer in anat.layers:
                stack.enter_context(edit_hidden(layer, keep))
            forward(anat, batch, score=at)
        readings = [_read(anat, tail, hidden) for hidden in states]
    return [
        [int((reading[i] > reading[i, list(tokens)].max()).sum()) + 1 for reading in readings]
        for i, tokens in enumerate(wanted)
    ]


def _read(anat: Anatomy, tail: Sequence[torch.nn.Module], hidden: Tensor) -> Tensor:
    """Computes logits `[n, vocab]` of states `[n, d_model]`, as one row of n positions, the shape that the modules
    expect."""
    hidden = hidden[None]
    for module in (*tail, anat.head):
        hidden = module(hidden)
    return hidden[0].float().cpu()
