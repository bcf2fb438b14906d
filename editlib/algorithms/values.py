"""Find values: the hidden states that make the model give its new answer (`compute_z` of MEMIT, 2210.07229).

A value is `z = h + δ`, with `h` the state that leaves the last edited layer at the lookup position of the plain prompt.
`δ` is found by gradient descent while the model itself stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from editlib.algorithms.suffixes import LogitPositions, SuffixBatch, read_logits
from editlib.errors import EditError
from editlib.models.anatomy import Anatomy
from editlib.models.freezing import no_param_grad
from editlib.models.prompts import TokenRow

CHUNK_ROWS = 64  # prompts whose graphs are held at once
CHUNK_TOKENS = 128 * CHUNK_ROWS  # tokens of these prompts, with padding: fewer prompts at once where they are long
FEW_TOKENS = 48  # up to here a pass costs what reading the weights costs, so that padding is free
FEW_FAST_TOKENS = 512  # the same on accelerators and in bf16, where products are fast and weights are packed first
PADDING = 1.25  # most columns of a larger pass, padding included, per token in it


@dataclass(frozen=True)
class Values:
    """Holds the values of `n` requests, with the steps and losses of the descent.

    `targets = h + δ` and `deltas = δ` are `[d_model, n]`. Per request: `steps` taken, the last NLL of its target
    (`nll`, nats per token) and `relative_norm = |δ| / |h|`. `gate` has UniErase's `δ_r [d_model]` by relation.
    """

    targets: Tensor
    deltas: Tensor
    steps: list[int]
    nll: list[float]
    relative_norm: list[float]
    gate: Mapping[str | None, Tensor] = field(default_factory=dict)

    @classmethod
    def joined(cls, parts: Sequence[Values]) -> Values:
        """Joins the values of several groups of requests, in their order."""
        return cls(
            torch.cat([part.targets for part in parts], dim=1),
            torch.cat([part.deltas for part in parts], dim=1),
            [step for part in parts for step in part.steps],
            [nll for part in parts for nll in part.nll],
            [norm for part in parts for norm in part.relative_norm],
            {relation: value for part in parts for relation, value in part.gate.items()},
        )

    def select(self, requests: Sequence[int]) -> Values:
        """Picks the values of `requests`, by index; the gate, which is of all requests, stays."""
        columns = list(requests)
        return Values(
            self.targets[:, columns],
            self.deltas[:, columns],
            [self.steps[i] for i in columns],
            [self.nll[i] for i in columns],
            [self.relative_norm[i] for i in columns],
            self.gate,
        )

    def numbers(self, request: int) -> dict[str, float]:
        """Returns one request's steps, target NLL and relative norm, by the names that receipts use."""
        return {
            "steps": self.steps[request],
            "target_nll": self.nll[request],
            "relative_norm": self.relative_norm[request],
        }


@dataclass(frozen=True)
class _DescentOptions:
    """Sets how `compute_zs` descends; see its docstring for each number."""

    steps: int
    lr: float
    weight_decay: float
    clamp_norm_factor: float
    kl_factor: float
    stop_loss: float
    optimizer: str


@dataclass
class _KLPrompts:
    """Holds the KL prompts of all requests of a chunk, and their log probabilities before any change.

    They prevent what ROME calls essence drift (2202.05262, eq. 4): `δ` may not change the model's next token in "France
    is a".
    """

    suffixes: SuffixBatch
    rows: Tensor  # [p], which rows of `suffixes` the prompts are
    owner: Tensor  # [p], the request that a prompt belongs to
    before: Tensor  # [sum(n_scored), vocab], log probabilities

    @classmethod
    def of(
        cls, anat: Anatomy, layer: int, suffixes: SuffixBatch, rows: Tensor, owner: Tensor, requests: int
    ) -> _KLPrompts:
        """Runs the prompts once, with `δ = 0` for each of `requests` requests."""
        dtype = torch.promote_types(suffixes.hidden.dtype, torch.float32)
        none = torch.zeros(requests, suffixes.hidden.shape[-1], dtype=dtype, device=owner.device)  # [n, d_model]
        with torch.no_grad():
            before = suffixes.logits(anat, layer, none, suffixes.last(rows, owner, suffixes.n_scored[rows]))
        return cls(suffixes, rows, owner, F.log_softmax(before, dim=1))

    def positions(self, active: Tensor) -> LogitPositions | None:
        """Returns the positions to compare for the `active` requests; `None` when they have no prompt."""
        mine = torch.isin(self.owner, active)  # [p]
        rows = self.rows[mine]
        return self.suffixes.last(rows, self.owner[mine], self.suffixes.n_scored[rows]) if len(rows) else None

    def divergence(self, logits: Tensor, active: Tensor, requests: int) -> Tensor:
        """Returns KL(after | before) of each active request, `[active]`: mean over the positions of a prompt, then over
        its prompts. `logits [m, vocab]` are those at `positions(active)`."""
        mine = torch.isin(self.owner, active)  # [p]
        n_scored = self.suffixes.n_scored[self.rows]  # [p]
        before = self.before[mine.repeat_interleave(n_scored)]  # [m, vocab]
        each = F.kl_div(before, F.log_softmax(logits, dim=1), log_target=True, reduction="none").sum(1)  # [m]
        prompts = torch.bincount(self.owner, minlength=requests)[self.owner]  # [p], prompts of the same request
        # A position weighs 1 / (its prompt's positions · its request's prompts), so that the sum is the two means.
        weight = (1.0 / (prompts * n_scored))[mine].repeat_interleave(n_scored[mine])  # [m]
        # `active` is sorted: the index of a position's request in it.
        at = torch.searchsorted(active, self.owner[mine]).repeat_interleave(n_scored[mine])  # [m]
        total = torch.zeros(len(active), dtype=logits.dtype, device=logits.device)
        return total.index_add(0, at, (weight * each).to(total.dtype))


def compute_zs(
    anat: Anatomy,
    rows: Sequence[Sequence[TokenRow]],
    targets: Sequence[Sequence[int]],
    layer: int,
    *,
    kl_prompts: Sequence[Sequence[TokenRow]] = (),
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
    """Optimises `z = h + δ` for all requests at once, at their lookup positions in the output of `layer`.

    This is `compute_z` of ROME (2202.05262, eq. 4) and MEMIT (2210.07229, eq. 16). Per request it minimises `mean
    NLL(target) over its contexts + kl_factor KL(after | before) + weight_decay |δ| / |h|^2`, `δ` from zero, `|δ|`
    clamped to `clamp_norm_factor |h|`; a request is done when the NLL of its target falls below `stop_loss`. Requests
    do not influence one another: the result does not depend on how many are optimised together.

    Args:
        rows: per request its contexts: the plain prompt first, which gives `h`, then the same prompt in the other
            context templates.
        targets: token ids that must follow each prompt.
        kl_prompts: per request the prompts about its subject ("France is a") whose next token must not change with the
            same `δ` at their lookup positions; their divergences are averaged. In a prompt that carries an answer
            (`TokenRow.extra`) every token of the answer is compared, and the mean counts.
        steps: gradient steps at most.
        lr: Adam's learning rate, or the length of a normalised step in units of `|h|`.
        optimizer: "adam" as published, or "normalised": every step goes `lr |h|` down the gradient. Adam moves each
            coordinate by the same amount, so most of its `δ` is off the gradient; normalised steps reach the same
            loss with about half the norm, and a smaller `δ` is a smaller edit.
        norms: `[n]`, the unit of the weight decay and the clamp; `None`: `|h|`. ROME takes the norm of the MLP's
            output.
        names: what to call the requests in errors.

    Raises:
        EditError: a loss is not finite; names the request.
    """
    options = _DescentOptions(steps, lr, weight_decay, clamp_norm_factor, kl_factor, stop_loss, optimizer)
    kept = kl_prompts or [()] * len(rows)
    parts: list[Values] = []
    chunks = _chunks(rows, kept, targets, _few_tokens(anat))
    with no_param_grad(anat.model), tqdm(total=len(rows), desc="values", disable=not progress, leave=False) as bar:
        for chunk in chunks:
            descent = _Descent(
                anat,
                [rows[i] for i in chunk],
                [targets[i] for i in chunk],
                [kept[i] for i in chunk],
                layer,
                options,
                None if norms is None else norms[chunk],
            )
            parts.append(_optimise(descent, [names[i] if names else f"number {i + 1}" for i in chunk], bar))
    order = [i for chunk in chunks for i in chunk]
    return Values.joined(parts).select([order.index(i) for i in range(len(rows))])


def _few_tokens(anat: Anatomy) -> int:
    """Returns the number of tokens below which the time of a pass hardly depends on it."""
    slow = anat.device.type == "cpu" and anat.embedding.weight.dtype.itemsize >= 4
    return FEW_TOKENS if slow else FEW_FAST_TOKENS


def _chunks(
    rows: Sequence[Sequence[TokenRow]],
    kl_prompts: Sequence[Sequence[TokenRow]],
    targets: Sequence[Sequence[int]],
    few_tokens: int,
) -> list[list[int]]:
    """Groups requests so that each group has at most `CHUNK_ROWS` prompts and `CHUNK_TOKENS` padded tokens.

    So memory grows neither with the number of requests nor with their length. Requests with suffixes of similar length
    form a group, since padding costs as much as tokens do.
    """
    suffix = [
        max(len(row) - row.lookup for row in contexts) + len(target) - 1
        for contexts, target in zip(rows, targets, strict=True)
    ]
    groups: list[list[int]] = []
    held = longest = tokens = 0  # of the last group: its prompts, the longest of them, and the sum of its suffixes
    for i in sorted(range(len(rows)), key=lambda i: suffix[i]):
        size, length = len(rows[i]) + len(kl_prompts[i]), max(map(len, (*rows[i], *kl_prompts[i])))
        full = held + size > CHUNK_ROWS or (held + size) * max(longest, length) > CHUNK_TOKENS
        most = max(few_tokens, PADDING * (tokens + size * suffix[i]))
        padded = (held + size) * suffix[i] > most
        if not groups or full or padded:
            groups.append([])
            held = longest = tokens = 0
        groups[-1].append(i)
        held, longest, tokens = held + size, max(longest, length), tokens + size * suffix[i]
    return groups


def _optimise(descent: _Descent, names: Sequence[str], bar: tqdm[Any]) -> Values:
    """Descends until every request of the chunk is done; `compute_zs` for one chunk."""
    options, n = descent.options, len(names)
    final = torch.zeros_like(descent.h)  # [n, d_model], δ where the last loss of a request was taken
    taken, last_nll = [0] * n, [0.0] * n
    active = torch.arange(n, device=descent.h.device)
    for step in range(options.steps):
        nll, loss = descent.losses(active)  # [active] each
        _check_finite(loss, active, names)
        # Kept at every step: a request may be done at any of them.
        for i, value in zip(active.tolist(), nll.detach().tolist(), strict=True):
            taken[i], last_nll[i] = step, value
        final[active] = descent.delta.detach()[active]
        resting = nll.detach() < options.stop_loss
        bar.update(int(resting.sum()))
        active = active[~resting]
        # The loss of the last step is only read: a step after it would move δ away from the NLL that is reported.
        if not len(active) or step == options.steps - 1:
            break
        descent.step(loss[~resting].sum())
    relative = (final.norm(dim=1) / descent.norm).tolist()
    return Values((descent.h + final).T.contiguous(), final.T.contiguous(), taken, last_nll, relative)


class _Descent:
    """Holds the changes `δ [n, d_model]` of one chunk's requests, computes their losses, and takes the steps.

    Attributes:
        h: `[n, d_model]`, the states to change, in fp32 at least.
        norm: `[n]`, the unit of the weight decay and the clamp.
        delta: `δ [n, d_model]`, zero at first.
    """

    def __init__(
        self,
        anat: Anatomy,
        rows: Sequence[Sequence[TokenRow]],
        targets: Sequence[Sequence[int]],
        kl_prompts: Sequence[Sequence[TokenRow]],
        layer: int,
        options: _DescentOptions,
        norms: Tensor | None,
    ) -> None:
        self.anat, self.layer, self.options, self.targets = anat, layer, options, targets
        # The last token of a target is only predicted, so it is never an input.
        flat = [row.followed_by(targets[i][:-1]) for i, contexts in enumerate(rows) for row in contexts]
        self.owner = torch.tensor([i for i, contexts in enumerate(rows) for _ in contexts], device=anat.device)
        self.main, self.kl = _suffixes(anat, flat, kl_prompts if options.kl_factor > 0 else [], layer)
        hidden, lookup = self.main.hidden, self.main.batch.lookup
        plain = torch.searchsorted(self.owner, torch.arange(len(rows), device=anat.device))  # [n], first contexts
        self.h = hidden[plain, lookup[plain]].to(torch.promote_types(hidden.dtype, torch.float32))
        self.norm = self.h.norm(dim=1) if norms is None else norms.to(self.h)
        self.delta = torch.zeros_like(self.h, requires_grad=True)
        self.adam = torch.optim.Adam([self.delta], lr=options.lr) if options.optimizer == "adam" else None

    def losses(self, active: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the NLL of the target and the whole loss of each active request, `[active]` each."""
        rows = torch.isin(self.owner, active).nonzero().flatten()  # [r], their contexts
        lengths = torch.tensor([len(self.targets[i]) for i in self.owner[rows].tolist()], device=rows.device)
        wanted = [(self.main, self.main.last(rows, self.owner[rows], lengths))]
        positions = None if self.kl is None else self.kl.positions(active)
        if self.kl is not None and positions is not None:
            wanted.append((self.kl.suffixes, positions))
        logits = read_logits(self.anat, self.layer, self.delta, wanted)
        nll = _target_nll(logits[0], wanted[0][1], active, self.targets)
        loss = nll + self.options.weight_decay * self.delta[active].norm(dim=1) / self.norm[active] ** 2
        if self.kl is not None and positions is not None:
            loss = loss + self.options.kl_factor * self.kl.divergence(logits[1], active, len(self.h))
        return nll, loss

    def step(self, loss: Tensor) -> None:
        """Takes one step down the gradient of `loss`, then clamps each `δ` to its largest allowed norm."""
        (gradient,) = torch.autograd.grad(loss, self.delta)  # [n, d_model], zero for requests that are done
        if self.adam is not None:
            self.delta.grad = gradient
            self.adam.step()
        with torch.no_grad():
            if self.adam is None:
                direction = gradient / gradient.norm(dim=1, keepdim=True).clamp_min(1e-12)
                self.delta.sub_(self.options.lr * self.norm[:, None] * direction)
            longest = self.options.clamp_norm_factor * self.norm  # [n]
            self.delta.mul_((longest / self.delta.norm(dim=1).clamp_min(1e-12)).clamp_max(1.0)[:, None])


def _suffixes(
    anat: Anatomy, flat: list[TokenRow], kl_prompts: Sequence[Sequence[TokenRow]], layer: int
) -> tuple[SuffixBatch, _KLPrompts | None]:
    """Runs the rows of the targets and of the KL prompts up to `layer`, in one batch where that is cheaper."""
    kept = [row for prompts in kl_prompts for row in prompts]
    together = not kept or _fit_together(flat, kept, _few_tokens(anat))
    main = SuffixBatch.of(anat, flat + kept if together else flat, layer)
    if not kept:
        return main, None
    suffixes = main if together else SuffixBatch.of(anat, kept, layer)
    rows = torch.arange(len(kept), device=anat.device) + (len(flat) if together else 0)  # [p]
    owners = torch.tensor([i for i, prompts in enumerate(kl_prompts) for _ in prompts], device=anat.device)  # [p]
    return main, _KLPrompts.of(anat, layer, suffixes, rows, owners, len(kl_prompts))


def _fit_together(rows: Sequence[TokenRow], others: Sequence[TokenRow], few_tokens: int) -> bool:
    """Returns whether one pass over the suffixes of both is cheaper than one over each, which reads the weights
    again."""
    width, other = (max(len(row) - row.lookup for row in group) for group in (rows, others))
    together = (len(rows) + len(others)) * max(width, other)  # tokens with padding
    return together <= max(few_tokens, PADDING * (len(rows) * width + len(others) * other))


def _target_nll(logits: Tensor, positions: LogitPositions, active: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
    """Returns the NLL of each active request's target, mean over its tokens and contexts, `[active]`."""
    wanted = torch.tensor([token for i in positions.owner.tolist() for token in targets[i]], device=logits.device)
    each = F.cross_entropy(logits, wanted, reduction="none")  # [m]
    at = torch.searchsorted(active, positions.owner)[positions.row]  # [m], index into `active`
    total = torch.zeros(len(active), dtype=logits.dtype, device=logits.device)
    return total.index_add(0, at, each) / torch.zeros_like(total).index_add(0, at, torch.ones_like(each))


def _check_finite(loss: Tensor, active: Tensor, names: Sequence[str]) -> None:
    """Raises `EditError` with the name of the first request whose loss is not finite."""
    not_finite = (~torch.isfinite(loss)).nonzero().flatten().tolist()
    if not_finite:
        i = int(active[not_finite[0]])
        raise EditError(f"the loss of request {names[i]} is not finite; the model is unchanged: lower `v_lr`")
