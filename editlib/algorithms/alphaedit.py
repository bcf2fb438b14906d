"""Edit with AlphaEdit (2410.02355): MEMIT's edit inside the null space of the keys of ordinary text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlib.algorithms.closed_form import alphaedit
from editlib.algorithms.edit import EditResult, EditState, LayerKeys
from editlib.algorithms.left_metric import find_left_metric
from editlib.algorithms.low_rank import LowRank
from editlib.algorithms.null_space import null_spaces
from editlib.algorithms.pipeline import edit_at_once, find_statistics, prepare
from editlib.algorithms.values import Values
from editlib.hparams import AlphaEditHyperParams
from editlib.requests.request import EditRequest
from editlib.stats.file import LayerStats


def apply_alphaedit_to_model(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    hparams: AlphaEditHyperParams,
    *,
    stats: Mapping[int, LayerStats] | None = None,
    stats_dir: str | Path = "stats",
    state: EditState | None = None,
    values: Values | None = None,
    chat: bool | None = False,
    seed: int = 0,
    progress: bool = False,
) -> EditResult:
    """Edits `model` in place so that every request is answered with its `target_new`.

    Outputs do not change along the key directions of ordinary text, nor at the keys of earlier edits.

    Args:
        stats: second moments by layer; read from `stats_dir` when not given.
        state: state after earlier edits (`result.state`).
        values: values found before (`result.values`); `None`: they are optimised.
        chat: ask through the chat template (`None`: when the tokenizer has one).
        seed: seed of the context templates that the model writes.

    Raises:
        RequestError, HparamsError, StatsError: input that does not fit this model.
        EditError: no finite solution. After every error the model is unchanged.
    """
    state = state or EditState()
    encoded = prepare(model, tok, requests, hparams, templates=state.templates, chat=chat, seed=seed)
    stats = find_statistics(model, hparams, stats_dir, stats)
    spaces = null_spaces(stats, hparams, encoded.anat.device)
    # None unless `left_weight` is set: the published solve weighs all output directions equally.
    metric = find_left_metric(encoded.anat, encoded.form, encoded.requests, hparams.layers, hparams.left_weight)

    def solve(layer: int, keys: LayerKeys, residual: Tensor) -> LowRank:
        # Past keys enter with a residual of zero (eq. 13).
        past = state.past_block(layer, keys.mean)  # [d_ff, m]
        space = spaces[layer]
        return alphaedit(keys.mean, residual, space, l2=hparams.L2, constraints=[past], metric=metric)

    return edit_at_once(encoded, hparams, solve, state, values, progress)
