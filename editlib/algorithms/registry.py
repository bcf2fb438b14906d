"""Map each algorithm to the function that applies its settings."""

from __future__ import annotations

from collections.abc import Callable

from editlib.algorithms.alphaedit import apply_alphaedit_to_model
from editlib.algorithms.edit import EditResult
from editlib.algorithms.ft import apply_ft_to_model
from editlib.algorithms.memit import apply_memit_to_model
from editlib.algorithms.rome import apply_rome_to_model
from editlib.errors import HparamsError
from editlib.hparams import HyperParams

APPLY: dict[str, Callable[..., EditResult]] = {
    "FT": apply_ft_to_model,
    "ROME": apply_rome_to_model,
    "MEMIT": apply_memit_to_model,
    "AlphaEdit": apply_alphaedit_to_model,
}
"""By the `procedure` of the settings."""


def apply_function(hparams: HyperParams) -> Callable[..., EditResult]:
    """Returns the function that edits a model towards `target_new` by these settings; MEMIT's serves its relatives.

    Raises:
        HparamsError: an algorithm without a target (UniErase).
    """
    if not hparams.has_target or hparams.procedure not in APPLY:
        raise HparamsError(
            f"{hparams.algorithm} removes facts and edits towards no answer; expected settings of "
            f"{', '.join(APPLY)} or their variants; use `editlib unlearn` for it"
        )
    return APPLY[hparams.procedure]
