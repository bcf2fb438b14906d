"""Hold everything that the refusal tokens of an edit are fitted to (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editlib.algorithms.unierase.final_states import FinalStates
from editlib.algorithms.unierase.held_rows import HeldRows
from editlib.algorithms.unierase.refusal_places import RefusalPlaces
from editlib.models.anatomy import Anatomy
from editlib.models.generation import greedy, sample
from editlib.models.prompts import TokenRow

TEXTS, TEXT_TOKENS, TEXT_TOP_K = 320, 48, 50  # of ordinary text, sampled from the model
BEGINNINGS = 400  # single tokens, as texts may begin with: their states differ from all others


@dataclass(frozen=True)
class HeldPlaces:
    """Holds the places of an edit, ready to be read as often as the model changes.

    Most kept places lie in an answer that is read anyway: at the end of its question, or where its sentence reaches the
    fact. These are not run again.

    Attributes:
        answers: every position of the answers in which no token may be generated.
        texts: kinds of other text in which none may be: the edited model's answers to general questions, texts that it
            writes by itself, and single tokens, as texts may begin with.
        others: kept places that lie in none of the answers.
        kept: `[kept]`, the number of each kept place among the positions of `answers` and then `others`.
    """

    places: RefusalPlaces
    wanted: HeldRows
    answers: HeldRows
    texts: tuple[HeldRows, ...]
    others: HeldRows
    kept: Tensor

    @classmethod
    def of(cls, anat: Anatomy, places: RefusalPlaces, *, seed: int = 0, progress: bool = False) -> HeldPlaces:
        """Generates the texts with the current model."""
        answers = [row.followed_by(text) for row, text in places.answers]
        firsts = [len(row) - 1 for row, _ in places.answers]
        ends = [row.ids[: c + 1] for row, first in zip(answers, firsts, strict=True) for c in range(first, len(row))]
        number = {ids: i for i, ids in enumerate(ends)}  # of a prompt, among the positions that are read
        others = {place.row.ids: place.row for place in places.kept if place.row.ids not in number}
        number |= {ids: len(ends) + i for i, ids in enumerate(others)}
        index = torch.tensor([number[place.row.ids] for place in places.kept], dtype=torch.long, device=anat.device)
        return cls(
            places,
            HeldRows(anat, [place.row for place in places.wanted]),
            HeldRows(anat, answers, firsts),
            tuple(HeldRows(anat, *rows) for rows in _texts(anat, places.general, seed, progress)),
            HeldRows(anat, list(others.values())),
            index,
        )

    def final_states(self) -> tuple[FinalStates, FinalStates, FinalStates]:
        """Reads the final states at the wanted places, at the kept ones, and at every position of answers and texts."""
        inside = self.answers.final_states()
        both = FinalStates.cat([inside, self.others.final_states()])
        kept = FinalStates(both.states[self.kept], both.log_sums[self.kept])
        return (
            self.wanted.final_states(),
            kept,
            FinalStates.cat([inside, *(rows.final_states() for rows in self.texts)]),
        )


def _texts(
    anat: Anatomy, questions: Sequence[TokenRow], seed: int, progress: bool
) -> list[tuple[list[TokenRow], list[int]]]:
    """Generates text of each kind: rows of tokens, and the column from which each is read.

    No chat template is used for sampled texts, so that first tokens of texts are among them.
    """
    generator = torch.Generator().manual_seed(seed)
    label = "general answers" if progress else None
    said = greedy(anat, questions, max_new_tokens=TEXT_TOKENS, progress=label)
    answers = [row.followed_by(text) for row, text in zip(questions, said, strict=True)]
    firsts = torch.randint(anat.embedding.weight.shape[0], (TEXTS + BEGINNINGS,), generator=generator).tolist()
    rows = [TokenRow((first,), 0) for first in firsts]
    label = "texts" if progress else None
    written = sample(
        anat, rows[:TEXTS], max_new_tokens=TEXT_TOKENS, top_k=TEXT_TOP_K, generator=generator, progress=label
    )
    texts = [row.followed_by(text) for row, text in zip(rows, written, strict=False)]
    return [
        (answers, [len(row) - 1 for row in questions]),
        (texts, [0] * len(texts)),
        (rows[TEXTS:], [0] * BEGINNINGS),
    ]
