"""Parse, call and print for `editlib eval` and `editlib subjects`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from editlib.cli.options import (
    DeviceMapOption,
    Dtype,
    Overwrite,
    Prompts,
    Seed,
    SkipBad,
    out,
    print_table,
    prompt_settings,
)
from editlib.errors import RequestError


def register(app: typer.Typer) -> None:
    """Adds the commands to `app`."""
    app.command("eval")(evaluate)
    app.command()(subjects)


def evaluate(
    base: Annotated[str, typer.Argument(help="the model before the edit")],
    edited: Annotated[str, typer.Argument(help="the model after it, or a chain's folder")],
    out_dir: Annotated[Path, typer.Option("--out", help="folder for metrics.json and report.html")],
    protocol: Annotated[str, typer.Option(help="facts or tofu, see docs/how-to/test-an-edit.md")] = "facts",
    mode: Annotated[str, typer.Option(help="batch, sequential (a chain, batch by batch) or single")] = "batch",
    request: Annotated[str | None, typer.Option(help="single: the id of the one request that was forgotten")] = None,
    requests: Annotated[
        Path | None, typer.Option(help="facts: to forget, see docs/reference/file-formats.md; default: the chain's own")
    ] = None,
    retain: Annotated[
        Path | None, typer.Option(help="facts: prompts that must still be answered; default: bundled")
    ] = None,
    text: Annotated[str | None, typer.Option(help="facts: corpus for perplexity, or none")] = None,
    skip_bad: SkipBad = False,
    before: Annotated[
        Path | None, typer.Option(help="facts: file for the base model's answers, reused by later runs")
    ] = None,
    endings: Annotated[
        int | None,
        typer.Option(min=0, help="facts: letters that an answer's inflected ending may have; default: 0"),
    ] = None,
    tofu: Annotated[
        str | None, typer.Option(help="tofu: folder of its files, or a data set on the Hub; default: locuslab/TOFU")
    ] = None,
    forget: Annotated[str | None, typer.Option(help="tofu: forget01, forget05 or forget10; default: forget01")] = None,
    learned: Annotated[
        Path | None, typer.Option(help="tofu: the questions that the model was trained on; default: all")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="tofu: a model trained on the retain set only, or its edited.json")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="tofu: most questions of each set")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="tofu: length of the answers, in tokens; default: 128")
    ] = None,
    encoder: Annotated[str | None, typer.Option(help="tofu: a sentence encoder, for cosine similarity")] = None,
    classifier: Annotated[str | None, typer.Option(help="tofu: an inference model, for entailment")] = None,
    prompts: Prompts = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    device_map: DeviceMapOption = None,
    overwrite: Overwrite = False,
) -> None:
    """Measures an edited model, or a chain, against its base on generated answers."""
    from editlib.files import check_output
    from editlib.jobs.evaluate import evaluate_models, point_rows

    check_output(out_dir, overwrite=overwrite, inputs=(base, edited, requests, retain, tofu, learned, reference))
    how = prompt_settings(prompts)
    facts: dict[str, object] = {"--requests": requests, "--retain": retain, "--text": text, "--before": before}
    facts |= {"--endings": endings}
    fiction: dict[str, object] = {"--tofu": tofu, "--forget": forget, "--learned": learned, "--reference": reference}
    fiction |= {"--limit": limit, "--max-new-tokens": max_new_tokens, "--encoder": encoder, "--classifier": classifier}
    chosen: Any
    if protocol == "facts":
        _refuse(fiction, "tofu")
        held_out = text or "wiki-sample:heldout"
        chosen = _facts(edited, requests, retain, held_out, before, endings=endings or 0, skip_bad=skip_bad)
    elif protocol == "tofu":
        _refuse(facts, "facts")
        whole = mode not in ("single", "precise")
        asked: dict[str, Any] = {"learned_file": learned, "skip_bad": skip_bad, "whole": whole, "limit": limit}
        loading: dict[str, Any] = {"reference": reference, "seed": seed, "dtype": dtype, "device_map": device_map}
        chosen = _tofu(tofu, forget, max_new_tokens, encoder, classifier, **asked, **loading)
    else:
        raise RequestError(f"--protocol {protocol!r}: expected facts or tofu")
    metrics = evaluate_models(
        chosen, base, edited, out_dir, mode=mode, request=request,
        dtype=dtype, device_map=device_map, prompts=how, overwrite=overwrite,
    )  # fmt: skip
    print_table(chosen.table(metrics))
    if note := chosen.note(metrics):
        out.print(note, highlight=False)
    if points := metrics.get("points"):
        print_table(point_rows(points))
    out.print(str(out_dir / "report.html"), soft_wrap=True)


def _refuse(options: dict[str, object], protocol: str) -> None:
    """Refuses options of the other protocol, which would have no effect."""
    if given := [name for name, value in options.items() if value is not None]:
        raise RequestError(f"{', '.join(given)}: only for --protocol {protocol}; leave out, or choose that")


def _tofu(
    folder: str | None,
    forget: str | None,
    max_new_tokens: int | None,
    encoder: str | None,
    classifier: str | None,
    **options: Any,
) -> Any:
    """Returns the protocol of TOFU, with the command's defaults for missing options."""
    from editlib.tofu.protocol import TofuProtocol
    from editlib.tofu.scores import ANSWER_TOKENS, Judges

    length, judges = max_new_tokens or ANSWER_TOKENS, Judges(encoder, classifier)
    forget = forget or "forget01"
    return TofuProtocol.read(folder, forget, max_new_tokens=length, judges=judges, progress=True, **options)


def _facts(
    edited: str,
    requests: Path | None,
    retain: Path | None,
    text: str,
    before: Path | None,
    *,
    endings: int,
    skip_bad: bool,
) -> Any:
    from editlib.chain import Chain
    from editlib.facts.protocol import FactsProtocol
    from editlib.jobs.evaluate import is_chain
    from editlib.requests.reading import read_requests

    if requests is None and not is_chain(edited):
        raise RequestError("--protocol facts needs --requests with the facts to forget, unless EDITED is a chain")
    left_out: dict[str, list[str]] = {}
    if requests is None:
        asked = Chain.open(edited).requests
    else:
        asked = read_requests(requests, skip_bad=skip_bad, left_out=left_out)
    corpus = None if text == "none" else text
    return FactsProtocol.read(
        asked,
        retain_file=retain,
        text=corpus,
        before_file=before,
        skip_bad=skip_bad,
        endings=endings,
        progress=True,
        left_out=left_out,
    )


def subjects(
    requests: Annotated[Path, typer.Argument(help="questions in TOFU's form")],
    out_file: Annotated[Path | None, typer.Option("--out", help="writes them as requests, with their subjects")] = None,
    given: Annotated[
        Path | None, typer.Option(help="your own subjects: one JSON object, id or question to subject")
    ] = None,
    skip_bad: SkipBad = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the file")] = False,
) -> None:
    """Shows the subject of every question and the rule that found it; those without one come first."""
    from editlib.files import check_file
    from editlib.requests.reading import read_questions, read_subjects, write_requests
    from editlib.requests.subjects import RULES

    if out_file is not None:
        check_file(out_file, overwrite=overwrite)
    pairs = read_questions(requests, subjects=None if given is None else read_subjects(given), skip_bad=skip_bad)
    order: dict[str | None, int] = {None: 0}
    order |= {rule: -i for i, rule in enumerate(RULES, 1)}  # from the weakest rule to the strongest
    rules = {request.id: subject.rule if subject else None for request, subject in pairs}
    ranked = sorted(pairs, key=lambda pair: (rules[pair[0].id] is not None, order[rules[pair[0].id]]))
    rows = [["question", "subject", "rule"]]
    rows += [[asked.question, asked.subject or "-", rules[asked.id] or "none"] for asked, _ in ranked]
    print_table(rows)
    counts = Counter(rules.values())
    print_table([["rule", "questions", "meaning"], *[[rule, str(counts[rule]), RULES[rule]] for rule in RULES]])
    out.print(f"{len(pairs) - counts[None]} of {len(pairs)} questions have a subject")
    if out_file is not None:
        write_requests(out_file, [request for request, _ in pairs])
        out.print(str(out_file), soft_wrap=True)
