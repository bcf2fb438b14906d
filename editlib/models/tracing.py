"""Observe, change and stop a model's own forward pass, with hooks that end with their block."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


class _Stop(Exception):
    """Ends a forward pass once all requested activations have been read."""


def hidden_of(output: Any) -> Tensor:
    """Returns the hidden states `[n, T, d_model]` in a decoder layer's output: a tensor, or a tuple that begins with
    it."""
    hidden: Tensor = output[0] if isinstance(output, tuple | list) else output  # varies with transformers
    return hidden


@contextmanager
def record_inputs(modules: Mapping[Any, nn.Module], sink: Callable[[Any, Tensor], None]) -> Iterator[None]:
    """Calls `sink(key, input)` with the first positional input of each module during a forward pass."""
    handles = [
        module.register_forward_pre_hook(lambda _, args, key=key: sink(key, args[0])) for key, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def stop_after(module: nn.Module | None, sink: Callable[[Tensor], None]) -> Iterator[None]:
    """Ends the forward pass inside the block after `module`, whose hidden states go to `sink`.

    With `None` the pass runs to its end.
    """
    if module is None:
        yield
        return

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        sink(hidden_of(output))
        raise _Stop  # only an exception can leave the model's own forward early

    handle = module.register_forward_hook(hook)
    try:
        yield
    except _Stop:
        pass
    finally:
        handle.remove()


@contextmanager
def edit_input(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replaces the first positional input of `module` by `change(input)`."""
    handle = module.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def edit_output(module: nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Replaces the output of `module` by `change(first input, output)`."""
    handle = module.register_forward_hook(lambda _, args, output: change(args[0], output))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def edit_hidden(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replaces the hidden states that leave a decoder layer by `change(hidden)`."""

    def hook(_: Tensor, output: Any) -> Any:
        new = change(hidden_of(output))
        return (new, *output[1:]) if isinstance(output, tuple | list) else new  # the rest of a tuple stays

    with edit_output(layer, hook):
        yield


@dataclass
class Call:
    """Holds one call of a module: copies of its first tensor and of the hidden states that it returned."""

    module: nn.Module
    input: Tensor | None
    output: Tensor | None = None

    @property
    def hidden(self) -> Tensor:
        """The output of a module that is known to return hidden states (a layer, a linear map)."""
        assert self.output is not None, f"{type(self.module).__name__} returned no tensor"
        return self.output


@contextmanager
def calls(modules: Iterable[nn.Module], made: list[Call]) -> Iterator[None]:
    """Appends to `made` every call of `modules`, in the order in which the calls begin."""
    open_calls: list[Call] = []  # a stack: modules are nested, so the call that ends is the last one that began

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        # Copies, since later modules may write into the same memory.
        open_calls.append(Call(module, None if first is None else first.detach().clone()))
        made.append(open_calls[-1])

    def end(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        hidden = hidden_of(output)
        open_calls.pop().output = hidden.detach().clone() if isinstance(hidden, Tensor) else None

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(begin, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(end).remove)
        yield


@contextmanager
def unwatched(model: nn.Module) -> Iterator[None]:
    """Switches off all hooks of `model` inside the block: a probe must not trigger the hooks of its caller."""
    names = ("_forward_hooks", "_forward_pre_hooks")
    every = [(module, name, getattr(module, name)) for module in model.modules() for name in names]
    kept = [(module, name, hooks) for module, name, hooks in every if hooks]  # usually few or none; setting all is slow
    for module, name, _ in kept:
        setattr(module, name, OrderedDict())
    try:
        yield
    finally:
        for module, name, hooks in kept:
            setattr(module, name, hooks)


@contextmanager
def bypass(layers: tuple[nn.Module, ...], hidden: Tensor, *, width: int = 0) -> Iterator[None]:
    """Lets `layers` return `hidden` without computing anything, so that the pass continues after them.

    `width` is the length of the tuple that these layers return; 0 if they return the tensor itself.
    """
    output = (hidden, *[None] * (width - 1)) if width else hidden

    def skipped(*_: Any, **__: Any) -> Any:
        return output

    # An instance attribute hides the class's method; accelerate may have set one already, which is restored.
    originals = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = skipped
    try:
        yield
    finally:
        for layer, forward in zip(layers, originals, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward
