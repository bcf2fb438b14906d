"""Values from rows: the smallest change of a hidden state after which chosen outputs have chosen numbers.

A row is a prompt, a scalar `y` read from the logits there, and a wanted number. All rows of one subject share the
change `δ [d_model]` at the subject's last token. With `A [m, d_model]`, `A_j = dy_j/dδ`, and `b = wanted - y`, each
Gauss-Newton step is the least-norm solution of `A δ = b`:

    δ += M^-1 A^T (A M^-1 A^T + ε tr(A M^-1 A^T) / m I)^-1 b

`M = I + λ Γ` is a metric on outputs (`left_metric`): it makes steps short in directions that other answers read.
The key at the subject's last token does not know the relation that is asked for; its gradient does. So the subject is
told by the key and the relation by the value, and a relation that rows keep is not touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from editlib.errors import EditError
from editlib.models.anatomy import Anatomy
from editlib.models.forward import encode_prefix, forward, split
from editlib.models.prefix import Prefix
from editlib.models.prompts import TokenBatch, TokenRow, pad

BATCH_TOKENS = 4096  # of all rows of a batch, prefixes not counted, since each keeps a graph
BATCH_LOGITS = 2**25  # numbers in the logits of a batch, which its graph keeps in fp32
RIVALS = 20  # likeliest other tokens that an answer is compared with where no others of its kind are known
RIDGE = 3e-3  # ε: rows that contradict one another share what is left of their residuals


@dataclass(frozen=True)
class Row:
    """One scalar to be read, and at what positions the change is added.

    kind: "erase", "say", "quiet" or "keep", see `_read`.
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
    """What rows are wanted to read, in nats.

    erased: logit of the answer less the log-sum-exp of its rivals, at most this.
    said: log-odds of the unlearning token at the end of a question to be refused, at least this.
    quiet: log-odds of that token at the end of other questions about the subject, at most this or what it is today.
    """

    erased: float = -3.0
    said: float = 1.0
    quiet: float = -3.0

    def wanted(self, kinds: Sequence[str], y: Tensor, before: Tensor) -> Tensor:
        """The number that each row should have: what it has, where that is good enough.

        Args:
            y: `[m]`, the rows as they are. `before`: `[m]`, without any change.
        """
        out = before.clone()  # "keep" rows go back to where they were
        for kind, value in (
            ("erase", y.clamp_max(self.erased)),
            ("say", y.clamp_min(self.said)),
            ("quiet", torch.minimum(y, before.clamp_min(self.quiet))),
        ):
            mine = torch.tensor([k == kind for k in kinds], dtype=torch.bool, device=y.device)
            out = torch.where(mine, value, out)
        return out


@dataclass(frozen=True)
class RowValues:
    """Changes found by rows: `deltas [n, d_model]`, `|δ| / |h|` per subject, and each row before, after and wanted."""

    deltas: Tensor
    relative_norm: list[float]
    before: Tensor  # [m]
    after: Tensor  # [m]
    wanted: Tensor  # [m]

    def missed(self, within: float = 1.0) -> list[int]:
        """Rows that are further than `within` nats from what they should read."""
        return (self.after - self.wanted).abs().gt(within).nonzero().flatten().tolist()


@dataclass
class _Chunk:
    """Rows that run together, from the first changed position on; everything earlier is cached."""

    numbers: list[int]
    rows: list[Row]
    batch: TokenBatch
    prefix: Prefix | None
    hidden: Tensor  # [r, T, d_model], what leaves the edited layer
    mask: Tensor  # [r, T, 1], one at the positions that get the change
    read: tuple[Tensor, Tensor]  # rows and columns of the logits
    counts: list[int]  # logits of each row


class RowBatch:
    """Rows encoded up to the edited layer once, to be read under any change of their subjects' states."""

    def __init__(self, anat: Anatomy, rows: Sequence[Row], layer: int) -> None:
        self.anat, self.rows, self.layer = anat, list(rows), layer
        vocab = anat.embedding.weight.shape[0]
        self.chunks = [self._encode(numbers) for numbers in _chunks(self.rows, max(1, BATCH_LOGITS // vocab))]
        self._resolve_rivals()

    def states(self, subjects: int) -> Tensor:
        """The hidden state that each subject's change is added to, `[subjects, d_model]` in fp32: of its first row."""
        found: dict[int, Tensor] = {}
        for chunk in self.chunks:
            first = chunk.mask[..., 0].argmax(dim=1)  # [r]
            for i, row in enumerate(chunk.rows):
                found.setdefault(row.owner, chunk.hidden[i, first[i]].float())
        return torch.stack([found[i] for i in range(subjects)])

    def read(self, delta: Tensor, *, grad: bool = True) -> tuple[Tensor, Tensor | None]:
        """Reads all rows under `delta [n, d_model]`.

        Returns:
            `y [m]`, and with `grad` the Jacobian `A [m, d_model]` of each row to its own subject's change.
        """
        y = torch.zeros(len(self.rows), device=delta.device)
        jacobian = torch.zeros(len(self.rows), delta.shape[1], device=delta.device) if grad else None
        for chunk in self.chunks:
            owner = torch.tensor([row.owner for row in chunk.rows], device=delta.device)
            # Each row has a copy of its subject's change, so one backward pass gives every row its own gradient.
            change = delta[owner].clone().requires_grad_(grad)  # [r, d_model]
            with torch.set_grad_enabled(grad):
                values = self._values(chunk, change)
                if jacobian is not None:
                    torch.autograd.backward(values.sum())
                    jacobian[chunk.numbers] = change.grad.float()  # type: ignore[union-attr]
            y[chunk.numbers] = values.detach()
        return y, jacobian

    def _encode(self, numbers: list[int]) -> _Chunk:
        rows = [self.rows[i] for i in numbers]
        cuts = [row.places[0] for row in rows]
        fronts, rests = split([TokenRow(row.ids, row.places[0]) for row in rows], cuts)
        # A subject at the very start leaves nothing to cache: then whole rows are run.
        cached = all(cuts)
        batch = pad(rests if cached else [TokenRow(row.ids, row.places[0]) for row in rows], device=self.anat.device)
        prefix = encode_prefix(self.anat, fronts) if cached else None
        with torch.no_grad():
            hidden = forward(self.anat, batch, stop=self.layer + 1, prefix=prefix)
        mask = torch.zeros(*hidden.shape[:2], 1, device=hidden.device)
        at: list[tuple[int, int]] = []
        for i, (row, cut) in enumerate(zip(rows, cuts, strict=True)):
            shift = cut if cached else 0
            mask[i, [place - shift for place in row.places]] = 1
            at += [(i, column - shift) for column in row.columns]
        where = torch.tensor(at, device=hidden.device)
        counts = [len(row.columns) for row in rows]
        return _Chunk(numbers, rows, batch, prefix, hidden, mask, (where[:, 0], where[:, 1]), counts)

    def _logits(self, chunk: _Chunk, change: Tensor) -> list[Tensor]:
        """Logits of each row, `[columns, vocab]` in fp32."""
        hidden = (chunk.hidden.to(change.dtype) + chunk.mask * change[:, None]).to(
            chunk.hidden.dtype
        )  # [r, T, d_model]
        logits = forward(
            self.anat, chunk.batch, start=self.layer + 1, hidden=hidden, prefix=chunk.prefix, score=chunk.read
        )
        return list(torch.split(logits.float(), chunk.counts))

    def _values(self, chunk: _Chunk, change: Tensor) -> Tensor:
        return torch.stack(
            [_read(row, logits) for row, logits in zip(chunk.rows, self._logits(chunk, change), strict=True)]
        )

    def _resolve_rivals(self) -> None:
        """Gives erase rows without rivals the likeliest other tokens of the unchanged model."""
        for chunk in self.chunks:
            if not any(row.kind == "erase" and not row.rivals for row in chunk.rows):
                continue
            none = torch.zeros(len(chunk.rows), chunk.hidden.shape[-1], device=chunk.hidden.device)
            with torch.no_grad():
                read = self._logits(chunk, none)
            for i, (row, logits) in enumerate(zip(chunk.rows, read, strict=True)):
                if row.kind == "erase" and not row.rivals:
                    best = logits[0].topk(RIVALS + 1).indices.tolist()
                    rivals = tuple(token for token in best if token != row.targets[0])[:RIVALS]
                    chunk.rows[i] = Row(row.kind, row.owner, row.ids, row.places, row.columns, row.targets, rivals)


def _read(row: Row, logits: Tensor) -> Tensor:
    """The scalar of a row from its logits `[columns, vocab]`, in nats.

    erase: logit of the answer's first token less the log-sum-exp of its rivals'.
    say, quiet: log-odds of the token, `z - logsumexp(all others)`.
    keep: log probability of the answer, summed over its tokens.
    """
    if row.kind == "erase":
        return logits[0, row.targets[0]] - logits[0, list(row.rivals)].logsumexp(-1)
    if row.kind == "keep":
        picked = logits[range(len(row.targets)), list(row.targets)]
        return (picked - logits.logsumexp(-1)).sum()
    others = torch.ones_like(logits[0], dtype=torch.bool)
    others[row.targets[0]] = False
    return logits[0, row.targets[0]] - logits[0].masked_fill(~others, -torch.inf).logsumexp(-1)


def _chunks(rows: Sequence[Row], most_columns: int) -> list[list[int]]:
    """Row numbers in groups of like length whose padded size keeps to `BATCH_TOKENS` and whose logits are read at no
    more than `most_columns` positions; a row that is larger alone is a group."""
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
    """The shortest change that moves `m` rows by `residual [m]`, to first order: `[d_model]`.

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
    """Finds each subject's change behind `layer` by Gauss-Newton, all subjects in one batch.

    Subjects do not influence one another: the result does not depend on which are found together.

    Args:
        names: of the subjects, by number; for errors.
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
    before, wanted = torch.zeros(0), torch.zeros(0)
    for step in tqdm(range(steps + 1), desc="values", disable=not progress, leave=False):
        y, jacobian = batch.read(delta, grad=step < steps)
        bad = (~torch.isfinite(y)).nonzero().flatten().tolist()
        if bad:
            raise EditError(f"a row of {names[rows[bad[0]].owner]} is not finite; the model is unchanged")
        before = y if step == 0 else before
        wanted = goals.wanted(kinds, y, before)
        if jacobian is None:
            break
        for i in range(len(names)):
            mine = owner == i  # [m]
            move = least_norm_step(jacobian[mine], (wanted - y)[mine], metric=metric)
            longest = step_limit * norms[i] / move.norm().clamp_min(torch.finfo(move.dtype).tiny)
            delta[i] += move * longest.clamp_max(1.0)
    return RowValues(delta, (delta.norm(dim=1) / norms).tolist(), before, y, wanted)
