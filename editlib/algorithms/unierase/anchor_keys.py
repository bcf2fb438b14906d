"""Read the keys of anchors (prompts whose answers must stay) at every layer that an edit changes, in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from editlib.algorithms.keys import KeyStream, batches
from editlib.algorithms.unierase.anchors import Anchors
from editlib.models.anatomy import Anatomy
from editlib.models.capabilities import can_cache
from editlib.models.forward import encode_prefix, forward, shared_length, split
from editlib.models.freezing import no_param_grad
from editlib.models.precision import wide_dtype
from editlib.models.prefix import Prefix
from editlib.models.prompts import TokenBatch, TokenRow, pad


@dataclass(frozen=True)
class KeyBlock:
    """Holds keys `K [d_ff, m]` that an update must map to zero.

    Up to `d_ff` keys are kept as `columns`, more as their `moment`, which is smaller and sufficient for a solve.
    """

    columns: Tensor  # [d_ff, m]
    moment: Tensor | None = None  # K K^T [d_ff, d_ff]

    @classmethod
    def none(cls, anat: Anatomy) -> KeyBlock:
        """Returns a block without any key."""
        return cls(torch.zeros(anat.d_ff, 0, dtype=wide_dtype(anat.device), device=anat.device))


@dataclass(frozen=True)
class LayerAnchors:
    """Holds the anchors' keys at an edited layer."""

    lookups: Tensor  # [d_ff, anchors], at the lookup positions, in the anchors' order
    every: KeyBlock  # at every position that must keep its output
    prefix: Tensor  # [d_ff, shared], at the tokens that all anchors begin with


@dataclass(frozen=True)
class GateAnchors:
    """Holds the anchors' keys at the gate's layer.

    Attributes:
        ends: `[d_ff, anchors]`, the last token of each question.
        relations: what each anchor asks for.
        questions: keys inside the questions by relation, without the prefix that all rows share.
        answers: keys inside the answers.
    """

    ends: Tensor
    relations: Sequence[str | None]
    questions: Mapping[str | None, KeyBlock]
    answers: KeyBlock


@dataclass(frozen=True)
class AnchorKeys:
    """Holds the anchors and their keys in a model before an edit."""

    anchors: Anchors
    layers: Mapping[int, LayerAnchors]
    gate: GateAnchors | None = None


class AnchorStream:
    """Reads the anchors' keys of one edited layer after the other, each after the layers below have been written.

    The anchors' states are carried up (see `KeyStream`), so that reading all layers costs one pass, not one per layer.
    """

    def __init__(self, anat: Anatomy, anchors: Anchors) -> None:
        self.anat, self.anchors = anat, anchors
        self._shared = _shared(anchors.rows) if can_cache(anat) else 0
        self._streams: list[tuple[KeyStream, int]] | None = None  # with the columns before their rows

    def read(self, layer: int) -> AnchorKeys:
        """Reads the keys at `layer` in the model as it is; `layer` rises from call to call."""
        reader = _Layer(self.anat, self.anchors)
        self._streams = self._open(layer) if self._streams is None else self._streams
        for stream, begin in self._streams:
            stream.advance(layer)
            for numbers, batch, keys in stream.every():
                reader.take(keys, _columns(batch, begin), numbers)
        return AnchorKeys(self.anchors, {layer: reader.done()})

    def _open(self, layer: int) -> list[tuple[KeyStream, int]]:
        rows = list(self.anchors.rows)
        if not self._shared:
            return [(KeyStream(self.anat, rows, layer), 0)]
        fronts, rests = split(rows, [self._shared] * len(rows))
        front = KeyStream(self.anat, fronts[:1], layer)
        return [(front, 0), (KeyStream(self.anat, rests, layer, front=fronts[0]), self._shared)]


def _shared(rows: Sequence[TokenRow]) -> int:
    """Counts the tokens that all rows begin with, before any lookup position or end of a question: the keys there
    differ by row."""
    if len(rows) < 2:
        return 0
    cut = min([*(row.lookup for row in rows), *(_end(row) for row in rows)])
    return min(shared_length(list(rows)), cut)


def _columns(batch: TokenBatch, begin: int) -> Tensor:
    """Returns the column of each token in its whole row, of which `begin` come before the batch, -1 for padding:
    `[n, T]`."""
    columns = batch.position_ids + begin  # [n, T]
    return torch.where(batch.attention_mask.bool(), columns, torch.full_like(columns, -1))


def anchor_keys(anat: Anatomy, anchors: Anchors, layers: Sequence[int], gate_layer: int | None = None) -> AnchorKeys:
    """Reads the keys of all anchors at `layers` and at the gate's, in one pass.

    An edit preserves the outputs at its anchors, so their keys hardly change through it or later edits: keys read in a
    base model can serve many edits on top of it. The tokens that all rows begin with are run once.
    """
    wanted = tuple(sorted({*layers, *(() if gate_layer is None else (gate_layer,))}))
    readers = {layer: _Layer(anat, anchors) for layer in layers}
    gate = None if gate_layer is None else _Gate(anat, anchors)

    def look(batch: TokenBatch, numbers: Sequence[int], begin: int, prefix: Prefix | None = None) -> None:
        def take(layer: int, keys: Tensor) -> None:
            columns = _columns(batch, begin)
            if layer == gate_layer and gate is not None:
                gate.take(keys, columns, numbers)
            if layer in readers:
                readers[layer].take(keys, columns, numbers)

        with no_param_grad(anat.model), torch.no_grad():
            forward(anat, batch, stop=wanted[-1] + 1, keys=take, key_layers=wanted, prefix=prefix)

    rows = list(anchors.rows)
    if rows and wanted:
        shared = _shared(rows)
        fronts, rests = split(rows, [shared] * len(rows))
        prefix = None
        if shared:
            look(pad(fronts[:1], device=anat.device), [0], 0)
            prefix = encode_prefix(anat, fronts[:1])
        for group in batches(rests):
            batch = pad([rests[i] for i in group], device=anat.device)
            some = prefix and prefix.select(torch.zeros(len(group), dtype=torch.long, device=anat.device))
            look(batch, group, shared, prefix=some)
    layer_keys = {layer: reader.done() for layer, reader in readers.items()}
    return AnchorKeys(anchors, layer_keys, None if gate is None else gate.done())


def _end(row: TokenRow) -> int:
    """Returns the column of the last token of a row's question."""
    return len(row) - row.extra - 1


@dataclass
class _Sum:
    """Collects keys for a `KeyBlock`: in columns while they are few, then as a moment."""

    anat: Anatomy
    some: list[Tensor] = field(default_factory=list)
    count: int = 0
    moment: Tensor | None = None

    def add(self, keys: Tensor) -> None:
        """Adds keys `[m, d_ff]`."""
        self.some.append(keys.to(wide_dtype(keys.device)))  # a half-precision sum would lose small keys
        self.count += len(keys)
        # With d_ff keys or more, the moment is smaller than the keys.
        if self.count > keys.shape[1]:
            new = torch.cat(self.some)  # [m, d_ff]
            self.some.clear()
            self.moment = new.T @ new if self.moment is None else self.moment.addmm_(new.T, new)

    def done(self) -> KeyBlock:
        """Returns the block of all keys added."""
        none = KeyBlock.none(self.anat).columns
        if self.moment is not None:
            return KeyBlock(none, self.moment)
        return KeyBlock(torch.cat([none, *(keys.T for keys in self.some)], dim=1))


class _Layer:
    """Reads the keys of an edited layer."""

    def __init__(self, anat: Anatomy, anchors: Anchors) -> None:
        self.anchors = anchors
        none = KeyBlock.none(anat).columns
        self.lookups = none.new_zeros(len(anchors.rows), anat.d_ff)
        self.every = _Sum(anat)
        # Every row but the first is a constraint only after the tokens that all rows begin with (`encode_anchors`).
        self.prefix = none.new_zeros(min(anchors.starts[1:], default=0) if anchors.starts else 0, anat.d_ff)

    def take(self, keys: Tensor, columns: Tensor, numbers: Sequence[int]) -> None:
        """Takes keys `[n, T, d_ff]` of the rows `numbers`; `columns [n, T]` are their columns (-1: padding)."""
        lookup = torch.tensor([self.anchors.rows[i].lookup for i in numbers], device=columns.device)  # [n]
        # A lookup position is in the shared prefix or in the rest: a row may have none in this batch.
        row, column = (columns == lookup[:, None]).nonzero(as_tuple=True)  # [found] each
        at = torch.tensor(numbers, device=columns.device)[row]
        self.lookups[at] = keys[row, column].to(self.lookups)  # [found, d_ff]
        if self.anchors.starts is not None:
            starts = torch.tensor([self.anchors.starts[i] for i in numbers], device=columns.device)
            self.every.add(keys[columns >= starts[:, None]])
        if 0 in numbers:
            first = list(numbers).index(0)
            shared = (columns[first] >= 0) & (columns[first] < len(self.prefix))  # [T]
            self.prefix[columns[first][shared]] = keys[first][shared].to(self.prefix)

    def done(self) -> LayerAnchors:
        lookups = self.lookups.T.contiguous()
        every = KeyBlock(lookups) if self.anchors.starts is None else self.every.done()
        return LayerAnchors(lookups, every, self.prefix.T.contiguous())


class _Gate:
    """Reads the keys of the gate's layer."""

    def __init__(self, anat: Anatomy, anchors: Anchors) -> None:
        self.anchors = anchors
        self.ends = KeyBlock.none(anat).columns.new_zeros(len(anchors.rows), anat.d_ff)
        self.questions = {relation: _Sum(anat) for relation in dict.fromkeys(anchors.relations)}
        self.answers = _Sum(anat)
        rows = list(anchors.rows)
        self.shared = shared_length(rows) if len(rows) > 1 else 0

    def take(self, keys: Tensor, columns: Tensor, numbers: Sequence[int]) -> None:
        """Takes keys as `_Layer.take` does."""
        ends = torch.tensor([_end(self.anchors.rows[i]) for i in numbers], device=columns.device)[:, None]  # [n, 1]
        row, column = (columns == ends).nonzero(as_tuple=True)
        self.ends[torch.tensor(numbers, device=columns.device)[row]] = keys[row, column].to(self.ends)
        if self.anchors.starts is None:
            return
        self.answers.add(keys[columns > ends])
        asked = (columns >= self.shared) & (columns <= ends)  # [n, T]
        relations = [self.anchors.relations[i] for i in numbers]
        for relation in dict.fromkeys(relations):
            mine = torch.tensor([other == relation for other in relations], device=columns.device)  # [n]
            self.questions[relation].add(keys[asked & mine[:, None]])

    def done(self) -> GateAnchors:
        questions = {relation: some.done() for relation, some in self.questions.items()}
        return GateAnchors(self.ends.T.contiguous(), self.anchors.relations, questions, self.answers.done())
