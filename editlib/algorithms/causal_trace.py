"""Trace up to which layer the subject's state decides the answer (causal tracing, 2202.05262, sec. 2).

Where the paper adds noise to the subject, another subject's state replaces its state here. If the state of "France" in
the place of that of "Japan" turns the answer from Tokyo to Paris, later layers have still to read the answer from it.
Edits of a subject's keys must lie below the layer where that ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from editlib.models.anatomy import Anatomy
from editlib.models.forward import forward
from editlib.models.freezing import no_param_grad
from editlib.models.prompts import PromptFormat, TokenRow, pad
from editlib.requests.request import EditRequest

STATEMENTS = {
    "capital": "The capital of {} is",
    "symbol": "The chemical symbol for {} is",
    "language": "The official language of {} is",
    "currency": "The currency of {} is the",
}
"""Frames whose next token is the answer itself, for the relations of the bundled facts."""

ASKED = 24  # most facts of each relation that the model is asked
LEAST = 6  # fewest pairs of known facts for a result


@dataclass(frozen=True)
class CausalTrace:
    """Holds the effect of replacing the subject's state, by layer.

    `effects [n_layers]` are mean probabilities of the answer that belongs to the state put in after each layer, over
    `pairs` pairs of facts.
    """

    effects: tuple[float, ...]
    pairs: int

    @property
    def read_at(self) -> int:
        """The last layer after which replacing the state has at least half of its largest effect; above it the answer
        is read."""
        most = max(self.effects)
        return max(layer for layer, effect in enumerate(self.effects) if effect >= most / 2)


@dataclass(frozen=True)
class _Known:
    """Holds a fact that the model completes rightly: its row, with the subject's last token as lookup, and the answer's
    first token."""

    row: TokenRow
    token: int


def causal_trace(
    anat: Anatomy, tok: PreTrainedTokenizerBase, facts: Sequence[EditRequest], *, pairs: int = 24
) -> CausalTrace | None:
    """Traces facts that the model knows; `None` where it knows too few of them.

    Args:
        facts: those with a relation in `STATEMENTS` are used, in order, at most `ASKED` of each relation.
        pairs: the most pairs to trace.
    """
    traced: list[tuple[_Known, _Known]] = []  # neighbours in order, with different answers
    with no_param_grad(anat.model), torch.no_grad():
        for relation, frame in STATEMENTS.items():
            asked = [fact for fact in facts if fact.relation == relation and fact.subject and fact.answer][:ASKED]
            known = _known(anat, tok, frame, asked)
            traced += [(source, target) for source, target in pairwise(known) if source.token != target.token]
        traced = traced[:: max(len(traced) // pairs, 1)][:pairs]
        if len(traced) < LEAST:
            return None
        return CausalTrace(_effects(anat, *zip(*traced, strict=True)), len(traced))


def _known(anat: Anatomy, tok: PreTrainedTokenizerBase, frame: str, facts: Sequence[EditRequest]) -> list[_Known]:
    """Keeps those of `facts` whose answer begins with the token that the model finds most likely after `frame`."""
    if not facts:
        return []
    form = PromptFormat(tok, chat=False)
    rows = [form.encode(frame.format(fact.subject), fact.subject) for fact in facts]
    batch = pad(rows, device=anat.device)
    likely = forward(anat, batch, score=(torch.arange(len(rows), device=anat.device), batch.last)).argmax(dim=-1)
    texts = [str(tok.decode([token])).strip().lower() for token in likely.tolist()]
    return [
        _Known(row, token)
        for row, token, text, fact in zip(rows, likely.tolist(), texts, facts, strict=True)
        if text and any(answer.lower().startswith(text) for answer in (fact.answer or "", *fact.aliases))
    ]


def _effects(anat: Anatomy, sources: Sequence[_Known], targets: Sequence[_Known]) -> tuple[float, ...]:
    """Returns, by layer, the mean probability of the sources' answers when their states replace the targets'."""
    each = torch.arange(len(sources), device=anat.device)
    read, changed = (pad([fact.row for fact in facts], device=anat.device) for facts in (sources, targets))
    wanted = torch.tensor([fact.token for fact in sources])
    there: Tensor | None = None  # states of the sources, [n, T, d_model]
    here: Tensor | None = None  # states of the targets
    effects = []
    for layer in range(anat.n_layers):
        there = forward(anat, read, start=layer, stop=layer + 1, hidden=there)
        here = forward(anat, changed, start=layer, stop=layer + 1, hidden=here)
        patched = here.clone()
        # Only the state at the subject's last token is replaced; what lower layers have read from it stays.
        patched[each, changed.lookup] = there[each, read.lookup]
        if layer + 1 < anat.n_layers:
            logits = forward(anat, changed, start=layer + 1, hidden=patched, score=(each, changed.last))
            chances = logits.float().softmax(dim=-1).cpu()
            effects.append(float(chances[torch.arange(len(wanted)), wanted].mean()))
        else:
            effects.append(0.0)  # after the last layer nothing moves between tokens any more
    return tuple(effects)
