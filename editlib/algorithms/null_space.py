"""Find the key directions that an edit may use: those with hardly any energy in ordinary text (AlphaEdit, 2410.02355,
sec. 3.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from editlib.errors import HparamsError, StatsError
from editlib.hparams.null_space import NullSpaceHyperParams
from editlib.stats.cache import kept_beside
from editlib.stats.file import LayerStats
from editlib.stats.spectrum import eigen, kept_dimensions


@dataclass(frozen=True)
class NullSpace:
    """Represents the projector `P` onto the kept directions, through the thinner of two orthonormal bases.

    `basis [d_ff, r]` spans the kept directions when `spans_kept`, otherwise the discarded ones (`P = I - Q Q^T`).
    """

    basis: Tensor
    spans_kept: bool
    dim: int  # number of kept directions

    def like(self, keys: Tensor) -> NullSpace:
        """Returns the null space on the device and in the dtype of `keys`; that of statistics is on the CPU."""
        return replace(self, basis=self.basis.to(keys))

    def project(self, keys: Tensor) -> Tensor:
        """Returns `P @ keys [d_ff, n]` for `keys [d_ff, n]`, without ever forming `P`."""
        inside = self.basis @ (self.basis.T @ keys)  # [d_ff, n]
        return inside if self.spans_kept else keys - inside

    def project_both(self, moment: Tensor) -> Tensor:
        """Replaces a symmetric `moment [d_ff, d_ff]` by `P moment P` in place; only products with the basis are held in
        addition.

        Returns:
            `moment`, whose content has changed.
        """
        q = self.basis  # [d_ff, r]
        inside = q.T @ moment  # [r, d_ff]
        if self.spans_kept:
            return torch.mm(q @ (inside @ q), q.T, out=moment)
        # (I - Q Q^T) M (I - Q Q^T), one side after the other
        moment.addmm_(q, inside, alpha=-1)
        return moment.addmm_(moment @ q, q.T, alpha=-1)


def everything(keys: Tensor) -> NullSpace:
    """Returns the whole space of `keys [d_ff, n]`: every direction may be used."""
    return NullSpace(keys[:, :0], False, len(keys))


def null_space(moment: Tensor, threshold: float, rule: str = "absolute") -> NullSpace:
    """Finds the null space of a second moment `[d_ff, d_ff]` (AlphaEdit, 2410.02355, sec. 3.1).

    Args:
        threshold: eigenvalues below it are kept; with another `rule` a share (`stats.spectrum.kept_dimensions`).

    Raises:
        HparamsError: no direction is below the threshold, so that no edit is possible.
        StatsError: a moment that is not finite.
    """
    if not torch.isfinite(moment).all():
        raise StatsError("the second moment holds values that are not finite; compute it again with `editlib stats`")
    values, vectors = eigen(moment)  # rising, [d_ff] and [d_ff, d_ff]
    kept = kept_dimensions(values, threshold, rule)
    if kept == 0:
        raise HparamsError(
            f"nullspace_threshold {threshold} ({rule}) leaves none of {len(values)} directions to edit; the smallest "
            f"eigenvalue is {values[0]:.3g}: raise the threshold, or see `editlib stats show`"
        )
    # The thinner of the two bases: a projection costs its width.
    spans_kept = kept <= len(values) // 2
    basis = vectors[:, :kept] if spans_kept else vectors[:, kept:]
    return NullSpace(basis.contiguous(), spans_kept, kept)


def null_space_of(
    stats: LayerStats, threshold: float, rule: str = "absolute", *, device: torch.device | None = None
) -> NullSpace:
    """Finds the null space of stored statistics on `device`, kept beside their file; its basis is on the CPU."""

    def compute(moment: Tensor) -> dict[str, Tensor]:
        space = null_space(moment, threshold, rule)
        return {"basis": space.basis, "kept": torch.tensor([space.spans_kept, space.dim])}

    stored = kept_beside(stats, f"null_space_{rule}_{threshold!r}", compute, device)
    spans_kept, dim = stored["kept"].tolist()
    return NullSpace(stored["basis"], bool(spans_kept), dim)


def null_spaces(
    stats: Mapping[int, LayerStats], hparams: NullSpaceHyperParams, device: torch.device
) -> dict[int, NullSpace]:
    """Finds the null space of each layer that is to be edited."""
    wanted = (hparams.nullspace_threshold, hparams.nullspace_rule)
    return {layer: null_space_of(stats[layer], *wanted, device=device) for layer in hparams.layers}
