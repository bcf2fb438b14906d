"""Requests -> values: the hidden states that would make the model give its new answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from editlib.algorithms.suffixes import Reading, Suffixes, read
from editlib.errors import EditError
from editlib.models.anatomy import Anatomy
from editlib.models.freezing import no_param_grad
from editlib.models.prompts import TokenRow

CHUNK_ROWS = 64  # prompts whose graphs are held at once
CHUNK_TOKENS = 128 * CHUNK_ROWS  # of them, with padding: fewer prompts at once where they are long
FEW_ROWS = 16  # up to here a pass costs what reading the weights costs, and targets and essence share one


@dataclass(frozen=True)
class Values:
    """`targets = h + δ` and `deltas = δ`, `[d_model, n]`; per request the steps taken, the last NLL of its target and
    `|δ| / |h|`; of UniErase's answer gate the value of each relation, `[d_model]`."""

    targets: Tensor
    deltas: Tensor
    steps: list[int]
    nll: list[float]
    relative_norm: list[float]
    gate: Mapping[str | None, Tensor] = field(default_factory=dict)

    @classmethod
    def joined(cls, parts: Sequence[Values]) -> Values:
        """Those of several groups of requests, one behind the other."""
        return cls(
            torch.cat([part.targets for part in parts], dim=1),
            torch.cat([part.deltas for part in parts], dim=1),
            [step for part in parts for step in part.steps],
            [nll for part in parts for nll in part.nll],
            [norm for part in parts for norm in part.relative_norm],
            {relation: value for part in parts for relation, value in part.gate.items()},
        )

    def select(self, requests: Sequence[int]) -> Values:
        """Those of some requests, and the gate of all."""
        some = list(requests)
        lists = ([every[i] for i in some] for every in (self.steps, self.nll, self.relative_norm))
        return Values(self.targets[:, some], self.deltas[:, some], *lists, self.gate)

    def numbers(self, request: int) -> dict[str, float]:
        """What one request's target state cost and came to, by the names that receipts have for it."""
        return {
            "steps": self.steps[request],
            "target_nll": self.nll[request],
            "relative_norm": self.relative_norm[request],
        }


@dataclass
class _Essence:
    """What the KL term compares: the prompts of all requests, and their log probabilities before any change."""

    suffixes: Suffixes
    rows: Tensor  # [n], which rows of `suffixes` the prompts are
    owner: Tensor  # [n], the request that a prompt belongs to
    before: Tensor  # [sum(scored), vocab]

    @classmethod
    def of(cls, anat: Anatomy, layer: int, suffixes: Suffixes, rows: Tensor, owner: Tensor, requests: int) -> _Essence:
        kind = torch.promote_types(suffixes.hidden.dtype, torch.float32)
        none = torch.zeros(requests, suffixes.hidden.shape[-1], dtype=kind, device=owner.device)
        with torch.no_grad():
            before = suffixes.logits(anat, layer, none, suffixes.last(rows, owner, suffixes.scored[rows]))
        return cls(suffixes, rows, owner, F.log_softmax(before, dim=1))

    def reading(self, active: Tensor) -> Reading | None:
        """Where the prompts of the active requests are read; `None` when they have none."""
        mine = torch.isin(self.owner, active)
        rows = self.rows[mine]
        return self.suffixes.last(rows, self.owner[mine], self.suffixes.scored[rows]) if len(rows) else None

    def divergence(self, logits: Tensor, active: Tensor, requests: int) -> Tensor:
        """KL(after | before) of each active request: mean over the positions of a prompt, then over its prompts."""
        mine = torch.isin(self.owner, active)
        scored = self.suffixes.scored[self.rows]
        before = self.before[mine.repeat_interleave(scored)]
        each = F.kl_div(before, F.log_softmax(logits, dim=1), log_target=True, reduction="none").sum(1)
        prompts = torch.bincount(self.owner, minlength=requests)[self.owner]
        weight = (1.0 / (prompts * scored))[mine].repeat_interleave(scored[mine])
        at = torch.searchsorted(active, self.owner[mine]).repeat_interleave(scored[mine])
        total = torch.zeros(len(active), dtype=logits.dtype, device=logits.device)
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
    norms: Tensor | None = None,
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
        norms: `[n]`, what the weight decay and the clamp measure `δ` in; `None`: `|h|`. ROME takes the norm of the
            MLP's output.
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
    with no_param_grad(anat.model), tqdm(total=len(rows), desc="values", disable=not progress, leave=False) as bar:
        for chunk in _chunks(rows, essence):
            called = [names[i] if names else f"number {i + 1}" for i in chunk]
            picked = ([source[i] for i in chunk] for source in (rows, targets, essence))
            units = None if norms is None else norms[chunk]
            parts.append(_optimise(anat, *picked, layer, called, norms=units, bar=bar, **options))
    return Values.joined(parts)


def _chunks(rows: Sequence[Sequence[TokenRow]], essence: Sequence[Sequence[TokenRow]]) -> list[list[int]]:
    """Requests in groups of at most `CHUNK_ROWS` prompts and `CHUNK_TOKENS` tokens with padding, so that memory grows
    neither with their number nor with their length."""
    groups: list[list[int]] = []
    held, width = CHUNK_ROWS, 0
    for i in range(len(rows)):
        size, longest = len(rows[i]) + len(essence[i]), max(map(len, (*rows[i], *essence[i])))
        full = held + size > CHUNK_ROWS or (held + size) * max(width, longest) > CHUNK_TOKENS
        if not groups or full:
            groups.append([])
            held = width = 0
        groups[-1].append(i)
        held, width = held + size, max(width, longest)
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
    norms: Tensor | None,
    bar: tqdm,
) -> Values:
    """`compute_zs` for one chunk of requests."""
    device = anat.device
    flat = [row.followed_by(targets[i][:-1]) for i, contexts in enumerate(rows) for row in contexts]
    owner = torch.tensor([i for i, contexts in enumerate(rows) for _ in contexts], device=device)
    main, essence = _suffixes(anat, flat, kl_rows if kl_factor > 0 else [], layer)
    n = len(rows)
    all_rows = torch.arange(n, device=device)
    plain = torch.searchsorted(owner, all_rows)  # each request's first context
    h = main.hidden[plain, main.batch.lookup[plain]].to(torch.promote_types(main.hidden.dtype, torch.float32))  # [n, d]
    norm = h.norm(dim=1) if norms is None else norms.to(h)
    delta = torch.zeros_like(h, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=lr) if optimizer == "adam" else None
    final = torch.zeros_like(h)
    taken, last_nll = [0] * n, [0.0] * n
    active = all_rows
    for step in range(steps):
        rows_read = torch.isin(owner, active).nonzero().flatten()
        lengths = torch.tensor([len(targets[i]) for i in owner[rows_read].tolist()], device=device)
        asked = [(main, main.last(rows_read, owner[rows_read], lengths))]
        if essence is not None and (reading := essence.reading(active)) is not None:
            asked.append((essence.suffixes, reading))
        logits = read(anat, layer, delta, asked)
        nll = _target_nll(logits[0], asked[0][1], active, targets)
        loss = nll + weight_decay * delta[active].norm(dim=1) / norm[active] ** 2
        if len(asked) > 1:
            loss = loss + kl_factor * essence.divergence(logits[1], active, n)
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


def _suffixes(
    anat: Anatomy, flat: list[TokenRow], kl_rows: Sequence[Sequence[TokenRow]], layer: int
) -> tuple[Suffixes, _Essence | None]:
    """The batch of the targets' rows and what the KL term compares, in the same batch when they are few."""
    held = [row for prompts in kl_rows for row in prompts]
    together = len(flat) + len(held) <= FEW_ROWS
    main = Suffixes.of(anat, flat + held if together else flat, layer)
    if not held:
        return main, None
    suffixes = main if together else Suffixes.of(anat, held, layer)
    places = torch.arange(len(held), device=anat.device) + (len(flat) if together else 0)
    owners = torch.tensor([i for i, prompts in enumerate(kl_rows) for _ in prompts], device=anat.device)
    return main, _Essence.of(anat, layer, suffixes, places, owners, len(kl_rows))


def _target_nll(logits: Tensor, reading: Reading, active: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
    """NLL of each active request's target, mean over its tokens and contexts, `[len(active)]`."""
    wanted = torch.tensor([token for i in reading.owner.tolist() for token in targets[i]], device=logits.device)
    each = F.cross_entropy(logits, wanted, reduction="none")
    at = torch.searchsorted(active, reading.owner)[reading.row]
    total = torch.zeros(len(active), dtype=logits.dtype, device=logits.device)
    return total.index_add(0, at, each) / torch.zeros_like(total).index_add(0, at, torch.ones_like(each))


def _check_finite(loss: Tensor, active: Tensor, names: Sequence[str]) -> None:
    bad = (~torch.isfinite(loss)).nonzero().flatten().tolist()
    if bad:
        i = int(active[bad[0]])
        raise EditError(f"the loss of request {names[i]} is not finite; the model is unchanged: lower `v_lr`")
