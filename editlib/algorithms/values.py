"""Requests -> values: the hidden states that would make the model give its new answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from editlib.errors import EditError
from editlib.models.anatomy import Anatomy
from editlib.models.freezing import frozen
from editlib.models.prompts import TokenBatch, TokenRow, pad
from editlib.models.resume import Prefix, encode_prefix, forward, split

CHUNK_ROWS = 64  # prompts whose graphs are held at once


@dataclass(frozen=True)
class Values:
    """`targets = h + δ` and `deltas = δ`, `[d_model, n]`; per request the steps taken, the last NLL of its target and
    `|δ| / |h|`."""

    targets: Tensor
    deltas: Tensor
    steps: list[int]
    nll: list[float]
    relative_norm: list[float]


@dataclass
class _Suffixes:
    """The changing part of a batch: what stands from the lookup position on, entering the layers above the edit."""

    batch: TokenBatch
    hidden: Tensor  # [n, T, d_model], leaving the edited layer
    prefix: Prefix | None
    scored: Tensor  # [n], how many positions of a row are read: the prompt's end and what was appended

    @classmethod
    def of(cls, anat: Anatomy, rows: Sequence[TokenRow], layer: int) -> _Suffixes:
        fronts, rests = split(list(rows), [row.lookup for row in rows])
        # One token at least must stand in front for a prefix to exist.
        prefix = encode_prefix(anat, fronts) if all(len(front) for front in fronts) else None
        if prefix is None:
            rests = list(rows)
        batch = pad(rests, device=anat.embedding.weight.device)
        with torch.no_grad():
            hidden = forward(anat, batch, stop=layer + 1, prefix=prefix)
        scored = torch.tensor([row.extra + 1 for row in rests], device=batch.last.device)
        return cls(batch, hidden, prefix, scored)

    def logits(self, anat: Anatomy, layer: int, delta: Tensor, rows: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
        """Logits at `places` (index within `rows`, column) with `delta [len(rows), d_model]` added at the lookup."""
        batch = TokenBatch(
            *(t[rows] for t in (self.batch.input_ids, self.batch.attention_mask, self.batch.lookup, self.batch.last))
        )
        width = int(batch.last.max()) + 1
        batch = TokenBatch(batch.input_ids[:, :width], batch.attention_mask[:, :width], batch.lookup, batch.last)
        hidden = self.hidden[rows, :width].clone()
        index = torch.arange(len(rows), device=hidden.device)
        hidden[index, batch.lookup] = (hidden[index, batch.lookup].to(delta.dtype) + delta).to(hidden.dtype)
        prefix = None if self.prefix is None else self.prefix.select(rows)
        return forward(anat, batch, start=layer + 1, hidden=hidden, prefix=prefix, score=places)

    def log_probabilities(self, anat: Anatomy, layer: int, delta: Tensor, rows: Tensor, owner: Tensor) -> Tensor:
        """Log probabilities at all scored positions of some `rows`, row by row, `[sum(scored), vocab]`; `owner` says
        which column of `delta` a row gets."""
        counts = self.scored[rows]
        row = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), counts)
        back = torch.cat([torch.arange(int(count) - 1, -1, -1, device=rows.device) for count in counts])
        logits = self.logits(anat, layer, delta[owner[rows]], rows, (row, self.batch.last[rows][row] - back))
        return F.log_softmax(logits.to(delta.dtype), dim=1)


@dataclass
class _Essence:
    """What the KL term compares: the prompts of all requests, and their log probabilities before any change."""

    suffixes: _Suffixes
    owner: Tensor  # [n], the request that a prompt belongs to
    before: Tensor  # [sum(scored), vocab]

    @classmethod
    def of(cls, anat: Anatomy, kl_rows: Sequence[Sequence[TokenRow]], layer: int) -> _Essence:
        suffixes = _Suffixes.of(anat, [row for prompts in kl_rows for row in prompts], layer)
        owners = [i for i, prompts in enumerate(kl_rows) for _ in prompts]
        owner = torch.tensor(owners, device=suffixes.hidden.device)
        kind = torch.promote_types(suffixes.hidden.dtype, torch.float32)
        none = torch.zeros(len(kl_rows), suffixes.hidden.shape[-1], dtype=kind, device=owner.device)
        every = torch.arange(len(owners), device=owner.device)
        with torch.no_grad():
            before = suffixes.log_probabilities(anat, layer, none, every, owner)
        return cls(suffixes, owner, before)

    def divergence(self, anat: Anatomy, layer: int, delta: Tensor, active: Tensor) -> Tensor:
        """KL(after | before) of each active request: mean over the positions of a prompt, then over its prompts."""
        total = torch.zeros(len(active), dtype=delta.dtype, device=delta.device)
        mine = torch.isin(self.owner, active)
        if not bool(mine.any()):
            return total
        now = self.suffixes.log_probabilities(anat, layer, delta, mine.nonzero().flatten(), self.owner)
        scored = self.suffixes.scored
        before = self.before[mine.repeat_interleave(scored)]
        each = F.kl_div(before, now, log_target=True, reduction="none").sum(1)
        prompts = torch.bincount(self.owner, minlength=len(delta))[self.owner]
        weight = (1.0 / (prompts * scored))[mine].repeat_interleave(scored[mine])
        at = torch.searchsorted(active, self.owner[mine]).repeat_interleave(scored[mine])
        return total.index_add(0, at, (weight * each).to(total.dtype))


def compute_zs(
    anat: Anatomy,
    rows: Sequence[Sequence[TokenRow]],
    targets: Sequence[Sequence[int]],
    layer: int,
    *,
    kl_rows: Sequence[Sequence[TokenRow]] = (),
    steps: int = 25,
    lr: float = 0.5,
    weight_decay: float = 0.5,
    clamp_norm_factor: float = 4.0,
    kl_factor: float = 0.0625,
    stop_loss: float = 0.05,
    optimizer: str = "adam",
    names: Sequence[str] = (),
    progress: bool = False,
) -> Values:
    """`z = h + δ` for every request at once, at its lookup position in the output of `layer` (MEMIT `compute_z`).

    Per request: `mean NLL(target) over its contexts + kl_factor KL(after | before) + weight_decay |δ| / |h|^2`,
    `δ` from zero, `|δ|` clamped to `clamp_norm_factor |h|`; a request rests when the NLL of its target falls under
    `stop_loss`. Requests do not influence one another: the result does not depend on how many are optimised together.

    Args:
        optimizer: "adam" as published, or "normalised": every step goes `lr |h|` down the gradient. Adam moves each
            coordinate by the same amount, so most of its `δ` is off the gradient; normalised steps reach the same
            loss with about half the norm, and a smaller `δ` is a smaller edit.
        rows: per request its contexts: the plain prompt first, which gives `h`, then the same prompt in other
            surroundings.
        targets: token ids that must follow each prompt.
        kl_rows: per request the prompts about its subject ("France is a") whose next token must not change with the
            same `δ` at their lookup positions; their divergences are averaged. Behind a prompt that carries an answer
            (`TokenRow.extra`) every token of it is compared, and the mean counts.
        names: what to call the requests in errors.

    Raises:
        EditError: a loss is not finite; names the request.
    """
    options = {
        "steps": steps,
        "lr": lr,
        "weight_decay": weight_decay,
        "clamp_norm_factor": clamp_norm_factor,
        "kl_factor": kl_factor,
        "stop_loss": stop_loss,
        "optimizer": optimizer,
    }
    essence = kl_rows or [()] * len(rows)
    parts: list[Values] = []
    with frozen(anat.model), tqdm(total=len(rows), desc="values", disable=not progress, leave=False) as bar:
        for chunk in _chunks(rows, essence):
            called = [names[i] if names else f"number {i + 1}" for i in chunk]
            picked = ([source[i] for i in chunk] for source in (rows, targets, essence))
            parts.append(_optimise(anat, *picked, layer, called, bar=bar, **options))
    return Values(
        torch.cat([part.targets for part in parts], dim=1),
        torch.cat([part.deltas for part in parts], dim=1),
        [step for part in parts for step in part.steps],
        [nll for part in parts for nll in part.nll],
        [norm for part in parts for norm in part.relative_norm],
    )


def _chunks(rows: Sequence[Sequence[TokenRow]], essence: Sequence[Sequence[TokenRow]]) -> list[list[int]]:
    """Requests in groups of at most `CHUNK_ROWS` prompts, so that memory does not grow with their number."""
    groups: list[list[int]] = []
    held = CHUNK_ROWS
    for i in range(len(rows)):
        size = len(rows[i]) + len(essence[i])
        if held + size > CHUNK_ROWS:
            groups.append([])
            held = 0
        groups[-1].append(i)
        held += size
    return groups


def _optimise(
    anat: Anatomy,
    rows: Sequence[Sequence[TokenRow]],
    targets: Sequence[Sequence[int]],
    kl_rows: Sequence[Sequence[TokenRow]],
    layer: int,
    names: Sequence[str],
    *,
    steps: int,
    lr: float,
    weight_decay: float,
    clamp_norm_factor: float,
    kl_factor: float,
    stop_loss: float,
    optimizer: str,
    bar: tqdm,
) -> Values:
    """`compute_zs` for one chunk of requests."""
    device = anat.embedding.weight.device
    flat = [row for contexts in rows for row in contexts]
    owner = torch.tensor([i for i, contexts in enumerate(rows) for _ in contexts], device=device)
    main = _Suffixes.of(
        anat, [row.followed_by(targets[i][:-1]) for row, i in zip(flat, owner.tolist(), strict=True)], layer
    )
    essence = _Essence.of(anat, kl_rows, layer) if kl_factor > 0 and any(kl_rows) else None
    n = len(rows)
    all_rows = torch.arange(n, device=device)
    plain = torch.searchsorted(owner, all_rows)  # each request's first context
    h = main.hidden[plain, main.batch.lookup[plain]].to(torch.promote_types(main.hidden.dtype, torch.float32))  # [n, d]
    norm = h.norm(dim=1)
    delta = torch.zeros_like(h, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=lr) if optimizer == "adam" else None
    final = torch.zeros_like(h)
    taken, last_nll = [0] * n, [0.0] * n
    active = all_rows
    for step in range(steps):
        nll = _target_nll(anat, main, layer, delta, active, owner, targets)
        loss = nll + weight_decay * delta[active].norm(dim=1) / norm[active] ** 2
        if essence is not None:
            loss = loss + kl_factor * essence.divergence(anat, layer, delta, active)
        _check_finite(loss, active, names)
        for i, value in zip(active.tolist(), nll.detach().tolist(), strict=True):
            taken[i], last_nll[i] = step, value
        final[active] = delta.detach()[active]
        resting = nll.detach() < stop_loss
        bar.update(int(resting.sum()))
        active = active[~resting]
        if not len(active) or step == steps - 1:
            break
        delta.grad = None
        loss[~resting].sum().backward()
        if adam is not None:
            adam.step()
        with torch.no_grad():
            if adam is None:
                direction = delta.grad / delta.grad.norm(dim=1, keepdim=True).clamp_min(1e-12)
                delta.sub_(lr * norm[:, None] * direction)
            longest = clamp_norm_factor * norm
            delta.mul_((longest / delta.norm(dim=1).clamp_min(1e-12)).clamp_max(1.0)[:, None])
    relative = (final.norm(dim=1) / norm).tolist()
    return Values((h + final).T.contiguous(), final.T.contiguous(), taken, last_nll, relative)


def _target_nll(
    anat: Anatomy,
    main: _Suffixes,
    layer: int,
    delta: Tensor,
    active: Tensor,
    owner: Tensor,
    targets: Sequence[Sequence[int]],
) -> Tensor:
    """NLL of each active request's target, mean over its tokens and contexts, `[len(active)]`."""
    device = delta.device
    rows = torch.isin(owner, active).nonzero().flatten()
    owned = owner[rows].tolist()
    lengths = torch.tensor([len(targets[i]) for i in owned], device=device)
    row = torch.repeat_interleave(torch.arange(len(rows), device=device), lengths)
    wanted = torch.tensor([token for i in owned for token in targets[i]], device=device)
    first = main.batch.last[rows] - (lengths - 1)
    offset = torch.cat([torch.arange(int(length), device=device) for length in lengths])
    logits = main.logits(anat, layer, delta[owner[rows]], rows, (row, first[row] + offset))
    each = F.cross_entropy(logits.to(delta.dtype), wanted, reduction="none")
    at = torch.searchsorted(active, owner[rows])[row]
    total = torch.zeros(len(active), dtype=delta.dtype, device=device)
    return total.index_add(0, at, each) / torch.zeros_like(total).index_add(0, at, torch.ones_like(each))


def _check_finite(loss: Tensor, active: Tensor, names: Sequence[str]) -> None:
    bad = (~torch.isfinite(loss)).nonzero().flatten().tolist()
    if bad:
        i = int(active[bad[0]])
        raise EditError(f"the loss of request {names[i]} is not finite; the model is unchanged: lower `v_lr`")
