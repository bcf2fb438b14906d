"""What one edit costs beside the published procedure: AlphaEdit of the same requests, settings and surroundings, twice.

    python benchmarks/edit_cost.py smollm2-135m --requests 20
    python benchmarks/edit_cost.py --shape 3b --device-map cuda --dtype bfloat16     # random weights of that shape
    python benchmarks/edit_cost.py --solve 14336 --keys 400                          # one layer's closed form alone

The published procedure is written down in `published.py`. Neither side's decomposition of the statistics is timed: both
are made once a model. A model of random weights stands for one that is not at hand; what it knows does not matter to
what an edit costs, but its target states rarely come near their targets, so that no request rests early.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from published import Asked, Settings, alphaedit, compute_ks
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from editlib import apply_alphaedit_to_model, data, load
from editlib.algorithms.closed_form import alphaedit as solve
from editlib.algorithms.null_space import NullSpace, null_space_of
from editlib.hparams import AlphaEditHyperParams
from editlib.models.anatomy import Anatomy, anatomy
from editlib.models.loading import DTYPES
from editlib.requests.request import EditRequest
from editlib.stats.file import LayerStats, StatsHeader
from editlib.stats.store import find_layers, save_stats

SURROUNDINGS = (
    "{}",
    "The weather was fine that day. {}",
    "Therefore it is good to know. {}",
    "Because of what had been said, {}",
    "I asked them to tell me. {}",
    "You may have heard of it. {}",
)
SHAPES = {  # hidden, MLP, layers, heads, heads of keys and values: those of Llama 3.2 and 3
    "1b": (2048, 8192, 16, 32, 8),
    "3b": (3072, 8192, 28, 24, 8),
    "8b": (4096, 14336, 32, 32, 8),
}
KEPT = 0.8  # share of directions in the null space


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m", help="also gives the tokenizer of a --shape")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--layers", default="4,5,6,7,8")
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=2, help="of each side; the faster one counts")
    parser.add_argument("--device-map", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--stats-dir", type=Path, help="stored statistics instead of drawn ones")
    parser.add_argument("--solve", type=int, metavar="D_FF", help="time one layer's solve alone, on random keys")
    parser.add_argument("--keys", type=int, default=400, help="with --solve: new keys")
    args = parser.parse_args()
    if args.solve:
        compare_solves(args.solve, args.keys, torch.device(args.device_map), args.repeats)
        return
    model, tok = load(args.model, dtype=args.dtype, device_map=args.device_map)
    if args.shape:
        model = random_model(args.shape, len(tok), next(model.parameters()).device, DTYPES[args.dtype])
    compare_edits(model, tok, args)


def random_model(shape: str, vocab: int, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    hidden, d_ff, layers, heads, kv = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=d_ff,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    kind = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(kind)
    model.name_or_path = f"random-{shape}"
    return model


def compare_edits(model: PreTrainedModel, tok: PreTrainedTokenizerBase, args: argparse.Namespace) -> None:
    anat, layers = anatomy(model), [int(layer) for layer in args.layers.split(",")]
    device = anat.device
    facts = [fact for fact in data.facts() if fact.subject and fact.relation == "capital"]
    answers = [fact.answer for fact in facts]
    requests = [
        EditRequest(id=fact.id, prompt=fact.prompt, subject=fact.subject, target_new=answers[i - 1])
        for i, fact in enumerate(facts[: args.requests])
    ]
    settings = Settings(layers)
    hparams = AlphaEditHyperParams.from_dict(
        {
            "layers": layers,
            "context_templates": list(SURROUNDINGS),
            "v_num_grad_steps": settings.steps,
            "v_lr": settings.lr,
            "v_weight_decay": settings.weight_decay,
            "clamp_norm_factor": settings.clamp_norm_factor,
            "kl_factor": settings.kl_factor,
            "early_stop_loss": settings.stop_loss,
            "nullspace_threshold": KEPT,
            "nullspace_rule": "dimensions",
            "L2": settings.l2,
        },
        "benchmark",
    )
    asked = [encoded(tok, request) for request in requests]
    originals = {layer: anat.weight(layer).clone() for layer in layers}

    def restore() -> None:
        for layer, weight in originals.items():
            anat.weight(layer).copy_(weight)

    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        stats = (
            find_layers(args.stats_dir, args.model, anat, layers)
            if args.stats_dir
            else drawn_stats(anat, layers, Path(folder))
        )
        first = apply_alphaedit_to_model(model, tok, requests[:2], hparams, stats=stats)  # decomposes, and warms up
        first.revert(model)
        say(f"statistics and their decomposition, not timed: {time.perf_counter() - begun:.0f} s")
        ours, theirs = Best(device), Best(device)
        for _ in range(args.repeats):
            result = ours.run(lambda: apply_alphaedit_to_model(model, tok, requests, hparams, stats=stats))
            parts, steps = result.timings, sum(entry["steps"] for entry in result.diagnostics)
            ours_after = target_nll(model, asked)
            restore()
        say(f"editlib    {ours.line()}; {steps} steps of target states; " + ", ".join(
            f"{name} {seconds:.2f} s" for name, seconds in parts.items()
        ))  # fmt: skip
        projectors = {layer: dense_projector(stats[layer]) for layer in layers}
    plain = [anat.layers[layer] for layer in range(anat.n_layers)]
    matrices = [anat.mlp_output(layer) for layer in range(anat.n_layers)]
    compute_ks(model, matrices[layers[0]], asked[:2])
    for _ in range(args.repeats):
        taken = theirs.run(lambda: alphaedit(model, plain, matrices, asked, settings, projectors))
        after = target_nll(model, asked)
        restore()
    say(f"published  {theirs.line()}; {taken} steps of target states")
    say(
        f"ratio {theirs.seconds / ours.seconds:.1f}; mean NLL of the targets, in nats a token: before "
        f"{target_nll(model, asked):.2f}, after editlib {ours_after:.2f}, after the published procedure {after:.2f}"
    )


def encoded(tok: PreTrainedTokenizerBase, request: EditRequest) -> Asked:
    """A request for the published procedure, encoded without editlib."""

    def row(text: str, subject: str) -> tuple[list[int], int]:
        found = tok(text, return_offsets_mapping=True)
        end = text.rindex(subject) + len(subject)
        at = next(i for i, (first, behind) in enumerate(found["offset_mapping"]) if first < end <= behind)
        return list(found["input_ids"]), at

    contexts = [row(template.replace("{}", request.question), request.subject) for template in SURROUNDINGS]
    target = tok(" " + request.target_new, add_special_tokens=False)["input_ids"]
    return Asked(contexts, target, row(f"{request.subject} is a", request.subject))


def drawn_stats(anat: Anatomy, layers: list[int], folder: Path) -> dict[int, LayerStats]:
    """Second moments of random keys with a falling spectrum, stored, so that their decomposition is kept."""
    found, device = {}, anat.device
    generator = torch.Generator(device).manual_seed(0)
    for layer in layers:
        scale = torch.logspace(0, -2, anat.d_ff, device=device)
        keys = scale[:, None] * torch.randn(anat.d_ff, 2 * anat.d_ff, generator=generator, device=device)
        header = StatsHeader(
            "drawn", anat.mlp_output_names[layer], anat.d_ff, keys.shape[1], 1, "drawn", "", 64, 0, 0, ""
        )
        found[layer] = LayerStats((keys @ keys.T).cpu(), keys.shape[1], 1, header)
        save_stats(folder, found[layer])
    return found


def dense_projector(stats: LayerStats) -> Tensor:
    """`P [d_ff, d_ff]` in fp32 on the CPU, from the basis that is kept."""
    space = null_space_of(stats, KEPT, "dimensions")
    inside = space.basis.float() @ space.basis.float().T
    return inside if space.spans_kept else torch.eye(len(inside)) - inside


@torch.no_grad()
def target_nll(model: PreTrainedModel, asked: list[Asked]) -> float:
    """Mean over the requests of the target's NLL a token behind the plain prompt."""
    device, found = next(model.parameters()).device, []
    for one in asked:
        ids = one.contexts[0][0]
        logits = model(torch.tensor([[*ids, *one.target[:-1]]], device=device), use_cache=False).logits[0].float()
        rows = logits[len(ids) - 1 :].log_softmax(-1)
        found.append(-float(rows[torch.arange(len(one.target)), torch.tensor(one.target)].mean()))
    return sum(found) / len(found)


class Best:
    """The fastest of several runs of one side, and the most memory that any took on an accelerator."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.peak = device, float("inf"), 0

    def run(self, work):
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
            torch.accelerator.reset_peak_memory_stats()
        held, begun = self._held(), time.perf_counter()
        made = work()
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
            self.peak = max(self.peak, torch.accelerator.max_memory_allocated() - held)
        self.seconds = min(self.seconds, time.perf_counter() - begun)
        return made

    def _held(self) -> int:
        return 0 if self.device.type == "cpu" else torch.accelerator.memory_allocated()

    def line(self) -> str:
        memory = f", {self.peak / 2**30:.2f} GiB above the model" if self.peak else ""
        return f"{self.seconds:8.2f} s{memory}"


def compare_solves(d_ff: int, n: int, device: torch.device, repeats: int) -> None:
    """`R E^T (A^T A + L2 I)^-1 A^T` beside the published dense system, on random keys, without earlier ones."""
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, device=device)  # noqa: E731
    d_model, l2 = d_ff // 4, 10.0
    keys, residual = draw(d_ff, n), draw(d_model, n)
    basis = torch.linalg.qr(draw(d_ff, round((1 - KEPT) * d_ff))).Q
    space, p = NullSpace(basis, False, d_ff - basis.shape[1]), torch.eye(d_ff, device=device) - basis @ basis.T
    wide = NullSpace(basis.double(), False, space.dim)
    ours, theirs = Best(device), Best(device)
    for _ in range(repeats + 1):  # the first is a warm-up
        made = ours.run(lambda: solve(keys.double(), residual.double(), wide, l2=l2))
        dense = theirs.run(
            lambda: torch.linalg.solve(p @ (keys @ keys.T) + l2 * torch.eye(d_ff, device=device), p @ keys @ residual.T)
        )
    apart = float((made.dense() - dense.T).norm() / made.dense().norm())
    say(f"d_ff {d_ff}, {n} keys, {device}: editlib, fp64 {ours.line()}; published, dense fp32 {theirs.line()}")
    say(f"ratio {theirs.seconds / ours.seconds:.1f}; relative difference of the updates {apart:.1e}")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
