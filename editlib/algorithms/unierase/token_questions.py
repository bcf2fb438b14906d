"""Choose the bundled questions that an unlearning token is learned over."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlib import data
from editlib.algorithms.unierase.token_learning import TokenHyperParams
from editlib.errors import TokenError
from editlib.models.positions import SPARE, fitting, positions_of
from editlib.models.prompt_settings import PromptSettings
from editlib.models.prompts import PromptFormat

log = logging.getLogger(__name__)


def token_questions(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    refusals: Sequence[str],
    hp: TokenHyperParams,
    prompts: PromptSettings,
    *,
    name: str,
) -> tuple[list[str], list[str]]:
    """Returns bundled questions to learn a token over, shuffled, and ordinary ones after which it must not appear.

    Both are asked with `prompts` and as plain text. Questions that do not fit the model's positions with a refusal
    after them are left out.

    Args:
        name: of the model, for messages.

    Raises:
        TokenError: fewer questions fit than a batch holds.
    """
    asked = data.questions("train")
    random.Random(hp.seed).shuffle(asked)
    ordinary = [prompt.question for prompt in data.general("anchor")][: hp.guard_prompts // 3]
    form = PromptFormat.of(tok, prompts)
    answer_tokens = max(hp.guard_tokens, 1 + max(len(form.answer_ids(text)) for text in refusals) + SPARE)
    fit_asked, fit_ordinary = asked, ordinary
    for each in (form, PromptFormat(tok, chat=False)):
        fit_asked = fitting(model, each, fit_asked, answer_tokens=answer_tokens)
        fit_ordinary = fitting(model, each, fit_ordinary, answer_tokens=answer_tokens)
    if len(fit_asked) < max(hp.batch, 2):
        raise TokenError(
            f"{name} has {positions_of(model)} positions, too few for {len(asked) - len(fit_asked)} of the "
            f"{len(asked)} bundled questions with a refusal ({answer_tokens} tokens) as it is asked; give "
            "shorter prompts or refusals, or another model"
        )
    if left_out := len(asked) + len(ordinary) - len(fit_asked) - len(fit_ordinary):
        log.info("%d bundled questions are longer than the positions of %s: left out", left_out, name)
    return fit_asked, fit_ordinary
