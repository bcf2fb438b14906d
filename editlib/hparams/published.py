"""Translate settings files of the ROME family where editlib names or writes a key differently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from editlib.errors import HparamsError

FAMILY_KEYS = frozenset(
    # ROME, MEMIT, AlphaEdit, FT
    {"mom2_adjustment", "mom2_update_weight", "context_template_length_params", "layer_selection"}
    | {"attn_module_tmp", "ln_f_module", "lm_head_module", "nullspace_threshold", "L2"}
    | {"num_steps", "lr", "weight_decay", "norm_constraint", "objective_optimization"}
    # EasyEdit
    | {"alg_name", "stats_dir", "P_loc", "device", "model_parallel", "fp16", "batch_size", "max_length"}
    | {"use_chat_template", "enable_thinking"}
    # EMMET, FastMEMIT, NSE
    | {"calculate_objective_value", "update_norm_lambda", "emmet_lambda", "dynamic", "dynamic_multiplier"}
    | {"alpha", "upper_bound", "max_iterations", "neuron_threshold"}
    # AnyEdit's edits in pieces
    | {"window_size", "overlap"}
)
"""Keys of the family's published files; those that an algorithm does not use are kept in `unused`."""

SAME = {"MEMIT_rect": "RECT", "MEMIT_prune": "PRUNE", "MEMIT_RECT": "RECT", "FT_uns": "FT", "FastEdit": "ROME"}
"""Other names of editlib's algorithms, in folders and `alg_name`."""

RELATIVES = {
    "NSE": ("MEMIT", "MEMIT on the neurons that matter most"),
    "NCMIT": ("MEMIT", "MEMIT with noise"),
    "MEMIT_ARE": ("MEMIT", "AnyEdit: MEMIT in pieces of a long answer"),
    "AlphaEdit_ARE": ("AlphaEdit", "AnyEdit: AlphaEdit in pieces of a long answer"),
    "R-ROME": ("ROME", "ROME with another average of keys"),
    "FT-L": ("FT", "fine-tuning of one matrix"),
    "FT-M": ("FT", "fine-tuning of one matrix"),
}
"""Algorithms that editlib lacks, each with one whose settings class reads its files."""

OTHERS = frozenset(
    {"AGRACE", "DEFER", "DINM", "EAMET", "FT-Api", "GRACE", "IKE", "KE", "KN", "LoRA", "LoRA_uns", "MALMEN", "MELO"}
    | {"MEND", "PMET", "QLoRA", "SERAC", "UltraEdit", "UnKE", "UnKE_ARE", "WISE"}
)
"""Algorithms of EasyEdit and AnyEdit whose settings no class of editlib reads."""


def as_ours(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Translates published values to editlib's; returns them, and values without a meaning as a second item.

    `norm_constraint: false` means no limit (EasyEdit). A matrix is named without its `.weight` (FT). The dtype of layer
    statistics has no meaning if they are not used (FastEdit's `mom2_adjustment: false`). AlphaEdit's own command names
    `L2` in full.

    Raises:
        HparamsError: a weight decay that grows with the number of edits (MEMIT's FT).
    """
    ours, idle = dict(values), {}
    if "wd_power_law" in ours:
        wanted = 'expected "weight_decay" as a number; write it and remove this key'
        raise HparamsError(f'key "wd_power_law": a weight decay by the number of edits, as in MEMIT; {wanted}')
    if "l2_regularization" in ours and "L2" not in ours:
        ours["L2"] = ours.pop("l2_regularization")
    if ours.get("norm_constraint") is False:
        ours["norm_constraint"] = None
    name = ours.get("rewrite_module_tmp")
    if isinstance(name, str):
        ours["rewrite_module_tmp"] = name.removesuffix(".weight")
    if ours.get("mom2_adjustment") is False and ours.get("mom2_dtype") in ("float16", "bfloat16"):
        idle["mom2_dtype"] = ours.pop("mom2_dtype")
    return ours, idle
