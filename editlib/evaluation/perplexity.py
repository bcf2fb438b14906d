"""Cut text into the windows on which perplexity is measured."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from editlib.errors import CorpusError
from editlib.models.prompts import token_windows

WINDOWS, WINDOW = 16, 256


def text_windows(tok: PreTrainedTokenizerBase, documents: Iterable[str]) -> list[list[int]]:
    """Cuts documents into their first `WINDOWS` windows of `WINDOW` tokens; shorter ones if no document is longer.

    Documents are read only until there are enough windows.

    Raises:
        CorpusError: there is no window of two tokens.
    """
    chosen: list[list[int]] = []
    for document in documents:
        windows = list(token_windows(tok, document, WINDOW))
        chosen += [ids for ids in windows if len(ids) == len(windows[0])]  # no shorter remainders
        if len(chosen) >= WINDOWS:
            break
    chosen = chosen[:WINDOWS]
    if not chosen:
        raise CorpusError("the text for perplexity has fewer than two tokens; give a longer one, or --text none")
    return chosen
