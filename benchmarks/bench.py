"""The core ratios of speed, each from one run on the same work: `make bench`, or

    python benchmarks/bench.py --out runs/bench                        # all of them
    python benchmarks/bench.py --only values,solve --requests 10       # some, on fewer requests

Every part that is finished is kept in `OUT/finished` and not measured again, so that an interrupted run resumes.
`OUT/results.json` holds the ratios of all parts that are there (more is better, except for the last), and what they are
made of under `parts`; `missing` names the ratios that no part has given yet:

- `values_ratio_contexts`: values of a request, published over editlib, the same six contexts and KL prompt
- `values_ratio_fast`: the same contexts with editlib in bf16 where the processor is fast at it, as all settings ship
- `values_ratio_default`: the same over editlib with the settings that ship for the model
- `rows_ratio`: values from rows, whole passes of one row after the other over editlib, both in fp32
- `rows_ratio_fast`: the same with editlib in bf16
- `job_ratio`: the whole edit of all requests, published over editlib
- `statistics_ratio`: a pass a layer over one pass for all layers
- `token_ratio`: the unlearning token as it was learned before (`former_token.py`), over the default; both are judged
  on the same held-out questions
- `solve_time_ratio`, `solve_memory_ratio`: the dense system over the factored one, 14336 x 4096, 64 directions kept out
- `sequential_flatness`: seconds of a chain's last batches over those of its first
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import former_token
import plain_rows
import published
import torch
from edit_cost import compare_edits
from published import Settings
from sides import capital_requests, encoded, measured, same_settings, say
from solve import compare
from torch import Tensor

from editlib import Chain, Workbench, data, load_hparams
from editlib.algorithms.pipeline import find_values, prepare
from editlib.algorithms.rows import Goals, RowBatch, find_row_values
from editlib.algorithms.unierase.catalogue import Catalogue
from editlib.algorithms.unierase.subject_rows import by_subject, subject_rows
from editlib.algorithms.unierase.token_learning import TokenHyperParams, learn_token
from editlib.algorithms.values import Values
from editlib.files import write_json
from editlib.hparams import AlphaEditHyperParams, UniEraseHyperParams
from editlib.models.anatomy import Anatomy
from editlib.models.forward import forward
from editlib.models.freezing import no_param_grad
from editlib.models.precision import cast_params, fast_dtype
from editlib.models.prompts import PromptFormat, TokenRow, pad
from editlib.requests.request import EditRequest
from editlib.shelf import Finished
from editlib.stats.corpus import load_corpus
from editlib.stats.file import StatsHeader
from editlib.stats.layer_stats import batches, counted_windows, document_windows, layer_stats

LAYERS = [4, 5, 6, 7, 8]
ROW_SETTINGS = "UniErase/smollm2-135m-erase"
FACT_STEP = 9  # takes facts from all over the bundled ones
STATISTICS_TOKENS = 20_000  # as many as `editlib unlearn` takes
WINDOW, BATCH_TOKENS = 256, 4096
FORMER, TOKEN = former_token.FORMER, TokenHyperParams()  # the token in its former and in its current form
ASKED = 100  # held-out questions that a token is judged by, and other prompts whose answers it must keep out of


def main(given: Sequence[str] | None = None) -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--requests", type=int, default=20, help="of values and of the whole edit")
    parser.add_argument("--facts", type=int, default=2, help="whose values are found from rows")
    parser.add_argument("--batches", type=int, default=20, help="of the chain, one request each")
    parser.add_argument("--solve", type=int, nargs=2, default=[14336, 4096], metavar=("D_FF", "D_MODEL"))
    parser.add_argument("--processor", action="store_true", help="seconds of the processor, one thread: beside others")
    args = parser.parse_args(given)
    if args.processor:
        torch.set_num_threads(1)
        time.perf_counter = time.process_time
    if unknown := set(args.only) - set(PARTS):
        raise SystemExit(f"--only {', '.join(sorted(unknown))}: expected {', '.join(PARTS)}")
    run(Side(args.model), args)


def run(side: Side, args: argparse.Namespace) -> None:
    """Measures the parts of `args.only` that are not finished; those that are finished go into the results, too."""
    finished = Finished(args.out)
    ratios: dict[str, float] = {}
    parts: dict[str, dict[str, Any]] = {}
    for name, (measure, keys) in PARTS.items():
        job = {
            "part": name,
            "machine": machine(),
            "clock": time.perf_counter.__name__,
            **{key: getattr(args, key) for key in keys},
        }
        made = finished.find(job, dict)
        if made is None and name in args.only:
            say(f"{name}: measuring")
            made = dict(measure(side, args))
            finished.keep(name, job, made)
        if made is not None:
            say(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in made.items()))
            ratios |= {key: value for key, value in made.items() if key in RATIOS}
            parts[name] = {"of": job, **made}
    missing = [name for name in RATIOS if name not in ratios]
    write_json(args.out / "results.json", {**ratios, "missing": missing, "machine": machine(), "parts": parts})
    say(f"{args.out / 'results.json'}" + (f", without {', '.join(missing)}" if missing else ""))


@dataclass
class Side:
    """The model that all parts share, loaded when the first of them needs it."""

    name: str
    device: str | None = None

    @cached_property
    def bench(self) -> Workbench:
        return Workbench.load(self.name, tempfile.mkdtemp(), device_map=self.device, progress=False)

    @property
    def anat(self) -> Anatomy:
        return self.bench.anat


def machine() -> dict[str, Any]:
    """What a measurement depends on beside its part."""
    return {"processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def processor() -> str:
    """The processor's name as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def values(side: Side, args: argparse.Namespace) -> Mapping[str, float]:
    """Seconds a request for its value: the published procedure, editlib on the same contexts, and as it ships."""
    anat, tok, requests, settings = side.anat, side.bench.tok, capital_requests(args.requests), Settings(LAYERS)
    layer = anat.layers[LAYERS[-1]]
    row: dict[str, float] = {}
    with no_param_grad(anat.model):
        asked = [encoded(tok, request) for request in requests]
        published.compute_z(anat.model, layer, asked[0], Settings(LAYERS, steps=2))  # warms up
        theirs = measured(lambda: [published.compute_z(anat.model, layer, one, settings) for one in asked], anat.device)
    row |= {"published": theirs.seconds / len(requests), "published_mb": theirs.memory_mb}
    row["published_steps"] = sum(steps for _, steps in theirs.made)
    for name, hparams in (
        ("contexts", same_settings(settings)),
        ("fast", replace(same_settings(settings), v_precision="fast")),
        ("default", load_hparams(f"AlphaEdit/{args.model}")),
    ):
        assert isinstance(hparams, AlphaEditHyperParams)
        values_of(side, requests[:1], hparams)  # warms up
        ours = measured(partial(values_of, side, requests, hparams), anat.device)
        row |= {name: ours.seconds / len(requests), f"{name}_mb": ours.memory_mb, f"{name}_steps": sum(ours.made.steps)}
        row[f"values_ratio_{name}"] = row["published"] / row[name]
    return row


def values_of(side: Side, requests: Sequence[EditRequest], hparams: AlphaEditHyperParams) -> Values:
    """Values of `requests`, their encoding included."""
    return find_values(prepare(side.bench.model, side.bench.tok, requests, hparams, chat=False), hparams)


def rows(side: Side, args: argparse.Namespace) -> Mapping[str, float]:
    """Values from rows of facts to be erased, beside whole passes of one row after the other: seconds, and how far
    apart the two leave a row, in nats."""
    anat, model, hparams = side.anat, side.bench.model, load_hparams(ROW_SETTINGS)
    assert isinstance(hparams, UniEraseHyperParams)
    facts = [fact for fact in data.facts() if fact.subject and fact.relation][::FACT_STEP][: args.facts]
    catalogue, form = Catalogue.bundled(), PromptFormat.of(side.bench.tok, None)
    asked = [catalogue.with_wordings(fact, hparams.wordings) for fact in facts]
    kept = data.retain_prompts(facts)
    made = subject_rows(anat, form, asked, kept, by_subject(asked), siblings=hparams.siblings, catalogue=catalogue)
    held = RowBatch(anat, made.rows, hparams.layers[-1])  # with the rivals of all rows
    numbered = {i: row for chunk in held.chunks for i, row in zip(chunk.numbers, chunk.rows, strict=True)}
    todo = [numbered[i] for i in range(len(numbered))]
    layer, goals, kinds = hparams.layers[-1], Goals(hparams.erase_margin), [row.kind for row in todo]
    names = [str(asked[group[0]].subject) for group in made.subjects]
    row: dict[str, float] = {"facts": len(facts), "rows": len(todo)}
    find = partial(find_row_values, anat, todo, layer, names, goals, steps=hparams.row_steps)
    wanted = partial(goals.wanted, kinds)
    with no_param_grad(model):
        plain = partial(plain_rows.find, model, anat.layers[layer], todo, wanted, steps=hparams.row_steps)
        theirs = measured(plain, anat.device)
        row |= {"plain": theirs.seconds, "plain_mb": theirs.memory_mb}
        for name, dtype in (("rows_ratio", None), ("rows_ratio_fast", fast_dtype(model))):
            with cast_params(model, dtype):
                ours = measured(find, anat.device)
            apart = (ours.made.after - theirs.made).abs()
            row |= {name: theirs.seconds / ours.seconds, f"{name}_seconds": ours.seconds, f"{name}_mb": ours.memory_mb}
            row |= {f"{name}_apart": float(apart.mean()), f"{name}_missed": len(ours.made.missed())}
    return row


def job(side: Side, args: argparse.Namespace) -> Mapping[str, float]:
    """The whole edit side by side."""
    row = compare_edits(side.bench.model, side.bench.tok, LAYERS, args.requests)
    return {**row, "job_ratio": row["ratio"]}


def layer_statistics(side: Side, args: argparse.Namespace) -> Mapping[str, float]:
    """Second moments of all layers over the same batches: a pass a layer, one pass for all, and a bare pass through the
    last of them in the dtype of the second."""
    anat, tok, model, device = side.anat, side.bench.tok, side.bench.model, side.anat.device
    text = load_corpus("wiki-sample")
    header = StatsHeader(args.model, "", anat.d_ff, STATISTICS_TOKENS, 0, text.name, text.sha256, WINDOW, 0, 0, "")
    windows = counted_windows(document_windows(tok, text.documents, WINDOW), STATISTICS_TOKENS, 0)
    groups = [[ids for _, ids in group] for group in batches(windows, BATCH_TOKENS)]

    def published_passes() -> None:
        for layer in LAYERS:
            published.layer_stats(model, anat.layers[layer], anat.mlp_output(layer), groups)

    def one_pass() -> None:
        layer_stats(
            anat,
            tok,
            LAYERS,
            text.documents,
            tokens=STATISTICS_TOKENS,
            header=header,
            max_length=WINDOW,
            batch_tokens=BATCH_TOKENS,
            skip_first=0,
            progress=False,
        )

    def bare_pass() -> None:
        with torch.no_grad():
            for group in groups:
                forward(anat, pad([TokenRow(tuple(ids), 0) for ids in group], device=device), stop=LAYERS[-1] + 1)

    with no_param_grad(model):
        row = {"published": measured(published_passes, device).seconds}
        with cast_params(model, fast_dtype(model)):
            row |= {"editlib": measured(one_pass, device).seconds, "bare": measured(bare_pass, device).seconds}
    return {**row, "over_bare": row["editlib"] / row["bare"], "statistics_ratio": row["published"] / row["editlib"]}


def token(side: Side, args: argparse.Namespace) -> Mapping[str, float]:
    """The token as it was learned before and as it is learned now, in one run, and what each is worth on held-out
    questions (`former_token.quality`)."""
    questions, held_out = data.questions("train"), data.questions("heldout")[:ASKED]
    random.Random(0).shuffle(questions)
    watched = [prompt.question for prompt in data.general("test")][:ASKED]
    ordinary = [prompt.question for prompt in data.general("anchor")]
    row: dict[str, float] = {}
    for name, learn, settings in (("before", former_token.learn, FORMER), ("now", learned_rows, TOKEN)):
        some = ordinary[: settings.guard_prompts // 3]
        work = partial(learn, side.anat, side.bench.tok, questions, data.refusals(), ordinary=some, hparams=settings)
        cost = measured(work, side.anat.device)
        row |= {name: cost.seconds, f"{name}_mb": cost.memory_mb}
        worth = former_token.quality(side.anat, side.bench.tok, cost.made, held_out, watched)
        row |= {f"{name}_{key}": value for key, value in worth.items()}
    return {**row, "token_ratio": row["before"] / row["now"]}


def learned_rows(*inputs: Any, **options: Any) -> list[Tensor]:
    """The rows of `learn_token`."""
    made = learn_token(*inputs, **options, progress=False)
    return [made.row_in, made.row_out]


def solve(side: Side, args: argparse.Namespace) -> Mapping[str, float]:
    """One layer's closed form at real size."""
    d_ff, d_model = args.solve
    row = compare(d_ff, d_model, 400, 0, 64, torch.device("cpu"))
    return {**row, "solve_time_ratio": row["time_ratio"], "solve_memory_ratio": row["memory_ratio"]}


def sequential(side: Side, args: argparse.Namespace) -> Mapping[str, float]:
    """A chain of AlphaEdit with one request per batch: median seconds of the last five batches, and of the second to
    the sixth."""
    requests, hparams = capital_requests(args.batches), load_hparams(f"AlphaEdit/{args.model}")
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        chain = Chain.create(Path(folder) / "chain", side.bench, hparams, stats_tokens=STATISTICS_TOKENS)
        for request in requests:
            begun = time.perf_counter()
            chain.add([request])
            seconds.append(time.perf_counter() - begun)
    first, last = statistics.median(seconds[1:6]), statistics.median(seconds[-5:])
    return {"first": first, "last": last, "batches": len(seconds), "sequential_flatness": last / first}


Part = Callable[[Side, argparse.Namespace], Mapping[str, float]]
PARTS: dict[str, tuple[Part, tuple[str, ...]]] = {  # each with the options that it depends on
    "values": (values, ("model", "requests")),
    "rows": (rows, ("model", "facts")),
    "job": (job, ("model", "requests")),
    "statistics": (layer_statistics, ("model",)),
    "solve": (solve, ("solve",)),
    "sequential": (sequential, ("model", "batches")),
    "token": (token, ("model",)),  # last, since it adds a row to the model
}
RATIOS = (
    "values_ratio_contexts",
    "values_ratio_fast",
    "values_ratio_default",
    "rows_ratio",
    "rows_ratio_fast",
    "job_ratio",
    "statistics_ratio",
    "token_ratio",
    "solve_time_ratio",
    "solve_memory_ratio",
    "sequential_flatness",
)

if __name__ == "__main__":
    main()
