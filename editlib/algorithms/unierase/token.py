"""Hold a learned token, or the tokens that an edit fitted: their rows, where they come from, and their file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlib.errors import TokenError, first_line, quote
from editlib.files import atomic_path
from editlib.models.anatomy import anatomy
from editlib.models.placement import input_embedding
from editlib.models.vocabulary import add_token, write_rows


@dataclass(frozen=True)
class TokenHeader:
    """Tells where a token comes from; stored beside its rows."""

    token: str
    model: str
    model_sha256: str
    seed: int
    questions: int
    refusals: int
    hparams: dict[str, Any] = field(default_factory=dict)
    prompts: dict[str, Any] = field(default_factory=dict)  # of the questions it was learned over, see `PromptSettings`
    metrics: dict[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] = ()  # of several tokens, the first of which is `token`

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))  # JSON has lists


@dataclass(frozen=True)
class UnlearningToken:
    """Holds a learned token: `row_in [d_model]`, `row_out [d_model]` (the same row when embeddings are tied).

    The tokens that an edit fitted, one for each relation, are kept together: `[k, d_model]` each.
    """

    row_in: Tensor
    row_out: Tensor
    header: TokenHeader

    @property
    def names(self) -> tuple[str, ...]:
        """The texts of all tokens."""
        return tuple(self.header.names) or (self.header.token,)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Returns the rows that are read in and out, `[k, d_model]` each, also of one token."""
        width = self.row_in.shape[-1]
        return self.row_in.reshape(-1, width), self.row_out.reshape(-1, width)

    @classmethod
    def of(cls, header: Any, row_in: Tensor, row_out: Tensor) -> UnlearningToken:
        """Builds tokens from what a file holds: the header as JSON, and the rows.

        Raises:
            TypeError: values of another kind than `asdict` of a header gives, or rows that do not fit it.
        """
        if wrong := _misfit(header, row_in, row_out):
            raise TypeError(wrong)
        return cls(row_in, row_out, TokenHeader(**header))

    @classmethod
    def joined(cls, tokens: Sequence[UnlearningToken]) -> UnlearningToken:
        """Joins the tokens of several edits of one model, in their order."""
        names = tuple(name for token in tokens for name in token.names)
        rows = [token.rows() for token in tokens]
        rows_in, rows_out = torch.cat([row for row, _ in rows]), torch.cat([row for _, row in rows])
        return cls(rows_in, rows_out, replace(tokens[0].header, token=names[0], names=names))

    def save(self, path: Path) -> None:
        """Writes the rows and the header to one safetensors file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            "row_in": self.row_in.contiguous().cpu(),
            "row_out": self.row_out.clone().contiguous().cpu(),
        }
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"editlib": json.dumps(asdict(self.header), sort_keys=True)})

    @classmethod
    def load(cls, path: Path) -> UnlearningToken:
        """Reads what `save` wrote.

        Raises:
            TokenError: missing, damaged, or another kind of file.
        """
        try:
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {})["editlib"])
                return cls.of(header, file.get_tensor("row_in"), file.get_tensor("row_out"))
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError, OSError) as error:
            said = first_line(error)
            raise TokenError(f"{path}: not an unlearning token ({said}); make one with `editlib token`") from None

    def ids(self, tok: PreTrainedTokenizerBase) -> list[int]:
        """Returns the tokens' ids in a tokenizer that has them."""
        token_ids = tok.convert_tokens_to_ids(list(self.names))
        return [token_ids] if isinstance(token_ids, int) else token_ids

    def check_width(self, model: PreTrainedModel) -> None:
        """Raises `TokenError` if the rows have another width than the model; reads no weight of it."""
        wide, width = self.row_in.shape[-1], input_embedding(model).weight.shape[1]
        if wide != width:
            raise TokenError(
                f"the token was learned for width {wide} ({self.header.model}), but this model has {width}; learn one "
                "for it with `editlib token`"
            )

    def add_to(self, model: PreTrainedModel, tok: PreTrainedTokenizerBase) -> list[int]:
        """Puts the tokens into `model` and `tok` and returns their ids.

        Raises:
            TokenError: the rows have another width than the model.
        """
        self.check_width(model)
        anat, (rows_in, rows_out) = anatomy(model), self.rows()  # rows: [k, d_model]
        ids = [add_token(model, tok, name) for name in self.names]
        for token_id, row_in, row_out in zip(ids, rows_in, rows_out, strict=True):
            write_rows(anat, token_id, row_in, row_out)
        return ids


_TEXTS = ("token", "model", "model_sha256")
_NUMBERS = ("seed", "questions", "refusals")
_OBJECTS = ("hparams", "prompts", "metrics")


def _misfit(header: Any, row_in: Tensor, row_out: Tensor) -> str | None:
    """Names what is not as `UnlearningToken.save` writes it; `None` if nothing is."""
    if not isinstance(header, dict):
        return f"{quote(header)}; expected an object"
    kinds = (*((name, str) for name in _TEXTS), *((name, int) for name in _NUMBERS))
    wrong = [name for name, kind in kinds if type(header.get(name)) is not kind]
    wrong += [name for name in _OBJECTS if not isinstance(header.get(name, {}), dict)]
    names = header.get("names", [])
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name for name in names):
        wrong.append("names")
    if wrong or not header["token"]:
        name = (*wrong, "token")[0]
        return f'key "{name}": {quote(header.get(name))}'
    if row_in.shape != row_out.shape or row_in.dim() not in (1, 2) or not row_in.is_floating_point():
        return f"rows of {list(row_in.shape)} and {list(row_out.shape)} {row_in.dtype}; expected numbers of one width"
    count = row_in.reshape(-1, row_in.shape[-1]).shape[0] if row_in.numel() else 0
    return None if count == max(len(names), 1) else f"{count} rows for {max(len(names), 1)} tokens"
