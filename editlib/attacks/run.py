"""Run attacks on one edited model, its base and a control; each result is saved as soon as it is done."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editlib import data
from editlib.attacks.asking import AttackContext
from editlib.attacks.control import bundled_control, unknown, usable
from editlib.attacks.outcome import COLUMNS, AttackResult
from editlib.attacks.registry import ATTACKS, choose
from editlib.attacks.settings import AttackSettings
from editlib.errors import RequestError
from editlib.files import write_json
from editlib.models.loaded import LoadedModel, ModelPair
from editlib.models.positions import check_requests_fit
from editlib.models.prompt_settings import PromptSettings
from editlib.models.prompts import PromptFormat
from editlib.models.weights import weights_sha256
from editlib.requests.reading import requests_hash
from editlib.requests.request import EditRequest
from editlib.shelf import FINISHED, check_same_job, read_kept
from editlib.version import library_version

log = logging.getLogger(__name__)

JOB = "job.json"


@dataclass(frozen=True)
class AttackReport:
    """Holds the settings of the run (`job`), the facts that cannot be attacked, and the outcome of each attack."""

    job: Mapping[str, Any]
    left_out: Mapping[str, Mapping[str, int]]
    results: tuple[AttackResult, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns the report JSON-ready."""
        left_out = {column: dict(reasons) for column, reasons in self.left_out.items()}
        results = [result.to_dict() for result in self.results]
        return {"job": self.job, "columns": COLUMNS, "left_out": left_out, "results": results}


def run_attacks(
    base: LoadedModel | ModelPair,
    edited: LoadedModel | ModelPair,
    requests: Sequence[EditRequest],
    *,
    control: Sequence[EditRequest] | None = None,
    known: Sequence[EditRequest] | None = None,
    attacks: Sequence[str] | None = None,
    settings: AttackSettings | None = None,
    prompts: PromptSettings | None = None,
    seed: int = 0,
    out: Path | None = None,
    overwrite: bool = False,
) -> AttackReport:
    """Tries to recover every forgotten fact. Both models are restored afterwards, bit for bit.

    Args:
        base, edited: models with their tokenizers, as `editlib.load` or `Workbench.loaded` gives them.
        requests: the forgotten facts, with their `answer`.
        control: facts that the base model should not know; those that it knows are left out. Default: bundled ones of
            the same relations.
        known: facts for few-shot examples; default: bundled ones.
        attacks: names of `registry.ATTACKS`; default: all.
        prompts: how both models are asked; default: the settings of the loaded edited model, otherwise its chat
            template if it has one.
        out: folder for finished attacks, from which the same job resumes.
        overwrite: drop the attacks in `out`.

    Returns:
        The requested attacks, and those of this job that were already in `out`.

    Raises:
        AttackError: an unknown attack, or `peft` missing for one that needs it.
        RequestError: no request whose leaking can be detected.
        OutputError: `out` holds another job's results, or cannot be written.
        ModelError: weights are offloaded, and an attack would change them.
    """
    names, settings = choose(attacks), settings or AttackSettings()
    asked, left_out = check_attacked(requests)
    if prompts is None and isinstance(edited, LoadedModel):
        prompts = edited.prompts
    models = {"edited": LoadedModel.given(edited, prompts), "base": LoadedModel.given(base, prompts)}
    form = PromptFormat.of(models["base"].tok, prompts)
    check_requests_fit(
        models["base"].anat.model, form, [*asked, *(control or ())], answer_tokens=settings.max_new_tokens
    )
    job = {
        "base": weights_sha256(models["base"].anat.model),
        "edited": weights_sha256(models["edited"].anat.model),
        **planned_job(requests, settings, control=control, known=known, prompts=prompts, seed=seed),
    }
    done = {} if out is None else _opened(out, job, overwrite=overwrite)
    unrelated = data.without_overlap(data.general("anchor") + data.general("test"), requests)
    facts = data.facts() if known is None else known
    context = AttackContext(models["base"], asked, facts, unrelated, settings, seed)
    never, missing = _control(control, context, requests)
    for name in names:
        if name not in done:
            done[name] = _run(name, models, asked, never, context)
            if out is not None:
                write_json(out / FINISHED / f"{name}.json", done[name].to_dict())
        rates = {column: share.rate for column, share in done[name].shares.items()}
        log.info("%s: %s", name, ", ".join(f"{k} {v:.2f}" for k, v in rates.items() if v is not None) or "not tried")
    return AttackReport(
        job, {"requests": left_out, "control": missing}, tuple(done[name] for name in ATTACKS if name in done)
    )


def planned_job(
    requests: Sequence[EditRequest],
    settings: AttackSettings,
    *,
    control: Sequence[EditRequest] | None = None,
    known: Sequence[EditRequest] | None = None,
    prompts: PromptSettings | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns everything that determines the results of `run_attacks` except the two models."""
    return {
        "editlib": library_version(),
        "requests": requests_hash(requests),
        "control": None if control is None else requests_hash(control),
        "known": None if known is None else requests_hash(known),
        "seed": seed,
        "settings": settings.to_dict(),
        "prompts": {} if prompts is None else prompts.to_dict(),
    }


def check_kept(out: Path, planned: Mapping[str, Any]) -> None:
    """Raises `OutputError` if `out` holds attacks of another job than one with these keys."""
    kept = read_kept(out / JOB)
    compared = None if kept is None else {key: kept.get(key) for key in planned}
    remedy = "choose another --out or add --overwrite"
    check_same_job(out, compared, planned, held="another job's attacks", remedy=remedy)


def check_attacked(requests: Sequence[EditRequest]) -> tuple[list[EditRequest], dict[str, int]]:
    """Picks the requests that can be attacked, and counts the others by reason.

    Raises:
        RequestError: none is left.
    """
    asked, left_out = usable(requests)
    if not asked:
        raise RequestError(
            f'none of the {len(requests)} requests can be attacked: each needs an "answer" that is not in its '
            "own question"
        )
    return asked, left_out


def _control(
    given: Sequence[EditRequest] | None, context: AttackContext, requests: Sequence[EditRequest]
) -> tuple[list[EditRequest], dict[str, int]]:
    """Picks the facts of the control, and counts the given facts that are left out."""
    if given is None:
        return bundled_control(context.base, requests, context), {}
    fitting, left_out = usable(given)
    apart = data.without_overlap(fitting, requests)
    control_facts = unknown(context.base, apart, context)
    counts = {**left_out, "is to be forgotten": len(fitting) - len(apart), "is known": len(apart) - len(control_facts)}
    return control_facts, {reason: count for reason, count in counts.items() if count}


def _run(
    name: str,
    models: Mapping[str, LoadedModel],
    requests: Sequence[EditRequest],
    control: Sequence[EditRequest],
    context: AttackContext,
) -> AttackResult:
    """Runs one attack on both models; requests and control are asked of the edited one in one batch."""
    begun = time.perf_counter()
    entry = ATTACKS[name]
    edited = entry.run(models["edited"], [*requests, *control], context)
    base = entry.run(models["base"], requests, context)
    trials = {
        "edited": edited.trials[: len(requests)],
        "base": base.trials,
        "control": edited.trials[len(requests) :],
    }
    notes = {"edited": edited.notes, "base": base.notes}
    resamples, seconds = context.settings.resamples, time.perf_counter() - begun
    return AttackResult.of(name, entry.meaning, trials, notes, seconds, resamples=resamples, seed=context.seed)


def _opened(out: Path, job: Mapping[str, Any], *, overwrite: bool) -> dict[str, AttackResult]:
    """Reads the finished attacks of `job` in `out`, and prepares the folder for more."""
    kept = read_kept(out / JOB)
    if not overwrite:
        check_kept(out, {**dict.fromkeys(kept or ()), **job})
    files = sorted((out / FINISHED).glob("*.json"))
    if kept != job or overwrite:
        for file in (*files, out / JOB):
            file.unlink(missing_ok=True)
        write_json(out / JOB, job)
        return {}
    finished = [result for file in files if (result := _finished(file)) is not None]
    return {result.attack: result for result in finished}


def _finished(file: Path) -> AttackResult | None:
    """Returns the finished attack in a file; a damaged one counts as missing, and the attack is made again."""
    try:
        result = AttackResult.from_dict(read_kept(file) or {})
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    return result if {"edited", "base", "control"} <= {*result.shares} & {*result.trials} else None
