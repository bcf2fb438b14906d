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


@dataclass(frozen=True)
class Values:
    """`targets [d_model, n]`, and per request the steps taken, the last NLL of its target and `|δ| / |h|`."""

    targets: Tensor
    steps: list[int]
    nll: list[float]
    relative_norm: list[float]


@dataclass
class _Suffixes:
    """The changing part of a batch: what stands from the lookup position on, entering the layers above the edit."""

    batch: TokenBatch
    hidden: Tensor  # [n, T, d_model], leaving the edited layer
    prefix: Prefix | None

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
        return cls(batch, hidden, prefix)

    def logits(self, anat: Anatomy, layer: int, delta: Tensor, rows: Tensor, places: tuple[Tensor, Tensor]) -> Tensor:
        """Logits at `places` (row index within `rows`, column) with `delta [len(rows), d_model]` added at the lookup."""
        batch = TokenBatch(*(t[rows] for t in (self.batch.input_ids, self.batch.attention_mask, self.batch.lookup, self.batch.last)))
        width = int(batch.last.max()) + 1
        batch = TokenBatch(batch.input_ids[:, :width], batch.attention_mask[:, :width], batch.lookup, batch.last)
        hidden = self.hidden[rows, :width].clone()
        index = torch.arange(len(rows), device=hidden.device)
        hidden[index, batch.lookup] = (hidden[index, batch.lookup].to(delta.dtype) + delta).to(hidden.dtype)
        prefix = None if self.prefix is None else self.prefix.select(rows)
        return forward(anat, batch, start=layer + 1, hidden=hidden, prefix=prefix, score=places)


def compute_zs(
    anat: Anatomy,
    rows: Sequence[TokenRow],
    targets: Sequence[Sequence[int]],
    layer: int,
    *,
    kl_rows: Sequence[TokenRow | None] = (),
    steps: int = 25,
    lr: float = 0.5,
    weight_decay: float = 0.5,
    clamp_norm_factor: float = 4.0,
    kl_factor: float = 0.0625,
    stop_loss: float = 0.05,
    names: Sequence[str] = (),
    progress: bool = False,
) -> Values:
    """`z = h + δ` for every request at once, at its lookup position in the output of `layer` (MEMIT `compute_z`).

    Per request: `mean NLL(target) + kl_factor KL(before | after) + weight_decay |δ| / |h|^2`, Adam on `δ` from zero,
    `|δ|` clamped to `clamp_norm_factor |h|`; a request rests when its loss falls under `stop_loss`. Requests do not
    influence one another, so the result does not depend on how many are optimised together.

    Args:
        rows: prompts with their lookup positions.
        targets: token ids that must follow each prompt.
        kl_rows: a prompt per request ("France is a") whose next token must not change; `None` leaves one out.
        names: what to call the requests in errors.

    Raises:
        EditError: a loss is not finite; names the request.
    """
    device = anat.embedding.weight.device
    with_target = [row.followed_by(target[:-1]) for row, target in zip(rows, targets, strict=True)]
    main = _Suffixes.of(anat, with_target, layer)
    kl_index = [i for i, row in enumerate(kl_rows) if row is not None and kl_factor > 0]
    kl = _Suffixes.of(anat, [kl_rows[i] for i in kl_index], layer) if kl_index else None
    n = len(rows)
    all_rows = torch.arange(n, device=device)
    h = main.hidden[all_rows, main.batch.lookup].to(torch.promote_types(main.hidden.dtype, torch.float32))  # [n, d]
    norm = h.norm(dim=1)
    delta = torch.zeros_like(h, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=lr)
    final = torch.zeros_like(h)
    taken, last_nll = [0] * n, [0.0] * n
    kl_before: Tensor | None = None
    active = all_rows
    with frozen(anat.model), tqdm(total=n, desc="values", disable=not progress, leave=False) as bar:
        for step in range(steps):
            nll = _target_nll(anat, main, layer, delta, active, targets)
            loss = nll + weight_decay * delta[active].norm(dim=1) / norm[active] ** 2
            if kl is not None:
                now, at = _next_token(anat, kl, layer, delta, active, kl_index)
                if kl_before is None:
                    kl_before = now.detach()
                places = torch.isin(torch.tensor(kl_index, device=device), active)
                divergence = F.kl_div(now, kl_before[places], log_target=True, reduction="none").sum(1)
                loss = loss.index_add(0, at, kl_factor * divergence.to(loss.dtype))
            _check_finite(loss, active, names)
            values = loss.detach()
            for i, value in zip(active.tolist(), nll.detach().tolist(), strict=True):
                taken[i], last_nll[i] = step, value
            final[active] = delta.detach()[active]
            resting = values < stop_loss
            bar.update(int(resting.sum()))
            active = active[~resting]
            if not len(active) or step == steps - 1:
                break
            optimizer.zero_grad()
            loss[~resting].sum().backward()
            optimizer.step()
            with torch.no_grad():
                longest = clamp_norm_factor * norm
                delta.mul_((longest / delta.norm(dim=1).clamp_min(1e-12)).clamp_max(1.0)[:, None])
    relative = (final.norm(dim=1) / norm).tolist()
    return Values((h + final).T.contiguous(), taken, last_nll, relative)


def _target_nll(
    anat: Anatomy, main: _Suffixes, layer: int, delta: Tensor, active: Tensor, targets: Sequence[Sequence[int]]
) -> Tensor:
    """Mean NLL of each active request's target, `[len(active)]`."""
    device = delta.device
    lengths = torch.tensor([len(targets[i]) for i in active.tolist()], device=device)
    owner = torch.repeat_interleave(torch.arange(len(active), device=device), lengths)
    wanted = torch.tensor([token for i in active.tolist() for token in targets[i]], device=device)
    first = main.batch.last[active] - (lengths - 1)
    offset = torch.cat([torch.arange(int(length), device=device) for length in lengths])
    logits = main.logits(anat, layer, delta[active], active, (owner, first[owner] + offset))
    each = F.cross_entropy(logits.to(delta.dtype), wanted, reduction="none")
    return torch.zeros(len(active), dtype=delta.dtype, device=device).index_add(0, owner, each) / lengths


def _next_token(
    anat: Anatomy, kl: _Suffixes, layer: int, delta: Tensor, active: Tensor, kl_index: list[int]
) -> tuple[Tensor, Tensor]:
    """Log probabilities behind the active KL prompts `[m, vocab]`, and which active request each belongs to `[m]`."""
    device = delta.device
    where = {i: at for at, i in enumerate(active.tolist())}
    rows = torch.tensor([r for r, i in enumerate(kl_index) if i in where], device=device, dtype=torch.long)
    at = torch.tensor([where[i] for i in kl_index if i in where], device=device, dtype=torch.long)
    owners = active[at]
    index = torch.arange(len(rows), device=device)
    logits = kl.logits(anat, layer, delta[owners], rows, (index, kl.batch.last[rows]))
    return F.log_softmax(logits.to(delta.dtype), dim=1), at


def _check_finite(loss: Tensor, active: Tensor, names: Sequence[str]) -> None:
    bad = (~torch.isfinite(loss)).nonzero().flatten().tolist()
    if bad:
        i = int(active[bad[0]])
        name = names[i] if names else f"number {i + 1}"
        raise EditError(f"the loss of request {name} is not finite; the model is unchanged: lower `v_lr`")
