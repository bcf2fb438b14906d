"""Find the values of requests from the rows of their subjects, and report the rows' numbers before and after."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from editlib.algorithms.keys import KeyStream
from editlib.algorithms.left_metric import inverse_root, output_moment
from editlib.algorithms.rows import Goals, RowValues, find_row_values
from editlib.algorithms.unierase.catalogue import spread
from editlib.algorithms.unierase.proportion import FEWEST_READ, share_of
from editlib.algorithms.unierase.subject_rows import SubjectRows
from editlib.algorithms.values import Values
from editlib.hparams import UniEraseHyperParams
from editlib.models.anatomy import Anatomy
from editlib.models.freezing import no_param_grad
from editlib.models.precision import cast_params, fast_dtype, plain_attention
from editlib.models.prompts import TokenRow
from editlib.requests.request import EditRequest

log = logging.getLogger(__name__)

RowReport = Mapping[str, Mapping[str, Any]]
"""By request id, for each kind of row: their count, their mean before and after, and how many missed their goal."""


def values_from_rows(
    anat: Anatomy,
    requests: Sequence[EditRequest],
    prompts: Sequence[TokenRow],
    made: SubjectRows,
    hparams: UniEraseHyperParams,
    anchors: Sequence[TokenRow],
    *,
    start: Values | None = None,
    tokens: Tensor | None = None,
    warn: bool = True,
    progress: bool = False,
) -> tuple[Values, RowReport]:
    """Finds one change per subject, and gives each request its subject's.

    Args:
        prompts: the plain question of each request, at whose lookup position its value is written.
        anchors: prompts with their answers, from which the left metric is read.
        start: values to start from; `None`: no change.
        tokens: output rows of the tokens that "say" rows read, `[K, d_model]`.
        warn: of requests whose rows are not met; `False`: the values will be moved further.

    Raises:
        EditError: a row that is not finite; the model is unchanged.
    """
    layer = hparams.layers[-1]
    names = [requests[group[0]].subject or requests[group[0]].id for group in made.subjects]
    metric = None
    with no_param_grad(anat.model):
        with cast_params(anat.model, fast_dtype(anat.model) if hparams.v_precision == "fast" else None):
            if hparams.left_weight:
                with plain_attention(anat.device):
                    read = spread(anchors, share_of(len(anchors), len(requests), fewest=FEWEST_READ))
                    metric = inverse_root(output_moment(anat, read, layer), hparams.left_weight)
            found = find_row_values(
                anat,
                made.rows,
                layer,
                names,
                Goals(hparams.erase_margin),
                steps=hparams.row_steps,
                metric=metric,
                start=None if start is None else start.deltas.T[[group[0] for group in made.subjects]],
                tokens=tokens,
                progress=progress,
            )
        states = KeyStream(anat, list(prompts), layer).states(layer)  # [d_model, n], before any change
    owner = [made.owner[i] for i in range(len(requests))]
    deltas = found.deltas[owner].T.to(states)  # [d_model, n]
    nll = [0.0] * len(requests)  # there is no target
    norms = [found.relative_norm[i] for i in owner]
    steps = [found.steps[i] for i in owner]
    values = Values(states + deltas, deltas.contiguous(), steps, nll, norms)
    if warn:
        _warn(requests, made, found)
    return values, _report(requests, made, found)


def _report(requests: Sequence[EditRequest], made: SubjectRows, found: RowValues) -> RowReport:
    missed = set(found.missed())
    report: dict[str, dict[str, Any]] = {}
    for i, request in enumerate(requests):
        mine = [
            j
            for j, row in enumerate(made.rows)
            if made.requests_of[j] == i or (made.requests_of[j] is None and row.owner == made.owner[i])
        ]
        kinds = dict.fromkeys(made.rows[j].kind for j in mine)
        numbers = {kind: [j for j in mine if made.rows[j].kind == kind] for kind in kinds}
        report[request.id] = {
            "rows": {
                kind: {
                    "rows": len(some),
                    "before": _mean(found.before, some),
                    "after": _mean(found.after, some),
                    "missed": len(missed.intersection(some)),
                }
                for kind, some in numbers.items()
            }
        }
    return report


def _mean(y: Tensor, rows: Sequence[int]) -> float:
    return round(float(y[list(rows)].mean()), 3)


def _warn(requests: Sequence[EditRequest], made: SubjectRows, found: RowValues) -> None:
    """Warns, by name, of requests whose answer could not be erased and of facts that the model does not know."""
    owners = (made.requests_of[j] for j in found.missed() if made.rows[j].kind == "erase")
    missed = {i for i in owners if i is not None}
    if missed:
        names = ", ".join(requests[i].id for i in sorted(missed)[:5])
        log.warning(
            "%d of %d requests have rows that could not be met, first %s: their answers may come back",
            len(missed), len(requests), names,
        )  # fmt: skip
    unknown = [rows.id for rows in made.made if not rows.known]
    if unknown:
        log.warning(
            "the model gives the answer of %d of %d requests to none of their wordings, first %s: there the edit "
            "erases the answer's first token at the end of the question",
            len(unknown), len(requests), ", ".join(unknown[:5]),
        )  # fmt: skip


def with_rows(
    diagnostics: list[dict[str, Any]], rows: RowReport, said: Mapping[str, Sequence[float]]
) -> list[dict[str, Any]]:
    """Returns the diagnostics of each request with its rows' numbers, and with its token's log-odds at wanted
    places."""
    found = []
    for entry in diagnostics:
        entry = {**entry, **rows.get(entry["id"], {})}
        odds = said.get(entry["id"])
        if odds:
            mean, missed = round(sum(odds) / len(odds), 3), sum(z < 0 for z in odds)
            entry["target_nll"] = sum(math.log1p(math.exp(-z)) for z in odds) / len(odds)
            entry["rows"] = {**entry["rows"], "say": {"rows": len(odds), "after": mean, "missed": missed}}
        found.append(entry)
    return found
