"""Read what the neurons of one MLP see, at chosen positions of many prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from editlib.algorithms.keys import batches
from editlib.models.anatomy import Anatomy
from editlib.models.forward import encode_prefix, forward, shared_length, split
from editlib.models.neurons import Neurons
from editlib.models.prompts import TokenRow, pad
from editlib.models.tracing import record_inputs


def read_positions(
    anat: Anatomy, rows: Sequence[TokenRow], firsts: Sequence[int], neurons: Neurons, stop: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yields batches of positions, from each row's column in `firsts` to its end.

    Of each position: the number of its row `[p]`, the MLP's input `[p, d_model]`, its key `[p, d_ff]`, and the state
    that enters layer `stop`, `[p, d_model]`; in fp32.
    """
    if not rows:
        return
    device = anat.device
    # The tokens that all rows begin with run once, up to the first position that is read.
    shared = min(shared_length(list(rows)), *firsts) if len(rows) > 1 else 0
    fronts, rests = split(list(rows), [shared] * len(rows))
    prefix = encode_prefix(anat, fronts[:1]) if shared else None
    modules = {"x": anat.matrix(neurons.gate.number), "key": anat.mlp_output(neurons.layer)}
    for group in batches(rests):
        batch = pad([rests[i] for i in group], device=device)
        front = None if prefix is None else prefix.select(torch.zeros(len(group), dtype=torch.long, device=device))
        seen: dict[str, Tensor] = {}
        with torch.no_grad(), record_inputs(modules, seen.__setitem__):
            hidden = forward(anat, batch, stop=stop, prefix=front)  # [n, T, d_model]
        spots = [(j, c) for j, i in enumerate(group) for c in range(firsts[i] - shared, len(rests[i]))]
        row, column = torch.tensor(spots, device=device).T  # [p] each
        # Some models flatten rows and columns for their MLP.
        x, key = (seen[name].reshape(*batch.input_ids.shape, -1)[row, column].float() for name in ("x", "key"))
        yield torch.tensor(group, device=device)[row], x, key, hidden[row, column].float()
