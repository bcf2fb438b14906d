"""Fine-tune one matrix per layer under a norm constraint: the usual baseline (FT+L of the ROME paper; 2012.00363)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlib.algorithms.edit import EditResult, EditState, Timer, layer_norms, restored_on_error
from editlib.algorithms.low_rank import LowRank
from editlib.algorithms.pipeline import check_fit, check_requests
from editlib.errors import EditError
from editlib.hparams import FTHyperParams
from editlib.models.anatomy import Anatomy, anatomy
from editlib.models.forward import forward
from editlib.models.freezing import no_param_grad
from editlib.models.prompts import PromptFormat, TokenRow, pad
from editlib.requests.request import EditRequest


def apply_ft_to_model(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    hparams: FTHyperParams,
    *,
    state: EditState | None = None,
    chat: bool | None = False,
    seed: int = 0,
    progress: bool = False,
) -> EditResult:
    """Trains the MLP output matrices of `layers` in place on the NLL of every request's `target_new`.

    No entry moves by more than `norm_constraint`.

    The weights are trained in fp32 and rounded to the model's dtype after each step, so that steps smaller than its
    resolution add up.

    Args:
        state: state after earlier edits; FT does not protect any of them.
        seed: seed of the order of the requests.

    Raises:
        RequestError, HparamsError: input that does not fit this model.
        EditError: the loss is not finite. After every error the model is unchanged.
    """
    requests = check_requests(requests, hparams.algorithm, subject=False)
    anat = anatomy(model)
    check_fit(anat, hparams)
    form = PromptFormat.of(tok, chat)
    rows = []
    for request in requests:
        target = form.answer_ids(str(request.target_new), request.question)
        row = form.encode(request.question)
        rows.append((row.followed_by(target[:-1]), target))
    originals = {layer: anat.weight(layer).clone() for layer in hparams.layers}
    timer = Timer()
    with restored_on_error(anat, originals), no_param_grad(model), timer("training"):
        losses = _train(anat, rows, hparams, seed, progress)
    deltas = {
        layer: LowRank.full(anat.weight(layer).float() - original.float()) for layer, original in originals.items()
    }
    return EditResult(
        deltas,
        originals,
        diagnostics=[{"id": request.id, "target_nll": loss} for request, loss in zip(requests, losses, strict=True)],
        norms=layer_norms(deltas, originals),
        timings=timer.seconds,
        state=state or EditState(),
    )


def _train(
    anat: Anatomy, rows: list[tuple[TokenRow, tuple[int, ...]]], hparams: FTHyperParams, seed: int, progress: bool
) -> list[float]:
    """Trains the matrices and returns the last NLL of each row, in nats per token."""
    modules = [anat.mlp_output(layer) for layer in hparams.layers]
    weights = [cast(Tensor, module.weight) for module in modules]  # in the module's own orientation
    starts = [weight.detach().float().clone() for weight in weights]
    # Steps are taken on fp32 copies: in bf16 a step may be smaller than the weight's resolution.
    masters = [start.clone().requires_grad_() for start in starts]
    adam = torch.optim.Adam(masters, lr=hparams.lr, weight_decay=hparams.weight_decay)
    rng = random.Random(seed)  # independent of the global generator
    losses = [0.0] * len(rows)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for _ in tqdm(range(hparams.num_steps), desc="fine-tuning", disable=not progress, leave=False):
            order = rng.sample(range(len(rows)), len(rows))
            for begin in range(0, len(order), hparams.batch_size):
                chunk = order[begin : begin + hparams.batch_size]
                nll = _nll(anat, [rows[i] for i in chunk])
                for i, value in zip(chunk, nll.detach().tolist(), strict=True):
                    losses[i] = value
                if not torch.isfinite(nll).all():
                    raise EditError("the loss of fine-tuning is not finite; the model is unchanged: lower `lr`")
                # Only these weights require a gradient.
                grads = torch.autograd.grad(nll.mean(), weights)
                for master, grad in zip(masters, grads, strict=True):
                    master.grad = grad.float()
                adam.step()
                with torch.no_grad():
                    for weight, master, start in zip(weights, masters, starts, strict=True):
                        if hparams.norm_constraint is not None:
                            most = hparams.norm_constraint
                            # The projected step of 2012.00363: entry by entry, back into the box around the start.
                            master.copy_(torch.clamp(master, start - most, start + most))
                        weight.copy_(master)
            if sum(losses) / len(losses) < hparams.early_stop_loss:
                break
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return losses


def _nll(anat: Anatomy, rows: list[tuple[TokenRow, tuple[int, ...]]]) -> Tensor:
    """Returns the mean NLL of each target after its prompt, `[n]`."""
    batch = pad([row for row, _ in rows], device=anat.device)
    places = [(r, len(row) - len(ids) + j) for r, (row, ids) in enumerate(rows) for j in range(len(ids))]
    # The target's tokens are predicted one position earlier each.
    row, column = torch.tensor(places).T  # [m] each
    logits = forward(anat, batch, score=(row, column)).float()  # [m, vocab]
    wanted = torch.tensor([token for _, ids in rows for token in ids], device=logits.device)
    each = F.cross_entropy(logits, wanted, reduction="none")
    return torch.stack([part.mean() for part in torch.split(each, [len(ids) for _, ids in rows])])
