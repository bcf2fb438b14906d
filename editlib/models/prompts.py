"""Questions -> token rows with lookup positions -> padded batches.

Everything is encoded once, from the rendered text, with character offsets; padding is ours, so the caller's
tokenizer is never touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from editlib.errors import RequestError
from editlib.request import EditRequest, occurrences

MARK = "\N{OBJECT REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class TokenRow:
    """One prompt as token ids.

    `lookup` is the index of the token whose hidden state is edited (the subject's last token, or the prompt's
    last one); `extra` counts the tokens at the end that were appended behind the prompt (an answer).
    """

    ids: tuple[int, ...]
    lookup: int
    extra: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def followed_by(self, ids: Sequence[int]) -> TokenRow:
        """The same prompt with `ids` behind it."""
        return TokenRow(self.ids + tuple(ids), self.lookup, self.extra + len(ids))


@dataclass(frozen=True)
class TokenBatch:
    """Padded rows. `input_ids` and `attention_mask` are `[n, T]`, `lookup` and `last` are `[n]` column indices."""

    input_ids: Tensor
    attention_mask: Tensor
    lookup: Tensor
    last: Tensor

    @property
    def position_ids(self) -> Tensor:
        return (self.attention_mask.cumsum(1) - 1).clamp_min(0)

    def __len__(self) -> int:
        return self.input_ids.shape[0]


def pad(rows: Sequence[TokenRow], *, side: str = "right", device: torch.device | str | None = None) -> TokenBatch:
    """Pads `rows` with token 0, which the attention mask hides, on the given side."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    shift = torch.zeros(len(rows), dtype=torch.long)
    for i, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        ids[i, start : start + len(row)] = torch.tensor(row.ids)
        mask[i, start : start + len(row)] = 1
        shift[i] = start
    lookup = torch.tensor([row.lookup for row in rows]) + shift
    last = torch.tensor([len(row) - 1 for row in rows]) + shift
    return TokenBatch(ids.to(device), mask.to(device), lookup.to(device), last.to(device))


@dataclass(frozen=True)
class PromptFormat:
    """How a question becomes the text that the model reads.

    `chat=None` uses the tokenizer's chat template when it has one; `False` asks with the bare text.
    """

    tok: PreTrainedTokenizerBase
    chat: bool | None = None
    system: str | None = None
    uses_chat: bool = field(init=False)

    def __post_init__(self) -> None:
        has_template = bool(getattr(self.tok, "chat_template", None))
        if self.chat and not has_template:
            raise RequestError("a chat template was asked for, but this tokenizer has none; leave the option out")
        object.__setattr__(self, "uses_chat", has_template if self.chat is None else self.chat)

    def render(self, question: str) -> str:
        """The text up to the point where the model answers."""
        if not self.uses_chat:
            return question
        messages = [{"role": "user", "content": question}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        return self.tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def encode(self, question: str, subject: str | None = None, at: int | None = None) -> TokenRow:
        """Token ids of the rendered question, with the subject's last token as lookup position.

        Raises:
            RequestError: the subject does not stand in the question exactly once, or a template changed it.
        """
        text = self.render(question)
        # A chat template writes its own special tokens; a bare prompt gets what the tokenizer adds (BOS).
        encoded = self.tok(text, add_special_tokens=not self.uses_chat, return_offsets_mapping=self.tok.is_fast)
        ids = tuple(encoded["input_ids"])
        if subject is None:
            return TokenRow(ids, len(ids) - 1)
        places = occurrences(question, subject)
        if len(places) != 1:
            raise RequestError(f"subject {subject!r} stands {len(places)} times in {question!r}; it must stand once")
        # Where a template puts the question is seen with a mark that no template writes itself.
        start = self.render(MARK).find(MARK)
        if start < 0 or not text.startswith(question, start):
            raise RequestError(f"the chat template changes the question {question!r}; use plain prompts for it")
        end = start + places[0] + len(subject)
        return TokenRow(ids, self._token_at(text, end, ids, encoded.get("offset_mapping")))

    def _token_at(self, text: str, end: int, ids: tuple[int, ...], offsets: list[tuple[int, int]] | None) -> int:
        """Index of the token that holds character `end - 1` (a merge across `end` counts as that token)."""
        # A character of several bytes may be several tokens, all with its span; the last one ends it.
        holding = [i for i, (first, behind) in enumerate(offsets or ()) if first < end <= behind]
        if holding:
            return holding[-1]
        # Slow tokenizers and versions with empty spans: the longest common prefix with the text cut at the subject.
        cut = self.tok(text[:end], add_special_tokens=not self.uses_chat)["input_ids"]
        same = 0
        while same < min(len(cut), len(ids)) and cut[same] == ids[same]:
            same += 1
        return min(same, len(ids) - 1) if same < len(cut) else same - 1

    def encode_request(self, request: EditRequest, question: str | None = None) -> TokenRow:
        """A request's own question (or another phrasing of it) at its lookup position."""
        if question is None and request.subject is not None:
            return self.encode(request.question, request.subject, request.prompt.index("{}"))
        return self.encode(question or request.question, request.subject)

    def answer_ids(self, answer: str) -> tuple[int, ...]:
        """Token ids of an answer as it stands behind the prompt: with a leading space where no template ends it."""
        text = answer if self.uses_chat else " " + answer.lstrip()
        return tuple(self.tok(text, add_special_tokens=False)["input_ids"])
