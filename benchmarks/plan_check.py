"""What `editlib plan` says beside what the same steps take, on random weights of three small models' shapes.

    python benchmarks/plan_check.py --out runs/plan.json      # 30M, 135M, 360M: an edit, and an erasure from rows
    python benchmarks/plan_check.py --shapes 135m --parts edit --requests 8

Random weights never reach their targets, so that every value takes all of its steps, and never end an answer, as in the
plan. Memory is that of the whole edit beyond the weights: the most of its steps as planned, and as seen. Rates are
measured before and after each part, and the mean of both plans counts. Beside other jobs, `--processor` reads all
seconds, planned and measured, from the process's own clock; that is for one thread alone.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import torch
from sides import SHAPES, capital_requests, measured, random_model, say
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from editlib import data, load_hparams
from editlib.algorithms import costs
from editlib.algorithms.alphaedit import apply_alphaedit_to_model
from editlib.algorithms.machine import measure
from editlib.algorithms.null_space import null_spaces
from editlib.algorithms.unierase import apply_unierase_to_model
from editlib.algorithms.work import Step
from editlib.files import write_json
from editlib.hparams import AlphaEditHyperParams, NullSpaceHyperParams, UniEraseHyperParams
from editlib.jobs.plan import GENERAL_STEP, settings_job
from editlib.models.anatomy import Anatomy, anatomy
from editlib.models.packaged.fetch import fetch
from editlib.models.precision import cast_params, fast_dtype
from editlib.models.size import model_size
from editlib.stats.corpus import Corpus, load_corpus
from editlib.stats.file import LayerStats, StatsHeader
from editlib.stats.layer_stats import layer_stats

TOKENS = 8192
MIB = 2**20
PARTS = ("edit", "rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=["30m", "135m", "360m"])
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--facts", type=int, default=2, help="erased from rows")
    parser.add_argument("--retain", type=int, default=64, help="retain prompts that are held meanwhile")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--layers", type=int, nargs="*", default=[3, 4])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--processor", action="store_true", help="seconds of the processor, with one thread")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.processor:
        torch.set_num_threads(1)
        time.perf_counter = time.process_time
    found: list[dict[str, Any]] = []
    for shape in args.shapes:
        tok = AutoTokenizer.from_pretrained(str(fetch("smollm2-135m")))
        model = random_model(shape, len(tok), args.device, torch.float32)
        model.generation_config.eos_token_id = None  # random weights end an answer by chance
        for part in args.parts:
            before = measure(model.config, torch.float32, args.device)
            planned, seconds, held = (edit if part == "edit" else rows)(model, tok, args)
            after = measure(model.config, torch.float32, args.device)
            for step in planned:
                told = (step.seconds(before) + step.seconds(after)) / 2
                row = {"shape": shape, "part": part, "step": step.name, "planned": told, "seconds": seconds[step.name]}
                found.append({**row, "ratio": told / seconds[step.name]})
            for name, (told, seen) in held.items():
                row = {"shape": shape, "part": part, "step": name, "planned_mb": told / MIB, "mb": seen}
                found.append({**row, "ratio": told / MIB / max(seen, 1.0)})
            for row in found[-len(planned) - len(held) :]:
                say(", ".join(f"{key} {one:.3g}" if isinstance(one, float) else str(one) for key, one in row.items()))
        if args.out:
            write_json(args.out, found)


Made = tuple[list[Step], dict[str, float], dict[str, tuple[float, float]]]
"""The steps as they are planned; the seconds that each took, by its name; bytes as planned and MiB as seen, by what
held them."""


def edit(model: PreTrainedModel, tok: PreTrainedTokenizerBase, args: argparse.Namespace) -> Made:
    """Statistics, values by descent and the solve of AlphaEdit."""
    anat, size, layers, device = anatomy(model), model_size(model.config), args.layers, args.device
    asked = capital_requests(args.requests)
    hparams = AlphaEditHyperParams.from_dict(
        {
            "layers": list(layers),
            "context_templates": ["{}"],
            "v_num_grad_steps": args.steps,
            "early_stop_loss": 0.0,
            "nullspace_threshold": 0.75,
            "nullspace_rule": "dimensions",
        },
        "plan check",
    )
    corpus()
    stats = measured(partial(statistics, anat, tok, hparams), device)
    with tempfile.TemporaryDirectory() as folder:
        kept = {layer: replace(one, path=Path(folder) / f"{layer}.npz") for layer, one in stats.made.items()}
        null_spaces(kept, hparams, device)  # kept beside the files, so that the edit does not decompose again
        run = partial(apply_alphaedit_to_model, model, tok, hparams=hparams, stats=kept)
        run(requests=asked[:1]).revert(model)  # warms up
        whole = measured(partial(run, requests=asked), device)
        result = whole.made
        result.revert(model)
    job = costs.Job(
        layers,
        args.requests,
        prompt_tokens=mean_tokens(tok, [request.question for request in asked]),
        suffix_tokens=2,
        steps=args.steps,
        kept_out=size.d_ff // 4,
    )
    planned = copied(model, [costs.statistics(size, layers, TOKENS), costs.values(size, job), costs.solve(size, job)])
    seconds = {"statistics": stats.seconds, "values": result.timings["values"], "solve": result.timings["write"]}
    held = {
        "memory of statistics": (planned[0].held, stats.memory_mb),
        "memory of the edit": (max(step.held for step in planned[1:]), whole.memory_mb),
    }
    return planned, seconds, held


def rows(model: PreTrainedModel, tok: PreTrainedTokenizerBase, args: argparse.Namespace) -> Made:
    """What UniErase adds with values from rows: anchors, rows, the solve with anchors, and refusal tokens."""
    anat, size = anatomy(model), model_size(model.config)
    facts = [fact for fact in data.facts() if fact.subject and fact.relation][:: len(data.facts()) // args.facts]
    facts, retain = facts[: args.facts], data.retain_prompts(facts)[: args.retain]
    shipped = cast(UniEraseHyperParams, load_hparams("UniErase/smollm2-135m-erase"))
    # The shapes have other depths than the model that the settings ship for.
    hparams = replace(shipped, layers=args.layers, token_steps=20)
    stats = statistics(anat, tok, hparams)
    run = partial(apply_unierase_to_model, model, tok, facts, hparams, retain=retain, stats=stats, chat=False)
    whole = measured(run, args.device)
    result = whole.made
    result.revert(model)
    length = mean_tokens(tok, [prompt.question for prompt in retain])
    job = replace(settings_job(hparams, args.facts, length, size), anchors=len(retain))
    general, others = len(data.questions("train")) // GENERAL_STEP, hparams.other_subjects
    solve = costs.neurons(size, job) if hparams.neurons else costs.solve(size, job)
    planned = [
        costs.anchors(size, job, job.v_rate),
        costs.row_values(size, job, others=others, said=hparams.token_wordings),
        replace(solve, work=[*solve.work, *solve.work]),  # values are written again when tokens have moved them
        costs.refusal_tokens(
            size,
            job,
            steps=hparams.token_steps,
            wordings=hparams.token_wordings,
            general=general,
            others=others,
        ),
    ]
    planned = copied(model, planned)
    held = {"memory of the edit": (max(step.held for step in planned), whole.memory_mb)}
    return planned, {**result.timings, "solve": result.timings["write"]}, held


def copied(model: PreTrainedModel, steps: list[Step]) -> list[Step]:
    """The steps with the bf16 copy of the weights, where the processor is fast at it."""
    return [costs.with_copy(step, model_size(model.config)) for step in steps] if fast_dtype(model) else steps


@cache
def corpus() -> Corpus:
    """The text of the statistics, read once, since a plan has no step for reading it."""
    return load_corpus("wiki-sample")


def statistics(anat: Anatomy, tok: PreTrainedTokenizerBase, hparams: NullSpaceHyperParams) -> dict[int, LayerStats]:
    """Second moments of the layers, and their decompositions, as `editlib stats` and an edit make them."""
    text, model = corpus(), anat.model
    header = StatsHeader("random", "", anat.d_ff, TOKENS, 0, text.name, text.sha256, 512, 0, 0, "")
    with cast_params(model, fast_dtype(model)):
        made = layer_stats(
            anat, tok, hparams.statistics_layers, text.documents, tokens=TOKENS, header=header, progress=False
        )
    if hparams.decomposition == "spectrum":
        null_spaces(made, hparams, anat.device)
    return made


def mean_tokens(tok: PreTrainedTokenizerBase, texts: Sequence[str]) -> int:
    """Tokens of a text, in the mean."""
    return round(sum(len(tok(text)["input_ids"]) for text in texts) / len(texts))


if __name__ == "__main__":
    main()
