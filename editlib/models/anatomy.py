"""Where a decoder-only model keeps the parts that an edit needs, found in its module tree.

No list of model names: decoder layers are the one long `ModuleList`, the MLP output matrix is the linear
map of a layer that writes into the residual stream and is not part of its attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from editlib.errors import ModelError
from editlib.models.tracing import stop_after


@dataclass(frozen=True)
class Anatomy:
    """The named parts of one model; holds references, never copies."""

    model: PreTrainedModel
    layers: tuple[nn.Module, ...]
    layer_names: tuple[str, ...]
    mlp_output_names: tuple[str, ...]  # e.g. "model.layers.4.mlp.down_proj", one a layer
    d_model: int
    d_ff: int
    output_width: int  # of the tuple that a layer returns by version of transformers; 0: the tensor itself

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def embedding(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    @property
    def head(self) -> nn.Module:
        return self.model.get_output_embeddings()

    @property
    def tied(self) -> bool:
        """True when one matrix serves as input and output embedding."""
        return self.head.weight is self.embedding.weight

    def mlp_output(self, layer: int) -> nn.Module:
        """The module (`Linear` or `Conv1D`) that maps `d_ff -> d_model` in `layer`."""
        return self.model.get_submodule(self.mlp_output_names[layer])

    def weight(self, layer: int) -> Tensor:
        """The MLP output matrix of `layer` as a view `[d_model, d_ff]`, whatever way the module stores it."""
        module = self.mlp_output(layer)
        return module.weight.data.T if isinstance(module, Conv1D) else module.weight.data

    def check_layers(self, layers: list[int]) -> None:
        """Raises `ModelError` when a layer number lies outside the model."""
        outside = [layer for layer in layers if not 0 <= layer < self.n_layers]
        if outside:
            raise ModelError(
                f"layer {outside[0]} was asked for, but the model has layers 0-{self.n_layers - 1}; "
                "choose layers in that range (hparams key `layers`, or --layers)"
            )


def anatomy(model: PreTrainedModel) -> Anatomy:
    """Finds the parts of `model`.

    Raises:
        ModelError: encoder-decoder models, quantised weights, models without an output head, without a
            list of decoder layers, or whose layers have no single MLP output matrix.
    """
    _check_kind(model)
    prefix, layers = _decoder_layers(model)
    d_model = model.get_input_embeddings().weight.shape[1]
    found = [_mlp_output(layer, d_model) for layer in layers]
    missing = [i for i, name in enumerate(found) if name is None]
    if missing:
        raise ModelError(
            f"layer {missing[0]} of {type(model).__name__} has no single linear map from its MLP into the residual "
            f"stream (width {d_model}); mixture-of-experts and similar layers cannot be edited"
        )
    names = tuple(f"{prefix}.{i}" for i in range(len(layers)))
    widths = [_fan(layer.get_submodule(str(path)))[0] for layer, path in zip(layers, found, strict=True)]
    if len(set(widths)) > 1:
        other = next(i for i, width in enumerate(widths) if width != widths[0])
        raise ModelError(
            f"{type(model).__name__}: layer {other} has an MLP of width {widths[other]}, layer 0 one of {widths[0]}; "
            "models whose layers differ cannot be edited"
        )
    return Anatomy(
        model=model,
        layers=tuple(layers),
        layer_names=names,
        mlp_output_names=tuple(f"{name}.{path}" for name, path in zip(names, found, strict=True)),
        d_model=d_model,
        d_ff=widths[0],
        output_width=_output_width(model, layers[0]),
    )


def _check_kind(model: PreTrainedModel) -> None:
    kind = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"{kind} is an encoder-decoder model; editlib edits decoder-only causal language models")
    if getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None) is not None:
        raise ModelError(f"{kind} has quantised weights; load it unquantised (float32, bfloat16 or float16) to edit it")
    if not isinstance(model.get_output_embeddings(), nn.Module):
        raise ModelError(f"{kind} has no output head; load it with AutoModelForCausalLM")


def _decoder_layers(model: PreTrainedModel) -> tuple[str, list[nn.Module]]:
    expected = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    fitting = [(name, module) for name, module in lists if len(module) == expected]
    if not fitting:
        raise ModelError(
            f"{type(model).__name__}: no list of {expected} decoder layers found among "
            f"{[f'{name} ({len(module)})' for name, module in lists] or 'no module lists'}; this model cannot be edited"
        )
    # The shortest path is the list of whole layers; longer ones are lists inside a layer.
    name, module = min(fitting, key=lambda item: item[0].count("."))
    return name, list(module)


def _fan(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear map."""
    rows, columns = module.weight.shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def _mlp_output(layer: nn.Module, d_model: int) -> str | None:
    if any(name.rpartition(".")[2] == "experts" for name, _ in layer.named_modules()):
        return None
    if any(parameter.ndim == 3 and not _in_attention(name) for name, parameter in layer.named_parameters()):
        return None  # packed experts: a shared expert beside them is only a part of the MLP's output
    writers = [
        name
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and _fan(module)[1] == d_model and not _in_attention(name)
    ]
    if not writers:
        return None
    # With d_ff == d_model the up projection qualifies too; the output matrix is defined after it.
    parents = {name.rpartition(".")[0] for name in writers}
    return writers[-1] if len(parents) == 1 else None


def _in_attention(name: str) -> bool:
    return "attn" in name or "attention" in name


def _output_width(model: PreTrainedModel, layer: nn.Module) -> int:
    """How `layer` returns its states, seen in a pass over one token that ends behind it."""
    seen: list[int] = []
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    watch = layer.register_forward_hook(lambda _, __, out: seen.append(len(out) if isinstance(out, tuple) else 0))
    try:
        with torch.no_grad(), stop_after(layer, lambda _: None):
            model(input_ids=ids, use_cache=False)
    finally:
        watch.remove()
    return seen[0]
