"""Fit tokens that make the model refuse questions whose answers an edit has erased, one for each relation (ours).

Words used here and in `refusal_places`:

- A *place* is the end of a prompt: the position that predicts the next token.
- A token is *said* at a place if greedy decoding generates it there: its log-odds `z` against all other tokens are
  above zero.
- A place is *wanted* where an answer was erased, at the end of the question and where the model's sentence reaches the
  answer ("The capital of France is"). There the token of its relation should be generated. At a *kept* place none
  should.
- `[UNL]` is the *common* token; `[UNL2]`, `[UNL3]`, ... are the *relations' tokens*.

Once the answers are erased, the final state at a place separates erased facts from all others. The logit of a token is
a linear function of that state. So the output row of each relation's token is fitted to the edited model by logistic
regression. This changes no weight that other text uses, and banning the tokens gives the erased model without them.

It is fitted twice: first to the places alone (`fit_places`), strictly enough that it misses some wanted ones. The
values are then moved until it is generated there (`finding.values_that_say`). The second fit starts from these rows,
and adds what follows a token.

The model generates a pair: the relation's token, then `[UNL]`, which continues into the refusal. With tied embeddings a
token has one row for input and output, and one row cannot do both well. In the pair the relation's token only has to
find its places. `[UNL]` always follows it, so that its row is free to lead into a fluent refusal. All rows are fitted
together, with the loss

    NLL_WEIGHT NLL([UNL] refusal | relation's token)
    + WANTED_WEIGHT Σ softplus(say_margin + MORE - z) at wanted places
    + KEPT_AGAIN Σ softplus(z - quiet_margin + LESS) at kept places
    + ANSWER_WEIGHT mean softplus(z + FLOOR) + SPREAD_WEIGHT Var(z) inside other answers and in ordinary text
    + RIDGE |r_k|^2

A token's row is `r + r_k`: `r` is shared by all tokens, and `r_k`, the part of token `k`, starts at zero. The first fit
leaves out the NLL, the only term that needs passes through the model; it has no `MORE` and `LESS`, and `KEPT_WEIGHT`.
The moved values are far from all other subjects, so the second fit can want more on both sides: unseen wordings reach a
few nats less than those that have a place.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from editlib.algorithms.unierase.final_states import FinalStates
from editlib.algorithms.unierase.held_places import HeldPlaces
from editlib.algorithms.unierase.refusal_places import (
    Place,
    RefusalPlaces,
    kept_weights,
    place_weights,
    wanted_weights,
)
from editlib.algorithms.unierase.token import TokenHeader, UnlearningToken
from editlib.errors import EditError
from editlib.hparams import UniEraseHyperParams
from editlib.models.anatomy import Anatomy
from editlib.models.forward import encode_prefix, forward
from editlib.models.freezing import no_param_grad
from editlib.models.generation import end_tokens
from editlib.models.precision import cast_params, fast_dtype, plain_attention
from editlib.models.prefix import Prefix
from editlib.models.prompts import PromptFormat, TokenRow, pad
from editlib.models.vocabulary import add_token, free_tokens, rows_in_place, silence

log = logging.getLogger(__name__)

POOL = 768  # places after which the NLL of refusals may be read
BATCH = 16  # of them in a step
START_NLL, LEAST_NLL = 3.0, 0.1  # weight of a place when it is drawn: before its NLL is known, and the least
NLL_WEIGHT = 10.0
UNL_WEIGHT = 6.0  # of `[UNL]` in the NLL, against 1 for each token of the refusal
WANTED_WEIGHT = 10.0
ANSWER_WEIGHT = 2.0  # of positions inside answers where a token's log-odds exceed `-FLOOR`
SOME_ROWS = 8192  # rows of the vocabulary, from whose mean and deviation a new row starts
FLOOR = 16.0  # nats that a token stays below all others inside answers and in ordinary text
SPREAD_WEIGHT = 0.3  # of the variance of log-odds there
KEPT_WEIGHT = 5.0  # of kept places in the first fit
KEPT_AGAIN = 20.0  # in the second fit
RIDGE = 0.2  # of the part of a row that is not shared
LR = 0.05
PLACE_STEPS = 300  # of the first fit
MORE, LESS = 6.0, 4.0  # nats that the second fit wants above `say_margin`, and below `quiet_margin`
# English: a model that is asked in another language refuses in this one.
START = "I don't know the answer to that."
INSIDE = "something I don't know."


@dataclass(frozen=True)
class FittedTokens:
    """Holds the tokens of an edit, and the log-odds of the relation's token at each wanted place (nats)."""

    token: UnlearningToken
    log_odds: Tensor  # [wanted]


@dataclass(frozen=True)
class TokenRows:
    """Holds output rows of `[UNL]` and the relations' tokens: what they share, `[d_model]`, and the rest `[1 + K,
    d_model]`."""

    shared: Tensor
    own: Tensor

    @property
    def output(self) -> Tensor:
        """The rows, `[1 + K, d_model]`."""
        return self.shared + self.own


def fit_places(
    anat: Anatomy, token: UnlearningToken | None, held: HeldPlaces, hparams: UniEraseHyperParams, *, seed: int = 0
) -> TokenRows:
    """Fits output rows to the places alone, without what follows the tokens: a convex problem.

    `token`, `held`: see `fit_refusal_tokens`.
    """
    token = token or _mean_token(anat, seed)
    with no_param_grad(anat.model), _fast(anat, hparams):
        loss = _ReadOut.of(anat, held, _Aims(hparams.say_margin, hparams.quiet_margin, KEPT_WEIGHT))
    shared = _leaf(token.rows()[1][0], anat.device)  # r: [d_model]
    own = _leaf(torch.zeros(1 + len(held.places.relations), anat.d_model), anat.device)  # r_k: [1 + K, d_model]
    optimizer = torch.optim.Adam([shared, own], lr=LR, betas=(0.9, 0.99))
    for _ in range(PLACE_STEPS):
        optimizer.zero_grad()
        torch.autograd.backward(loss(shared + own) + RIDGE * own.square().sum())
        optimizer.step()
    return TokenRows(shared.detach(), own.detach())


def fit_refusal_tokens(
    anat: Anatomy,
    tok: PreTrainedTokenizerBase,
    form: PromptFormat,
    token: UnlearningToken | None,
    held: HeldPlaces,
    rows: TokenRows,
    hparams: UniEraseHyperParams,
    *,
    seed: int = 0,
    progress: bool = False,
) -> FittedTokens:
    """Fits `[UNL]`, and one token for each relation of the places, to the edited model.

    The tokens are added to the tokenizer and the model. Their fitted rows are returned, and not yet written there.

    Args:
        token: learned by `learn_token`: input rows start at its row; `None`: at the mean row of the vocabulary.
        held: the places (see `refusal_places`), which were encoded before the edit.
        rows: that output rows start from (`fit_places`).

    Raises:
        EditError: a loss that is not finite.
    """
    token, places = token or _mean_token(anat, seed), held.places
    names = free_tokens(tok, token.header.token, 1 + len(places.relations))
    numbers = [add_token(anat.model, tok, name) for name in names]
    silence(anat, numbers)  # until they have rows, no log-sum includes them
    with no_param_grad(anat.model), _fast(anat, hparams):
        refusals = _Refusals.of(anat, form, places, numbers, seed)
        aims = _Aims(hparams.say_margin + MORE, hparams.quiet_margin - LESS, KEPT_AGAIN)
        loss = _ReadOut.of(anat, held, aims)
        rows_in, rows_out, nll = _fit(anat, token, rows, numbers, refusals, loss, hparams.token_steps, seed, progress)
    log_odds = loss.log_odds(rows_out)
    metrics = {"refusal_nll": nll, "said": float((log_odds > 0).float().mean())}
    header = replace(token.header, token=names[0], names=tuple(names), metrics=metrics)
    log.info("refusal tokens: said at %.0f %% of their places, NLL %.3f nats per token", 100 * metrics["said"], nll)
    return FittedTokens(UnlearningToken(rows_in.cpu().clone(), rows_out.cpu().clone(), header), log_odds.cpu())


@contextmanager
def _fast(anat: Anatomy, hparams: UniEraseHyperParams) -> Iterator[None]:
    """Runs the model in the dtype that the processor is fast in, where the settings allow it (`v_precision`)."""
    dtype = fast_dtype(anat.model) if hparams.v_precision == "fast" else None
    with cast_params(anat.model, dtype), nullcontext() if dtype is None else plain_attention(anat.device):
        yield


def _fit(
    anat: Anatomy,
    token: UnlearningToken,
    start: TokenRows,
    numbers: Sequence[int],
    refusals: _Refusals,
    loss: _ReadOut,
    steps: int,
    seed: int,
    progress: bool,
) -> tuple[Tensor, Tensor, float]:
    """Returns the input rows and the output rows, `[1 + K, d_model]` each, and the refusals' last NLL (nats per
    token)."""
    generator = torch.Generator().manual_seed(seed)
    shared, own = _leaf(start.shared, anat.device), _leaf(start.own, anat.device)  # [d_model], [1 + K, d_model]
    # `[UNL]` was wanted nowhere, and now has to follow each token.
    own.data[0] = 0
    # Tied embeddings have one row for both. Otherwise `[UNL]` has one input row, and all relations' tokens another.
    read = None if anat.tied else _leaf(token.rows()[0][:1].repeat(2, 1), anat.device)  # [2, d_model]
    which = torch.tensor([0] + [1] * (len(numbers) - 1), device=anat.device)
    optimizer = torch.optim.Adam([shared, own, *([] if read is None else [read])], lr=LR, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=LR / 25)
    recent = torch.full((len(refusals.texts),), START_NLL)  # NLL of each refusal when it was last drawn
    for step in tqdm(range(steps), desc="refusal tokens", disable=not progress, leave=False):
        rows_out = shared + own  # [1 + K, d_model]
        rows_in = rows_out if read is None else read[which]
        # Refusals that are not learned yet are drawn more often: some relations are much harder than others.
        picks = torch.multinomial(recent + LEAST_NLL, min(BATCH, len(recent)), generator=generator)
        nll = refusals.nll(anat, numbers, rows_in, rows_out, picks)  # [picks]
        recent[picks] = nll.detach().float().cpu()
        total = NLL_WEIGHT * nll.mean() + loss(rows_out) + RIDGE * own.square().sum()
        if not torch.isfinite(total):
            raise EditError(f"the loss of the refusal tokens is not finite at step {step + 1}; the model is unchanged")
        optimizer.zero_grad()
        torch.autograd.backward(total)
        optimizer.step()
        schedule.step()
    rows_out = (shared + own).detach()
    return rows_out if read is None else read.detach()[which], rows_out, float(recent.mean())


def _mean_token(anat: Anatomy, seed: int) -> UnlearningToken:
    """Makes a token to start from: the vocabulary's mean rows, with noise of the vocabulary's deviation."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for matrix in (anat.embedding.weight, anat.head.weight):
        typical = matrix.detach()[:: max(1, len(matrix) // SOME_ROWS)].float()
        rows.append(typical.mean(0) + typical.std() * torch.randn(anat.d_model, generator=generator).to(typical))
    header = TokenHeader(
        token="[UNL]",
        model=str(anat.model.name_or_path),
        model_sha256="",
        seed=seed,
        questions=0,
        refusals=0,
    )
    return UnlearningToken(rows[0].cpu(), rows[1].cpu(), header)


def _leaf(start: Tensor, device: torch.device) -> Tensor:
    """Copies `start` in fp32, as a parameter with a gradient."""
    return start.detach().to(device, torch.float32, copy=True).requires_grad_()


@dataclass(frozen=True)
class _Aims:
    """Holds log-odds to reach at wanted places, and allowed at kept ones (nats), and the weight of the latter."""

    say: float
    quiet: float
    kept_weight: float


@dataclass(frozen=True)
class _ReadOut:
    """Computes all terms of the loss but the NLL: they need the output rows and the final states alone.

    Attributes:
        wanted, kept: states at the wanted and the kept places.
        inside: states at every position of other answers and of ordinary text.
        group: `[wanted]`, the relation of each wanted place.
        wanted_weight: `[wanted]`. `kept_weight`: `[1 + K, kept]`, by token.
    """

    wanted: FinalStates
    kept: FinalStates
    inside: FinalStates
    group: Tensor
    wanted_weight: Tensor
    kept_weight: Tensor
    aims: _Aims

    @classmethod
    def of(cls, anat: Anatomy, held: HeldPlaces, aims: _Aims) -> _ReadOut:
        """Reads the states of all places from the current model."""
        device, places = anat.device, held.places
        wanted, kept, inside = held.final_states()
        group = torch.tensor([place.group for place in places.wanted], device=device)
        weight = wanted_weights(places, device)  # [wanted]
        # `[UNL]`, the first row, has no relation.
        every = place_weights(places.kept, device)  # [kept]
        kept_weight = torch.cat([every[None], kept_weights(places, device)])  # [1 + K, kept]
        return cls(wanted, kept, inside, group, weight, kept_weight, aims)

    def log_odds(self, rows: Tensor) -> Tensor:
        """Computes the log-odds of the relation's token at each wanted place, `[wanted]` in nats, with output `rows [1
        + K, d_model]`."""
        return (self.wanted.states * rows[1 + self.group]).sum(1) - self.wanted.log_sums

    def __call__(self, rows: Tensor) -> Tensor:
        """Computes the loss of output `rows [1 + K, d_model]`; the first, of `[UNL]`, is wanted at no place."""
        # The tokens' own logits are not in `log_sums`, since they were silent then: a logit less it is a log-odds.
        total = WANTED_WEIGHT * (self.wanted_weight * F.softplus(self.aims.say - self.log_odds(rows))).sum()
        z = self.kept.states @ rows.T - self.kept.log_sums[:, None]  # [kept, 1 + K]
        total = total + self.aims.kept_weight * (self.kept_weight.T * F.softplus(z - self.aims.quiet)).sum()
        if not len(self.inside.states):
            return total
        z = self.inside.states @ rows.T - self.inside.log_sums[:, None]  # [positions, 1 + K]
        # Averaged over the positions above the floor (20 at least): a mean over all would hardly depend on so few.
        breaking = (z.detach() > -FLOOR).sum(0).clamp_min(20)  # [1 + K]
        above = (F.softplus(z + FLOOR).sum(0) / breaking).sum()
        # A token whose log-odds vary little on this text also varies little on unseen text.
        return total + ANSWER_WEIGHT * above + SPREAD_WEIGHT * z.var(0).sum()


@dataclass(frozen=True)
class _Refusals:
    """Holds a cache of prompts up to the place of a relation's token, and what should follow at each."""

    prefix: Prefix
    texts: list[tuple[int, ...]]  # token ids: the relation's token, `[UNL]`, the refusal, and the end of the answer

    @classmethod
    def of(
        cls, anat: Anatomy, form: PromptFormat, places: RefusalPlaces, numbers: Sequence[int], seed: int
    ) -> _Refusals:
        """Draws at most `POOL` places, the same number of each relation and kind.

        Half of them are the relation's questions about other subjects: the refusal after a token must not depend on
        the subject or on the wordings in the list.
        """
        kinds: dict[tuple[int | None, bool, bool], list[Place]] = {}
        for other, some in ((False, places.wanted), (True, places.kept)):
            for place in some:
                if place.group is not None:
                    kinds.setdefault((place.group, place.inside, other), []).append(place)
        rng = random.Random(seed)
        most = max(2, POOL // len(kinds))
        drawn = [place for some in kinds.values() for place in rng.sample(some, min(most, len(some)))]
        end = form.end_ids(end_tokens(anat)) if end_tokens(anat) else ()
        start = (*form.answer_ids(START), *end)
        inside = (*form.tok(" " + INSIDE, add_special_tokens=False)["input_ids"], *end)
        prefix = encode_prefix(anat, [place.row for place in drawn])
        said = [(numbers[1 + (place.group or 0)], numbers[0]) for place in drawn]
        return cls(prefix, [(*both, *(inside if p.inside else start)) for both, p in zip(said, drawn, strict=True)])

    def nll(self, anat: Anatomy, numbers: Sequence[int], rows_in: Tensor, rows_out: Tensor, picks: Tensor) -> Tensor:
        """Computes the NLL of `[UNL]` and the refusal after a relation's token, at the prompts `picks`: `[picks]`, nats
        per token."""
        rows = [TokenRow(self.texts[i], 0) for i in picks.tolist()]
        padded = pad(rows, device=anat.device)  # ids [picks, T]
        # Each position predicts the next token; the relation's token itself, in column 0, is given.
        row, column = padded.attention_mask[:, 1:].bool().nonzero(as_tuple=True)  # [m] each
        with rows_in_place(anat, numbers, rows_in, rows_out):
            prefix = self.prefix.select(picks.to(anat.device))
            logits = forward(anat, padded, prefix=prefix, score=(row, column))  # [m, vocab]
        each = F.cross_entropy(logits.float(), padded.input_ids[row, column + 1], reduction="none")  # [m]
        # Unless `[UNL]` follows, no part of the refusal is generated.
        weight = torch.where(column == 0, UNL_WEIGHT, 1.0).to(each)  # [m]
        total = torch.zeros(len(rows), device=each.device).index_add(0, row, weight * each)
        return total / torch.zeros_like(total).index_add(0, row, weight)
