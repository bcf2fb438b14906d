"""Find the values of a UniErase edit, from rows or by descent, and where its tokens are wanted."""

from __future__ import annotations

from typing import Any

from editlib import data
from editlib.algorithms.contexts import subject_prompts
from editlib.algorithms.edit import Timer
from editlib.algorithms.pipeline import EncodedEdit, find_values
from editlib.algorithms.unierase.anchors import answers_to, choose_anchors
from editlib.algorithms.unierase.held_places import HeldPlaces
from editlib.algorithms.unierase.inputs import FoundValues, KeptInputs, UniEraseInputs
from editlib.algorithms.unierase.other_subjects import other_subjects
from editlib.algorithms.unierase.refusal_places import RefusalPlaces, refusal_places, say_rows
from editlib.algorithms.unierase.refusal_tokens import TokenRows
from editlib.algorithms.unierase.row_values import RowReport, values_from_rows
from editlib.algorithms.unierase.subject_rows import SubjectRows, by_subject, subject_rows
from editlib.algorithms.values import Values

MOST_KEPT = 600  # most retain prompts that refusal tokens stay out of
GENERAL_STEP = 4  # refusal tokens stay out of every fourth bundled question


def general_questions() -> list[str]:
    """Returns bundled questions about anything, at which neither neurons nor tokens may be active."""
    return data.questions("train")[::GENERAL_STEP]


def edit_values(edit: UniEraseInputs, kept: KeptInputs, timer: Timer) -> FoundValues:
    """Finds the values of all requests, from rows or by descent, the report of the rows, and the tokens' places."""
    with timer("values"):
        return _from_rows(edit, kept) if edit.hparams.values_from_rows else _by_descent(edit)


def _from_rows(edit: UniEraseInputs, kept: KeptInputs) -> FoundValues:
    """Finds values that erase each answer, as fitted rows of its subject read it."""
    hparams = edit.hparams
    with edit.fast():
        made = subject_rows(
            edit.anat,
            edit.form,
            edit.requests,
            kept.retain,
            by_subject(edit.requests),
            siblings=hparams.siblings,
            examples=hparams.example_wordings,
            catalogue=edit.catalogue,
            known_answers=kept.answers,
            seed=edit.seed,
            progress=edit.progress,
        )
    values, report = _values(edit, kept, made, warn=not edit.fits_tokens)
    return FoundValues(values, report, made, _places(edit, kept, made) if edit.fits_tokens else None)


def _values(edit: UniEraseInputs, kept: KeptInputs, made: SubjectRows, **given: Any) -> tuple[Values, RowReport]:
    """Finds values that meet the rows `made`; `given`: keywords of `values_from_rows`."""
    plain = [rows[0] for rows in edit.contexts]
    anchors = kept.keys.anchors.rows
    return values_from_rows(
        edit.anat, edit.requests, plain, made, edit.hparams, anchors, progress=edit.progress, **given
    )


def values_that_say(
    edit: UniEraseInputs, kept: KeptInputs, found: FoundValues, held: HeldPlaces, tokens: TokenRows
) -> FoundValues:
    """Moves values that erase further, until the model generates refusal tokens where it was asked for an answer.

    Args:
        found: values that erase. `held`: the tokens' places. `tokens`: fitted to the model with these values written;
            it is unedited again.
    """
    assert found.made is not None
    first = edit.anat.embedding.weight.shape[0]  # the id of a new token
    says = say_rows(edit.form, held.places, edit.requests, found.made.owner, first)
    made = found.made.followed_by(says, held.places.requests)
    # The first row is `[UNL]`'s, which follows the others.
    values, report = _values(edit, kept, made, start=found.values, tokens=tokens.output[1:])
    return FoundValues(values, report, made, found.places)


def _places(edit: UniEraseInputs, kept: KeptInputs, made: SubjectRows) -> RefusalPlaces:
    """Returns where tokens should be generated, and where not: at retain prompts, other facts of the subjects, general
    questions."""
    siblings = dict.fromkeys(text for rows in made.made for text in rows.siblings)
    retain = choose_anchors(kept.retain, edit.requests, most=MOST_KEPT, seed=edit.seed)
    most, progress = edit.hparams.other_subjects, edit.progress
    known = {**(kept.answers or {}), **made.answers}
    with edit.fast():
        others = other_subjects(edit.anat, edit.form, edit.requests, retain, most, seed=edit.seed, progress=progress)
        known |= answers_to(edit.anat, edit.form, others, known=known, progress=progress)
    return refusal_places(
        edit.form,
        edit.requests,
        [*retain, *others],
        list(siblings),
        known,
        edit.catalogue,
        wordings=edit.hparams.token_wordings,
        general=general_questions(),
    )


def _by_descent(edit: UniEraseInputs) -> FoundValues:
    """Finds values at which each question is answered with [UNL], as published."""
    hparams = edit.hparams
    subjects = subject_prompts(
        edit.anat, edit.form, edit.requests, prompts=hparams.kl_subject_prompts, answer_tokens=hparams.kl_answer_tokens
    )
    assert edit.token_id is not None  # `_prepare` refuses descent without a token
    wanted: list[tuple[int, ...]] = [(edit.token_id,)] * len(edit.requests)
    encoded = EncodedEdit(edit.anat, edit.form, edit.requests, edit.contexts, wanted, subjects)
    return FoundValues(find_values(encoded, hparams, groups=by_subject(edit.requests), progress=edit.progress))
