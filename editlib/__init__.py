"""Closed-form knowledge edits and unlearning for Hugging Face causal language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from editlib.ability import run_ability
    from editlib.algorithms.alphaedit import apply_alphaedit_to_model
    from editlib.algorithms.edit import EditResult, EditState
    from editlib.algorithms.ft import apply_ft_to_model
    from editlib.algorithms.low_rank import LowRank
    from editlib.algorithms.memit import apply_memit_to_model
    from editlib.algorithms.null_space import NullSpace
    from editlib.algorithms.rome import apply_rome_to_model
    from editlib.algorithms.unierase.apply import apply_unierase_to_model
    from editlib.algorithms.unierase.token import UnlearningToken
    from editlib.algorithms.unierase.token_learning import TokenHyperParams, learn_token
    from editlib.attacks import run_attacks
    from editlib.baselines import apply_baseline_to_model
    from editlib.chain import Chain
    from editlib.errors import EditlibError
    from editlib.hparams import (
        AlphaEditHyperParams,
        FTHyperParams,
        MEMITHyperParams,
        ROMEHyperParams,
        UniEraseHyperParams,
        load_hparams,
    )
    from editlib.jobs.edit import edit, unlearn
    from editlib.jobs.finetune import finetune
    from editlib.models.loading import load
    from editlib.requests.reading import read_requests, write_requests
    from editlib.requests.request import EditRequest, Probe
    from editlib.workbench import Workbench

# Names are looked up when they are used, so that `import editlib` does not wait for torch and transformers.
_HOMES = {
    "EditResult": "algorithms.edit",
    "EditState": "algorithms.edit",
    "LowRank": "algorithms.low_rank",
    "NullSpace": "algorithms.null_space",
    "apply_alphaedit_to_model": "algorithms.alphaedit",
    "apply_ft_to_model": "algorithms.ft",
    "apply_memit_to_model": "algorithms.memit",
    "apply_rome_to_model": "algorithms.rome",
    "apply_unierase_to_model": "algorithms.unierase",
    "TokenHyperParams": "algorithms.unierase.token_learning",
    "UnlearningToken": "algorithms.unierase.token",
    "learn_token": "algorithms.unierase.token_learning",
    "run_ability": "ability",
    "run_attacks": "attacks",
    "apply_baseline_to_model": "baselines",
    "Chain": "chain",
    "EditlibError": "errors",
    "finetune": "jobs.finetune",
    "AlphaEditHyperParams": "hparams",
    "FTHyperParams": "hparams",
    "MEMITHyperParams": "hparams",
    "ROMEHyperParams": "hparams",
    "UniEraseHyperParams": "hparams",
    "load_hparams": "hparams",
    "load": "models.loading",
    "EditRequest": "requests.request",
    "Probe": "requests.request",
    "read_requests": "requests.reading",
    "write_requests": "requests.reading",
    "Workbench": "workbench",
    "edit": "jobs.edit",
    "unlearn": "jobs.edit",
}

__all__ = [
    "AlphaEditHyperParams",
    "Chain",
    "EditRequest",
    "EditResult",
    "EditState",
    "EditlibError",
    "FTHyperParams",
    "LowRank",
    "MEMITHyperParams",
    "NullSpace",
    "Probe",
    "ROMEHyperParams",
    "TokenHyperParams",
    "UniEraseHyperParams",
    "UnlearningToken",
    "Workbench",
    "apply_alphaedit_to_model",
    "apply_baseline_to_model",
    "apply_ft_to_model",
    "apply_memit_to_model",
    "apply_rome_to_model",
    "apply_unierase_to_model",
    "edit",
    "finetune",
    "learn_token",
    "load",
    "load_hparams",
    "read_requests",
    "run_ability",
    "run_attacks",
    "unlearn",
    "write_requests",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"editlib.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'editlib' has no attribute {name!r}")
