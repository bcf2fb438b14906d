"""Encode questions as token rows with lookup positions, and pad them to batches.

A question goes to the model in three steps. `PromptFormat.render` turns it into the text that the model reads: through
the tokenizer's chat template, between tags, or as it is. `PromptFormat.encode` turns that text into a `TokenRow`: token
ids, and the lookup position, the index of the token whose hidden state an edit changes (usually the last token of the
subject; without a subject, the last token of the prompt). `pad` joins rows to a `TokenBatch` of tensors `[n, T]`.

The rendered text is always encoded as a whole, since tokens may cross the ends of the subject. Padding is done here, so
the caller's tokenizer is never changed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date as Day
from typing import Any, Literal, cast, get_args

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from editlib.errors import RequestError, first_line
from editlib.models.gaps import gap_between
from editlib.models.lookup import TokenizedText, first_token, last_token
from editlib.models.prompt_settings import NAMES, PromptSettings, dated
from editlib.requests.templates import occurrences

MARK = "\N{OBJECT REPLACEMENT CHARACTER}"  # a placeholder that no text or template contains
_NEUTRAL = ("\n", '"', "(")  # texts after which an answer needs no space
THINKING = "enable_thinking"  # the argument of chat templates that makes a model think before it answers (Qwen3)
WORD = "a"  # a placeholder for a question whose text does not matter

LookupPlace = Literal["last", "subject_first", "subject_last", "subject_first_after_last"]
"""Values of `fact_token` (ROME, MEMIT): the prompt's last token, the subject's first or last one, or the one after the
subject's last one (the prompt's last token if the subject ends the prompt)."""


Asking = PromptSettings | bool | None
"""How a model is asked: all settings, or only whether to use the chat template (`None`: if there is one)."""


@dataclass(frozen=True)
class TokenRow:
    """Holds one prompt as token ids.

    `lookup` is the index of the token whose hidden state is edited (see `LookupPlace`). `extra` counts the
    tokens that were appended to the prompt (an answer).
    """

    ids: tuple[int, ...]
    lookup: int
    extra: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def followed_by(self, ids: Sequence[int]) -> TokenRow:
        """Returns the same prompt with `ids` appended."""
        return TokenRow(self.ids + tuple(ids), self.lookup, self.extra + len(ids))


@dataclass(frozen=True)
class TokenBatch:
    """Holds padded rows. `lookup` and `last` are column indices: those of the lookup position and of the last token."""

    input_ids: Tensor  # [n, T]
    attention_mask: Tensor  # [n, T]
    lookup: Tensor  # [n]
    last: Tensor  # [n]

    @property
    def position_ids(self) -> Tensor:
        """Positions `[n, T]` that count a row's tokens from 0, padding aside."""
        return (self.attention_mask.cumsum(1) - 1).clamp_min(0)

    def __len__(self) -> int:
        return self.input_ids.shape[0]


def pad(rows: Sequence[TokenRow], *, side: str = "right", device: torch.device | str | None = None) -> TokenBatch:
    """Pads `rows` with token 0, which the attention mask hides, on the given side."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)  # [n, T]
    mask = torch.zeros_like(ids)
    shift = torch.zeros(len(rows), dtype=torch.long)  # [n], the column of each row's first token
    for i, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        ids[i, start : start + len(row)] = torch.tensor(row.ids)
        mask[i, start : start + len(row)] = 1
        shift[i] = start
    lookup = torch.tensor([row.lookup for row in rows]) + shift
    last = torch.tensor([len(row) - 1 for row in rows]) + shift
    return TokenBatch(ids.to(device), mask.to(device), lookup.to(device), last.to(device))


def leading_tokens(tok: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Returns the special tokens that a tokenizer puts before a text (BOS).

    Special tokens after a text (EOS) are always left out: they would end a prompt before its answer.
    """
    bare, full = TokenizedText.of(tok, WORD).ids, tuple(tok(WORD)["input_ids"])
    # The start of the bare tokens inside the full ones is the number of leading tokens.
    added = range(len(full) - len(bare) + 1)
    return next((full[:n] for n in added if full[n : n + len(bare)] == bare), ())


def token_windows(tok: PreTrainedTokenizerBase, text: str, length: int) -> Iterator[list[int]]:
    """Splits a text into windows of at most `length` tokens; windows of one token are left out.

    Each window starts with the leading tokens (BOS): models trained with BOS predict badly without it.
    """
    front = list(leading_tokens(tok))
    ids = list(tok(text, add_special_tokens=False, verbose=False)["input_ids"])
    size = max(length - len(front), 1)
    for start in range(0, len(ids), size):
        if len(window := front + ids[start : start + size]) > 1:
            yield window


@dataclass(frozen=True)
class PromptFormat:
    """Turns a question into the text that the model reads, and this text and its answer into token ids.

    `chat=None` uses the tokenizer's chat template if it has one; `False` uses the bare text. `shots` are few-shot
    examples, questions with answers: turns of the chat, or lines of the text. `system` and `arguments` are for chat
    templates only; `tags` and `date` are those of `PromptSettings`.
    """

    tok: PreTrainedTokenizerBase
    chat: bool | None = None
    system: str | None = None
    shots: tuple[tuple[str, str], ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)
    tags: str | None = None
    date: str | None = None
    uses_chat: bool = field(init=False)

    def __post_init__(self) -> None:
        has_template = bool(getattr(self.tok, "chat_template", None))
        if self.chat and not has_template:
            raise RequestError("a chat template was asked for, but this tokenizer has none; leave the option out")
        wanted = has_template if self.chat is None else self.chat
        object.__setattr__(self, "uses_chat", wanted and self.tags is None)

    @classmethod
    def of(cls, tok: PreTrainedTokenizerBase, how: Asking = None) -> PromptFormat:
        """Builds the format of a tokenizer from settings, or from their `chat` alone.

        Raises:
            RequestError: a system or arguments without a chat template, or ones that the template does not use.
        """
        if not isinstance(how, PromptSettings):
            return cls(tok, how)
        form = cls(tok, how.chat, how.system, (), how.arguments, how.tags, how.date)
        if not form.uses_chat and (how.system is not None or how.arguments):
            raise RequestError("prompts: system and arguments need a chat template, but this tokenizer has none")
        # A template may silently ignore a setting; the prompt would then differ from the one asked for.
        if how.system is not None and not form.tells_system:
            raise RequestError("prompts: the chat template ignores the system prompt; put it into the questions")
        template = str(getattr(tok, "chat_template", ""))
        for name in how.arguments:
            if not re.search(rf"\b{re.escape(name)}\b", template):
                raise RequestError(
                    f"prompts: the chat template of this model does not use {name!r}; expected {', '.join(NAMES)} or "
                    "an argument of the template"
                )
        return form

    @property
    def settings(self) -> PromptSettings:
        """The settings of the format, without tokenizer and shots."""
        return PromptSettings(self.chat, self.system, self.arguments, self.tags, self.date)

    @property
    def prints_date(self) -> bool:
        """Whether prompts depend on the day."""
        # Two days that differ in every part of a date.
        days = ("2001-02-03", "2012-11-22")
        return self.uses_chat and len({replace(self, date=day).render(WORD) for day in days}) > 1

    @property
    def may_think(self) -> bool:
        """Whether the chat template lets the model think before it answers, unless `enable_thinking` says otherwise."""
        named = re.search(rf"\b{THINKING}\b", str(getattr(self.tok, "chat_template", "")))
        if not self.uses_chat or not named or THINKING in self.arguments:
            return False
        return replace(self, arguments={**self.arguments, THINKING: False}).render(WORD) != self.render(WORD)

    def render(self, question: str) -> str:
        """Returns the prompt of a question: the text up to the point where the model answers."""
        if not self.uses_chat:
            shown = (self.joined(self._tagged(asked), answer) + "\n" for asked, answer in self.shots)
            return "".join(shown) + self._tagged(question)
        return self._apply(self._messages(question), ask=True)

    @property
    def tells_system(self) -> bool:
        """Whether the system's turn reaches the model: some chat templates refuse it or leave it out."""
        if not self.uses_chat or self.system is None:
            return False
        try:
            return self.system in self.render(WORD)
        except RequestError:
            return False

    def encode(
        self,
        question: str,
        subject: str | None = None,
        *,
        start: int | None = None,
        place: LookupPlace = "subject_last",
        template: str = "{}",
    ) -> TokenRow:
        """Encodes the rendered question, with the lookup position at `place`.

        Args:
            subject: occurs in the question once; without it the lookup position is the prompt's last token.
            start: index of the subject's first character in the question, needed if it occurs more than once.
            place: which token is looked up. A token that crosses an end of the subject counts as part of it, such as a
                first token that includes the space before the subject.
            template: a context template; the question replaces its last `{}`. The rest is plain text: other braces
                stay, and the subject is not searched there.

        Raises:
            RequestError: the subject does not occur exactly once in the question, the chat template changed it, or the
                tokenizer drops it.
        """
        before, mark, after = template.rpartition("{}")
        if not mark:
            raise RequestError(f'template {template!r} has no "{{}}"; expected one in the place of the question')
        if place not in get_args(LookupPlace):
            raise RequestError(f"place {place!r}; expected one of {', '.join(get_args(LookupPlace))}")
        whole = before + question + after
        text = self.render(whole)
        tokenized = TokenizedText.of(self.tok, text)
        ids = self._front() + tokenized.ids
        if place == "last" or subject is None:
            return TokenRow(ids, len(ids) - 1)
        if start is None:
            places = occurrences(question, subject)
            if len(places) != 1:
                given = f"subject {subject!r} occurs {len(places)} times in {question!r}"
                raise RequestError(f"{given}; it must occur once, or be written as {{}} in the request's prompt")
            start = places[0]
        start += self._start(text, whole) + len(before)
        find = first_token if place == "subject_first" else last_token
        lookup = len(ids) - len(tokenized.ids) + find(tokenized, start, start + len(subject))
        return TokenRow(ids, min(lookup + (place == "subject_first_after_last"), len(ids) - 1))

    def answer_ids(self, answer: str, question: str = WORD) -> tuple[int, ...]:
        """Encodes an answer as it follows the prompt, with the characters between the two (`gap`).

        Encoded alone, the answer would begin a text, and many tokenizers add a space there. So it is encoded after a
        prompt, whose tokens are then cut off. It is encoded alone only if it merges with the last token of every prompt
        that is tried.

        Args:
            question: the question that is answered; by default a word in Latin script.
        """
        text = self.gap(answer, question) + answer.lstrip()
        # An answer that starts with a space has the same tokens after any prompt. One that does not is encoded after
        # its
        # own prompt or a neutral text, since a space added by the tokenizer does not belong there.
        fronts = [self.render(WORD)] if self.uses_chat or text[:1].isspace() else [self.render(question), *_NEUTRAL]
        for front in fronts:
            before, both = (TokenizedText.of(self.tok, encoded).ids for encoded in (front, front + text))
            if both[: len(before)] == before:  # no token crosses the boundary: the rest is the answer
                return both[len(before) :]
        return TokenizedText.of(self.tok, text).ids

    def gap(self, answer: str, question: str = WORD) -> str:
        """Returns the characters between the prompt of `question` and an answer.

        The gap of running text (`gap_between`), or the blanks that a chat template writes there.
        """
        return self._template_gap() if self.uses_chat else gap_between(self.render(question), answer)

    def joined(self, question: str, answer: str) -> str:
        """Returns the question and its answer as running text, without tags or chat template."""
        return question + gap_between(question, answer) + answer.lstrip()

    def end_ids(self, ends: Collection[int] = ()) -> tuple[int, ...]:
        """Returns the token that ends an answer, as a tuple of at most one.

        It is the first special token that the chat template writes after an answer (`<|eot_id|>`, `<end_of_turn>`).
        Without a template, or if it writes none, it is the tokenizer's end of text.

        Args:
            ends: the tokens at which the model stops generating (`end_tokens`). If the template writes one of them, or
                one is the tokenizer's own, it is preferred.
        """
        written = self._written_after() if self.uses_chat else ()
        usual = () if self.tok.eos_token_id is None else (self.tok.eos_token_id,)
        # In order of preference: tokens named by both source and model come before those named by one alone.
        stopping = [[token for token in tokens if token in ends] for tokens in (written, usual)]
        return tuple((*stopping[0], *written, *stopping[1], *sorted(ends), *usual)[:1])

    def _written_after(self) -> tuple[int, ...]:
        """Returns the special tokens that the chat template writes after an answer, up to the next turn."""
        special = set(self.tok.all_special_ids) | set(self.tok.get_added_vocab().values())
        messages = [*self._messages(WORD), {"role": "assistant", "content": MARK}]
        for last in ([], [{"role": "user", "content": WORD}]):  # some templates end only answers before another turn
            shown = self._apply([*messages, *last]).rpartition(MARK)[2]
            specials = tuple(token for token in TokenizedText.of(self.tok, shown).ids if token in special)
            if specials:
                return specials
        return ()

    def _apply(self, messages: Sequence[Mapping[str, str]], *, ask: bool = False) -> str:
        """Renders `messages` with the chat template; with `ask`, up to the start of the model's answer."""
        options = dict(self.arguments)
        if self.date is not None:
            options["chat_template"] = dated(self.tok.get_chat_template(), Day.fromisoformat(self.date))
        turns = [dict(message) for message in messages]
        plain = "fix it, or ask as plain text with --prompt chat=false"
        try:
            text = cast(str, self.tok.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask, **options))
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            # Jinja passes on exceptions from expressions of the template.
            raise RequestError(f"the chat template cannot be used ({first_line(error)}); {plain}") from None
        if not text.strip():
            raise RequestError(f"the chat template writes nothing; {plain}")
        return text

    def _tagged(self, question: str) -> str:
        """Returns the question inside `tags`."""
        return question if self.tags is None else self.tags.replace("{}", question)

    def _messages(self, question: str) -> list[dict[str, str]]:
        """Returns the turns of a chat: the system's, the shots, the question."""
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for asked, answer in self.shots:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        return [*messages, {"role": "user", "content": question}]

    def _front(self) -> tuple[int, ...]:
        """Returns the tokens that the tokenizer puts before a bare text; a chat template writes its own."""
        return () if self.uses_chat else leading_tokens(self.tok)

    def _start(self, text: str, question: str) -> int:
        """Returns the index in `text`, the rendered question, at which the question starts.

        Found by rendering a placeholder instead: the question's own text might occur in the template too.
        """
        start = self.render(MARK).find(MARK)
        for shown in (question, question.strip()):  # some templates strip the content
            if start >= 0 and text.startswith(shown, start):
                return start - question.index(shown)
        raise RequestError(f"the chat template changes the question {question!r}; use plain prompts for it")

    def _template_gap(self) -> str:
        """Returns the blanks that the chat template writes between a prompt and its answer."""
        messages = [*self._messages(WORD), {"role": "assistant", "content": MARK}]
        shown, front = self._apply(messages), self.render(WORD)
        gap = shown[len(front) :].partition(MARK)[0] if shown.startswith(front) else ""
        return "" if gap.strip() else gap


def settled(tok: PreTrainedTokenizerBase, how: PromptSettings | None = None) -> PromptSettings:
    """Fills in open settings: today as the date, if the chat template prints one, and no thinking before the answer, if
    the template has the choice (`enable_thinking`)."""
    settings = how or PromptSettings()
    form = PromptFormat.of(tok, settings)
    if settings.date is None and form.prints_date:
        settings = replace(settings, date=Day.today().isoformat())
    if form.may_think:
        settings = replace(settings, arguments={**settings.arguments, THINKING: False})
    return settings
