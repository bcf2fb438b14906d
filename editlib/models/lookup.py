"""Find the token of a text that holds the first or the last character of a subject.

A tokenizer's offsets are used where they are unambiguous. They are ambiguous where a character is several tokens: a run
of characters outside the vocabulary may share one span, and a space that the tokenizer adds before a text has the span
of the first character. Then, and for tokenizers without offsets, the text up to the character is encoded on its own,
and tokens are decoded one by one until they cover the character.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from transformers import PreTrainedTokenizerBase

from editlib.errors import RequestError


@dataclass(frozen=True)
class TokenizedText:
    """Holds a text as tokens, without the special tokens that the tokenizer adds.

    `spans` holds the first character of each token and the one after its last; it is empty if they are unknown.
    """

    tok: PreTrainedTokenizerBase
    text: str
    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, tok: PreTrainedTokenizerBase, text: str) -> TokenizedText:
        """Encodes `text`; special tokens that are written in it are read as special tokens."""
        encoded = tok(text, add_special_tokens=False, return_offsets_mapping=tok.is_fast)
        spans = tuple((start, end) for start, end in encoded.get("offset_mapping", ()))
        # Some versions of tokenizers give empty spans; then the others cannot be trusted either.
        return cls(tok, text, tuple(encoded["input_ids"]), spans if all(a < b for a, b in spans) else ())

    def tokens_at(self, at: int) -> list[int]:
        """Returns the indices of the tokens whose span holds character `at`."""
        return [i for i, (start, end) in enumerate(self.spans) if start <= at < end]

    def before(self, at: int) -> TokenizedText:
        """Returns the text up to character `at`, encoded on its own."""
        return TokenizedText.of(self.tok, self.text[:at])

    def decoded(self, count: int | None = None) -> str:
        """Returns the first `count` tokens as text."""
        ids = list(self.ids[:count])
        text = self.tok.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return cast(str, text)  # one list of ids decodes to one text

    def shared(self, other: TokenizedText) -> int:
        """Counts the leading tokens that both texts have in common."""
        pairs = enumerate(zip(self.ids, other.ids, strict=False))
        return next((i for i, (mine, its) in pairs if mine != its), min(len(self.ids), len(other.ids)))


def last_token(tokenized: TokenizedText, start: int, end: int) -> int:
    """Returns the index of the token with the last byte of `text[start:end]`; the token may reach beyond it.

    Raises:
        RequestError: the tokenizer drops all of these characters.
    """
    _check_kept(tokenized, start, end)
    # 1. Offsets settle it when one token holds the character, or all that do end with it.
    holding = tokenized.tokens_at(end - 1)
    if holding and (len(holding) == 1 or all(tokenized.spans[i][1] == end for i in holding)):
        return holding[-1]
    # 2. The text up to the character, encoded alone, has the same tokens: its last one is the result.
    cut = tokenized.before(end)
    same = tokenized.shared(cut)
    if same == len(cut.ids):
        return same - 1
    # 3. A merge crosses the character: the first token whose decoded text reaches it.
    wanted, candidates = cut.decoded(), _from(same, tokenized, holding)
    reaching = (i for i in candidates if tokenized.decoded(i + 1).startswith(wanted))
    # No token reaches it if a normalizer merges the last character with the next: take the first difference.
    return next(reaching, candidates[0])


def first_token(tokenized: TokenizedText, start: int, end: int) -> int:
    """Returns the index of the token with the first byte of `text[start:end]`; the token may begin earlier, often with
    a space.

    Raises:
        RequestError: the tokenizer drops all of these characters.
    """
    _check_kept(tokenized, start, end)
    holding = tokenized.tokens_at(start)
    if len(holding) == 1:
        return holding[0]
    cut = tokenized.before(start)
    # Blanks at the end do not count: they may belong to the subject's first token.
    same, length = tokenized.shared(cut), len(cut.decoded().rstrip())
    candidates = _from(same, tokenized, holding)
    return next((i for i in candidates if len(tokenized.decoded(i + 1).rstrip()) > length), candidates[0])


def _from(same: int, tokenized: TokenizedText, holding: list[int]) -> list[int]:
    """Returns candidate tokens: those after the first `same`, among `holding` if offsets are known."""
    return [i for i in holding or range(len(tokenized.ids)) if i >= same] or [len(tokenized.ids) - 1]


def _check_kept(tokenized: TokenizedText, start: int, end: int) -> None:
    """Raises `RequestError` if no token holds any of the characters."""
    if any(tokenized.tokens_at(at) for at in range(start, end)):
        return
    if tokenized.before(start).ids == tokenized.before(end).ids:
        raise RequestError(
            f"the tokenizer drops all of the subject {tokenized.text[start:end]!r}; expected one that it can encode"
        )
