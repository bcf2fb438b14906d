"""Find values from rows: the smallest change of a hidden state that brings chosen outputs to chosen numbers.

A row is a prompt, a scalar `y` read from the logits there, and a wanted number. All rows of one subject share the
change `δ [d_model]` at the subject's last token. With `A [m, d_model]`, `A_j = dy_j/dδ`, and `b = wanted - y`, each
Gauss-Newton step is the least-norm solution of `A δ = b`:

    δ += M^-1 A^T (A M^-1 A^T + ε tr(A M^-1 A^T) / m I)^-1 b

`M = I + λ Γ` is a metric on outputs (`left_metric`): it makes steps short in directions on which other answers depend.
The key at the subject's last token does not depend on the relation that is asked for; the gradient there does. So the
key selects the subject and the value the relation, and relations with "keep" rows are preserved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from editlib.algorithms.left_metric import least_norm_step
from editlib.errors import EditError
from editlib.models.anatomy import Anatomy
from editlib.models.forward import encode_prefix, forward, split
from editlib.models.precision import plain_attention
from editlib.models.prefix import Prefix
from editlib.models.prompts import TokenBatch, TokenRow, pad

BATCH_TOKENS = 512  # most tokens of a batch, without prefixes: little padding, and a layer fits into caches
TOGETHER = 64  # subjects whose rows, with the keys and values before them, are held at once
BATCH_LOGITS = 2**25  # most numbers in the logits of a batch, in fp32
RIVALS = 20  # likeliest other tokens, which serve as rivals of an answer where no answers of its kind are known
MET = 0.1  # nats: root mean square residual at which a subject's rows are met; rounding in bf16 is nearly as large
HALVED = 0.5  # after a step that leaves at most this share of the residual, the next one reuses its Jacobian


@dataclass(frozen=True)
class Row:
    """Holds one scalar to be read, and the positions at which the change is added.

    Args:
        kind: "erase", "keep" or "say", see `read_logits`.
        owner: number of the subject whose change is added to the row's states.
        ids: all tokens of the row.
        places: columns of the subject's last token, at each of which the change is added.
        columns: columns whose logits are read.
        targets: the token whose logit is read, for each of `columns`; those after the vocabulary are the new tokens.
        rivals: tokens that an answer to erase competes with; none: the likeliest others before any change.
    """

    kind: str
    owner: int
    ids: tuple[int, ...]
    places: tuple[int, ...]
    columns: tuple[int, ...]
    targets: tuple[int, ...]
    rivals: tuple[int, ...] = ()


@dataclass(frozen=True)
class Goals:
    """Holds the numbers that rows should reach, in nats.

    erased: logit of the answer less the log-sum-exp of its rivals, at most this.
    said: log-odds of a new token where it is wanted, at least this.
    """

    erased: float = -3.0
    said: float = 3.0

    def wanted(self, kinds: Sequence[str], y: Tensor, before: Tensor) -> Tensor:
        """Returns the number that each row should have: its current one where that is good enough.

        Args:
            y: `[m]`, the current numbers of the rows. `before`: `[m]`, those without any change.
        """
        erases, says = (torch.tensor([kind == one for kind in kinds], device=y.device) for one in ("erase", "say"))
        # "keep" rows return to their number without any change.
        return torch.where(erases, y.clamp_max(self.erased), torch.where(says, y.clamp_min(self.said), before))


@dataclass(frozen=True)
class RowValues:
    """Holds changes found by rows: `deltas [n, d_model]`, per subject the steps taken and `|δ| / |h|`, and each row
    before, after and wanted."""

    deltas: Tensor
    steps: list[int]
    relative_norm: list[float]
    before: Tensor  # [m]
    after: Tensor  # [m]
    wanted: Tensor  # [m]

    def missed(self, within: float = 1.0) -> list[int]:
        """Returns the rows that are further than `within` nats from the number they should have."""
        return (self.after - self.wanted).abs().gt(within).nonzero().flatten().tolist()


@dataclass
class _Chunk:
    """Holds rows that run together, from the first changed position on; everything earlier is cached."""

    numbers: list[int]
    rows: list[Row]
    batch: TokenBatch
    prefix: Prefix | None
    hidden: Tensor  # [r, T, d_model], what leaves the edited layer
    mask: Tensor  # [r, T, 1], one at the positions that get the change
    read: tuple[Tensor, Tensor]  # rows and columns of the logits, [c] each

    def select(self, indices: list[int]) -> _Chunk:
        """Returns the chunk with `some` of its rows, in ascending order."""
        if len(indices) == len(self.rows):
            return self
        index = torch.tensor(indices, device=self.hidden.device)
        batch = self.batch
        read = torch.isin(self.read[0], index)  # [c]
        return _Chunk(
            [self.numbers[i] for i in indices],
            [self.rows[i] for i in indices],
            TokenBatch(batch.input_ids[index], batch.attention_mask[index], batch.lookup[index], batch.last[index]),
            None if self.prefix is None else self.prefix.select(index),
            self.hidden[index],
            self.mask[index],
            (torch.searchsorted(index, self.read[0][read]), self.read[1][read]),
        )


class RowBatch:
    """Holds rows encoded once up to the edited layer, to be read under any change of their subjects' states.

    Args:
        tokens: output rows `[K, d_model]` of new tokens, which the model has not got; `None`: there are none.
    """

    def __init__(self, anat: Anatomy, rows: Sequence[Row], layer: int, tokens: Tensor | None = None) -> None:
        self.anat, self.rows, self.layer, self.tokens = anat, list(rows), layer, tokens
        vocab = anat.embedding.weight.shape[0]
        self.chunks = [self._encode(numbers) for numbers in _chunks(self.rows, max(1, BATCH_LOGITS // vocab))]
        self._resolve_rivals()

    def states(self, subjects: int) -> Tensor:
        """Returns the hidden state that each subject's change is added to, `[subjects, d_model]` in fp32: of its first
        row."""
        state_of: dict[int, Tensor] = {}
        for chunk in self.chunks:
            first = chunk.mask[..., 0].argmax(dim=1)  # [r]
            for i, row in enumerate(chunk.rows):
                state_of.setdefault(row.owner, chunk.hidden[i, first[i]].float())
        return torch.stack([state_of[i] for i in range(subjects)])

    def read(self, delta: Tensor, *, grad: bool = True, subjects: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Reads all rows under `delta [n, d_model]`, or those of `subjects [n]` (booleans) alone.

        Returns:
            `y [m]`, and with `grad` the Jacobian `A [m, d_model]` of each row to its own subject's change; zeros in
            rows that are not read.
        """
        y = torch.zeros(len(self.rows), device=delta.device)
        jacobian = torch.zeros(len(self.rows), delta.shape[1], device=delta.device) if grad else None
        asked = None if subjects is None else subjects.tolist()
        for whole in self.chunks:
            mine = [i for i, row in enumerate(whole.rows) if asked is None or asked[row.owner]]
            if not mine:
                continue
            chunk = whole.select(mine)
            owner = torch.tensor([row.owner for row in chunk.rows], device=delta.device)
            # Each row has a copy of its subject's change, so one backward pass gives every row its own gradient.
            change = delta[owner].clone().requires_grad_(grad)  # [r, d_model]
            with torch.set_grad_enabled(grad), plain_attention(delta.device):
                logits = self._logits(chunk, change)  # [c, vocab], at the columns of the chunk's rows
                each, slope = read_logits(logits.detach(), chunk.rows)  # [c], [c, vocab]
                if jacobian is not None:
                    # Starting from the slope saves the graph of logarithms over the vocabulary.
                    (gradient,) = torch.autograd.grad(logits, change, slope.to(logits.dtype))  # [r, d_model]
                    jacobian[chunk.numbers] = gradient.float()
            values = torch.zeros(len(chunk.rows), device=delta.device).index_add_(0, chunk.read[0], each)
            y[chunk.numbers] = values
        return y, jacobian

    def _encode(self, numbers: list[int]) -> _Chunk:
        """Runs the rows with these indices up to the edited layer; the tokens before their changes are cached."""
        # No token before the first changed position depends on the change: these run once, here.
        rows = [self.rows[i] for i in numbers]
        cuts = [row.places[0] for row in rows]
        fronts, rests = split([TokenRow(row.ids, row.places[0]) for row in rows], cuts)
        batch = pad(rests, device=self.anat.device)
        # With a subject at the very start there is nothing to cache.
        prefix = encode_prefix(self.anat, fronts) if any(cuts) else None
        with torch.no_grad():
            hidden = forward(self.anat, batch, stop=self.layer + 1, prefix=prefix)
        mask = torch.zeros(*hidden.shape[:2], 1, device=hidden.device)
        at: list[tuple[int, int]] = []
        for i, (row, cut) in enumerate(zip(rows, cuts, strict=True)):
            mask[i, [place - cut for place in row.places]] = 1
            at += [(i, column - cut) for column in row.columns]
        where = torch.tensor(at, device=hidden.device)
        return _Chunk(numbers, rows, batch, prefix, hidden, mask, (where[:, 0], where[:, 1]))

    def _logits(self, chunk: _Chunk, change: Tensor) -> Tensor:
        """Returns logits at the columns of all rows, `[c, vocab + K]`, each row's state changed by its row of
        `change`."""
        added = chunk.hidden.to(change.dtype) + chunk.mask * change[:, None]  # [r, T, d_model]
        seen: list[Tensor] = []  # [c, d_model], the states that enter the head
        logits = forward(
            self.anat,
            chunk.batch,
            start=self.layer + 1,
            hidden=added.to(chunk.hidden.dtype),
            prefix=chunk.prefix,
            score=chunk.read,
            final=seen.append,
        )
        if self.tokens is None:
            return logits
        return torch.cat([logits, seen[0].to(logits) @ self.tokens.to(logits).T], dim=1)

    def _resolve_rivals(self) -> None:
        """Gives erase rows without rivals the likeliest other tokens of the unchanged model."""
        for chunk in self.chunks:
            if not any(row.kind == "erase" and not row.rivals for row in chunk.rows):
                continue
            none = torch.zeros(len(chunk.rows), chunk.hidden.shape[-1], device=chunk.hidden.device)
            with torch.no_grad():
                logits = self._logits(chunk, none)[:, : self.anat.embedding.weight.shape[0]]  # without new tokens
                likeliest = logits.topk(RIVALS + 1).indices  # [c, RIVALS + 1]
            for i, row in enumerate(chunk.rows):
                if row.kind == "erase" and not row.rivals:
                    best = likeliest[chunk.read[0] == i][0].tolist()
                    rivals = tuple(token for token in best if token != row.targets[0])[:RIVALS]
                    chunk.rows[i] = replace(row, rivals=rivals)


def read_logits(logits: Tensor, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Computes the scalar of each row at each of its columns, in nats, and its gradient by the logits there.

    Every kind is a logit less the log-sum-exp of others, `z_target - logsumexp(z_S)`, summed over a row's columns:

    erase: the answer's first token; `S` are its rivals.
    keep: each token of the answer; `S` is the whole vocabulary, so that this is its log probability.
    say: a new token; `S` is all others, so that these are its log-odds.

    Args:
        logits: `[m, vocab]`, at the columns of all `rows`, in order.

    Returns:
        `[m]`, and `[m, vocab]`: one at the target, less the softmax over `S`.
    """
    kinds = [row.kind for row in rows for _ in row.columns]  # of each column
    targets = torch.tensor([token for row in rows for token in row.targets], device=logits.device)  # [m]
    index = torch.arange(len(targets), device=logits.device)
    others = logits.float()  # copied even from fp32 logits, since it is changed in place
    others = others.clone() if others is logits else others
    target_logits = others[index, targets]  # [m]
    erased = [i for i, kind in enumerate(kinds) if kind == "erase"]
    rivals = [row.rivals for row in rows if row.kind == "erase"]
    for i, tokens in zip(erased, rivals, strict=True):
        rival_logits = others[i, list(tokens)]
        others[i] = -torch.inf
        others[i, list(tokens)] = rival_logits
    said = [i for i, kind in enumerate(kinds) if kind == "say"]
    others[said, targets[said]] = -torch.inf
    top = others.amax(dim=1, keepdim=True)  # [m, 1]
    weights = others.sub_(top).exp_()  # in place: these are the largest tensors of a step
    total = weights.sum(dim=1, keepdim=True)  # [m, 1]
    y = target_logits - (top + total.log())[:, 0]  # [m]
    slope = weights.div_(-total)
    slope[index, targets] += 1
    return y, slope


def _chunks(rows: Sequence[Row], most_columns: int) -> list[list[int]]:
    """Groups row numbers by length: at most `BATCH_TOKENS` padded tokens and `most_columns` positions with logits.

    A row that exceeds a limit by itself is a group of its own.
    """
    length = [len(row.ids) - row.places[0] for row in rows]
    groups: list[list[int]] = []
    columns = 0
    for i in sorted(range(len(rows)), key=lambda i: (length[i], i)):
        columns += len(rows[i].columns)
        if not groups or (len(groups[-1]) + 1) * length[i] > BATCH_TOKENS or columns > most_columns:
            groups.append([])
            columns = len(rows[i].columns)
        groups[-1].append(i)
    return groups


def find_row_values(
    anat: Anatomy,
    rows: Sequence[Row],
    layer: int,
    names: Sequence[str],
    goals: Goals,
    *,
    steps: int = 5,
    step_limit: float = 0.35,
    metric: Tensor | None = None,
    start: Tensor | None = None,
    tokens: Tensor | None = None,
    progress: bool = False,
) -> RowValues:
    """Finds each subject's change after `layer` by Gauss-Newton, `TOGETHER` subjects at once.

    A subject is done when the residual of its rows is at most `MET`. Its Jacobian costs more than its rows' values, so
    it is computed for the first two steps, between which it changes most. A later step reuses the last one if the step
    before had its full length and halved the residual. Subjects do not influence one another.

    Args:
        names: of the subjects, by number; for errors.
        steps: most Gauss-Newton steps. `step_limit`: the longest, in units of the norm of the subject's state.
        metric: see `least_norm_step`.
        start: changes to start from, `[subjects, d_model]`; `None`: zeros.
        tokens: see `RowBatch`.

    Raises:
        EditError: a row reads a number that is not finite; names the subject.
    """
    delta = torch.zeros(len(names), anat.d_model, device=anat.device)
    before, after, wanted = torch.zeros(3, len(rows), device=anat.device)
    parts = []
    for first in range(0, len(names), TOGETHER):
        last = min(first + TOGETHER, len(names))
        some = [j for j, row in enumerate(rows) if first <= row.owner < last]
        found = _find_together(
            anat,
            [replace(rows[j], owner=rows[j].owner - first) for j in some],
            layer,
            names[first:last],
            goals,
            steps=steps,
            step_limit=step_limit,
            metric=metric,
            start=None if start is None else start[first:last],
            tokens=tokens,
            label=f"values {first + 1} to {last} of {len(names)}" if progress else None,
        )
        delta[first:last] = found.deltas
        before[some], after[some], wanted[some] = found.before, found.after, found.wanted
        parts.append(found)
    taken = [count for part in parts for count in part.steps]
    return RowValues(delta, taken, [one for part in parts for one in part.relative_norm], before, after, wanted)


def _find_together(
    anat: Anatomy,
    rows: Sequence[Row],
    layer: int,
    names: Sequence[str],
    goals: Goals,
    *,
    steps: int,
    step_limit: float,
    metric: Tensor | None,
    start: Tensor | None,
    tokens: Tensor | None,
    label: str | None,
) -> RowValues:
    """Finds the changes of subjects whose rows are held at once; `label`: of the progress bar, `None` for none."""
    batch = RowBatch(anat, rows, layer, tokens)
    kinds = [row.kind for row in rows]
    norms = batch.states(len(names)).norm(dim=1)  # [n]
    delta = torch.zeros(len(names), anat.d_model, device=anat.device)
    unchanged = None if start is None else batch.read(delta, grad=False)[0]
    delta = delta if start is None else start.to(delta, copy=True)
    owner = torch.tensor([row.owner for row in rows], device=anat.device)
    m, n = len(rows), len(names)
    y, jacobian = torch.zeros(m, device=anat.device), torch.zeros(m, anat.d_model, device=anat.device)
    before = wanted = y
    active, stale = torch.ones(2, n, dtype=torch.bool, device=anat.device)  # not done; Jacobian out of date
    taken = [0] * n
    residual = torch.zeros(n, device=anat.device)  # root mean square over a subject's rows, in the previous step
    for step in tqdm(range(steps + 1), desc=label, disable=label is None, leave=False):
        last = step == steps
        for grad, due in ((True, active & stale & (not last)), (False, active & (~stale | last))):
            if bool(due.any()):
                readings, slopes = batch.read(delta, grad=grad, subjects=due)
                y = torch.where(due[owner], readings, y)
                jacobian = jacobian if slopes is None else torch.where(due[owner][:, None], slopes, jacobian)
        not_finite = (~torch.isfinite(y)).nonzero().flatten().tolist()
        if not_finite:
            raise EditError(f"a row of {names[rows[not_finite[0]].owner]} is not finite; the model is unchanged")
        before = before if step else y if unchanged is None else unchanged
        wanted = goals.wanted(kinds, y, before)
        rms = torch.zeros_like(residual).index_add_(0, owner, (wanted - y) ** 2)
        rms = (rms / torch.bincount(owner, minlength=n)).sqrt()  # [n]
        stale, residual, active = rms > HALVED * residual, rms, active & (rms > MET)
        if last or not bool(active.any()):
            break
        for i in active.nonzero().flatten().tolist():
            mine = owner == i  # [m]
            move = least_norm_step(jacobian[mine], (wanted - y)[mine], metric=metric)
            share = step_limit * norms[i] / move.norm().clamp_min(torch.finfo(move.dtype).tiny)
            delta[i] += move * share.clamp_max(1.0)
            stale[i] |= bool(share < 1)
            taken[i] += 1
    return RowValues(delta, taken, (delta.norm(dim=1) / norms).tolist(), before, y, wanted)
