"""Values from rows: the smallest change of a hidden state after which chosen outputs have chosen numbers.

A row is a prompt, a scalar `y` read from the logits there, and a wanted number. All rows of one subject share the
change `δ [d_model]` at the subject's last token. With `A [m, d_model]`, `A_j = dy_j/dδ`, and `b = wanted - y`, each
Gauss-Newton step is the least-norm solution of `A δ = b`:

    δ += M^-1 A^T (G + ε diag(G))^-1 b,    G = A M^-1 A^T

`M = I + λ Γ` is a metric on outputs (`left_metric`): it makes steps short in directions that other answers read.
The key at the subject's last token does not know the relation that is asked for; its gradient does. So the subject is
told by the key and the relation by the value, and a relation that rows keep is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from editlib.algorithms.mark import Mark, find_mark
from editlib.errors import EditError
from editlib.models.anatomy import Anatomy
from editlib.models.forward import encode_prefix, forward, split
from editlib.models.precision import plain_attention
from editlib.models.prefix import Prefix
from editlib.models.prompts import TokenBatch, TokenRow, pad

BATCH_TOKENS = 512  # of all rows of a batch, prefixes not counted: few are padding, and a layer fits into caches
BATCH_LOGITS = 2**25  # numbers in the logits of a batch, which are held in fp32
RIVALS = 20  # likeliest other tokens that an answer is compared with where no others of its kind are known
MARKS = ("mark", "still")
DRAWS, DRAWN = 3, 0.3  # random changes of each subject that the mark is found from, and their length in norms
NATURAL = 8192  # states of kept answers, about, that the mark is found from
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
    marks: groups of columns; the mark, summed over each group, is another scalar (`mark.Mark`).
    """

    kind: str
    owner: int
    ids: tuple[int, ...]
    places: tuple[int, ...]
    columns: tuple[int, ...]
    targets: tuple[int, ...]
    rivals: tuple[int, ...] = ()
    marks: tuple[tuple[int, ...], ...] = ()

    @property
    def read(self) -> tuple[int, ...]:
        """All columns that are read: those of the logits, then those of marks alone."""
        return tuple(dict.fromkeys([*self.columns, *(column for group in self.marks for column in group)]))


@dataclass(frozen=True)
class Reading:
    """Names one scalar of a subject `owner`: what the logits of a row read (`kind` "erase" or "keep"), or the mark in
    one group of columns. Where answers are erased it is the mean over the subject's `rows` ("mark"), elsewhere that of
    one row, to be kept ("still")."""

    kind: str
    owner: int
    rows: tuple[int, ...]
    group: int = 0


def readings(rows: Sequence[Row]) -> list[Reading]:
    """Lists the scalars of all rows: what their logits read, row by row, and then their marks."""
    found = [Reading(row.kind, row.owner, (i,)) for i, row in enumerate(rows)]
    marked: dict[tuple[int, int], list[int]] = {}
    for i, row in enumerate(rows):
        for group in range(len(row.marks)):
            if row.kind == "erase":
                marked.setdefault((row.owner, group), []).append(i)
            else:
                found.append(Reading("still", row.owner, (i,), group))
    # To set the mark at every wording alike would make a change long: their gradients differ.
    return [*found, *(Reading("mark", owner, tuple(mine), group) for (owner, group), mine in marked.items())]


@dataclass(frozen=True)
class Goals:
    """Holds what rows are wanted to read.

    erased: logit of the answer less the log-sum-exp of its rivals, at most this (nats).
    marked: the mark where an answer is erased, at least this (standard deviations).
    """

    erased: float = -3.0
    marked: float = 0.0

    def wanted(self, kinds: Sequence[str], y: Tensor, before: Tensor) -> Tensor:
        """Returns the number that each row should have: what it has, where that is good enough.

        Args:
            y: `[m]`, the rows as they are. `before`: `[m]`, without any change.
        """
        erases, marks = (
            torch.tensor([kind == name for kind in kinds], dtype=torch.bool, device=y.device)
            for name in ("erase", "mark")
        )
        # All others go back to where they were.
        kept = torch.where(marks, y.clamp_min(self.marked), before)
        return torch.where(erases, y.clamp_max(self.erased), kept)


@dataclass(frozen=True)
class RowValues:
    """Changes found by rows: `deltas [n, d_model]`, per subject the steps taken and `|δ| / |h|`, and each of the
    `readings` before, after and wanted."""

    deltas: Tensor
    steps: list[int]
    relative_norm: list[float]
    before: Tensor  # [m]
    after: Tensor  # [m]
    wanted: Tensor  # [m]
    readings: list[Reading]  # [m]

    def missed(self, within: float = 1.0) -> list[int]:
        """Returns readings that are further than `within` nats from what they should read."""
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
        self.readings = readings(rows)
        self.mark: Mark | None = None  # what the rows' `marks` read
        marks = [(i, one) for i, one in enumerate(self.readings) if one.kind in MARKS]
        self._marked = {(row, one.group): (i, len(one.rows)) for i, one in marks for row in one.rows}
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
            `y [m]`, the `readings`, and with `grad` the Jacobian `A [m, d_model]` of each to its own subject's change;
            zeros in rows that are not read.
        """
        y = torch.zeros(len(self.readings), device=delta.device)
        jacobian = torch.zeros(len(self.readings), delta.shape[1], device=delta.device) if grad else None
        for chunk in self._of(subjects):
            owner = torch.tensor([row.owner for row in chunk.rows], device=delta.device)
            # Each row has a copy of its subject's change, so one backward pass gives every row its own gradient.
            change = delta[owner].clone().requires_grad_(grad)  # [r, d_model]
            with torch.set_grad_enabled(grad), plain_attention(delta.device):
                final: list[Tensor] = []
                logits = self._logits(chunk, change, final.append)  # [c, vocab], at the columns of the chunk's rows
                self._read_marks(chunk, change, final[0], y, jacobian)
                each, slope = _read_some(logits.detach(), chunk)  # [c], [c, vocab]
                if jacobian is not None:
                    # Starting from the slope spares the graph of logarithms over the vocabulary.
                    (gradient,) = torch.autograd.grad(logits, change, slope.to(logits.dtype))  # [r, d_model]
                    jacobian[chunk.numbers] = gradient.float()
            values = torch.zeros(len(chunk.rows), device=delta.device).index_add_(0, chunk.read[0], each)
            y[chunk.numbers] = values
        return y, jacobian

    def finals(self, delta: Tensor, kind: str) -> Tensor:
        """Returns final states of rows of one kind under `delta [n, d_model]`, `[k, d_model]` in fp32: at the columns
        of the marks of "erase" rows, or at some columns of "keep" rows, as many of each chunk."""
        found = []
        for chunk in self.chunks:
            owner = torch.tensor([row.owner for row in chunk.rows], device=delta.device)
            final: list[Tensor] = []
            with torch.no_grad():
                self._logits(chunk, delta[owner], final.append)
            wanted = [
                row.kind == kind and (kind == "keep" or any(column in group for group in row.marks))
                for row in chunk.rows
                for column in row.read
            ]
            some = final[0][torch.tensor(wanted, device=delta.device)].float()
            step = 1 if kind == "erase" else max(1, len(some) * len(self.chunks) // NATURAL)
            found.append(some[::step])
        return torch.cat(found)

    def _of(self, subjects: Tensor | None) -> Iterator[_Chunk]:
        """Yields the chunks of all rows, or of those of `subjects [n]` (booleans)."""
        asked = None if subjects is None else subjects.tolist()
        for whole in self.chunks:
            mine = [i for i, row in enumerate(whole.rows) if asked is None or asked[row.owner]]
            if mine:
                yield whole.select(mine)

    def _read_marks(self, chunk: _Chunk, change: Tensor, final: Tensor, y: Tensor, jacobian: Tensor | None) -> None:
        """Puts what the mark reads in `final [c, d_model]`, and its gradients to `change`, into `y` and `jacobian`."""
        if self.mark is None:
            return
        direction = self.mark.direction.to(final.dtype)
        for group in range(max(len(row.marks) for row in chunk.rows)):
            mine = [i for i, row in enumerate(chunk.rows) if len(row.marks) > group]
            inside = torch.tensor(
                [len(row.marks) > group and column in row.marks[group] for row in chunk.rows for column in row.read],
                device=final.device,
            )  # [c]
            if not mine:
                continue
            # A mean over the rows of a reading is summed up row by row.
            at, counts = (
                torch.tensor(each, device=y.device)
                for each in zip(*(self._marked[chunk.numbers[i], group] for i in mine), strict=True)
            )
            values = torch.zeros(len(chunk.rows), device=y.device)
            values.index_add_(0, chunk.read[0], self.mark.read(final.detach()) * inside)
            y.index_add_(0, at, values[mine] / counts)
            if jacobian is not None:
                # The graph is needed again, for the next group or the logits.
                (gradient,) = torch.autograd.grad(final, change, inside[:, None] * direction, retain_graph=True)
                jacobian.index_add_(0, at, gradient.float()[mine] / counts[:, None])

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
            at += [(i, column - cut) for column in row.read]
        where = torch.tensor(at, device=hidden.device)
        return _Chunk(numbers, rows, batch, prefix, hidden, mask, (where[:, 0], where[:, 1]))

    def _logits(self, chunk: _Chunk, change: Tensor, final: Callable[[Tensor], None] | None = None) -> Tensor:
        """Returns logits at the columns of all rows, `[c, vocab]`, each row's state changed by its row of `change`;
        `final` is called with the states `[c, d_model]` that enter the head there."""
        added = chunk.hidden.to(change.dtype) + chunk.mask * change[:, None]  # [r, T, d_model]
        return forward(
            self.anat,
            chunk.batch,
            start=self.layer + 1,
            hidden=added.to(chunk.hidden.dtype),
            prefix=chunk.prefix,
            score=chunk.read,
            final=final,
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


def _read_some(logits: Tensor, chunk: _Chunk) -> tuple[Tensor, Tensor]:
    """Returns what `read_logits` does, with zeros at the columns where marks alone are read."""
    scored = [k < len(row.columns) for row in chunk.rows for k in range(len(row.read))]
    if all(scored):
        return read_logits(logits, chunk.rows)
    index = torch.tensor(scored, device=logits.device)
    each, slope = torch.zeros(len(logits), device=logits.device), torch.zeros_like(logits, dtype=torch.float32)
    each[index], slope[index] = read_logits(logits[index], chunk.rows)
    return each, slope


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
        columns += len(rows[i].read)
        if not groups or (len(groups[-1]) + 1) * length[i] > BATCH_TOKENS or columns > most_columns:
            groups.append([])
            columns = len(rows[i].read)
        groups[-1].append(i)
    return groups


def least_norm_step(
    jacobian: Tensor, residual: Tensor, *, ridge: float = RIDGE, metric: Tensor | None = None
) -> Tensor:
    """Computes the shortest change that moves `m` rows by `residual [m]`, to first order: `[d_model]`.

    Args:
        jacobian: `A [m, d_model]`.
        ridge: ε, as a share of each row's own squared length (Marquardt 1963): rows with small gradients are met as
            well as those with large ones.
        metric: `M^-1/2 [d_model, d_model]`, symmetric; `None`: lengths are Euclidean.
    """
    scaled = jacobian if metric is None else jacobian @ metric  # [m, d_model]
    gram = scaled @ scaled.T  # [m, m]
    # A row that no change moves has no length of its own.
    least = torch.finfo(gram.dtype).eps * gram.trace() / len(gram)
    gram.diagonal().mul_(1 + ridge).add_(least)
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

    Subjects do not influence one another, but for the mark, which is found from all of them: without one the result
    does not depend on which are found together.

    Args:
        names: of the subjects, by number; for errors.
        steps: at most.
        step_limit: longest step, in norms of the subject's state.
        metric: see `least_norm_step`.

    Raises:
        EditError: a row reads a number that is not finite; names the subject.
    """
    # Without a goal for it the mark is not read.
    rows = rows if goals.marked else [replace(row, marks=()) for row in rows]
    batch = RowBatch(anat, rows, layer)
    norms = batch.states(len(names)).norm(dim=1)  # [n]
    if goals.marked:
        batch.mark = _find_mark(batch, norms)
    kinds = [one.kind for one in batch.readings]
    delta = torch.zeros(len(names), anat.d_model, device=anat.device)
    owner = torch.tensor([one.owner for one in batch.readings], device=anat.device)
    m, n = len(batch.readings), len(names)
    y, jacobian = torch.zeros(m, device=anat.device), torch.zeros(m, anat.d_model, device=anat.device)
    before = wanted = y
    active, anew = torch.ones(2, n, dtype=torch.bool, device=anat.device)  # subjects at work; Jacobians to be read
    taken = [0] * n
    residual = torch.zeros(n, device=anat.device)  # root mean square over a subject's rows, in the step before
    for step in tqdm(range(steps + 1), desc="values", disable=not progress, leave=False):
        last = step == steps
        for grad, some in ((True, active & anew & (not last)), (False, active & (~anew | last))):
            if bool(some.any()):
                found, slopes = batch.read(delta, grad=grad, subjects=some)
                y = torch.where(some[owner], found, y)
                jacobian = jacobian if slopes is None else torch.where(some[owner][:, None], slopes, jacobian)
        bad = (~torch.isfinite(y)).nonzero().flatten().tolist()
        if bad:
            raise EditError(f"a row of {names[int(owner[bad[0]])]} is not finite; the model is unchanged")
        before = y if step == 0 else before
        wanted = goals.wanted(kinds, y, before)
        now = torch.zeros_like(residual).index_add_(0, owner, (wanted - y) ** 2)
        now = (now / torch.bincount(owner, minlength=n)).sqrt()  # [n]
        anew, residual, active = now > HALVED * residual, now, active & (now > MET)
        if last or not bool(active.any()):
            break
        for i in active.nonzero().flatten().tolist():
            mine = owner == i  # [m]
            move = least_norm_step(jacobian[mine], (wanted - y)[mine], metric=metric)
            share = step_limit * norms[i] / move.norm().clamp_min(torch.finfo(move.dtype).tiny)
            delta[i] += move * share.clamp_max(1.0)
            anew[i] |= bool(share < 1)
            taken[i] += 1
    return RowValues(delta, taken, (delta.norm(dim=1) / norms).tolist(), before, y, wanted, batch.readings)


def _find_mark(batch: RowBatch, norms: Tensor) -> Mark:
    """Finds the mark from random changes of each subject's state, of a given share of its norm (`norms [n]`)."""
    generator = torch.Generator().manual_seed(0)
    none = torch.zeros(len(norms), batch.anat.d_model, device=norms.device)
    before = batch.finals(none, "erase")
    moved = []
    for _ in range(DRAWS):
        drawn = torch.randn(none.shape, generator=generator).to(norms)
        change = DRAWN * norms[:, None] * drawn / drawn.norm(dim=1, keepdim=True)
        moved.append(batch.finals(change, "erase") - before)
    return find_mark(torch.cat([before, batch.finals(none, "keep")]), torch.cat(moved))
