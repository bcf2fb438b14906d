"""Map the settings of each algorithm to the function that applies them."""

from __future__ import annotations

from collections.abc import Callable

from editlib.algorithms.alphaedit import apply_alphaedit_to_model
from editlib.algorithms.edit import EditResult
from editlib.algorithms.ft import apply_ft_to_model
from editlib.algorithms.memit import apply_memit_to_model
from editlib.algorithms.rome import apply_rome_to_model
from editlib.errors import HparamsError
from editlib.hparams import AlphaEditHyperParams, FTHyperParams, HyperParams, MEMITHyperParams, ROMEHyperParams

APPLY: dict[type[HyperParams], Callable[..., EditResult]] = {
    FTHyperParams: apply_ft_to_model,
    ROMEHyperParams: apply_rome_to_model,
    MEMITHyperParams: apply_memit_to_model,
    AlphaEditHyperParams: apply_alphaedit_to_model,
}


def apply_function(hparams: HyperParams) -> Callable[..., EditResult]:
    """Returns the function that edits a model towards `target_new` by these settings; MEMIT's serves its relatives.

    Raises:
        HparamsError: an algorithm that has no target, which is UniErase.
    """
    for kind, apply in APPLY.items():
        if isinstance(hparams, kind):
            return apply
    raise HparamsError(
        f"{hparams.algorithm} removes facts and edits towards no answer; expected settings of "
        f"{', '.join(kind.algorithm for kind in APPLY)} or their variants; use `editlib unlearn` for it"
    )
