"""Run `editlib baseline`: from a model and request files to an ordinary folder with its receipt."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from editlib import data
from editlib.baselines.apply import apply_baseline_to_model, check_baseline
from editlib.baselines.refusal_edit import REFUSAL
from editlib.baselines.registry import BASELINES, baseline, canonical_name
from editlib.baselines.search import SearchResult, check_range, search
from editlib.baselines.settings import BaselineSettings, Budget
from editlib.baselines.validation import ValidationSplit, split
from editlib.editing import check_given, check_wanted
from editlib.errors import HparamsError
from editlib.export import asked_as, save_edited
from editlib.export.receipt import origin
from editlib.files import check_folder, check_output, check_room
from editlib.finding import find_settings
from editlib.hparams import HyperParams
from editlib.models.loading import DeviceMap
from editlib.models.outline import Outline, load_checked
from editlib.models.positions import check_requests_fit
from editlib.models.prompt_settings import PromptSettings
from editlib.models.prompts import PromptFormat, settled
from editlib.models.weights import stored_bytes, weights_sha256
from editlib.requests.reading import read_with_retain
from editlib.requests.request import EditRequest
from editlib.stats.store import check_stored
from editlib.training import TrainResult


@dataclass(frozen=True)
class Ran:
    """Holds a baseline with its settings, in the form in which a receipt names an algorithm with its
    hyper-parameters."""

    name: str
    settings: BaselineSettings

    @property
    def algorithm(self) -> str:
        """The name in the receipt."""
        return self.name

    @property
    def source(self) -> str:
        """The origin of the settings: the command itself, no file."""
        return ""

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings with the baseline's own defaults filled in."""
        entry, values = baseline(self.name), self.settings.to_dict()
        defaults = {
            "learning_rate": entry.rate,
            "steps": entry.steps,
            "beta": entry.beta,
            "forget_weight": entry.weight,
        }
        return {key: defaults.get(key) if value is None else value for key, value in values.items()}


def baseline_folder(
    name: str,
    model: str,
    requests_file: Path,
    out: Path,
    *,
    retain_file: Path | None = None,
    settings: BaselineSettings | None = None,
    budget: Budget | None = None,
    skip_bad: bool = False,
    prompts: PromptSettings | None = None,
    seed: int = 0,
    dtype: str | None = None,
    device_map: DeviceMap = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Makes `model` forget the requests by a baseline and writes it to `out`, with a receipt for `editlib eval` and
    `editlib attack`.

    The receipt lists the retain prompts of training and of the search's validation as `anchors`, which `editlib eval`
    leaves out. A search keeps its trials beside `out` until the folder is complete, and resumes from them.

    Args:
        retain_file: prompts whose answers must stay; default: the bundled ones, as for `editlib unlearn`.
        budget: budget of a preceding search for learning rate and steps; `None`: no search.
        skip_bad: leave out unusable rows of the files, see `read_requests`.
        prompts: how the model is asked; recorded in the receipt, so that later commands ask in the same way.

    Returns:
        The receipt.

    Raises:
        EditlibError: unsuitable input; nothing is written then.
    """
    out, settings, name = Path(out), settings or BaselineSettings(), canonical_name(name)
    check_output(out, overwrite=overwrite, inputs=(model, requests_file, retain_file))
    left_out: dict[str, list[str]] = {}
    requests, given = read_with_retain(requests_file, retain_file, skip_bad=skip_bad, left_out=left_out)
    retain = data.retain_prompts(requests) if given is None else given
    check_baseline(name, requests, retain, settings, prompts)
    found_for, stats_dir = _editor_settings(name, model, settings, requests), Path(settings.stats_dir)
    if budget is not None:
        check_range(name, budget)
    parts = split(requests, retain, questions=budget.questions, seed=seed) if budget is not None else None

    def look(outline: Outline) -> None:
        form = PromptFormat.of(outline.tok, settled(outline.tok, prompts))
        check_requests_fit(outline.model, form, [*requests, *retain])
        if found_for is not None and found_for.uses_statistics:
            check_stored(stats_dir, model, outline.model, found_for.statistics_layers)
        check_room(out, stored_bytes(outline.model))

    loaded, tok = load_checked(model, look, dtype=dtype, device_map=device_map)
    how = settled(tok, prompts)
    sha, asked = weights_sha256(loaded), asked_as(tok, how, requests)
    trials = out.parent / f".{out.name}.search"
    found = None
    forget, kept = (requests, retain) if parts is None else (parts.forget, parts.retain)
    if parts is not None:
        found = search(
            name, loaded, tok, forget, kept, parts.validation, budget, settings,
            seed=seed, model_name=model, how=prompts, out=trials, progress=progress,
        )  # fmt: skip
        settings = found.best
    result = apply_baseline_to_model(
        name, loaded, tok, forget, kept, settings, seed=seed, model_name=model, how=prompts, progress=progress
    )
    base = {"name": model, "sha256": sha}
    receipt = make_receipt(Ran(name, settings), result, base, requests, kept, parts, found, seed) | asked
    if left_out:
        receipt["left_out"] = left_out
    receipt["result_sha256"] = save_edited(loaded, tok, out, receipt, overwrite=overwrite)
    shutil.rmtree(trials, ignore_errors=True)
    return receipt


def _editor_settings(
    name: str, model: str, settings: BaselineSettings, requests: Sequence[EditRequest]
) -> HyperParams | None:
    """Finds the settings of the editor with a refusal as its target; `None` for a baseline that trains.

    Raises:
        EditlibError: settings given for a baseline that trains, or unsuitable for the model, files or requests.
    """
    editor = BASELINES[name].editor
    if editor is None:
        if settings.hparams is not None:
            raise HparamsError(
                f"--hparams {settings.hparams}: {name} is not an editor and has no such settings; expected one such as "
                "MEMIT-refusal, or leave it out"
            )
        return None
    check_folder(Path(settings.stats_dir), "--stats-dir", write=False)
    hparams = find_settings(model, editor, settings.hparams)
    check_given(hparams, corpus=settings.corpus)
    check_wanted([replace(request, target_new=REFUSAL) for request in requests], hparams)
    return hparams


def make_receipt(
    ran: Ran,
    result: TrainResult,
    base: Mapping[str, str],
    requests: Sequence[EditRequest],
    kept: Sequence[EditRequest],
    parts: ValidationSplit | None,
    found: SearchResult | None,
    seed: int,
) -> dict[str, Any]:
    """Builds the receipt, in the format of an edit's, as JSON values."""
    entry = BASELINES[ran.name]
    read = [prompt.id for prompt in kept] if entry.needs_retain else []
    layers = result.notes.get("layers", {})
    return {
        **origin(base["name"], base["sha256"], requests, ran, None, seed),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "requests": result.notes.get("requests") or [{"id": request.id} for request in requests],
        "anchors": [*read, *(parts.validation.ids if parts else ())],
        "stats_sha256": "",
        "stats": {},
        "layers": {str(layer): norms for layer, norms in layers.items()},  # type: ignore[attr-defined]
        "timings": {"training": round(result.seconds, 2)},
        "baseline": {
            "name": ran.name,
            "kind": entry.kind,
            "meaning": entry.meaning,
            "source": entry.source,
            "steps": result.steps,
            "parameters": result.parameters,
            "tokens": result.tokens,
            "losses": {part: [round(loss, 4) for loss in losses] for part, losses in result.parts.items()},
            "told": result.notes.get("told"),
            "search": None if found is None else found.to_dict(),
            "validation": None if parts is None else parts.validation.to_dict(),
        },
    }
