"""Read keys: the inputs of the MLP output matrices at chosen positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from editlib.models.anatomy import Anatomy
from editlib.models.forward import encode_prefix, forward
from editlib.models.freezing import no_param_grad
from editlib.models.prefix import Prefix
from editlib.models.prompts import TokenBatch, TokenRow, pad
from editlib.models.tracing import record_inputs

BATCH_TOKENS = 4096


def batches(rows: Sequence[TokenRow], batch_tokens: int = BATCH_TOKENS) -> list[list[int]]:
    """Groups the indices of `rows` into batches of similar length, at most `batch_tokens` padded tokens each."""
    # By length, so that a batch is padded little.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    groups: list[list[int]] = []
    for i in order:
        if groups and (len(groups[-1]) + 1) * len(rows[i]) <= batch_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


class KeyStream:
    """Carries the hidden states of many rows up layer by layer while the weights of lower layers change.

    An edit of layers `l1 < l2 < ...` needs the keys of each layer after the layers below were written. The stream keeps
    the states that enter the next layer, so that the whole edit costs one pass through the layers instead of one per
    layer.

    Args:
        front: tokens before every row, which are run once and not for each of them.
    """

    def __init__(
        self,
        anat: Anatomy,
        rows: Sequence[TokenRow],
        layer: int,
        *,
        batch_tokens: int = BATCH_TOKENS,
        front: TokenRow | None = None,
    ) -> None:
        self.anat = anat
        self._front = front
        self._order = batches(rows, batch_tokens)
        device = anat.device
        self._batches = [pad([rows[i] for i in group], device=device) for group in self._order]
        # The states that enter `layer`, [n, T, d_model] per batch; at layer 0 a pass starts from the token ids.
        self._hidden: list[Tensor | None] = [None for _ in self._batches]
        self.layer = 0
        self.advance(layer)

    def _prefix(self) -> Prefix | None:
        """Runs the tokens before every row through the current weights."""
        return None if self._front is None else encode_prefix(self.anat, [self._front])

    def _run(
        self, batch: TokenBatch, hidden: Tensor | None, stop: int, prefix: Prefix | None = None, **kwargs: Any
    ) -> Tensor:
        """Runs a batch from the entry of the stream's layer to that of `stop`; returns the states there.

        `prefix` has one row, which is repeated for each row of the batch; `kwargs` go to `forward`.
        """
        if prefix is not None:
            prefix = prefix.select(torch.zeros(len(batch.input_ids), dtype=torch.long, device=batch.input_ids.device))
        with no_param_grad(self.anat.model), torch.no_grad():
            return forward(self.anat, batch, start=self.layer, stop=stop, hidden=hidden, prefix=prefix, **kwargs)

    def advance(self, layer: int) -> None:
        """Carries the states up to the entry of `layer` through the current weights."""
        if layer == self.layer:
            return
        prefix = self._prefix()
        self._hidden = [
            self._run(batch, hidden, layer, prefix) for batch, hidden in zip(self._batches, self._hidden, strict=True)
        ]
        self.layer = layer

    def keys(self) -> Tensor:
        """Returns the keys of the next layer at the lookup positions, `[d_ff, n]` in the order of the rows."""
        collected = [_at(keys, batch) for _, batch, keys in self.every()]
        return torch.cat(collected)[self._places()].T

    def every(self) -> Iterator[tuple[list[int], TokenBatch, Tensor]]:
        """Yields the keys of the next layer at all positions, batch by batch: indices of the rows, the rows, `[n, T,
        d_ff]`."""
        prefix = self._prefix()
        for numbers, batch, hidden in zip(self._order, self._batches, self._hidden, strict=True):
            seen: list[Tensor] = []

            def take(_: int, keys: Tensor, seen: list[Tensor] = seen) -> None:
                seen.append(keys)

            self._run(batch, hidden, self.layer + 1, prefix, keys=take, key_layers=(self.layer,))
            yield numbers, batch, seen[0]

    def inputs(self, module: nn.Module) -> Tensor:
        """Returns what `module` of the next layer reads at the lookup positions, `[d, n]`."""
        collected = []
        prefix = self._prefix()
        for batch, hidden in zip(self._batches, self._hidden, strict=True):
            seen: list[Tensor] = []

            def take(_: int, x: Tensor, seen: list[Tensor] = seen) -> None:
                seen.append(x)

            with record_inputs({0: module}, take):
                self._run(batch, hidden, self.layer + 1, prefix)
            # Some models flatten rows and columns for their MLP: [n * T, d] -> [n, T, d].
            collected.append(_at(seen[-1].reshape(*batch.input_ids.shape, -1), batch))
        return torch.cat(collected)[self._places()].T

    def states(self, layer: int) -> Tensor:
        """Returns the states that leave `layer` at the lookup positions, `[d_model, n]`, through the current
        weights."""
        collected = []
        prefix = self._prefix()
        for batch, hidden in zip(self._batches, self._hidden, strict=True):
            out = self._run(batch, hidden, layer + 1, prefix)  # [n, T, d_model]
            collected.append(_at(out, batch))
        return torch.cat(collected)[self._places()].T

    def _places(self) -> Tensor:
        """Returns where each row is among the batches' rows, `[n]`: the inverse of `_order`."""
        flat = torch.tensor([i for group in self._order for i in group])
        return torch.argsort(flat)


def _at(values: Tensor, batch: TokenBatch) -> Tensor:
    """Picks the lookup positions of `values [n, T, d]`: `[n, d]`, fp32 at least."""
    # Sums over keys follow, which half precision would round.
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return values[torch.arange(len(batch), device=values.device), batch.lookup]


def compute_ks(anat: Anatomy, rows: Sequence[TokenRow], layers: Sequence[int]) -> dict[int, Tensor]:
    """Reads the key of every row at its lookup position, `{layer: [d_ff, n]}` (MEMIT, 2210.07229, eq. 19)."""
    stream = KeyStream(anat, rows, min(layers))
    collected = {}
    for layer in sorted(layers):  # a stream only goes up
        stream.advance(layer)
        collected[layer] = stream.keys()
    return collected
