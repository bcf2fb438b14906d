"""Find in the module tree of a decoder-only model the parts that an edit needs.

`anatomy(model)` returns an `Anatomy`: the decoder layers, the MLP output matrix of each (`W [d_model, d_ff]`, whose
input is a key and whose output goes into the residual stream), the embedding, and the head that turns final states into
logits. The rest of the package reaches a model through it, and so needs no case for each architecture.

There is no list of model names: the decoder layers are the one long `ModuleList`. The MLP output matrix is the linear
map of a layer that writes into the residual stream and is not part of what mixes tokens (attention, convolution).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from editlib.errors import ModelError
from editlib.models.freezing import no_param_grad
from editlib.models.output_path import OutputPath
from editlib.models.placement import in_memory, input_device, input_embedding
from editlib.models.tracing import Call, calls, hidden_of, stop_after, unwatched


@dataclass
class ProbeCache:
    """Keeps the results of trial passes of one model (`models.capabilities`, `models.residual_path`).

    `resumes`: by layer, whether a pass can start there. `caches`: whether the model continues from cached keys and
    values; `None` until it is tried. `paths`: by layer, how its MLP output reaches the residual stream.
    """

    resumes: dict[int, bool] = field(default_factory=dict)
    caches: bool | None = None
    paths: dict[int, OutputPath] = field(default_factory=dict)


@dataclass(frozen=True)
class Anatomy:
    """Names the parts of one model; holds references, never copies, and writes nothing onto the model."""

    model: PreTrainedModel
    layers: tuple[nn.Module, ...]
    layer_names: tuple[str, ...]
    mlp_output_names: tuple[str, ...]  # one per layer, e.g. "model.layers.4.mlp.down_proj"
    mlp_input_names: tuple[tuple[str, ...], ...]  # by layer, e.g. gate_proj and up_proj; may be none
    d_model: int  # width of the residual stream; the embeddings of some models are narrower
    d_ff: int  # inputs of each MLP output matrix: the length of a key
    output_width: int  # length of the tuple that a layer returns (varies with transformers); 0: the tensor itself
    probe_cache: ProbeCache = field(default_factory=ProbeCache, repr=False, compare=False)

    @property
    def n_layers(self) -> int:
        """Number of decoder layers; they are counted from 0."""
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        """The device for token ids, whether the embeddings are offloaded or not."""
        return input_device(self.model)

    @property
    def embedding(self) -> nn.Embedding:
        """The input embedding, `weight [vocab, width]`."""
        return input_embedding(self.model)

    @property
    def head(self) -> nn.Linear:
        """The map from final states to logits, `weight [vocab, width]`."""
        return cast(nn.Linear, _output_head(self.model))

    @property
    def tied(self) -> bool:
        """True when one matrix serves as input and output embedding."""
        return self.head.weight is self.embedding.weight

    @cached_property
    def tail(self) -> tuple[nn.Module, ...]:
        """The modules between the last layer and the head, in order.

        Mostly the final norm alone; models whose head is narrower than the residual stream have a projection after it
        or in its place. Found by following the data through one pass over three tokens, on first use.
        """
        return _tail(self.model, self.layers, self.head)

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm between the last layer and the head; `None` if the model has none.

        `head(final_norm(hidden))` gives the logits before the model's own scaling or capping, unless `tail` holds more
        than the norm.
        """
        # A projection in the tail is linear; the other module is the norm.
        return next((module for module in self.tail if not isinstance(module, nn.Linear | Conv1D)), None)

    @cached_property
    def matrix_names(self) -> tuple[str, ...]:
        """Names of all matrices that an edit may change; a matrix's number is its index here.

        The MLP output matrix of layer `l` has the number `l`. The MLP input matrices of all layers follow.
        """
        return (*self.mlp_output_names, *(name for names in self.mlp_input_names for name in names))

    def input_numbers(self, layer: int) -> tuple[int, ...]:
        """Returns the numbers of the MLP input matrices of `layer` (`matrix_names`)."""
        begin = self.n_layers + sum(map(len, self.mlp_input_names[:layer]))
        return tuple(range(begin, begin + len(self.mlp_input_names[layer])))

    def matrix(self, number: int) -> nn.Linear | Conv1D:
        """Returns the module of the matrix with this number (`matrix_names`)."""
        return cast(nn.Linear | Conv1D, self.model.get_submodule(self.matrix_names[number]))

    def mlp_output(self, layer: int) -> nn.Linear | Conv1D:
        """Returns the module (`Linear` or `Conv1D`) that maps `d_ff -> d_model` in `layer`."""
        return self.matrix(layer)

    def weight(self, number: int) -> Tensor:
        """Returns a matrix as a view `[outputs, inputs]`, however the module stores it.

        With the number of a layer it is the layer's MLP output matrix `[d_model, d_ff]` (`matrix_names`).

        Raises:
            ModelError: the weight is offloaded to where a write would be lost (a disk).
        """
        module = self.matrix(number)
        weight = in_memory(module, "weight")
        if weight is None:
            raise ModelError(
                f"{self.matrix_names[number]} is offloaded to disk, where an edit would be lost; "
                "load the model so that its layer stays in memory (device_map, or dtype bfloat16)"
            )
        return weight.T if isinstance(module, Conv1D) else weight  # GPT-2's Conv1D stores [d_ff, d_model]

    def check_layers(self, layers: list[int]) -> None:
        """Raises `ModelError` if the model lacks one of `layers`."""
        outside = [layer for layer in layers if not 0 <= layer < self.n_layers]
        if outside:
            raise ModelError(
                f"layer {outside[0]} was asked for, but the model has layers 0-{self.n_layers - 1}; "
                "choose layers in that range (hparams key `layers`, or --layers)"
            )

    def check_one_device(self) -> None:
        """Raises `ModelError` if the layers run on several devices.

        Edits and answers combine states of one layer with keys and values of all layers. Layers that accelerate
        offloads run on the device of the others.
        """
        devices = {p.device for layer in self.layers for p in layer.parameters() if not p.is_meta}
        if len(devices) > 1:
            raise ModelError(
                f"the layers lie on {', '.join(sorted(map(str, devices)))}; edits and answers need all of them on one "
                "device (statistics do not): name one that holds them as device_map, or load in a narrower dtype"
            )


def anatomy(model: PreTrainedModel) -> Anatomy:
    """Finds the parts of `model`; costs a pass of one token through the first layer.

    Raises:
        ModelError: encoder-decoder models, quantised weights, models without an output head, without a list of decoder
            layers, or whose layers have no single MLP output matrix.
    """
    _check_kind(model)
    prefix, layers = _decoder_layers(model)
    output_width, d_model = _first_output(model, layers[0])
    names = tuple(f"{prefix}.{i}" for i in range(len(layers)))
    kind = type(model).__name__
    paths = [_mlp_output(layer, d_model, f"{kind}, {name}") for layer, name in zip(layers, names, strict=True)]
    widths = [_fan(layer.get_submodule(path))[0] for layer, path in zip(layers, paths, strict=True)]
    inputs = [_mlp_inputs(layer, path, d_model) for layer, path in zip(layers, paths, strict=True)]
    if len(set(widths)) > 1:  # keys of all layers are handled as one width, `d_ff`
        other = next(i for i, width in enumerate(widths) if width != widths[0])
        raise ModelError(
            f"{kind}: layer {other} has an MLP of width {widths[other]}, layer 0 one of {widths[0]}; "
            "models whose layers differ cannot be edited"
        )
    return Anatomy(
        model=model,
        layers=tuple(layers),
        layer_names=names,
        mlp_output_names=tuple(f"{name}.{path}" for name, path in zip(names, paths, strict=True)),
        mlp_input_names=tuple(
            tuple(f"{name}.{path}" for path in some) for name, some in zip(names, inputs, strict=True)
        ),
        d_model=d_model,
        d_ff=widths[0],
        output_width=output_width,
    )


class _HasHead(Protocol):
    """Types the method that returns the output head, which is untyped in transformers."""

    def get_output_embeddings(self) -> Any: ...


def _output_head(model: _HasHead) -> Any:
    return model.get_output_embeddings()


def _check_kind(model: PreTrainedModel) -> None:
    """Raises `ModelError` for a kind of model that cannot be edited, as its class and configuration show it."""
    kind = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"{kind} is an encoder-decoder model; editlib edits decoder-only causal language models")
    if getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None) is not None:
        raise ModelError(f"{kind} has quantised weights; load it unquantised (float32, bfloat16 or float16) to edit it")
    if not isinstance(_output_head(model), nn.Module):
        raise ModelError(f"{kind} has no output head; load it with AutoModelForCausalLM")
    # Masked language models load as causal ones, but their attention is marked as bidirectional.
    looks_back = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    if looks_back and not any(looks_back):
        raise ModelError(
            f"{kind} is not a causal language model: tokens attend to later ones; editlib edits decoder-only "
            "causal language models (BERT-like models can only be decoders with is_decoder in config.json)"
        )


def _decoder_layers(model: PreTrainedModel) -> tuple[str, list[nn.Module]]:
    """Returns the name of the list of decoder layers, and the layers."""
    expected = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists: list[tuple[str, nn.ModuleList]] = [
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)
    ]
    fitting = [(name, module) for name, module in lists if len(module) == expected]
    if not fitting:
        raise ModelError(
            f"{type(model).__name__}: no list of {expected} decoder layers found among "
            f"{[f'{name} ({len(module)})' for name, module in lists] or 'no module lists'}; this model cannot be edited"
        )
    # The shortest path is the list of whole layers; longer ones are lists inside a layer.
    name, module = min(fitting, key=lambda item: item[0].count("."))
    layers: list[nn.Module] = list(module)
    return name, layers


def inputs_of(module: nn.Module | None) -> int | None:
    """Returns the number of inputs of a linear map; `None` for any other module."""
    return _fan(module)[0] if isinstance(module, nn.Linear | Conv1D) else None


def _fan(module: nn.Module) -> tuple[int, int]:
    """Returns the numbers of inputs and outputs of a linear map."""
    rows, columns = cast(Tensor, module.weight).shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)  # Linear stores [outputs, inputs]


def _mixer_of(modules: Mapping[str, nn.Module]) -> Callable[[str], bool]:
    """Returns a test of paths inside a layer: whether a module belongs to attention or a replacement (convolution,
    SSM).

    Args:
        modules: all modules of the layer, by path.
    """
    convolutions = tuple(path for path, module in modules.items() if isinstance(module, nn.modules.conv._ConvNd))
    mixers = {path.partition(".")[0] for path in convolutions}  # short convolutions, state space models

    def mixes_tokens(path: str) -> bool:
        return "attn" in path or "attention" in path or path.partition(".")[0] in mixers

    return mixes_tokens


def _check_experts(layer: nn.Module, where: str) -> None:
    """Raises `ModelError` for a layer that is a mixture of experts."""
    modules: dict[str, nn.Module] = dict(layer.named_modules())
    mixes_tokens = _mixer_of(modules)
    experts = [path for path in modules if path.rpartition(".")[2] == "experts"]
    # Packed experts are a parameter of three dimensions, without a module each.
    experts += [
        path
        for path, parameter in layer.named_parameters()
        if parameter.ndim == 3 and min(parameter.shape) > 1 and not mixes_tokens(path)
    ]
    if experts:
        raise ModelError(
            f"{where} is a mixture-of-experts layer ({experts[0]}): tokens pass through different matrices, so "
            "one update of an output matrix cannot reach all of them; use a dense model"
        )


def check_kind(model: PreTrainedModel) -> None:
    """Checks what `anatomy` requires, as far as a model without weights (on the meta device) shows it.

    Raises:
        ModelError: see `anatomy`.
    """
    _check_kind(model)
    prefix, layers = _decoder_layers(model)
    for number, layer in enumerate(layers):
        _check_experts(layer, f"{type(model).__name__}, {prefix}.{number}")


def _mlp_output(layer: nn.Module, d_model: int, where: str) -> str:
    """Returns the path inside `layer` of its MLP output matrix; `where` names the layer in errors."""
    modules: dict[str, nn.Module] = dict(layer.named_modules())
    mixes_tokens = _mixer_of(modules)
    # 1. A mixture of experts has no single output matrix, even if a shared expert looks like one.
    _check_experts(layer, where)
    # 2. Candidates: linear maps as wide as the residual stream that are not part of attention.
    writers = [
        path
        for path, module in modules.items()
        if isinstance(module, nn.Linear | Conv1D) and _fan(module)[1] == d_model and not mixes_tokens(path)
    ]
    parents = {path.rpartition(".")[0] for path in writers}
    if len(parents) != 1:
        seen = f"{len(writers)} were found ({', '.join(writers)})" if writers else "none was found"
        raise ModelError(
            f"{where}: expected one linear map from an MLP into the residual stream (width {d_model}), but {seen}; "
            "this model cannot be edited, use one whose layers have one MLP each"
        )
    # With d_ff == d_model the up projection qualifies too; the output matrix is defined after it.
    return writers[-1]


def _mlp_inputs(layer: nn.Module, output: str, d_model: int) -> list[str]:
    """Returns the paths inside `layer` of the linear maps beside its MLP `output` that read the MLP's input: a gate and
    an up projection, both in one, or the only one. None where they lie elsewhere."""
    modules: dict[str, nn.Module] = dict(layer.named_modules())
    mixes_tokens = _mixer_of(modules)
    d_ff = _fan(modules[output])[0]
    return [
        path
        for path, module in modules.items()
        if isinstance(module, nn.Linear | Conv1D)
        and path != output
        and path.rpartition(".")[0] == output.rpartition(".")[0]
        and not mixes_tokens(path)
        and _fan(module)[0] == d_model
        and _fan(module)[1] in (d_ff, 2 * d_ff)
    ]


def _first_output(model: PreTrainedModel, layer: nn.Module) -> tuple[int, int]:
    """Returns the length of the tuple that `layer` returns (0: a tensor) and the width of its states.

    Observed in a pass of one token that ends after the first layer: no config key gives the width reliably.
    """
    seen: list[tuple[int, int]] = []

    def look(_: nn.Module, __: object, out: object) -> None:
        seen.append((len(out) if isinstance(out, tuple | list) else 0, hidden_of(out).shape[-1]))

    ids = torch.zeros(1, 1, dtype=torch.long, device=input_device(model))
    with unwatched(model), torch.no_grad():
        watch = layer.register_forward_hook(look)
        try:
            with stop_after(layer, lambda _: None):
                model(input_ids=ids, use_cache=False)
        finally:
            watch.remove()
    return seen[0]


def _tail(model: PreTrainedModel, layers: tuple[nn.Module, ...], head: nn.Module) -> tuple[nn.Module, ...]:
    """Lists the modules between the last layer and the head that change the states, in order, from one small pass."""
    inside = {id(module) for layer in layers for module in layer.modules()}
    others = [module for module in model.modules() if id(module) not in inside]
    device = input_device(model)
    traced: list[Call] = []
    with unwatched(model), no_param_grad(model), torch.no_grad(), calls([layers[-1], *others], traced):
        model(input_ids=torch.arange(1, 4, device=device)[None], use_cache=False)
    last = next(i for i, call in enumerate(traced) if call.module is layers[-1])
    states, tail = traced[last].hidden, []  # [1, 3, d_model]
    for call in traced[last + 1 :]:
        # The module that reads the states is found by equal numbers, since names differ between families.
        if call.input is None or call.output is None or not _same(call.input, states):
            continue
        if call.module is head:
            break
        if not _same(call.output, states):  # dropout and identity return their input
            tail.append(call.module)
            states = call.output
    return tuple(tail)


def _same(first: Tensor, second: Tensor) -> bool:
    """Returns whether two tensors hold the same numbers, whatever their shapes."""
    return first.numel() == second.numel() and torch.equal(first.reshape(-1).to(second.device), second.reshape(-1))
