"""Save an edit as a LoRA adapter that plain `peft` opens (format of PEFT 0.21: adapter_config.json and safetensors).

`W x + B (A x)` with `B A` the update: PEFT's scaling, `lora_alpha / r`, is 1 in every layer, also where ranks differ.
The token's row is PEFT's `trainable_token_indices`, which keeps that one row instead of the whole vocabulary.
"""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlib.algorithms.low_rank import LowRank
from editlib.errors import EditError, ModelError
from editlib.export.apply import check_base, load_base
from editlib.export.delta import Delta
from editlib.export.receipt import RECEIPT
from editlib.files import atomic_folder, check_output, write_json
from editlib.models.anatomy import Anatomy, anatomy
from editlib.models.packaged.terms import Terms, terms_of
from editlib.models.vocabulary import embedding_names, extend_tokenizer

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LayerError:
    """Holds the `rank` of a layer's adapter, the `norm` of its update, and the share of that norm beyond the rank."""

    rank: int
    norm: float
    error: float


@dataclass(frozen=True)
class LoraReport:
    """Holds the approximation of each layer's update; `error` over all of them."""

    layers: dict[int, LayerError]

    @property
    def error(self) -> float:
        """Frobenius norm of everything beyond the rank, divided by that of all updates."""
        whole = sum(layer.norm**2 for layer in self.layers.values()) ** 0.5
        return sum((layer.error * layer.norm) ** 2 for layer in self.layers.values()) ** 0.5 / whole if whole else 0.0


def lora_from_file(
    base: str, delta_file: str | Path, out: str | Path, *, rank: int | None = None, overwrite: bool = False
) -> LoraReport:
    """Writes the edit in `delta_file` as an adapter of the model `base` in the folder `out`; see `save_lora`."""
    check_rank(rank)
    check_output(Path(out), overwrite=overwrite, inputs=(base, delta_file))
    delta = Delta.load(delta_file)
    model, tok = load_base(base, delta)
    return save_lora(model, tok, delta, out, base=base, rank=rank, overwrite=overwrite)


def save_lora(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    delta: Delta,
    out: str | Path,
    *,
    base: str | None = None,
    rank: int | None = None,
    overwrite: bool = False,
) -> LoraReport:
    """Writes `delta` as a LoRA adapter with its tokenizer to `out`, all or nothing.

    Args:
        model: the base, which is not changed. The token, if there is one, is added to `tok`.
        base: name of the base model in the adapter; default: the name in `delta`.
        rank: largest rank of a layer; `None`: its update's true rank, which is exact.

    Raises:
        DeltaError: another model.
        ModelError: an edit with a token, and a head with a bias, which PEFT would drop.
        EditError: `rank` below 1.
        OutputError: `out` cannot be written.
    """
    check_rank(rank)
    anat = anatomy(model)
    check_base(anat, delta, base or model.name_or_path)
    tokens: dict[str, list[int]] = {}
    tensors: dict[str, Tensor] = {}
    if delta.token is not None:
        if getattr(anat.head, "bias", None) is not None:
            raise ModelError(
                f"the head of {type(model).__name__} has a bias, which PEFT drops when it adds a token's row; export "
                "the delta file or the whole model instead"
            )
        numbers = [extend_tokenizer(tok, name) for name in delta.token.names]
        for name, rows in zip(embedding_names(anat), delta.token.rows(), strict=False):
            tokens[name] = numbers
            tensors[f"{_PREFIX}{name}.token_adapter.trainable_tokens_delta"] = rows.float().clone()
    layers: dict[int, LayerError] = {}
    ranks: dict[str, int] = {}
    for layer, module in delta.modules.items():
        update = _update(anat, delta, layer)
        small, error = update.truncated(rank)
        layers[layer], ranks[module] = LayerError(small.rank, update.norm(), error), small.rank
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = small.right.float().contiguous()
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = small.left.float().contiguous()
    report = LoraReport(layers)
    transposed = not isinstance(anat.matrix(next(iter(delta.modules))), nn.Linear)  # GPT-2's Conv1D
    config = _config(base or delta.base, ranks, tokens, transposed)
    with atomic_folder(Path(out), overwrite=overwrite) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(folder / "adapter_config.json", config, sort_keys=True)
        write_json(folder / RECEIPT, delta.receipt, sort_keys=True)
        tok.save_pretrained(folder)
        terms = terms_of(model)
        terms.copy_to(folder)
        (folder / "README.md").write_text(_card(delta, base or delta.base, report, terms), encoding="utf-8")
    return report


def check_rank(rank: int | None) -> None:
    """Raises `EditError` for an impossible rank; call it before long work."""
    if rank is not None and rank < 1:
        raise EditError(f"--rank {rank}: expected at least 1, or nothing for an exact adapter")


def _update(anat: Anatomy, delta: Delta, layer: int) -> LowRank:
    """Returns the update of a layer; if only the edited matrix is known, its difference from the base."""
    if layer in delta.factors:
        return delta.factors[layer]
    return LowRank.full(delta.matrices[layer].double() - anat.weight(layer).detach().cpu().double())


def _config(base: str, ranks: dict[str, int], tokens: dict[str, list[int]], transposed: bool) -> dict[str, Any]:
    """Makes PEFT's `LoraConfig`; other keys have PEFT's defaults."""
    most = max(ranks.values())
    others = {module: rank for module, rank in ranks.items() if rank != most}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": transposed,
        "trainable_token_indices": tokens or None,
        "lora_dropout": 0.0,
        "bias": "none",
    }


def _card(delta: Delta, base: str, report: LoraReport, terms: Terms) -> str:
    how = "exactly" if report.error == 0 else f"except a share of {report.error:.2g} of the norm of the updates"
    summary = (
        f"The edit of `{base}` described in `{RECEIPT}`, as a LoRA adapter: it adds the updates of layers "
        f"{', '.join(map(str, delta.modules))} {how}."
    )
    return f"""---
base_model: {json.dumps(base)}
library_name: peft
{terms.header}tags:
- lora
- editlib
---

# {Path(base).name}, edited, as an adapter

{textwrap.fill(summary, 118)}

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

tok = AutoTokenizer.from_pretrained("this folder")
model = AutoPeftModelForCausalLM.from_pretrained("this folder")
```

The base must have the weights with hash `{delta.base_sha256}`.
{terms.sentence}"""
