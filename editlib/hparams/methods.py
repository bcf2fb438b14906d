"""Define the settings of each algorithm: its own keys on top of the shared ones, with the published defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeGuard

from editlib.hparams.base import ClosedFormHyperParams, HyperParams
from editlib.hparams.null_space import AlphaEditHyperParams, UniEraseHyperParams
from editlib.settings import invalid, setting


@dataclass(frozen=True, kw_only=True)
class FTHyperParams(HyperParams):
    """Holds the keys of constrained fine-tuning (Zhu et al., 2012.00363), the ROME paper's FT+L: one matrix per layer,
    each of its entries changed by at most `norm_constraint`."""

    algorithm: ClassVar[str] = "FT"
    paper: ClassVar[str] = "2012.00363"
    summary: ClassVar[str] = "constrained fine-tuning of one matrix, the usual baseline"
    procedure: ClassVar[str] = "FT"
    chainable: ClassVar[bool] = False

    num_steps: int = setting(25, "largest number of passes over the requests", min=1)
    lr: float = setting(5e-4, "Adam's learning rate", above=0)
    weight_decay: float = setting(0.0, "Adam's weight decay", min=0)
    norm_constraint: float | None = setting(5e-4, "largest change to an entry of the matrix; none: no limit", above=0)
    batch_size: int = setting(64, "requests per gradient step", min=1)
    early_stop_loss: float = setting(0.01, "training stops when the mean NLL over a pass is below this", min=0)

    @property
    def uses_statistics(self) -> bool:
        return False

    @property
    def trained_steps(self) -> int:
        return self.num_steps


@dataclass(frozen=True, kw_only=True)
class ROMEHyperParams(ClosedFormHyperParams):
    """Holds the keys of ROME (2202.05262): one request after another, each a rank-one update of one matrix."""

    algorithm: ClassVar[str] = "ROME"
    paper: ClassVar[str] = "2202.05262"
    summary: ClassVar[str] = "one fact after another, each a rank-one update"
    procedure: ClassVar[str] = "ROME"
    takes_batches: ClassVar[bool] = False

    context_template_length_params: list[list[int]] | None = setting(
        lambda: [[5, 10], [10, 10]],
        "pairs of length in tokens and number of the generated context templates",
        min=0,
    )
    v_num_grad_steps: int = setting(20, "largest number of gradient steps for a value", min=1)
    mom2_adjustment: bool = setting(
        True, "whiten the key by the covariance of keys of ordinary text; without it the update's direction is the key"
    )

    @property
    def uses_statistics(self) -> bool:
        return self.mom2_adjustment

    def check(self) -> None:
        super().check()
        if len(self.layers) != 1:
            raise invalid("layers", self.layers, "one layer, since ROME edits one matrix", "choose one")


@dataclass(frozen=True, kw_only=True)
class MEMITHyperParams(ClosedFormHyperParams):
    """Holds the keys of MEMIT (2210.07229): all requests at once, spread over several layers."""

    algorithm: ClassVar[str] = "MEMIT"
    paper: ClassVar[str] = "2210.07229"
    summary: ClassVar[str] = "all facts in one solve per layer, spread over several layers"

    procedure: ClassVar[str] = "MEMIT"
    values_first: ClassVar[bool] = True
    plain_share: ClassVar[float | None] = 0.5  # as in MEMIT's `compute_ks`: half plain prompt, half mean of the others
    holds_past: ClassVar[bool] = False  # preserves the outputs at the keys of earlier edits

    layer_selection: str = setting("all", "which of `layers` to edit", choices=("all",))
    mom2_update_weight: float = setting(
        15000.0, "weight of ordinary text relative to the requests, the paper's λ", above=0
    )
    left_weight: float = setting(
        0.0,
        "weight of the left metric: the update avoids directions that the answers about the subjects depend on; 0 as "
        "published",
        min=0,
    )

    @property
    def equality_ridge(self) -> float | None:
        """The ridge of the constraint that meets the requests exactly; `None`: they are met by least squares."""
        return None

    @property
    def kept_share(self) -> float | None:
        """Share of an update's entries that is written, the relatively largest; `None`: the whole update."""
        return None


@dataclass(frozen=True, kw_only=True)
class MEMITSeqHyperParams(MEMITHyperParams):
    """Holds the keys of MEMIT_seq: MEMIT that also preserves the outputs at the keys of earlier edits."""

    algorithm: ClassVar[str] = "MEMIT_seq"
    paper: ClassVar[str] = "2210.07229, as in 2410.02355"
    summary: ClassVar[str] = "MEMIT that preserves earlier edits"
    holds_past: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class NASHyperParams(MEMITHyperParams):
    """Holds the keys of NAS (2602.02543): MEMIT with each value scaled to the norm of the hidden state that it
    replaces."""

    algorithm: ClassVar[str] = "NAS"
    paper: ClassVar[str] = "2602.02543"
    summary: ClassVar[str] = "MEMIT with values as long as the hidden states that they replace"

    rescale_norm: bool = setting(True, "scale a value to the norm that the hidden state had before the edit")


@dataclass(frozen=True, kw_only=True)
class RECTHyperParams(MEMITHyperParams):
    """Holds the keys of RECT (2401.04700): MEMIT that keeps only the relatively largest changes."""

    algorithm: ClassVar[str] = "RECT"
    paper: ClassVar[str] = "2401.04700"
    summary: ClassVar[str] = "MEMIT of which only the relatively largest changes are kept"

    rect_share: float = setting(0.4, "share of a matrix's entries that may change", above=0, max=1)

    @property
    def kept_share(self) -> float | None:
        return self.rect_share


@dataclass(frozen=True, kw_only=True)
class PRUNEHyperParams(MEMITHyperParams):
    """Holds the keys of PRUNE (2405.16821): MEMIT with the total update's singular values limited by the weight's."""

    algorithm: ClassVar[str] = "PRUNE"
    paper: ClassVar[str] = "2405.16821"
    summary: ClassVar[str] = "MEMIT with the total update's singular values limited by the weight's"
    refits_totals: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class EMMETHyperParams(MEMITHyperParams):
    """Holds the keys of EMMET (2403.14236): MEMIT with the requests met exactly, by an equality constraint."""

    algorithm: ClassVar[str] = "EMMET"
    paper: ClassVar[str] = "2403.14236"
    summary: ClassVar[str] = "MEMIT's facts under an equality constraint"

    mom2_update_weight: float = setting(1.0, "factor of the covariance, relative to `emmet_lambda`", above=0)
    emmet_lambda: float = setting(0.1, "ridge added to the diagonal of the constraint's linear system", min=0)

    @property
    def equality_ridge(self) -> float | None:
        return self.emmet_lambda


ALGORITHMS: dict[str, type[HyperParams]] = {
    cls.algorithm: cls
    for cls in (
        FTHyperParams,
        ROMEHyperParams,
        MEMITHyperParams,
        MEMITSeqHyperParams,
        EMMETHyperParams,
        NASHyperParams,
        RECTHyperParams,
        PRUNEHyperParams,
        AlphaEditHyperParams,
        UniEraseHyperParams,
    )
}
"""The settings of every algorithm, by its name."""


def finds_values(hparams: HyperParams) -> TypeGuard[ClosedFormHyperParams]:
    """Returns whether an edit finds values and solves for them; its settings then have the keys of closed-form
    edits."""
    return hparams.chainable


def takes_retain(hparams: HyperParams) -> TypeGuard[UniEraseHyperParams]:
    """Returns whether an edit takes retain prompts; its settings then say how these are anchored."""
    return hparams.takes_retain
