"""Which token of a text holds the first or the last character of a subject.

Offsets of a tokenizer are believed where they leave no doubt. They do where a character is several tokens: a run of
characters outside the vocabulary may share one span, and a space that the tokenizer puts in front of a text has the
span of the first character. Then, and for tokenizers without offsets, the text up to the character is encoded on its
own, and tokens are decoded one by one until they reach as far.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from editlib.errors import RequestError


@dataclass(frozen=True)
class Pieces:
    """A text as tokens, without special tokens of the tokenizer's own; `spans` are their characters, or empty where
    they are not known."""

    tok: PreTrainedTokenizerBase
    text: str
    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, tok: PreTrainedTokenizerBase, text: str) -> Pieces:
        """Encodes `text`; special tokens that are written in it are read as such."""
        found = tok(text, add_special_tokens=False, return_offsets_mapping=tok.is_fast)
        spans = tuple((first, behind) for first, behind in found.get("offset_mapping", ()))
        # Some versions of tokenizers give spans of no character; then the others are not to be trusted either.
        return cls(tok, text, tuple(found["input_ids"]), spans if all(a < b for a, b in spans) else ())

    def holding(self, at: int) -> list[int]:
        """Indices of the tokens whose span holds character `at`."""
        return [i for i, (first, behind) in enumerate(self.spans) if first <= at < behind]

    def before(self, at: int) -> Pieces:
        """The text up to character `at`, encoded on its own."""
        return Pieces.of(self.tok, self.text[:at])

    def decoded(self, count: int | None = None) -> str:
        """The first `count` tokens as text."""
        return self.tok.decode(self.ids[:count], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def shared(self, other: Pieces) -> int:
        """How many tokens at the beginning are the same."""
        pairs = enumerate(zip(self.ids, other.ids, strict=False))
        return next((i for i, (own, its) in pairs if own != its), min(len(self.ids), len(other.ids)))


def last_token(pieces: Pieces, start: int, end: int) -> int:
    """Index of the token with the last byte of `text[start:end]`, which may reach beyond it.

    Raises:
        RequestError: the tokenizer leaves nothing of these characters.
    """
    _check_kept(pieces, start, end)
    holding = pieces.holding(end - 1)
    if holding and (len(holding) == 1 or all(pieces.spans[i][1] == end for i in holding)):
        return holding[-1]
    cut = pieces.before(end)
    same = pieces.shared(cut)
    if same == len(cut.ids):
        return same - 1
    wanted, candidates = cut.decoded(), _from(same, pieces, holding)
    reaching = (i for i in candidates if pieces.decoded(i + 1).startswith(wanted))
    # None does where a normalizer makes one character of the last one and the next: the first difference is the place.
    return next(reaching, candidates[0])


def first_token(pieces: Pieces, start: int, end: int) -> int:
    """Index of the token with the first byte of `text[start:end]`; it may begin before it, with a space most often.

    Raises:
        RequestError: the tokenizer leaves nothing of these characters.
    """
    _check_kept(pieces, start, end)
    holding = pieces.holding(start)
    if len(holding) == 1:
        return holding[0]
    cut = pieces.before(start)
    same, length = pieces.shared(cut), len(cut.decoded().rstrip())
    candidates = _from(same, pieces, holding)
    return next((i for i in candidates if len(pieces.decoded(i + 1).rstrip()) > length), candidates[0])


def _from(same: int, pieces: Pieces, holding: list[int]) -> list[int]:
    """Tokens that may be the one sought: those behind the first `same`, of `holding` where that is known."""
    return [i for i in holding or range(len(pieces.ids)) if i >= same] or [len(pieces.ids) - 1]


def _check_kept(pieces: Pieces, start: int, end: int) -> None:
    if any(pieces.holding(at) for at in range(start, end)):
        return
    if pieces.before(start).ids == pieces.before(end).ids:
        raise RequestError(
            f"the tokenizer leaves nothing of the subject {pieces.text[start:end]!r}; expected one that it can write"
        )
