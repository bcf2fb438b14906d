"""Remove think blocks (`<think>...</think>`) from generated text: an answer is judged without its thoughts."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from editlib.models.prompts import WORD, PromptFormat

log = logging.getLogger(__name__)

BLOCKS = (
    ("<think>", "</think>"),  # Qwen3, DeepSeek-R1, SmolLM3, OLMo 3
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
)
"""Marks that open and close a think block."""


def opens_block(form: PromptFormat) -> bool:
    """Returns whether a prompt ends inside a think block: the chat template opened it, and the model closes it."""
    return _ends_inside(form.render(WORD))


def _ends_inside(text: str) -> bool:
    return any(text.rfind(opening) > text.rfind(closing) for opening, closing in BLOCKS)


def warn_of_block(form: PromptFormat) -> None:
    """Warns where every prompt ends inside a think block, so that an edit changes thoughts, not answers."""
    if opens_block(form):
        log.warning(
            "the chat template opens a think block after every question, and no argument was given that closes "
            "it: an edit changes the model's thoughts, and short answers end inside the block; ask as plain text with "
            '--prompt tags="Question: {}\\nAnswer:"'
        )


def answer_texts(form: PromptFormat, said: Sequence[Sequence[int]], *, warn: bool = True) -> list[str]:
    """Decodes generated token ids without special tokens and think blocks.

    An answer that ends inside a block is empty; with `warn` a warning says how many do.
    """
    opened = opens_block(form)
    pairs = [_decoded(form.tok, ids, opened) for ids in said]
    if warn:
        warn_of_unfinished(sum(inside for _, inside in pairs), len(pairs))
    return [text for text, _ in pairs]


def answer_after(tok: PreTrainedTokenizerBase, prompt: Sequence[int], said: Sequence[int]) -> tuple[str, bool]:
    """Decodes the token ids generated after those of any prompt, as `answer_texts` does.

    Returns:
        (answer, unfinished): without special tokens and think blocks, and whether it ends inside such a block.
    """
    return _decoded(tok, said, _ends_inside(str(tok.decode(list(prompt)))))


def warn_of_unfinished(count: int, of: int) -> None:
    """Warns where answers end inside a think block."""
    if count:
        log.warning(
            "%d of %d answers end inside a think block and count as empty; ask without one (--prompt "
            'enable_thinking=false, or plain text with --prompt tags="Question: {}\\nAnswer:")',
            count,
            of,
        )


def _decoded(tok: PreTrainedTokenizerBase, ids: Sequence[int], opened: bool) -> tuple[str, bool]:
    """Returns an answer without its thoughts, and whether it ends inside them."""
    shown = str(tok.decode(list(ids)))  # with special tokens, since the marks may be special tokens
    if not opened and not any(mark in shown for pair in BLOCKS for mark in pair):
        return str(tok.decode(list(ids), skip_special_tokens=True)).strip(), False
    text, inside = without_thoughts(shown, opened=opened)
    for special in tok.all_special_tokens:
        text = text.replace(special, "")
    return text.strip(), inside


def without_thoughts(text: str, *, opened: bool = False) -> tuple[str, bool]:
    """Removes think blocks from a text, and returns whether it ended inside one.

    Args:
        opened: the text begins inside a block.
    """
    for opening, closing in BLOCKS:
        if opened and closing in text:
            text, opened = text.partition(closing)[2], False
        text = re.sub(f"{re.escape(opening)}.*?{re.escape(closing)}", "", text, flags=re.DOTALL)
    if opened:
        return "", True
    for opening, _ in BLOCKS:
        before, mark, _ = text.partition(opening)
        if mark:
            return before, True
    return text, False
