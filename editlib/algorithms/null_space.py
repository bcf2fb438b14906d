"""Which key directions an edit may use: those that ordinary text hardly takes (AlphaEdit, 2410.02355, sec. 3.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from editlib.errors import HparamsError, StatsError
from editlib.hparams.methods import NullSpaceHyperParams
from editlib.stats.cache import kept_beside
from editlib.stats.file import LayerStats
from editlib.stats.spectrum import eigen, kept_dimensions


@dataclass(frozen=True)
class NullSpace:
    """The projector `P` onto the kept directions, through the thinner of two orthonormal bases.

    `basis [d_ff, r]` spans the kept directions when `spans_kept`, otherwise the discarded ones (`P = I - Q Q^T`).
    """

    basis: Tensor
    spans_kept: bool
    dim: int  # number of kept directions

    def like(self, keys: Tensor) -> NullSpace:
        """The same as `keys` are kept (device, dtype): those of statistics lie on the CPU."""
        return replace(self, basis=self.basis.to(keys))

    def project(self, keys: Tensor) -> Tensor:
        """`P @ keys` for `keys [d_ff, n]`, without ever forming `P`."""
        inside = self.basis @ (self.basis.T @ keys)
        return inside if self.spans_kept else keys - inside


def everything(keys: Tensor) -> NullSpace:
    """The whole space of `keys [d_ff, n]`: every direction may be used."""
    return NullSpace(keys[:, :0], False, len(keys))


def null_space(moment: Tensor, threshold: float, rule: str = "absolute") -> NullSpace:
    """The null space of a second moment `[d_ff, d_ff]`.

    Raises:
        HparamsError: no direction lies under the threshold, so that no edit is possible.
    """
    if not torch.isfinite(moment).all():
        raise StatsError("the second moment holds values that are not finite; compute it again with `editlib stats`")
    values, vectors = eigen(moment)
    kept = kept_dimensions(values, threshold, rule)
    if kept == 0:
        raise HparamsError(
            f"nullspace_threshold {threshold} ({rule}) leaves none of {len(values)} directions to edit; the smallest "
            f"eigenvalue is {values[0]:.3g}: raise the threshold, or see `editlib stats show`"
        )
    spans_kept = kept <= len(values) // 2
    basis = vectors[:, :kept] if spans_kept else vectors[:, kept:]
    return NullSpace(basis.contiguous(), spans_kept, kept)


def null_space_of(
    stats: LayerStats, threshold: float, rule: str = "absolute", *, device: torch.device | None = None
) -> NullSpace:
    """`null_space` of stored statistics, computed on `device` and kept beside their file; the basis is on the CPU."""

    def compute(moment: Tensor) -> dict[str, Tensor]:
        made = null_space(moment, threshold, rule)
        return {"basis": made.basis, "kept": torch.tensor([made.spans_kept, made.dim])}

    found = kept_beside(stats, f"null_space_{rule}_{threshold!r}", compute, device)
    spans_kept, dim = found["kept"].tolist()
    return NullSpace(found["basis"], bool(spans_kept), dim)


def null_spaces(
    stats: Mapping[int, LayerStats], hparams: NullSpaceHyperParams, device: torch.device
) -> dict[int, NullSpace]:
    """`null_space_of` the statistics of each layer that is to be edited."""
    wanted = (hparams.nullspace_threshold, hparams.nullspace_rule)
    return {layer: null_space_of(stats[layer], *wanted, device=device) for layer in hparams.layers}
