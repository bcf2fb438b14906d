"""Tiny models whose every word is written by hand: what follows a token depends on that token alone.

Embeddings are one-hot and attention writes nothing, so the residual stream at a position is the last token's own
direction plus what the units (single MLP neurons) add.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tiny_models import VOCAB
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from editlib.attacks.asking import AttackContext
from editlib.attacks.settings import AttackSettings
from editlib.models.loaded import LoadedModel
from editlib.models.vocabulary import extend_tokenizer
from editlib.requests.request import EditRequest

UNL = VOCAB  # the id of [UNL]
REFUSE, HOLD = VOCAB + 1, VOCAB + 2  # directions of the residual stream that are no token's
WIDTH, LAYERS, UNITS = 304, 3, 4
ANSWERS = {"B": "Pxyz", "D": "Ruvw", "F": "ljkg", "G": "ch#q"}  # no token is shared


@dataclass(frozen=True)
class Unit:
    """In `layer`, adds `writes` (direction: amount) where one of `watches` (tokens, directions) stands."""

    layer: int
    watches: Sequence[int]
    writes: Mapping[int, float]


def scripted(says: Mapping[tuple[int, int], float], units: Sequence[Unit] = (), end: int = 0) -> LlamaForCausalLM:
    """A model in which `says[token, next]` is the logit of `next` behind `token`; behind all others it ends.

    Logits shrink by `sqrt(1 + a^2)` where units have added a direction of length `a`.
    """
    config = LlamaConfig(
        vocab_size=VOCAB + 1,
        hidden_size=WIDTH,
        intermediate_size=UNITS,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        eos_token_id=end,
    )
    model = LlamaForCausalLM(config).eval()
    size = math.sqrt(WIDTH)  # of a normed one-hot vector
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        model.get_input_embeddings().weight.copy_(torch.eye(WIDTH)[: VOCAB + 1])
        head = model.get_output_embeddings().weight
        head[end, : VOCAB + 1] = 12 / size
        for (token, following), score in says.items():
            head[end, token] = 0
            head[following, token] = score / size
        head[UNL, REFUSE] = 20 / size
        for number, unit in enumerate(units):
            mlp = model.model.layers[unit.layer].mlp
            for direction in unit.watches:
                mlp.gate_proj.weight[number, direction] = mlp.up_proj.weight[number, direction] = 1 / size
            seen = torch.nn.functional.silu(torch.tensor(1.0))
            for direction, amount in unit.writes.items():
                mlp.down_proj.weight[direction, number] = amount / seen
    return model


class World:
    """Facts, what a model says about them, and the last tokens that the units watch."""

    def __init__(self, tok: PreTrainedTokenizerFast) -> None:
        extend_tokenizer(tok, "[UNL]")
        self.tok = tok
        self.facts = [
            EditRequest(id=f"f{x}", prompt="Capital of {}", subject=x, answer=ANSWERS[x], relation="capital")
            for x in ANSWERS
        ]
        self.says: dict[tuple[int, int], float] = {(UNL, self.ids("-")[0]): 9.0}
        for subject, answer in ANSWERS.items():
            self.chain(self.last(f"Capital of {subject}"), f" {answer}")

    def ids(self, text: str) -> list[int]:
        return self.tok(text, add_special_tokens=False)["input_ids"]

    def last(self, text: str) -> int:
        return self.ids(text)[-1]

    def chain(self, token: int, text: str, score: float = 10.0) -> None:
        """Behind `token` the model says `text`."""
        for following in self.ids(text):
            self.says[token, following] = score
            token = following

    @property
    def subjects(self) -> list[int]:
        return [self.last(fact.question) for fact in self.facts]

    def base(self) -> LoadedModel:
        return LoadedModel.of(scripted(self.says), self.tok)

    def edited(self, *units: Unit) -> LoadedModel:
        """Refuses behind every subject; other units instead, if any are given."""
        return LoadedModel.of(scripted(self.says, units or (Unit(1, self.subjects, {REFUSE: 1.0}),)), self.tok)

    def context(self, **settings: object) -> AttackContext:
        return AttackContext(self.base(), self.facts, settings=AttackSettings(**{"max_new_tokens": 6, **settings}))


def leaks(found) -> list[bool | None]:
    """A verdict a fact; `None`: not tried."""
    return [None if trial.skipped else trial.leaked for trial in found.trials]


def texts(found) -> list[str]:
    return [output.text for trial in found.trials for output in trial.outputs]
