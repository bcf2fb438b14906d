"""Phase I: learn one token that continues into "I don't know" after any question (UniErase, 2505.15674, eq. 8-10)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from editlib.algorithms.unierase.token import TokenHeader, UnlearningToken
from editlib.algorithms.unierase.token_guard import LogitGapGuard, answer_guard, ordinary_states
from editlib.algorithms.unierase.token_steps import GuardedAdam, rate
from editlib.errors import TokenError
from editlib.models.anatomy import Anatomy
from editlib.models.forward import forward, new_cache, shared_prefix
from editlib.models.freezing import no_param_grad
from editlib.models.generation import end_tokens
from editlib.models.precision import cast_params, fast_dtype, plain_attention
from editlib.models.prefix import Prefix
from editlib.models.prompt_settings import PromptSettings
from editlib.models.prompts import PromptFormat, TokenRow, pad, settled
from editlib.models.vocabulary import add_token, check_rows, rows_in_place, write_rows
from editlib.settings import check_fields, setting

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenHyperParams:
    """Sets how the token is learned."""

    steps: int = setting(70, min=1)  # optimiser steps
    robust_steps: int = setting(50, min=0)  # the last of `steps`, with noise on the matrices that edits will change
    batch: int = setting(8, min=1)  # questions of a step, all in one prompt form
    lr: float = setting(0.15, above=0)  # learning rate
    memory: float = setting(0.99, min=0, below=1)  # Adam's second beta; smaller values suit fewer steps
    opening: int = setting(4, min=0)  # first tokens that the chosen refusals share; fewer if no two share as many
    refusals: int = setting(1, min=1)  # most refusals to learn from: the shortest of those with the same opening
    noise: float = setting(0.1, min=0)  # standard deviation of the noise, in units of the weight's own
    layers: tuple[int, ...] = ()  # layers that get noise; empty: 4/30 to 8/30 of the depth, the usual layers of edits
    averaged_steps: int = setting(15, min=0)  # the last of `steps`, over which the rows are averaged
    guard_weight: float = setting(1.0, min=0)  # of the guard's penalty, which keeps the token out of ordinary text
    reach: float = 14.0  # nats: target for logsumexp(other logits) - logit(token) where an answer starts
    floor: float = 12.0  # nats: lower bound of the same gap at all other positions of ordinary text
    questions: int = setting(200, min=1)  # most questions that the token is learned over
    guard_prompts: int = setting(120, min=0)  # ordinary prompts whose answers the guard covers
    guard_tokens: int = setting(16, min=0)  # tokens of each answer that the guard covers
    guard_every: int = setting(1, min=1)  # the guard covers every n-th position of a question, counted from its end
    precision: Literal["fast", "model"] = "fast"  # dtype of the passes: the model's, or bf16 if faster
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises `TokenError` for a value of the wrong type or out of range."""
        check_fields(self, error=TokenError)


@dataclass(frozen=True)
class _Form:
    """Holds all training questions in one prompt form, encoded once."""

    prefix: Prefix
    refusals: list[tuple[int, ...]]  # token ids, each with the token that ends an answer


def learn_token(
    anat: Anatomy,
    tok: PreTrainedTokenizerBase,
    questions: Sequence[str],
    refusals: Sequence[str],
    *,
    token: str = "[UNL]",
    ordinary: Sequence[str] = (),
    hparams: TokenHyperParams | None = None,
    prompts: PromptSettings | None = None,
    model_sha256: str = "",
    progress: bool = True,
) -> UnlearningToken:
    """Learns the token's rows; the token stays in model and tokenizer.

    Everything before the token is constant, so it is run once; a step runs the token and the refusal after it. With
    tied embeddings one row is trained as input and output, otherwise two. A guard (`LogitGapGuard.penalty`) holds the
    token's logit `reach` nats under the log-sum-exp of all others where an answer starts, and at least `floor` nats
    under it elsewhere in the questions and in the model's own answers to them and to `ordinary`. The rows are learned
    in fp32, whatever the dtype of the model's passes.

    One row cannot lead into many sentences: it learns how they begin, and then mixes them. So it is learned over the
    shortest of the `refusals` with the most common opening (`alike`), by default over a single one.

    Args:
        ordinary: further prompts in whose answers the token must not appear, such as open instructions.
        prompts: how questions are asked; with a chat template, every other one is asked as plain text.

    Raises:
        TokenError: fewer questions than a batch (at least 2) or fewer than 2 refusals, or a loss that is not finite.
        ModelError: `layers` outside the model.
    """
    hp = hparams or TokenHyperParams()
    _check(anat, questions, refusals, hp)
    questions = questions[: max(hp.questions, hp.batch, 2)]
    settings = settled(tok, prompts)
    unl_id = add_token(anat.model, tok, token)
    dtype = fast_dtype(anat.model) if hp.precision == "fast" else None
    with no_param_grad(anat.model), cast_params(anat.model, dtype):
        form = PromptFormat.of(tok, settings)
        forms, guard = _encode(anat, form, questions, refusals, unl_id, hp)
        guarded = [*ordinary, *questions][: hp.guard_prompts]
        if guarded:
            asked = [form.encode(text) for text in guarded]
            guard = LogitGapGuard.joined([guard, answer_guard(anat, asked, unl_id, answer_tokens=hp.guard_tokens)])
        with nullcontext() if dtype is None else plain_attention(anat.device):
            rows, nll = _train(anat, forms, guard, unl_id, hp, progress=progress)
    write_rows(anat, unl_id, rows[0], rows[-1])
    gaps = guard.summary(rows[-1])
    log.info("token learned: refusal NLL %.3f nats per token, on ordinary text %s", nll, gaps)
    header = TokenHeader(
        token=token,
        model=str(anat.model.name_or_path),
        model_sha256=model_sha256,
        seed=hp.seed,
        questions=len(questions),
        refusals=len(forms[0].refusals),
        hparams=asdict(hp),
        prompts=settings.to_dict(),
        metrics={"refusal_nll": nll, **gaps},
    )
    return UnlearningToken(rows[0].float().cpu(), rows[-1].float().cpu(), header)


def _check(anat: Anatomy, questions: Sequence[str], refusals: Sequence[str], hp: TokenHyperParams) -> None:
    """Raises what `learn_token` raises for unsuitable input, before anything is changed."""
    least = max(hp.batch, 2)
    if len(questions) < least or len(refusals) < 2:
        raise TokenError(
            f"{len(questions)} questions and {len(refusals)} refusals given; at least {least} and 2 are needed"
        )
    anat.check_layers(_noisy_layers(anat, hp))
    check_rows(anat)


def _noisy_layers(anat: Anatomy, hp: TokenHyperParams) -> list[int]:
    """Returns the layers that carry noise in the robust steps."""
    return list(hp.layers or range(4 * anat.n_layers // 30, 8 * anat.n_layers // 30 + 1))


def _encode(
    anat: Anatomy,
    asked: PromptFormat,
    questions: Sequence[str],
    refusals: Sequence[str],
    unl_id: int,
    hp: TokenHyperParams,
) -> tuple[list[_Form], LogitGapGuard]:
    """Returns the prompt forms with their cached prefixes, each question in one form, and from the same pass the guard
    over the questions."""
    formats = [PromptFormat(asked.tok, chat=False)]
    chosen = alike([formats[0].answer_ids(text) for text in refusals], hp.opening, hp.refusals)
    refusals = [refusals[i] for i in chosen]
    if asked.uses_chat or asked.tags is not None:
        formats.append(asked)
    forms, guards = [], []
    for i, form in enumerate(formats):
        rows = [form.encode(question) for question in questions[i :: len(formats)]]
        end = form.end_ids(end_tokens(anat)) if end_tokens(anat) else ()  # a model that never stops is taught no end
        with torch.no_grad():
            prefix, guard = _ordinary(anat, rows, unl_id, hp.guard_every)
        forms.append(_Form(prefix, [(*form.answer_ids(text), *end) for text in refusals]))
        guards.append(guard)
    return forms, LogitGapGuard.joined(guards)


def alike(refusals: Sequence[Sequence[int]], opening: int, most: int) -> list[int]:
    """Returns the indices of at most `most` refusals, given as token ids: the shortest that begin with the
    same `opening` tokens.

    If no two do, fewer tokens are compared, down to none. The largest such group is used. A list of at most `most` is
    used whole.
    """
    if len(refusals) <= most:
        return list(range(len(refusals)))
    for length in range(opening, -1, -1):
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, refusal in enumerate(refusals):
            groups.setdefault(tuple(refusal[:length]), []).append(i)
        largest = max(groups.values(), key=len)
        if len(largest) > 1:
            break
    return sorted(largest, key=lambda i: len(refusals[i]))[:most]


def _ordinary(anat: Anatomy, rows: list[TokenRow], unl_id: int, every: int) -> tuple[Prefix, LogitGapGuard]:
    """Returns the cached `rows`, and the guard over their ends and each `every`-th position before."""
    front, rests = shared_prefix(anat, rows)
    batch = pad(rests, side="left", device=anat.device)
    cache = new_cache(anat, len(rows)) if front is None else front.cache()
    mask = batch.attention_mask if front is None else torch.cat([front.attention_mask, batch.attention_mask], dim=1)
    columns = torch.arange(batch.input_ids.shape[1], device=batch.last.device)
    back = batch.last[:, None] - columns  # [n, T], tokens from here to the end of the question
    row, column = ((back % every == 0) & batch.attention_mask.bool()).nonzero(as_tuple=True)  # [m] each
    positions = (row, column)
    states, log_sums = ordinary_states(anat, replace(batch, attention_mask=mask), unl_id, positions, cache=cache)
    prefix = Prefix.of(cache, mask)
    return prefix, LogitGapGuard(states, log_sums, back[positions] == 0)


def _train(
    anat: Anatomy, forms: Sequence[_Form], guard: LogitGapGuard, unl_id: int, hp: TokenHyperParams, *, progress: bool
) -> tuple[list[Tensor], float]:
    """Returns the learned rows `[d_model]` (one where embeddings are tied, else input and output), averaged over the
    last `averaged_steps`, and the refusals' mean NLL over those steps, in nats per token.

    Raises:
        TokenError: a loss that is not finite.
    """
    generator = torch.Generator().manual_seed(hp.seed)
    noisy = _noisy_layers(anat, hp)
    rows, longest = _first_rows(anat, unl_id, generator)
    moves = GuardedAdam(rows, guard, weight=hp.guard_weight, answer_gap=hp.reach, min_gap=hp.floor, memory=hp.memory)
    averaged = min(max(hp.averaged_steps, 1), hp.steps)
    mean_rows, mean_nll = [torch.zeros_like(row) for row in rows], 0.0
    for step in tqdm(range(hp.steps), desc="unlearning token", disable=not progress, leave=False):
        noise_layer = noisy[step % len(noisy)] if step >= hp.steps - hp.robust_steps else None
        leaves = [row.clone().requires_grad_() for row in rows]
        with (
            _noise(anat, noise_layer, hp.noise, generator),
            rows_in_place(anat, [unl_id], leaves[0][None], leaves[-1][None]),
        ):
            loss = _refusal_nll(anat, forms[step % len(forms)], unl_id, hp.batch, generator)
        nll = float(loss.detach())
        if not math.isfinite(nll):
            raise TokenError(f"the loss is not finite at step {step + 1}; lower the token's learning rate")
        log.debug("step %d: refusal NLL %.3f", step, nll)
        moves.step(torch.autograd.grad(loss, leaves), rate(hp.lr, step, hp.steps))
        for row in rows:
            row.mul_((longest / row.norm()).clamp_max(1.0))
        if step >= hp.steps - averaged:
            mean_nll += nll / averaged
            for mean_row, row in zip(mean_rows, rows, strict=True):
                mean_row.add_(row / averaged)
    return mean_rows, mean_nll


def _first_rows(anat: Anatomy, unl_id: int, generator: torch.Generator) -> tuple[list[Tensor], Tensor]:
    """Returns the initial rows in fp32, and the norm that they must not exceed."""
    typical = anat.embedding.weight[:unl_id].detach().float()
    mean, spread, length = typical.mean(0), typical.std(), typical.norm(dim=1).mean()
    row = mean + spread * torch.randn(anat.d_model, generator=generator).to(mean)
    return [row] if anat.tied else [row, row.clone()], 1.5 * length


def _refusal_nll(anat: Anatomy, form: _Form, unl_id: int, batch: int, generator: torch.Generator) -> Tensor:
    """Computes the mean NLL of a refusal and the end of the turn after the token, over `batch` drawn questions."""
    device = anat.device
    # Each question with one refusal, so that on average all pairs are seen.
    picks = torch.randperm(len(form.prefix.attention_mask), generator=generator)[:batch].to(device)
    texts = torch.randint(len(form.refusals), (len(picks),), generator=generator).tolist()
    rows = [TokenRow((unl_id, *form.refusals[i]), 0) for i in texts]
    padded = pad(rows, device=device)
    # Every position but the last of a row predicts the token after it.
    positions = (padded.attention_mask[:, 1:].bool()).nonzero().T  # [2, m]: rows and columns
    logits = forward(anat, padded, prefix=form.prefix.select(picks), score=(positions[0], positions[1]))
    return F.cross_entropy(logits.float(), padded.input_ids[positions[0], positions[1] + 1])


@contextmanager
def _noise(anat: Anatomy, layer: int | None, scale: float, generator: torch.Generator) -> Iterator[None]:
    """Adds Gaussian noise to one layer's MLP output matrix for the block, in units of its standard deviation.

    The matrix is restored bit for bit, also after an interruption. UniErase, eq. 10; its published code scales by the
    mean of the matrix, which is nearly zero.
    """
    if layer is None:
        yield
        return
    weight = anat.weight(layer)
    kept = weight.clone()
    try:
        noise = torch.randn(weight.shape, generator=generator).to(weight.device)
        with torch.no_grad():
            weight.add_((noise * scale * weight.float().std()).to(weight.dtype))
        yield
    finally:
        with torch.no_grad():
            weight.copy_(kept)
