"""Find values from rows: the smallest change of a hidden state after which chosen outputs have chosen numbers.

A row is a prompt, a scalar `y` read from the logits there, and a wanted number. All rows of one subject share the
change `δ [d_model]` at the subject's last token. With `A [m, d_model]`, `A_j = dy_j/dδ`, and `b = wanted - y`, each
Gauss-Newton step is the least-norm solution of `A δ = b`:

    δ += M^-1 A^T (A M^-1 A^T + ε tr(A M^-1 A^T) / m I)^-1 b

`M = I + λ Γ` is a metric on outputs (`left_metric`): it makes steps short in directions that other answers read.
The key at the subject's last token does not know the relation that is asked for; its gradient does. So the key
selects the subject and the value the relation, and a relation that rows keep is not touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from editlib.errors import EditError
from editlib.models.anatomy import Anatomy
from editlib.models.forward import encode_prefix, forward, split
from editlib.models.precision import plain_attention
from editlib.models.prefix import Prefix
from editlib.models.prompts import TokenBatch, TokenRow, pad

BATCH_TOKENS = 512  # of all rows of a batch, prefixes not counted: few are padding, and a layer fits into caches
BATCH_LOGITS = 2**25  # numbers in the logits of a batch, which are held in fp32
RIVALS = 20  # likeliest other tokens that an answer is compared with where no others of its kind are known
RIDGE = 3e-3  # ε: rows that contradict one another share what is left of their residuals
MET = 0.1  # root mean square residual of a subject's rows, in nats, at which it rests; bf16 rounds by nearly as much
HALVED = 0.5  # of the residual must go in a step for its Jacobian to serve once more


@dataclass(frozen=True)
class Row:
    """Holds one scalar to be read, and at what positions the change is added.

    kind: "erase" or "keep", see `read_logits`.
    owner: number of the subject whose change the row gets.
    ids: all tokens of the row. `places`: columns of the subject's last token, each of which gets the change.
    columns: where logits are read. `targets`: the token looked for at each of them.
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
    """Holds what rows are wanted to read, in nats.

    erased: logit of the answer less the log-sum-exp of its rivals, at most this.
    """

    erased: float = -3.0

    def wanted(self, kinds: Sequence[str], y: Tensor, before: Tensor) -> Tensor:
        """Returns the number that each row should have: what it has, where that is good enough.

        Args:
            y: `[m]`, the rows as they are. `before`: `[m]`, without any change.
        """
        erases = torch.tensor([kind == "erase" for kind in kinds], dtype=torch.bool, device=y.device)
        # "keep" rows go back to where they were.
        return torch.where(erases, y.clamp_max(self.erased), before)


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
        """Returns rows that are further than `within` nats from what they should read."""
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

    def select(self, some: list[int]) -> _Chunk:
        """Returns the chunk with `some` of its rows, in ascending order."""
        if len(some) == len(self.rows):
            return self
        index = torch.tensor(some, device=self.hidden.device)
        batch = self.batch
        kept = torch.isin(self.read[0], index)  # [c]
        return _Chunk(
            [self.numbers[i] for i in some],
            [self.rows[i] for i in some],
            TokenBatch(batch.input_ids[index], batch.attention_mask[index], batch.lookup[index], batch.last[index]),
            None if self.prefix is None else self.prefix.select(index),
            self.hidden[index],
            self.mask[index],
            (torch.searchsorted(index, self.read[0][kept]), self.read[1][kept]),
        )


class RowBatch:
    """Holds rows encoded up to the edited layer once, to be read under any change of their subjects' states."""

    def __init__(self, anat: Anatomy, rows: Sequence[Row], layer: int) -> None:
        self.anat, self.rows, self.layer = anat, list(rows), layer
        vocab = anat.embedding.weight.shape[0]
        self.chunks = [self._encode(numbers) for numbers in _chunks(self.rows, max(1, BATCH_LOGITS // vocab))]
        self._resolve_rivals()

    def states(self, subjects: int) -> Tensor:
        """Returns the hidden state that each subject's change is added to, `[subjects, d_model]` in fp32: of its first
        row."""
        found: dict[int, Tensor] = {}
        for chunk in self.chunks:
            first = chunk.mask[..., 0].argmax(dim=1)  # [r]
            for i, row in enumerate(chunk.rows):
                found.setdefault(row.owner, chunk.hidden[i, first[i]].float())
        return torch.stack([found[i] for i in range(subjects)])

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
                    # Starting from the slope spares the graph of logarithms over the vocabulary.
                    (gradient,) = torch.autograd.grad(logits, change, slope.to(logits.dtype))  # [r, d_model]
                    jacobian[chunk.numbers] = gradient.float()
            values = torch.zeros(len(chunk.rows), device=delta.device).index_add_(0, chunk.read[0], each)
            y[chunk.numbers] = values
        return y, jacobian

    def _encode(self, numbers: list[int]) -> _Chunk:
        rows = [self.rows[i] for i in numbers]
        cuts = [row.places[0] for row in rows]
        fronts, rests = split([TokenRow(row.ids, row.places[0]) for row in rows], cuts)
        batch = pad(rests, device=self.anat.device)
        # A subject at the very start leaves nothing to cache.
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
        """Returns logits at the columns of all rows, `[c, vocab]`, each row's state changed by its row of `change`."""
        added = chunk.hidden.to(change.dtype) + chunk.mask * change[:, None]  # [r, T, d_model]
        return forward(
            self.anat,
            chunk.batch,
            start=self.layer + 1,
            hidden=added.to(chunk.hidden.dtype),
            prefix=chunk.prefix,
            score=chunk.read,
        )

    def _resolve_rivals(self) -> None:
        """Gives erase rows without rivals the likeliest other tokens of the unchanged model."""
        for chunk in self.chunks:
            if not any(row.kind == "erase" and not row.rivals for row in chunk.rows):
                continue
            none = torch.zeros(len(chunk.rows), chunk.hidden.shape[-1], device=chunk.hidden.device)
            with torch.no_grad():
                likeliest = self._logits(chunk, none).topk(RIVALS + 1).indices  # [c, RIVALS + 1]
            for i, row in enumerate(chunk.rows):
                if row.kind == "erase" and not row.rivals:
                    best = likeliest[chunk.read[0] == i][0].tolist()
                    rivals = tuple(token for token in best if token != row.targets[0])[:RIVALS]
                    chunk.rows[i] = replace(row, rivals=rivals)


def read_logits(logits: Tensor, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Returns what rows read at each of their columns, in nats, and its gradient with respect to the logits there.

    Every kind is a logit less the log-sum-exp of others, `z_target - logsumexp(z_S)`, summed over a row's columns:

    erase: the answer's first token; `S` are its rivals.
    keep: each token of the answer; `S` is the whole vocabulary, so that this is its log probability.

    Args:
        logits: `[m, vocab]`, at the columns of all `rows`, in order.

    Returns:
        `[m]`, and `[m, vocab]`: one at the target, less the softmax over `S`.
    """
    kinds = [row.kind for row in rows for _ in row.columns]  # of each column
    targets = torch.tensor([token for row in rows for token in row.targets], device=logits.device)  # [m]
    index = torch.arange(len(targets), device=logits.device)
    others = logits.float()  # a copy even of fp32 logits, since it is changed
    others = others.clone() if others is logits else others
    aimed = others[index, targets]  # [m]
    erased = [i for i, kind in enumerate(kinds) if kind == "erase"]
    rivals = [row.rivals for row in rows if row.kind == "erase"]
    for i, tokens in zip(erased, rivals, strict=True):
        held = others[i, list(tokens)]
        others[i] = -torch.inf
        others[i, list(tokens)] = held
    top = others.amax(dim=1, keepdim=True)  # [m, 1]
    weights = others.sub_(top).exp_()  # in place: these are the largest tensors of a step
    total = weights.sum(dim=1, keepdim=True)  # [m, 1]
    y = aimed - (top + total.log())[:, 0]  # [m]
    slope = weights.div_(-total)
    slope[index, targets] += 1
    return y, slope


def _chunks(rows: Sequence[Row], most_columns: int) -> list[list[int]]:
    """Returns row numbers in groups of like length whose padded size keeps to `BATCH_TOKENS` and whose logits are read
    at no more than `most_columns` positions; a row that is larger alone is a group."""
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


def least_norm_step(
    jacobian: Tensor, residual: Tensor, *, ridge: float = RIDGE, metric: Tensor | None = None
) -> Tensor:
    """Computes the shortest change that moves `m` rows by `residual [m]`, to first order: `[d_model]`.

    Args:
        jacobian: `A [m, d_model]`.
        ridge: ε, as a share of the mean squared length of the rows of `A`.
        metric: `M^-1/2 [d_model, d_model]`, symmetric; `None`: lengths are Euclidean.
    """
    scaled = jacobian if metric is None else jacobian @ metric  # [m, d_model]
    gram = scaled @ scaled.T  # [m, m]
    gram.diagonal().add_(ridge * gram.trace() / len(gram))
    step: Tensor = scaled.T @ torch.linalg.solve(gram, residual)  # [d_model]
    return step if metric is None else metric @ step


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
    progress: bool = False,
) -> RowValues:
    """Finds each subject's change after `layer` by Gauss-Newton, all subjects in one batch.

    A subject rests when its rows read what they should (`MET`). Its Jacobian, which costs more than reading the rows,
    is read for the first two steps, since it changes most with the first; it serves for a later step where the one
    before had its full length and halved the residual.

    Subjects do not influence one another: the result does not depend on which are found together.

    Args:
        names: of the subjects, by number; for errors.
        steps: at most.
        step_limit: longest step, in norms of the subject's state.
        metric: see `least_norm_step`.

    Raises:
        EditError: a row reads a number that is not finite; names the subject.
    """
    batch = RowBatch(anat, rows, layer)
    kinds = [row.kind for row in rows]
    norms = batch.states(len(names)).norm(dim=1)  # [n]
    delta = torch.zeros(len(names), anat.d_model, device=anat.device)
    owner = torch.tensor([row.owner for row in rows], device=anat.device)
    m, n = len(rows), len(names)
    y, jacobian = torch.zeros(m, device=anat.device), torch.zeros(m, anat.d_model, device=anat.device)
    before = wanted = y
    active, stale = torch.ones(2, n, dtype=torch.bool, device=anat.device)  # subjects at work; Jacobians to read again
    taken = [0] * n
    residual = torch.zeros(n, device=anat.device)  # root mean square over a subject's rows, in the step before
    for step in tqdm(range(steps + 1), desc="values", disable=not progress, leave=False):
        last = step == steps
        for grad, some in ((True, active & stale & (not last)), (False, active & (~stale | last))):
            if bool(some.any()):
                found, slopes = batch.read(delta, grad=grad, subjects=some)
                y = torch.where(some[owner], found, y)
                jacobian = jacobian if slopes is None else torch.where(some[owner][:, None], slopes, jacobian)
        bad = (~torch.isfinite(y)).nonzero().flatten().tolist()
        if bad:
            raise EditError(f"a row of {names[rows[bad[0]].owner]} is not finite; the model is unchanged")
        before = y if step == 0 else before
        wanted = goals.wanted(kinds, y, before)
        now = torch.zeros_like(residual).index_add_(0, owner, (wanted - y) ** 2)
        now = (now / torch.bincount(owner, minlength=n)).sqrt()  # [n]
        stale, residual, active = now > HALVED * residual, now, active & (now > MET)
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
