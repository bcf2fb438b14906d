"""Describe a model's shape, on which settings depend, and list the shapes of public models."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from editlib.errors import ModelError


@dataclass(frozen=True)
class ModelShape:
    """Describes a model's name and shape: architecture (`model_type` of its configuration), number of decoder layers,
    width of its residual stream."""

    name: str
    model_type: str
    n_layers: int
    d_model: int

    @classmethod
    def of(cls, config: Any, name: str) -> ModelShape:
        """Reads a configuration of transformers.

        Raises:
            ModelError: it lacks the number of layers or the width.
        """
        text = config.get_text_config(decoder=True)
        layers, width = getattr(text, "num_hidden_layers", None), getattr(text, "hidden_size", None)
        if not isinstance(layers, int) or not isinstance(width, int):
            raise ModelError(
                f"{name}: its configuration ({text.model_type}) lacks the number of layers or the width, so no "
                "settings can be found for it; give a file with --hparams"
            )
        return cls(name, text.model_type, layers, width)

    def same_form(self, other: ModelShape) -> bool:
        """Returns whether the shapes are equal, so that settings of one model fit the other."""
        return (self.model_type, self.n_layers, self.d_model) == (other.model_type, other.n_layers, other.d_model)

    def __str__(self) -> str:
        return f"{self.model_type}, {self.n_layers} layers, width {self.d_model}"


KNOWN: dict[str, ModelShape] = {
    name: ModelShape(name, model_type, layers, width)
    for model_type, models in {
        "llama": {
            "smollm2-135m": (30, 576),
            "smollm2-360m": (32, 960),
            "smollm2-1.7b": (24, 2048),
            "llama-3.2-1b": (16, 2048),
            "llama-3.2-3b": (28, 3072),
            "llama-3.1-8b": (32, 4096),
            "llama-3-8b": (32, 4096),
            "llama-3.3-70b": (80, 8192),
            "llama-3.1-70b": (80, 8192),
            "llama-3-70b": (80, 8192),
        },
        "smollm3": {"smollm3-3b": (36, 2048)},
        "qwen2": {
            "qwen2.5-0.5b": (24, 896),
            "qwen2.5-1.5b": (28, 1536),
            "qwen2.5-3b": (36, 2048),
            "qwen2.5-7b": (28, 3584),
        },
        "qwen3": {
            "qwen3-0.6b": (28, 1024),
            "qwen3-1.7b": (28, 2048),
            "qwen3-4b": (36, 2560),
            "qwen3-8b": (36, 4096),
        },
        "gemma3_text": {
            "gemma3-270m": (18, 640),
            "gemma3-1b": (26, 1152),
            "gemma3-4b": (34, 2560),
            "gemma3-12b": (48, 3840),
            "gemma3-27b": (62, 5376),
        },
        "phi3": {"phi-4-mini": (32, 3072)},
        "olmo2": {"olmo2-1b": (16, 2048), "olmo2-7b": (32, 4096), "olmo2-13b": (40, 5120)},
        "mistral": {"mistral-7b": (32, 4096)},
        "gpt2": {"gpt2-xl": (48, 1600)},
        "gptj": {"gpt-j-6b": (28, 4096)},
    }.items()
    for name, (layers, width) in models.items()
}
"""Shapes of public models by the name of their settings; the first of several with one shape is used for all."""


def known_as(shape: ModelShape) -> str | None:
    """Returns the entry of `KNOWN` with the model's shape; `None` if there is none.

    Among several, the one whose name is part of the model's name, else the first.
    """
    fitting = [name for name, other in KNOWN.items() if shape.same_form(other)]
    plain_name = _plain(shape.name)
    return next((name for name in fitting if _plain(name) in plain_name), fitting[0] if fitting else None)


def _plain(name: str) -> str:
    """Returns a name in lower case, without separators."""
    return re.sub(r"[^a-z0-9.]", "", name.lower())
