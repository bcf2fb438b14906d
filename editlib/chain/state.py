"""Hold the state of a chain: the weights after some of its batches, and the inputs of the next edit.

Every weight is `round(base + sum of all updates)`: the sum is kept in fp64 and rounded to the model's dtype once, so
that updates too small for bf16 add up. A state depends only on the base model and on the batches' files, not on the
history of undone or revoked edits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from editlib.algorithms.edit import EditState, edited_matrices
from editlib.algorithms.low_rank import LowRank
from editlib.algorithms.memit import restrained
from editlib.algorithms.past_keys import PastKeys
from editlib.algorithms.unierase.answer_gate import relations_of
from editlib.chain.batch import Batch
from editlib.errors import ChainError, EditError
from editlib.hparams import HyperParams
from editlib.models.anatomy import Anatomy


@dataclass(frozen=True)
class ChainState:
    """Holds the base weights and the sums of all updates; immutable, `after` returns a new object.

    Args:
        base: base weights by layer, `[d_model, d_ff]`, on the CPU.
        pruned: whether the spectrum of the running total is pruned (PRUNE).
        sums: sums of the updates of changed layers, `[d_model, d_ff]`, fp64, on the CPU.
        factors: PRUNE only: the same sums as factors, as long as their rank is below `d_model`.
        past: keys of all earlier requests by layer.
        opened: relations for which UniErase's gate is open.
        neurons: by layer, the neurons that UniErase has written.
    """

    base: Mapping[int, Tensor]
    pruned: bool = False
    sums: Mapping[int, Tensor] = field(default_factory=dict)
    factors: Mapping[int, LowRank] = field(default_factory=dict)
    past: Mapping[int, PastKeys] = field(default_factory=dict)
    opened: frozenset[str] = frozenset()
    neurons: Mapping[int, frozenset[int]] = field(default_factory=dict)

    @classmethod
    def start(cls, anat: Anatomy, hparams: HyperParams, wanted: Mapping[str, str]) -> ChainState:
        """Returns the state before the first batch, from the weights of an unedited model.

        Args:
            wanted: hash of each base weight by layer.

        Raises:
            ChainError: a weight does not have its hash.
        """
        base = {layer: anat.weight(layer).detach().cpu().clone() for layer in edited_matrices(anat, hparams)}
        for layer, weight in base.items():
            if digest(weight) != wanted.get(str(layer)):
                raise ChainError(
                    f"the weights of layer {layer} are not those of the chain's base model: the model given was "
                    "edited, or loaded in another dtype; load the base model"
                )
        return cls(base, hparams.refits_totals)

    def after(self, batch: Batch) -> ChainState:
        """Returns the state after one more batch."""
        sums, factors, past = dict(self.sums), dict(self.factors), dict(self.past)
        for layer, update in batch.updates.items():
            wide = LowRank(update.left.double(), update.right.double())
            dense = wide.dense()  # [d_model, d_ff]
            sums[layer] = sums[layer] + dense if layer in sums else dense
            if self.pruned:
                total = factors[layer] + wide if layer in factors else wide
                factors[layer] = total if total.rank < len(dense) else LowRank.full(sums[layer])
        for layer, keys in batch.keys.items():
            past[layer] = past.get(layer, PastKeys.none(len(keys))).with_keys(keys)
        opened = self.opened | relations_of(batch.values.gate)
        neurons = EditState(neurons=self.neurons).with_neurons(batch.neurons).neurons
        return replace(self, sums=sums, factors=factors, past=past, opened=opened, neurons=neurons)

    def weights(self) -> dict[int, Tensor]:
        """Returns the weights by layer, `[d_model, d_ff]`, in the base model's dtype.

        Raises:
            EditError: a weight is not finite in that dtype.
        """
        weights = dict(self.base)
        updates = (
            {layer: update.dense() for layer, update in self.pruned_updates().items()} if self.pruned else self.sums
        )
        for layer, update in updates.items():
            base = self.base[layer]
            weights[layer] = (base.double() + update).to(base.dtype)
            if not torch.isfinite(weights[layer]).all():
                raise EditError(f"the weights of layer {layer} would not be finite in {base.dtype}: lower `v_lr`")
        return weights

    def pruned_updates(self) -> dict[int, LowRank]:
        """Returns PRUNE's total updates by layer, with the spectrum of each total pruned."""
        return {layer: restrained(total, self.base[layer]) for layer, total in self.factors.items()}

    def write(self, anat: Anatomy) -> dict[int, Tensor]:
        """Copies the weights of this state into the model, and returns them."""
        weights = self.weights()
        with torch.no_grad():
            for layer, weight in weights.items():
                anat.weight(layer).copy_(weight)
        return weights

    def edit_state(self, anat: Anatomy, templates: Sequence[str]) -> EditState:
        """Returns the `EditState` from which the next edit continues."""
        factors = {}
        for layer, total in self.factors.items():
            device = anat.weight(layer).device
            factors[layer] = LowRank(total.left.to(device), total.right.to(device))
        bases = {layer: self.base[layer].to(anat.weight(layer).device) for layer in factors}
        return EditState(dict(self.past), tuple(templates), factors, bases, self.opened, self.neurons)


def digest(weight: Tensor) -> str:
    """Computes the SHA-256 (hex) over dtype, shape and bytes of one weight `[d_model, d_ff]`."""
    sha256 = hashlib.sha256(f"{weight.dtype}:{tuple(weight.shape)};".encode())
    sha256.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def new_part(total: LowRank, before: LowRank | None) -> LowRank:
    """Returns the factors that an edit added to a running total (PRUNE reports the total)."""
    rank = 0 if before is None else before.rank
    return LowRank(total.left[:, rank:], total.right[rank:])
