"""Hold a loaded model together with its tokenizer and prompt settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlib.models.anatomy import Anatomy, anatomy
from editlib.models.prompt_settings import PromptSettings
from editlib.models.prompts import PromptFormat, settled

ModelPair = tuple[PreTrainedModel | Anatomy, PreTrainedTokenizerBase]
"""A model, or its anatomy, with its tokenizer, as `load` gives it."""


@dataclass(frozen=True)
class LoadedModel:
    """Holds a model with its tokenizer and the settings of its prompts."""

    anat: Anatomy
    tok: PreTrainedTokenizerBase
    prompts: PromptSettings = field(default_factory=PromptSettings)

    @classmethod
    def of(
        cls, model: PreTrainedModel, tok: PreTrainedTokenizerBase, prompts: PromptSettings | None = None
    ) -> LoadedModel:
        """Builds it from a model and a tokenizer; costs the pass of `anatomy`."""
        return cls(anatomy(model), tok, settled(tok, prompts))

    @classmethod
    def given(cls, model: LoadedModel | ModelPair, prompts: PromptSettings | None = None) -> LoadedModel:
        """Accepts a model in either form: a `LoadedModel`, or a pair of model and tokenizer.

        Args:
            prompts: how questions are asked; `None`: the loaded model's own settings, for a pair the tokenizer's
                defaults.
        """
        if isinstance(model, LoadedModel):
            return model if prompts is None else replace(model, prompts=settled(model.tok, prompts))
        network, tok = model
        anat = network if isinstance(network, Anatomy) else anatomy(network)
        return cls(anat, tok, settled(tok, prompts))

    @property
    def form(self) -> PromptFormat:
        """The prompt format of the model's own settings."""
        return PromptFormat.of(self.tok, self.prompts)

    def answer_start(self, answer: str, question: str, form: PromptFormat | None = None) -> tuple[int, ...]:
        """Returns the first tokens of an answer to `question`, up to the first one that is not blank.

        Some tokenizers write a space as a token of its own.
        """
        ids = (form or self.form).answer_ids(answer, question)
        shown = next((i for i, token in enumerate(ids) if self.text([token])), len(ids) - 1)
        return ids[: shown + 1]

    def text(self, ids: Sequence[int]) -> str:
        """Decodes token ids without special tokens."""
        return plain_text(self.tok, ids)

    def prompt_text(self, ids: Sequence[int]) -> str:
        """Decodes token ids with special tokens, as the model reads them."""
        return str(self.tok.decode(list(ids)))


def plain_text(tok: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Decodes token ids without special tokens, and without blanks at the ends."""
    return str(tok.decode(list(ids), skip_special_tokens=True)).strip()
