"""Closed-form knowledge edits and unlearning for Hugging Face causal language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from editlib.algorithms.edit import EditResult
    from editlib.algorithms.low_rank import LowRank
    from editlib.algorithms.null_space import NullSpace
    from editlib.algorithms.unierase import apply_unierase_to_model
    from editlib.algorithms.unlearning_token import TokenHyperParams, UnlearningToken, learn_token
    from editlib.errors import EditlibError
    from editlib.hparams import UniEraseHyperParams, load_hparams
    from editlib.models.loading import load
    from editlib.request import EditRequest, Probe, read_requests, write_requests
    from editlib.workbench import Workbench, unlearn

# Names are looked up when they are used, so that `import editlib` does not wait for torch and transformers.
_HOMES = {
    "EditResult": "algorithms.edit",
    "LowRank": "algorithms.low_rank",
    "NullSpace": "algorithms.null_space",
    "apply_unierase_to_model": "algorithms.unierase",
    "TokenHyperParams": "algorithms.unlearning_token",
    "UnlearningToken": "algorithms.unlearning_token",
    "learn_token": "algorithms.unlearning_token",
    "EditlibError": "errors",
    "UniEraseHyperParams": "hparams",
    "load_hparams": "hparams",
    "load": "models.loading",
    "EditRequest": "request",
    "Probe": "request",
    "read_requests": "request",
    "write_requests": "request",
    "Workbench": "workbench",
    "unlearn": "workbench",
}

__all__ = [
    "EditRequest",
    "EditResult",
    "EditlibError",
    "LowRank",
    "NullSpace",
    "Probe",
    "TokenHyperParams",
    "UniEraseHyperParams",
    "UnlearningToken",
    "Workbench",
    "apply_unierase_to_model",
    "learn_token",
    "load",
    "load_hparams",
    "read_requests",
    "unlearn",
    "write_requests",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"editlib.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'editlib' has no attribute {name!r}")
