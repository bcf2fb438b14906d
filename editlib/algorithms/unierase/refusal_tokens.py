"""Tokens that refuse what an edit has erased, one for each relation (ours).

Once the answers are erased, the final state at the place of an answer tells an erased fact from every other. The logit
of a token is a linear read-out of that state. So the output row of a new token is fitted to the edited model: the token
wins where an answer was erased, at the end of the question and where the model's own sentence reaches the answer ("The
capital of France is"), and loses everywhere else. Nothing that other text runs through is changed for it, and banning
it leaves the model that was erased.

What is said is a pair: the relation's own token (`[UNL2]`, `[UNL3]`, ...), and after it `[UNL]`, which all relations
share and which continues into the refusal. With tied embeddings a token's one row is both read out and read in. The
pair parts the two: an own token's row only has to find its places. `[UNL]` follows such a token wherever it was said,
so that its row is free to lead into a fluent refusal. All are fitted at once, with `z` a token's log-odds:

    NLL_WEIGHT NLL([UNL] refusal | own token) + WANTED_WEIGHT Σ softplus(say_margin - z) where it is wanted
    + Σ softplus(z - quiet_margin) at other questions + RIDGE |own part|^2
    + ANSWER_WEIGHT mean softplus(z + FLOOR) + SPREAD_WEIGHT Var(z) in the answers that are kept and in ordinary text

A row is a part that all tokens share and an own part, which starts at zero. The places are learned first, for
`PLACE_STEPS` steps that run no model.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from editlib.algorithms.unierase.refusal_places import Place, RefusalPlaces
from editlib.algorithms.unierase.token import TokenHeader, UnlearningToken
from editlib.errors import EditError
from editlib.hparams import UniEraseHyperParams
from editlib.models.anatomy import Anatomy
from editlib.models.forward import encode_prefix, forward, shared_prefix
from editlib.models.freezing import no_param_grad
from editlib.models.generation import end_tokens, greedy, sample
from editlib.models.precision import cast_params, fast_dtype, plain_attention
from editlib.models.prefix import Prefix
from editlib.models.prompts import PromptFormat, TokenRow, pad
from editlib.models.vocabulary import add_token, free_tokens, rows_in_place, silence

log = logging.getLogger(__name__)

BATCH_ROWS = 64
BATCH_LOGITS = 2**25  # numbers in the logits of a batch
POOL = 384  # places that the NLL of the refusals is drawn from
BATCH = 16  # of them a step
START_NLL, LEAST_NLL = 3.0, 0.1  # by which they are drawn: before they have been, and at least
NLL_WEIGHT = 10.0
UNL_WEIGHT = 6.0  # of `[UNL]` in the NLL, beside 1 for each token of the refusal
WANTED_WEIGHT = 10.0
ANSWER_WEIGHT = 2.0  # of positions inside answers that come nearer than `FLOOR`
TEXTS, TEXT_TOKENS, TEXT_TOP_K = 64, 40, 50  # of ordinary text that the model writes
BEGINNINGS = 400  # single tokens, as texts may begin with
SOME_ROWS = 8192  # of the vocabulary, whose mean and spread a new row starts with
FLOOR = 10.0  # nats that a token stays below all others there
SPREAD_WEIGHT = 0.1  # of the variance of log-odds there
RIDGE = 0.02  # of a row's own part
LR = 0.05
PLACE_STEPS = 100  # without the NLL, which costs nearly all of a step
# English: a model that is asked in another language refuses in this one.
START = "I don't know the answer to that."
INSIDE = "something I don't know."


@dataclass(frozen=True)
class FittedTokens:
    """Holds the tokens of an edit, and the log-odds of the wanted token at each of the places' `wanted`."""

    token: UnlearningToken
    log_odds: Tensor  # [wanted]


@dataclass(frozen=True)
class _States:
    """Holds what enters the head at `m` positions, `states [m, d_model]`, and the log-sums of all logits there,
    `[m]`."""

    states: Tensor
    log_sums: Tensor


def fit_refusal_tokens(
    anat: Anatomy,
    tok: PreTrainedTokenizerBase,
    form: PromptFormat,
    token: UnlearningToken | None,
    places: RefusalPlaces,
    hparams: UniEraseHyperParams,
    *,
    seed: int = 0,
    progress: bool = False,
) -> FittedTokens:
    """Fits `[UNL]`, and one token for each relation of `places`, to the model as it is now, after the edit.

    The tokens are added to the tokenizer and the model; their rows are in what is returned, and are not written.

    Args:
        token: learned by `learn_token`, whose rows are where all rows start; `None`: they start at the mean row of the
            vocabulary.

    Raises:
        EditError: a loss that is not finite.
    """
    token = token or _mean_token(anat, seed)
    names = free_tokens(tok, token.header.token, 1 + len(places.relations))
    numbers = [add_token(anat.model, tok, name) for name in names]
    silence(anat, numbers)  # until they have rows they take part in no log-sum
    dtype = fast_dtype(anat.model) if hparams.v_precision == "fast" else None
    attention = nullcontext() if dtype is None else plain_attention(anat.device)
    with no_param_grad(anat.model), cast_params(anat.model, dtype), attention:
        refusals = _Refusals.of(anat, form, places, numbers, seed)
        loss = _ReadOut.of(anat, places, hparams, seed)
        rows_in, rows_out, nll = _fit(anat, token, numbers, refusals, loss, hparams.token_steps, seed, progress)
    log_odds = loss.log_odds(rows_out)
    metrics = {"refusal_nll": nll, "said": float((log_odds > 0).float().mean())}
    header = replace(token.header, token=names[0], names=tuple(names), metrics=metrics)
    log.info("refusal tokens: said at %.0f %% of their places, NLL %.3f nats per token", 100 * metrics["said"], nll)
    return FittedTokens(UnlearningToken(rows_in.cpu().clone(), rows_out.cpu().clone(), header), log_odds.cpu())


def _fit(
    anat: Anatomy,
    token: UnlearningToken,
    numbers: Sequence[int],
    refusals: _Refusals,
    loss: _ReadOut,
    steps: int,
    seed: int,
    progress: bool,
) -> tuple[Tensor, Tensor, float]:
    """Returns the rows `[1 + K, d_model]` that are read in and out, and the refusals' NLL at the end (nats per
    token)."""
    generator = torch.Generator().manual_seed(seed)
    shared = _leaf(token.rows()[1][0], anat.device)  # [d_model]
    own = _leaf(torch.zeros(len(numbers), anat.d_model), anat.device)  # [1 + K, d_model]
    # Tied embeddings have one row for both; otherwise `[UNL]` is read by a row of its own, and all others by another.
    read = None if anat.tied else _leaf(token.rows()[0][:1].repeat(2, 1), anat.device)  # [2, d_model]
    which = torch.tensor([0] + [1] * (len(numbers) - 1), device=anat.device)
    optimizer = torch.optim.Adam([shared, own, *([] if read is None else [read])], lr=LR, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=LR / 25)
    recent = torch.full((len(refusals.texts),), START_NLL)  # NLL of each refusal when it was last drawn
    for _ in range(PLACE_STEPS):
        optimizer.zero_grad()
        torch.autograd.backward(loss(shared + own) + RIDGE * own.square().sum())
        optimizer.step()
    for step in tqdm(range(steps), desc="refusal tokens", disable=not progress, leave=False):
        rows_out = shared + own  # [1 + K, d_model]
        rows_in = rows_out if read is None else read[which]
        # Refusals that are not yet learned are drawn more often: relations differ much in how hard theirs are.
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
    """Makes a token with the vocabulary's mean rows and some noise, as a start."""
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
    """Makes a copy of `start` in fp32 that is learned."""
    return start.detach().to(device, torch.float32, copy=True).requires_grad_()


@dataclass(frozen=True)
class _ReadOut:
    """Computes the part of the loss that concerns output rows: one product with all states a step.

    Attributes:
        wanted, kept, inside: states of the places' `wanted` and `kept`, and of every position in their `answers` and in
            ordinary text.
        group: relation of each wanted place.
        wanted_weight, kept_weight: `[wanted]`, and `[1 + K, kept]` by token.
        say, quiet: log-odds that are wanted, and that are allowed elsewhere.
    """

    wanted: _States
    kept: _States
    inside: _States
    group: Tensor
    wanted_weight: Tensor
    kept_weight: Tensor
    say: float
    quiet: float

    @classmethod
    def of(cls, anat: Anatomy, places: RefusalPlaces, hparams: UniEraseHyperParams, seed: int) -> _ReadOut:
        """Reads the states of all places from the model as it is."""
        device, groups = anat.device, range(len(places.relations))
        wanted = _read(anat, [place.row for place in places.wanted])
        kept = _read(anat, [place.row for place in places.kept])
        answered = list(zip(places.general, greedy(anat, places.general, max_new_tokens=TEXT_TOKENS), strict=True))
        texts = [*places.answers, *answered, *_ordinary_text(anat, seed)]
        inside = _read(anat, [row.followed_by(text) for row, text in texts], firsts=[len(row) - 1 for row, _ in texts])
        group = torch.tensor([place.group for place in places.wanted], device=device)
        weight = _shares(places.wanted, device)  # [wanted]
        # Every relation counts the same, however many questions ask for it.
        for k in groups:
            weight[group == k] /= weight[group == k].sum()
        # A token's own relation is a kind of its own: other subjects' questions are what comes nearest to its own.
        # `[UNL]`, the first row, has no relation.
        kept_weight = torch.stack([_shares(places.kept, device, own=k) for k in (None, *groups)])  # [1 + K, kept]
        return cls(wanted, kept, inside, group, weight, kept_weight, hparams.say_margin, hparams.quiet_margin)

    def log_odds(self, rows: Tensor) -> Tensor:
        """Computes the log-odds of the wanted token at each wanted place, `[wanted]`, with output rows `[1 + K,
        d_model]`."""
        return (self.wanted.states * rows[1 + self.group]).sum(1) - self.wanted.log_sums

    def __call__(self, rows: Tensor) -> Tensor:
        """Computes the loss of output rows `[1 + K, d_model]`, of which the first, of `[UNL]`, is wanted at no
        place."""
        total = WANTED_WEIGHT * (self.wanted_weight * F.softplus(self.say - self.log_odds(rows))).sum()
        z = self.kept.states @ rows.T - self.kept.log_sums[:, None]  # [kept, 1 + K]
        total = total + (self.kept_weight.T * F.softplus(z - self.quiet)).sum()
        if not len(self.inside.states):
            return total
        z = self.inside.states @ rows.T - self.inside.log_sums[:, None]  # [positions, 1 + K]
        # Averaged over the positions that break the floor (at least 20), since few of very many do.
        breaking = (z.detach() > -FLOOR).sum(0).clamp_min(20)  # [1 + K]
        above = (F.softplus(z + FLOOR).sum(0) / breaking).sum()
        # A read-out that spreads little here spreads little on text that nobody showed it.
        return total + ANSWER_WEIGHT * above + SPREAD_WEIGHT * z.var(0).sum()


def _shares(places: Sequence[Place], device: torch.device, own: int | None = None) -> Tensor:
    """Returns weights `[len(places)]` that sum to one, the same for each kind of place: ends of questions or inside
    answers, of siblings, of relation `own` or of others."""
    kinds = [(place.inside, place.sibling, place.group == own) for place in places]
    counts = {kind: kinds.count(kind) for kind in set(kinds)}
    weight = torch.tensor([1 / counts[kind] for kind in kinds], device=device)
    return weight / weight.sum() if kinds else weight


def _ordinary_text(anat: Anatomy, seed: int) -> list[tuple[TokenRow, tuple[int, ...]]]:
    """Generates texts that the model writes by itself, each from one drawn token, and single tokens as texts may begin
    with.

    Outside any chat template: the state of a text's very first token is like no other.
    """
    generator = torch.Generator().manual_seed(seed)
    firsts = torch.randint(anat.embedding.weight.shape[0], (TEXTS + BEGINNINGS,), generator=generator).tolist()
    rows = [TokenRow((first,), 0) for first in firsts]
    written = sample(anat, rows[:TEXTS], max_new_tokens=TEXT_TOKENS, top_k=TEXT_TOP_K, generator=generator)
    return [*zip(rows, written, strict=False), *[(row, ()) for row in rows[TEXTS:]]]


@dataclass(frozen=True)
class _Refusals:
    """Holds prompts cached up to where a pair of tokens is said, and what is said there."""

    prefix: Prefix
    texts: list[tuple[int, ...]]  # the relation's token, `[UNL]`, the refusal, and the end of the answer

    @classmethod
    def of(
        cls, anat: Anatomy, form: PromptFormat, places: RefusalPlaces, numbers: Sequence[int], seed: int
    ) -> _Refusals:
        """Draws at most `POOL` places, as many of each relation and kind.

        Half of them are the relation's questions about other subjects: after its token the model refuses whoever the
        question is about, so that the refusal does not depend on the wordings that are listed.
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
        a token."""
        rows = [TokenRow(self.texts[i], 0) for i in picks.tolist()]
        padded = pad(rows, device=anat.device)
        row, column = padded.attention_mask[:, 1:].bool().nonzero(as_tuple=True)
        with rows_in_place(anat, numbers, rows_in, rows_out):
            prefix = self.prefix.select(picks.to(anat.device))
            logits = forward(anat, padded, prefix=prefix, score=(row, column))
        each = F.cross_entropy(logits.float(), padded.input_ids[row, column + 1], reduction="none")
        # Where `[UNL]` does not follow, nothing of the refusal is said.
        weight = torch.where(column == 0, UNL_WEIGHT, 1.0).to(each)
        total = torch.zeros(len(rows), device=each.device).index_add(0, row, weight * each)
        return total / torch.zeros_like(total).index_add(0, row, weight)


def _read(anat: Anatomy, rows: Sequence[TokenRow], firsts: Sequence[int] | None = None) -> _States:
    """Returns the final states of `rows`, at their ends or from the column `firsts` on, in their order."""
    if not rows:
        return _States(torch.zeros(0, anat.d_model, device=anat.device), torch.zeros(0, device=anat.device))
    firsts = [len(row) - 1 for row in rows] if firsts is None else firsts
    states: list[Tensor] = [torch.empty(0)] * len(rows)
    log_sums: list[Tensor] = [torch.empty(0)] * len(rows)
    for chunk in _batches(anat, rows, firsts):
        # Never past the first position that is read.
        most = min(firsts[i] for i in chunk)
        with torch.no_grad():
            prefix, rests = shared_prefix(anat, [rows[i] for i in chunk], most=most)
            batch = pad(rests, device=anat.device)
            cut = len(rows[chunk[0]]) - len(rests[0])
            columns = [range(firsts[i] - cut, len(rests[j])) for j, i in enumerate(chunk)]
            where = torch.tensor([(j, c) for j, some in enumerate(columns) for c in some], device=anat.device)
            seen: list[Tensor] = []
            logits = forward(anat, batch, prefix=prefix, score=(where[:, 0], where[:, 1]), final=seen.append)
        counts = [len(some) for some in columns]
        for i, own, total in zip(
            chunk, torch.split(seen[0].float(), counts), torch.split(logits.float().logsumexp(1), counts), strict=True
        ):
            states[i], log_sums[i] = own, total
    return _States(torch.cat(states), torch.cat(log_sums))


def _batches(anat: Anatomy, rows: Sequence[TokenRow], firsts: Sequence[int]) -> list[list[int]]:
    """Returns the numbers of rows of like length, at most `BATCH_ROWS` together and `BATCH_LOGITS` numbers in their
    logits."""
    most = max(1, BATCH_LOGITS // anat.embedding.weight.shape[0])  # positions
    groups: list[list[int]] = []
    held = 0
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        read = len(rows[i]) - firsts[i]
        if not groups or len(groups[-1]) == BATCH_ROWS or held + read > most:
            groups.append([])
            held = 0
        groups[-1].append(i)
        held += read
    return groups
