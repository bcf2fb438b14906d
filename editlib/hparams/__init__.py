"""Hyper-parameters: one flat, checked dataclass per algorithm, with the published key names.

A new key is one `setting(...)` line, including its range. A new algorithm is one class with an entry in `ALGORITHMS`;
its bundled settings are `hparams/<algorithm>/<name>.json`.
"""

from editlib.hparams.base import ClosedFormHyperParams, HyperParams
from editlib.hparams.bundled import available
from editlib.hparams.derive import derive
from editlib.hparams.loading import algorithm_of, find_hparams, load_hparams
from editlib.hparams.methods import (
    ALGORITHMS,
    EMMETHyperParams,
    FTHyperParams,
    MEMITHyperParams,
    MEMITSeqHyperParams,
    NASHyperParams,
    PRUNEHyperParams,
    RECTHyperParams,
    ROMEHyperParams,
    finds_values,
    takes_retain,
)
from editlib.hparams.null_space import AlphaEditHyperParams, NullSpaceHyperParams, UniEraseHyperParams
from editlib.hparams.shapes import KNOWN, ModelShape

__all__ = [
    "ALGORITHMS",
    "KNOWN",
    "AlphaEditHyperParams",
    "ClosedFormHyperParams",
    "EMMETHyperParams",
    "FTHyperParams",
    "HyperParams",
    "MEMITHyperParams",
    "MEMITSeqHyperParams",
    "ModelShape",
    "NASHyperParams",
    "NullSpaceHyperParams",
    "PRUNEHyperParams",
    "RECTHyperParams",
    "ROMEHyperParams",
    "UniEraseHyperParams",
    "algorithm_of",
    "available",
    "derive",
    "find_hparams",
    "finds_values",
    "load_hparams",
    "takes_retain",
]
