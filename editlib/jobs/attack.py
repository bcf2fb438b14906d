"""Run `editlib attack`: from two model folders and request files to attacks.json and table.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from editlib import data
from editlib.attacks.outcome import COLUMNS, LeakRate
from editlib.attacks.registry import choose
from editlib.attacks.run import JOB, AttackReport, check_attacked, check_kept, planned_job, run_attacks
from editlib.attacks.settings import AttackSettings
from editlib.export import read_receipt
from editlib.export.receipt import check_base, prompts_of
from editlib.files import check_output, write_json
from editlib.models.loading import DeviceMap, load
from editlib.models.outline import Outline, load_checked, outline_of
from editlib.models.positions import check_requests_fit
from editlib.models.prompt_settings import PromptSettings
from editlib.models.prompts import PromptFormat, settled
from editlib.models.source import check_models
from editlib.models.weights import weights_sha256
from editlib.reports.tables import write_table
from editlib.requests.reading import read_requests
from editlib.requests.request import EditRequest

NOTE = (
    "A cell is the share of facts that leaked, its 95 % interval (bootstrap over facts; `*`: Wilson, where all or none "
    "leaked and the bootstrap is a point), and their numbers. edited: the edited model; base: the model before the "
    "edit; control: the edited model on facts that the base does not know, which is the level of chance. Forgotten "
    "means that edited is no higher than control; where base is low, an attack shows nothing."
)


def attack_folders(
    base: str,
    edited: str,
    requests_file: Path,
    out: Path,
    *,
    control_file: Path | None = None,
    known_file: Path | None = None,
    attacks: Sequence[str] | None = None,
    settings: AttackSettings | None = None,
    skip_bad: bool = False,
    prompts: PromptSettings | None = None,
    seed: int = 0,
    dtype: str | None = None,
    device_map: DeviceMap = None,
    overwrite: bool = False,
) -> AttackReport:
    """Loads both models, attacks (see `run_attacks`), and writes `attacks.json` and `table.md` to `out`.

    An interrupted run resumes with the attacks that are not done. The banned token is read from the edit's receipt, and
    so are the prompt settings if none are given.

    Args:
        skip_bad: leave out unusable rows of the files, see `read_requests`.

    Raises:
        EditlibError: unsuitable input; nothing is written then.
    """
    out, settings = Path(out), settings or AttackSettings()
    names = choose(attacks)
    if settings.frames is not None:
        data.frames(settings.frames)  # an invalid file is refused before a model is loaded
    if not (out / JOB).is_file():
        check_output(out, overwrite=overwrite, inputs=(base, edited, requests_file, control_file, known_file))
    rows: dict[str, list[str]] = {}
    read = partial(read_requests, skip_bad=skip_bad, left_out=rows)
    requests = read(requests_file)
    control, known = (None if file is None else read(file) for file in (control_file, known_file))
    receipt = read_receipt(edited)
    check_models(base, edited)
    check_attacked(requests)
    how = prompts_of(receipt, prompts)
    given: dict[str, Any] = {"control": control, "known": known, "seed": seed}
    if receipt is not None and receipt.get("token"):
        settings = replace(settings, token=receipt["token"]["token"])
    settled(outline_of(edited, dtype=dtype).tok, how)
    kept = None if overwrite else out
    look = partial(_check_fit, how=how, requests=requests, settings=settings, kept=kept, **given)
    model, tok = load_checked(base, look, dtype=dtype, device_map=device_map)
    if receipt is not None and dtype is None:  # in another dtype, the same weights have another hash
        check_base(receipt, weights_sha256(model), edited=edited, base=base)
    report = run_attacks(
        (model, tok),
        load(edited, dtype=dtype, device_map=device_map),
        requests,
        attacks=names,
        settings=settings,
        prompts=settled(tok, how),
        out=out,
        overwrite=overwrite,
        **given,
    )
    # `left_out` of the report counts facts that cannot be attacked; these are unusable rows of the file.
    unread = {"rows_left_out": rows} if rows else {}
    write_json(out / "attacks.json", {"models": {"base": base, "edited": str(edited)}, **report.to_dict(), **unread})
    write_table(table_rows(report), out / "table.md", NOTE)
    return report


def _check_fit(
    outline: Outline,
    how: PromptSettings | None,
    requests: Sequence[EditRequest],
    settings: AttackSettings,
    kept: Path | None,
    **given: Any,
) -> None:
    """Checks the base model's outline, and the folder `kept`, which may contain attacks of an earlier run.

    Raises:
        RequestError: prompts that do not fit the model, or its positions.
        OutputError: the folder holds another job's attacks.
    """
    prompts = settled(outline.tok, how)
    asked = [*requests, *(given["control"] or ())]
    check_requests_fit(
        outline.model, PromptFormat.of(outline.tok, prompts), asked, answer_tokens=settings.max_new_tokens
    )
    if kept is not None:
        check_kept(kept, planned_job(requests, settings, prompts=prompts, **given))


def table_rows(report: AttackReport, *, short: bool = False) -> list[list[str]]:
    """Returns head and rows: a row per attack, a column per model (see `outcome.COLUMNS`); `short` for a terminal."""
    rows = [["attack", *COLUMNS, *([] if short else ["not tried", "meaning"])]]
    for result in report.results:
        skipped = result.shares["edited"].skipped
        reasons = ", ".join(f"{count}: {reason}" for reason, count in skipped.items())
        cells = [cell(result.shares[name], short=short) for name in COLUMNS]
        rows.append([result.attack, *cells, *([] if short else [reasons or "-", result.meaning])])
    return rows


def cell(share: LeakRate, *, short: bool = False) -> str:
    """Formats a share with its interval, or without it, and its numbers on one line."""
    if share.rate is None:
        return "-"
    numbers = f"{share.leaked} of {share.n}"
    if short:
        return f"{share.rate:.2f} ({numbers})"
    (low, high), mark = (share.interval, "") if 0 < share.leaked < share.n else (share.wilson, "*")
    return f"{share.rate:.2f} ({low:.2f}-{high:.2f}{mark}), {numbers}"
