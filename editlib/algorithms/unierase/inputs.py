"""Hold what the steps of a UniErase edit hand on to one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from editlib.algorithms.unierase.anchor_keys import AnchorKeys
from editlib.algorithms.unierase.catalogue import Catalogue
from editlib.algorithms.unierase.refusal_places import RefusalPlaces
from editlib.algorithms.unierase.row_values import RowReport
from editlib.algorithms.unierase.subject_rows import SubjectRows
from editlib.algorithms.values import Values
from editlib.hparams import UniEraseHyperParams
from editlib.models.anatomy import Anatomy
from editlib.models.precision import cast_params, fast_dtype
from editlib.models.prompts import PromptFormat, TokenRow
from editlib.requests.request import EditRequest


@dataclass(frozen=True)
class UniEraseInputs:
    """Holds one edit's inputs, ready for the model: requests with the wordings made for them, and encoded contexts."""

    anat: Anatomy
    form: PromptFormat
    requests: list[EditRequest]
    hparams: UniEraseHyperParams
    contexts: list[list[TokenRow]]
    catalogue: Catalogue
    token_id: int | None  # of [UNL], the target of values by descent; `None` with values from rows
    seed: int
    progress: bool

    @property
    def fits_tokens(self) -> bool:
        """Whether tokens are fitted to the edited model."""
        return self.hparams.values_from_rows and self.hparams.say

    def steps(self, *, found: bool) -> list[str]:
        """Lists the steps of the edit as its timer names them; values that were `found` before are none."""
        gate, tokens = self.hparams.gate_at is not None, self.fits_tokens
        wanted = {"anchors": True, "gate": gate, "values": not found, "write": True, "tokens": tokens}
        return [name for name, is_one in wanted.items() if is_one]

    def fast(self) -> AbstractContextManager[None]:
        """Runs the model in the dtype that the processor is fast in, where the settings allow it (`v_precision`)."""
        return cast_params(self.anat.model, fast_dtype(self.anat.model) if self.hparams.v_precision == "fast" else None)


@dataclass(frozen=True)
class KeptInputs:
    """Holds what an edit must preserve: retain prompts, the model's answers to them as far as they are known, and the
    anchors' keys."""

    retain: Sequence[EditRequest]
    answers: Mapping[str, Sequence[int]] | None
    keys: AnchorKeys


@dataclass(frozen=True)
class FoundValues:
    """Holds the values of an edit; if they were found and not given, also the rows, their report and the tokens'
    places."""

    values: Values
    rows: RowReport = field(default_factory=dict)
    made: SubjectRows | None = None
    places: RefusalPlaces | None = None
