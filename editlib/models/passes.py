"""Run one pass of a model in which layers are skipped, states replaced and activations read.

Layers are skipped inside the model's own forward, so that every family keeps transformers' masks, positions, caches and
logit scaling. `capabilities` finds out whether a layer may be skipped.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from editlib.errors import ModelError
from editlib.models.anatomy import Anatomy
from editlib.models.positions import positions_of
from editlib.models.prefix import KVCache, TokenReplay
from editlib.models.tracing import bypass, edit_hidden, edit_input, record_inputs, stop_after


class _Columns:
    """Maps the caller's columns to those of the pass that is run.

    `front` replayed tokens come before them, and with `close` padding moves after each row's tokens: sliding windows
    and some position biases count the columns of a gap, and a recurrent state must not meet padding before it meets
    tokens.
    """

    def __init__(self, mask: Tensor, front: int, close: bool) -> None:
        self.front = front
        self.order: Tensor | None = None
        if close and bool((mask[:, 1:] > mask[:, :-1]).any()):  # padding before a token, in some row
            self.order = (1 - mask).argsort(dim=1, stable=True)  # [n, front + T]
            self.places = self.order.argsort(dim=1)  # the inverse permutation

    def enter(self, x: Tensor) -> Tensor:
        """Reorders `[n, front + T, ...]` from the caller's order to the pass's."""
        return x if self.order is None else _gather(x, self.order)

    def leave(self, x: Tensor) -> Tensor:
        """Reorders `[n, front + T, ...]` in the pass's order to `[n, T, ...]`, the caller's columns."""
        return (x if self.order is None else _gather(x, self.places))[:, self.front :]

    def put(self, into: Tensor, x: Tensor) -> Tensor:
        """Returns `into` with the caller's columns replaced by `x [n, T, ...]`."""
        into = into if self.order is None else _gather(into, self.places)
        return self.enter(torch.cat([into[:, : self.front], x.to(into)], dim=1))

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Maps the caller's places, rows and columns `[m]` each, to the pass's columns `[m]`."""
        columns = columns + self.front
        return (
            columns if self.order is None else self.places[rows.to(self.places.device), columns.to(self.places.device)]
        )


def _gather(x: Tensor, order: Tensor) -> Tensor:
    """Gathers `x [n, T, ...]` with the columns of each row in `order [n, T]`."""
    return x[torch.arange(len(x), device=x.device)[:, None], order.to(x.device)]


def run(
    anat: Anatomy,
    input_ids: Tensor,
    mask: Tensor,
    past: KVCache | None = None,
    *,
    start: int = 0,
    stop: int | None = None,
    hidden: Tensor | None = None,
    skip: bool = True,
    keys: Callable[[int, Tensor], None] | None = None,
    key_layers: tuple[int, ...] = (),
    score: tuple[Tensor, Tensor] | None = None,
    final: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Runs the model over `input_ids [n, T]` after `past`, which it extends; `mask [n, P + T]` covers both.

    Args:
        start, hidden: `hidden [n, T, d_model]` enters layer `start` in place of the output of the layers before it.
            With `skip` these are left out; otherwise they run too, for models whose later layers read more from them.
        stop, keys, key_layers, score, final: as for `forward.forward`.
    """
    # 1. A cache is extended; replayed tokens are put before the batch instead.
    cache: DynamicCache | None = None
    front, ids = 0, input_ids
    if isinstance(past, TokenReplay):
        front = past.input_ids.shape[1]
        ids = torch.cat([past.input_ids, input_ids], dim=1)  # [n, P + T]
    else:
        cache = past
    # 2. Padding inside a row is moved to its end, so that no column count includes it.
    present = mask[:, -ids.shape[1] :]  # [n, front + T], without the columns of a cache
    # A new cache keeps its padding on the left, so that the next tokens directly follow the present ones.
    columns = _Columns(present, front, close=cache is None or mask.shape[1] > present.shape[1])
    arguments = _arguments(anat, ids, mask, cache, columns)
    lengths = [layer[0].shape[2] for layer in cache] if columns.order is not None and cache is not None else []
    stopped: list[Tensor] = []
    # 3. States are replaced and read by hooks, which are removed after the block.
    with ExitStack() as stack:
        if stop is not None:
            stack.enter_context(stop_after(anat.layers[stop - 1], lambda h: stopped.append(columns.leave(h))))
        if start:
            stack.enter_context(_starting_at(anat, start, hidden, columns, skip=skip and not front))
        if keys is not None:
            # Some layers fold rows and columns into one dimension.
            modules = {layer: anat.mlp_output(layer) for layer in key_layers}
            sink = lambda layer, k: keys(layer, columns.leave(k.reshape(*ids.shape, -1)))  # noqa: E731
            stack.enter_context(record_inputs(modules, sink))
        if score is not None:
            # The head works on one row of m positions: the model's own scaling and capping still follow.
            rows, at = score[0], columns.at(*score)
            stack.enter_context(edit_input(anat.head, lambda h: h[rows.to(h.device), at.to(h.device)][None]))
            if final is not None:
                stack.enter_context(record_inputs({0: anat.head}, lambda _, h: final(h[0])))
        stack.enter_context(_within_positions(anat, mask))
        output = anat.model(**arguments)
    # 4. The cache for the next pass is put into the order of the caller's mask.
    if isinstance(past, TokenReplay):
        past.input_ids = ids
    elif cache is not None and lengths:
        _restore_order(cache, lengths, columns)
    if stop is not None:
        return stopped[0]
    return output.logits[0] if score is not None else columns.leave(output.logits)


@contextmanager
def _within_positions(anat: Anatomy, mask: Tensor) -> Iterator[None]:
    """Turns an error of the model's own code into a `ModelError` if a text is longer than its positions."""
    try:
        yield
    except (IndexError, RuntimeError) as error:
        limit, longest = positions_of(anat.model), mask.shape[1]
        if limit is None or longest <= limit:
            raise
        raise ModelError(
            f"a prompt with what follows it takes {longest} tokens, but the model has {limit} positions; shorten "
            "prompts, wordings and system prompt, or ask for fewer new tokens"
        ) from error


def _arguments(
    anat: Anatomy, ids: Tensor, mask: Tensor, cache: DynamicCache | None, columns: _Columns
) -> dict[str, Any]:
    """Returns the arguments of the model's forward for `ids [n, front + T]`, in the column order of the pass."""
    width = ids.shape[1]
    mask = torch.cat([mask[:, :-width], columns.enter(mask[:, -width:])], dim=1)  # [n, P + T]
    arguments: dict[str, Any] = {
        "input_ids": columns.enter(ids),
        "attention_mask": mask,
        "past_key_values": cache,
        "use_cache": cache is not None,
    }
    if "position_ids" in inspect.signature(anat.model.forward).parameters:
        arguments["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, -width:]
    return arguments


def _starting_at(
    anat: Anatomy, start: int, hidden: Tensor | None, columns: _Columns, *, skip: bool
) -> AbstractContextManager[None]:
    """Lets `hidden [n, T, d_model]` enter layer `start`, with the layers before it left out (`skip`) or run."""
    assert hidden is not None, "a pass that starts at a layer needs the states that enter it"
    states = hidden
    if skip:
        return bypass(anat.layers[:start], columns.enter(states), width=anat.output_width)
    # Replayed tokens keep the states that these layers have just computed.
    return edit_hidden(anat.layers[start - 1], lambda h: columns.put(h, states))


def _restore_order(cache: DynamicCache, lengths: list[int], columns: _Columns) -> None:
    """Puts the columns that a pass has appended to `cache`, after `lengths` columns, into the order of the caller's
    mask."""
    for layer, length in zip(cache.layers, lengths, strict=True):
        for name in ("keys", "values"):
            cached = getattr(layer, name)  # [n, heads, P + T, head_dim]
            if cached.shape[2] > length:  # a skipped layer has appended nothing
                new = columns.leave(cached[:, :, length:].transpose(1, 2)).transpose(1, 2)
                setattr(layer, name, torch.cat([cached[:, :, :length], new], dim=2))
