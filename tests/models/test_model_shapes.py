# ruff: noqa: F722  (jaxtyping writes shapes as strings)
"""The shapes and dtypes that docstrings promise, checked while the public tensor functions run.

The library itself imports no checker: each function is wrapped here, with its annotations written out.
"""

import pytest
import torch
from beartype import beartype
from jaxtyping import Float, Int, TypeCheckError, jaxtyped
from torch import Tensor, nn

from editlib.models.forward import encode_prefix, forward
from editlib.models.inversion import nearest
from editlib.models.output_path import OutputPath
from editlib.models.prefix import Prefix
from editlib.models.prompts import TokenBatch, TokenRow, pad
from editlib.models.quantization import round_channels

ROWS = [TokenRow((5, 6, 7, 8), 1), TokenRow((9, 10), 0)]


def checked(function):
    """`function` with its annotations enforced at each call."""
    return jaxtyped(typechecker=beartype)(function)


@checked
def padded(rows: list) -> tuple[Int[Tensor, "n T"], Int[Tensor, "n T"], Int[Tensor, " n"], Int[Tensor, " n"]]:
    batch = pad(rows)
    return batch.input_ids, batch.attention_mask, batch.lookup, batch.last


@checked
def hidden_states(
    anat: object, ids: Int[Tensor, "n T"], batch: TokenBatch, stop: int, d_model: Float[Tensor, " d"]
) -> Float[Tensor, "n T d"]:
    return forward(anat, batch, stop=stop)


@checked
def resumed(
    anat: object, batch: TokenBatch, start: int, hidden: Float[Tensor, "n T d"], vocabulary: Float[Tensor, " vocab"]
) -> Float[Tensor, "n T vocab"]:
    return forward(anat, batch, start=start, hidden=hidden)


@checked
def scored(
    anat: object,
    batch: TokenBatch,
    rows: Int[Tensor, " m"],
    columns: Int[Tensor, " m"],
    vocabulary: Float[Tensor, " vocab"],
) -> Float[Tensor, "m vocab"]:
    return forward(anat, batch, score=(rows, columns))


@checked
def keys_of(
    anat: object, ids: Int[Tensor, "n T"], batch: TokenBatch, d_ff: Float[Tensor, " f"]
) -> Float[Tensor, "n T f"]:
    seen = []
    forward(anat, batch, keys=lambda _, keys: seen.append(keys), key_layers=(1,))
    return seen[0]


@checked
def after_prefix(
    anat: object, mask: Int[Tensor, "n P"], prefix: Prefix, batch: TokenBatch, vocabulary: Float[Tensor, " vocab"]
) -> Float[Tensor, "n T vocab"]:
    return forward(anat, batch, prefix=prefix)


@checked
def weight_of(anat: object, d_model: Float[Tensor, " d"], d_ff: Float[Tensor, " f"]) -> Float[Tensor, "d f"]:
    return anat.weight(1)


@checked
def inverted(path: OutputPath, current: Float[Tensor, "d n"], wanted: Float[Tensor, "d n"]) -> Float[Tensor, "d n"]:
    return path.invert(current, wanted)


@checked
def applied(path: OutputPath, current: Float[Tensor, "d n"], change: Float[Tensor, "d n"]) -> Float[Tensor, "d n"]:
    return path.apply(current, change)


@checked
def nearest_input(post: nn.Module, base: Float[Tensor, "n d"], target: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return nearest(post, base, target)


@checked
def rounded_channels(weight: Float[Tensor, "rows columns"], channel: int) -> Float[Tensor, "rows columns"]:
    return round_channels(weight, 8, channel=channel)


@torch.no_grad()
def test_a_pass_and_its_parts(anat):
    batch = pad(ROWS)
    d_model, d_ff = torch.zeros(anat.d_model), torch.zeros(anat.d_ff)
    vocabulary = torch.zeros(anat.head.weight.shape[0])
    padded(ROWS)
    hidden = hidden_states(anat, batch.input_ids, batch, 2, d_model)
    resumed(anat, batch, 2, hidden, vocabulary)
    scored(anat, batch, torch.tensor([0, 1, 1]), torch.tensor([3, 0, 1]), vocabulary)
    keys_of(anat, batch.input_ids, batch, d_ff)
    prefix = encode_prefix(anat, ROWS)
    after_prefix(anat, prefix.attention_mask, prefix, batch, vocabulary)
    weight_of(anat, d_model, d_ff)


@pytest.mark.parametrize("post", [None, nn.LayerNorm(8), nn.RMSNorm(8)], ids=["factor", "layer norm", "rms norm"])
def test_paths_and_their_inverse(post):
    path = OutputPath(post, scale=0.5)
    current, wanted = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0))
    applied(path, current, inverted(path, current, wanted))
    if post is not None:
        nearest_input(post, current.T, wanted.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channel", [0, 1])
def test_rounding(dtype, channel):
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert rounded_channels(weight, channel).dtype == dtype


def test_the_checker_is_at_work():
    """Rows where columns belong are noticed."""
    with pytest.raises(TypeCheckError):
        inverted(OutputPath(), torch.zeros(8, 3), torch.zeros(3, 8))
