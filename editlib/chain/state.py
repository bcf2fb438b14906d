"""Where a chain stands: the weights after some of its batches, and what the next edit must know of them.

Every weight is `round(base + sum of all updates)`: the sum is kept in fp64 and rounded to the model's dtype once, so
that updates too small for bf16 add up. Nothing here depends on how the chain came to its batches: a position is a
function of the base model and of the batches' files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from editlib.algorithms.edit import EditState
from editlib.algorithms.low_rank import LowRank
from editlib.algorithms.memit import restrained
from editlib.algorithms.past_keys import PastKeys
from editlib.algorithms.unierase.apply import relations_of
from editlib.chain.batch import Batch
from editlib.errors import ChainError, EditError
from editlib.hparams import HyperParams
from editlib.models.anatomy import Anatomy


@dataclass(frozen=True)
class ChainState:
    """`base` and `sums` are `[d_model, d_ff]` by layer, on the CPU; `sums` in fp64, of the layers that a batch has
    changed. `factors` (PRUNE only) are the same sums as factors, while these are thinner; `opened` are the relations
    that UniErase's gate is open for. A new object after each batch."""

    base: Mapping[int, Tensor]
    pruned: bool = False
    sums: Mapping[int, Tensor] = field(default_factory=dict)
    factors: Mapping[int, LowRank] = field(default_factory=dict)
    past: Mapping[int, PastKeys] = field(default_factory=dict)
    opened: frozenset[str] = frozenset()

    @classmethod
    def start(cls, anat: Anatomy, hparams: HyperParams, wanted: Mapping[str, str]) -> ChainState:
        """Before the first batch, of the model as it is.

        Args:
            wanted: hash of each base weight by layer.

        Raises:
            ChainError: a weight is not the base model's.
        """
        base = {layer: anat.weight(layer).detach().cpu().clone() for layer in hparams.edited_layers}
        for layer, weight in base.items():
            if digest(weight) != wanted.get(str(layer)):
                raise ChainError(
                    f"the weights of layer {layer} are not those of the chain's base model: the model given was "
                    "edited, or loaded in another dtype; load the base model"
                )
        return cls(base, hparams.refits_totals)

    def after(self, batch: Batch) -> ChainState:
        """The position after one more batch."""
        sums, factors, past = dict(self.sums), dict(self.factors), dict(self.past)
        for layer, update in batch.updates.items():
            own = LowRank(update.left.double(), update.right.double())
            dense = own.dense()
            sums[layer] = sums[layer] + dense if layer in sums else dense
            if self.pruned:
                joined = factors[layer] + own if layer in factors else own
                factors[layer] = joined if joined.rank < len(dense) else LowRank.full(sums[layer])
        for layer, keys in batch.keys.items():
            past[layer] = past.get(layer, PastKeys.none(len(keys))).with_keys(keys)
        opened = self.opened | relations_of(batch.values.gate)
        return replace(self, sums=sums, factors=factors, past=past, opened=opened)

    def weights(self) -> dict[int, Tensor]:
        """The weights here, in the base's dtype.

        Raises:
            EditError: one is not finite in that dtype.
        """
        found = dict(self.base)
        updates = (
            {layer: update.dense() for layer, update in self.pruned_updates().items()} if self.pruned else self.sums
        )
        for layer, update in updates.items():
            base = self.base[layer]
            found[layer] = (base.double() + update).to(base.dtype)
            if not torch.isfinite(found[layer]).all():
                raise EditError(f"the weights of layer {layer} would not be finite in {base.dtype}: lower `v_lr`")
        return found

    def pruned_updates(self) -> dict[int, LowRank]:
        """PRUNE's updates: all so far, with their spectrum cut together."""
        return {layer: restrained(total, self.base[layer]) for layer, total in self.factors.items()}

    def write(self, anat: Anatomy) -> dict[int, Tensor]:
        """Puts the weights of this position into the model; returns them."""
        found = self.weights()
        with torch.no_grad():
            for layer, weight in found.items():
                anat.weight(layer).copy_(weight)
        return found

    def edit_state(self, anat: Anatomy, templates: Sequence[str]) -> EditState:
        """What the next edit is given."""
        factors = {}
        for layer, total in self.factors.items():
            device = anat.weight(layer).device
            factors[layer] = LowRank(total.left.to(device), total.right.to(device))
        bases = {layer: self.base[layer].to(anat.weight(layer).device) for layer in factors}
        return EditState(dict(self.past), tuple(templates), factors, bases, self.opened)


def digest(weight: Tensor) -> str:
    """Hash over dtype, shape and bytes of one weight `[d_model, d_ff]`."""
    found = hashlib.sha256(f"{weight.dtype}:{tuple(weight.shape)};".encode())
    found.update(memoryview(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return found.hexdigest()


def new_part(total: LowRank, before: LowRank | None) -> LowRank:
    """What an edit added to a running total of factors (PRUNE reports the total, not the part)."""
    rank = 0 if before is None else before.rank
    return LowRank(total.left[:, rank:], total.right[rank:])
