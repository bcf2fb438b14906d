"""Hyper-parameters: one flat, checked dataclass an algorithm, under the published key names.

A new key is one `knob(...)` line, its range included. A new algorithm is one class and its place in
`ALGORITHMS`; its bundled settings are `hparams/<algorithm>/<name>.json`.
"""

from editlib.hparams.base import ClosedFormHyperParams, HyperParams
from editlib.hparams.loading import algorithm_of, available, load_hparams
from editlib.hparams.methods import (
    ALGORITHMS,
    AlphaEditHyperParams,
    EMMETHyperParams,
    FTHyperParams,
    MEMITHyperParams,
    MEMITSeqHyperParams,
    NASHyperParams,
    NullSpaceHyperParams,
    PRUNEHyperParams,
    RECTHyperParams,
    ROMEHyperParams,
    UniEraseHyperParams,
)

__all__ = [
    "ALGORITHMS",
    "AlphaEditHyperParams",
    "ClosedFormHyperParams",
    "EMMETHyperParams",
    "FTHyperParams",
    "HyperParams",
    "MEMITHyperParams",
    "MEMITSeqHyperParams",
    "NASHyperParams",
    "NullSpaceHyperParams",
    "PRUNEHyperParams",
    "RECTHyperParams",
    "ROMEHyperParams",
    "UniEraseHyperParams",
    "algorithm_of",
    "available",
    "load_hparams",
]
