"""Read TOFU's sets of questions from a folder or the Hub, with subjects, without questions that a model never
learned."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from editlib.errors import RequestError, quote
from editlib.models.hub import quiet_hub, reading
from editlib.requests.parsing import report_bad_rows
from editlib.requests.reading import read_questions, read_requests, tell_subjects
from editlib.requests.request import EditRequest
from editlib.requests.rows import FileRow, file_rows, is_saved
from editlib.requests.subjects import Subject

log = logging.getLogger(__name__)

HUB = "locuslab/TOFU"
FORGET = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
"""Sets to forget, nested, each with the set of all other questions."""
SIDE = ("real_authors", "world_facts")
SETS = ("forget", "forget_paraphrased", "retain", *SIDE)
"""The probe sets, by the names of their results."""

Pair = tuple[str, str]
"""Question and answer: some authors have questions with the same wording."""


@dataclass(frozen=True)
class Asked:
    """Holds a question of a probe set with its `answer`, a paraphrase of the answer if there is one, and wrong
    answers."""

    id: str
    question: str
    answer: str
    paraphrase: str | None = None
    wrong: tuple[str, ...] = ()


@dataclass(frozen=True)
class TofuSets:
    """Holds the questions to forget, those to keep, and the probes that measure both.

    `probes` maps names of `SETS` to their questions; a set that is missing is named in `missing`. `unlearned` counts
    the questions of `forget` and `retain` that were left out because the model never learned them. `subjects` says how
    the subject of each request to forget was found; `None`: not at all. `left_out` lists the unusable rows by file.
    """

    name: str
    forget: tuple[EditRequest, ...]
    retain: tuple[EditRequest, ...]
    probes: Mapping[str, tuple[Asked, ...]]
    missing: tuple[str, ...] = ()
    unlearned: Mapping[str, int] | None = None
    subjects: tuple[Subject | None, ...] = ()
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def forgetting(self, requests: Sequence[EditRequest], kept: Sequence[EditRequest] = ()) -> TofuSets:
        """Returns the same sets where only `requests` are to be forgotten, and `kept`, others of them, are to be
        kept."""
        ids, more = {request.id for request in requests}, {request.id for request in kept}
        asked = self.probes["forget"]
        probes = {
            name: tuple(probe for probe in probes if probe.id in ids) if name.startswith("forget") else probes
            for name, probes in self.probes.items()
        }
        probes["retain"] = (*(question for question in asked if question.id in more), *self.probes.get("retain", ()))
        chosen = [i for i, request in enumerate(self.forget) if request.id in ids]
        return replace(
            self,
            forget=tuple(self.forget[i] for i in chosen),
            retain=(*(request for request in self.forget if request.id in more), *self.retain),
            probes=probes,
            subjects=tuple(self.subjects[i] for i in chosen) if self.subjects else (),
        )

    def only(self, *names: str) -> TofuSets:
        """Returns the same sets with only the probe sets `names`."""
        return replace(self, probes={name: probes for name, probes in self.probes.items() if name in names})

    def limited(self, limit: int | None, seed: int = 0) -> TofuSets:
        """Draws at most `limit` questions of each probe set; with the same `seed`, a smaller draw is part of a larger
        one."""
        if limit is None:
            return self
        return replace(self, probes={name: draw(probes, limit, seed) for name, probes in self.probes.items()})


def draw(probes: Sequence[Asked], limit: int, seed: int) -> tuple[Asked, ...]:
    """Draws `limit` of `probes`, in their order. Each has its own random number, so the draw changes little if a set
    grows."""

    def lot(question: Asked) -> bytes:
        return hashlib.sha256(f"{seed}:{question.id}".encode()).digest()

    drawn = {probe.id for probe in sorted(probes, key=lot)[:limit]}
    return tuple(probe for probe in probes if probe.id in drawn)


def read_tofu(
    source: str | Path | None = None,
    forget: str = "forget01",
    *,
    learned: Collection[str] | None = None,
    subjects: Mapping[str, str] | None = None,
    skip_bad: bool = False,
) -> TofuSets:
    """Reads TOFU's sets and finds the subjects of the questions to forget and to keep (`editlib.requests.subjects`).

    Args:
        source: a folder with TOFU's files (`forget01.jsonl`, `forget01_perturbed.jsonl`, `retain99.jsonl` or
            `forget10.jsonl` and `retain90.jsonl`, `retain_perturbed.jsonl`, `real_authors_perturbed.jsonl`,
            `world_facts_perturbed.jsonl`; also `.json`, `.parquet` or a folder by `save_to_disk`), or the name of a
            data set on the Hub; default: TOFU's own.
        forget: `forget01`, `forget05` or `forget10`.
        learned: the questions that the model was trained on; all others are neither forgotten nor kept. Default: all.
        subjects: the user's own subjects, by id or by question.
        skip_bad: leave out unusable rows, and log their numbers and faults.

    Raises:
        RequestError: an unknown set, no such folder, a set that cannot be read or reached, or nothing to forget.
    """
    if forget not in FORGET:
        raise RequestError(f"{forget!r} is not a forget set of TOFU; expected one of {', '.join(FORGET)}")
    place = _Place(HUB if source is None else source, skip_bad=skip_bad)
    given = dict(subjects or {})
    asked, subjects_of = _questions(place, forget, given)
    others = _rest(place, forget, {request.question for request in asked}, given)
    if given:
        raise RequestError(f"subjects: {next(iter(given))!r} is not a question of TOFU; fix the mapping")
    known = set(learned) if learned is not None else {request.question for request in (*asked, *others)}
    unlearned = {"forget": len(asked), "retain": len(others)}
    kept = [i for i, request in enumerate(asked) if request.question in known]
    asked, subjects_of = [asked[i] for i in kept], [subjects_of[i] for i in kept]
    others = [request for request in others if request.question in known]
    if not asked:
        raise RequestError(
            f"none of {unlearned['forget']} questions of {forget} is among the {len(known)} that the model learned; "
            "expected some; train it on them, or give another --forget"
        )
    unlearned = {"forget": unlearned["forget"] - len(asked), "retain": unlearned["retain"] - len(others)}
    rows = {name: place.rows(f"{name}_perturbed") for name in (forget, "retain", *SIDE)}
    probes = {
        "forget": _probes(asked, rows[forget], "question"),
        "forget_paraphrased": _probes(asked, rows[forget], "paraphrased_question"),
        "retain": _probes(others, rows["retain"], "question", only=True) or _probes(others, {}, "question"),
        **{name: tuple(_asked(f"{name}:{i}", row) for i, row in enumerate(rows[name].values(), 1)) for name in SIDE},
    }
    missing = tuple(name for name in SETS if not probes[name])
    for name in missing:
        log.warning("%s: no questions of the set %s; it is not measured", place.source, name)
    return TofuSets(
        name=forget,
        forget=tuple(asked),
        retain=tuple(others),
        probes={name: questions for name, questions in probes.items() if questions},
        missing=missing,
        unlearned=unlearned,
        subjects=tuple(subjects_of),
        left_out=place.left_out,
    )


def questions_in(path: str | Path, *, skip_bad: bool = False) -> frozenset[str]:
    """Reads the questions that a model learned: from a request file, such as `learned.jsonl` by `editlib finetune`, or
    one in TOFU's form.

    Raises:
        RequestError: it cannot be read, or has no questions.
    """
    return frozenset(request.question for request in read_requests(path, skip_bad=skip_bad))


def _questions(place: _Place, name: str, own: dict[str, str]) -> tuple[list[EditRequest], list[Subject | None]]:
    """Makes the requests of a set with their subjects; removes the used ones from the user's `own`."""
    path, skip_bad = place.need(name), place.skip_bad
    given = {}
    if own:
        read = read_questions(path, skip_bad=skip_bad)
        names = {name for request, _ in read for name in (request.id, request.question)}
        given = {name: own.pop(name) for name in names & own.keys()}
    pairs = read_questions(path, subjects=given, skip_bad=skip_bad, left_out=place.left_out)
    if missing := [request for request, _ in pairs if request.answer is None]:
        complaint = 'field "answer": missing; expected the true answer; add it'
        unusable = [(FileRow(_place_of(request, path), None), complaint) for request in missing]
        pairs = [(request, subject) for request, subject in pairs if request.answer is not None]
        place.report(path, unusable, len(pairs) + len(unusable), any_left=bool(pairs))
    tell_subjects(path.name, pairs)
    return [request for request, _ in pairs], [subject for _, subject in pairs]


def _rest(place: _Place, forget: str, asked: Collection[str], own: dict[str, str]) -> list[EditRequest]:
    """Makes all other questions: from the matching retain set, or from the rest of the two largest sets."""
    if place.find(FORGET[forget]):
        return _questions(place, FORGET[forget], own)[0]
    whole = [request for name in ("forget10", "retain90") for request in _questions(place, name, own)[0]]
    return [request for request in whole if request.question not in asked]


def _probes(
    requests: Sequence[EditRequest], rows: Mapping[Pair, Mapping[str, Any]], field: str, *, only: bool = False
) -> tuple[Asked, ...]:
    """Lists the probes of `requests`: `field` of their perturbed rows, or the question itself.

    Args:
        only: leave out those without a perturbed row.
    """
    probes = []
    for request in requests:
        pair = (request.question, str(request.answer))
        row = rows.get(pair, {} if only else {"question": request.question, "answer": request.answer})
        if row.get(field):
            probes.append(replace(_asked(request.id, row), question=str(row[field])))
    return tuple(probes)


def _asked(name: str, row: Mapping[str, Any]) -> Asked:
    wrong = row.get("perturbed_answer") or ()
    wrong = (wrong,) if isinstance(wrong, str) else tuple(wrong)
    return Asked(name, row["question"], row["answer"], row.get("paraphrased_answer"), wrong)


def _place_of(request: EditRequest, path: Path) -> str:
    """Returns where in its file a request is, as `FileRow.place`."""
    place = request.source.removeprefix(f"{path}:").strip()
    return place if place.startswith("row") else f"line {place}"


class _Place:
    """Locates the files: in a folder, or a data set on the Hub. `left_out` collects unusable rows."""

    def __init__(self, source: str | Path, *, skip_bad: bool = False) -> None:
        self.source, self.skip_bad = str(source), skip_bad
        self.left_out: dict[str, list[str]] = {}
        self._folder = Path(source) if Path(source).is_dir() else None
        on_hub = len(self.source.split("/")) == 2 and self.source[0] not in "./~" and not isinstance(source, Path)
        if self._folder is None and not on_hub:
            raise RequestError(
                f"{source}: no such folder; expected one with TOFU's files, or the name of a data set on the Hub, "
                f"such as {HUB}"
            )

    def need(self, name: str) -> Path:
        """Finds the file of a set.

        Raises:
            RequestError: there is no such file, or the Hub cannot be reached.
        """
        if path := self.find(name):
            return path
        raise RequestError(f"{self.source}: holds no {name}.jsonl; expected TOFU's files (see docs/how-to/tofu.md)")

    def find(self, name: str) -> Path | None:
        """Finds the file of a set, `None` if there is none; raises as `need` if the Hub cannot be reached."""
        if self._folder is not None:
            paths = [self._folder / f"{name}{end}" for end in (".jsonl", ".json", ".parquet", "")]
            return next((path for path in paths if path.is_file() or is_saved(path)), None)
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            with quiet_hub():
                return Path(hf_hub_download(self.source, f"{name}.json", repo_type="dataset", **reading()))
        except LocalEntryNotFoundError:
            reason = "no connection, and not in its cache"
        except EntryNotFoundError:
            return None
        except (OSError, ValueError) as error:  # no such data set, no access
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:120]
        wanted = "give a folder with TOFU's files instead (--tofu), or a network"
        raise RequestError(f"{self.source} cannot be read from the Hub ({reason}); {wanted}")

    def rows(self, name: str) -> dict[Pair, dict[str, Any]]:
        """Reads the rows of a set by question and answer; empty if the set is missing.

        Raises:
            RequestError: a row that cannot be used.
        """
        path = self.find(name)
        if path is None:
            return {}
        by_pair: dict[Pair, dict[str, Any]] = {}
        unusable: list[tuple[FileRow, str]] = []
        rows = list(file_rows(path))
        for row in rows:
            if complaint := row.complaint or _perturbed_complaint(row.value):
                unusable.append((row, complaint))
            else:
                by_pair[row.value["question"], row.value["answer"]] = row.value
        self.report(path, unusable, len(rows), any_left=bool(by_pair))
        return by_pair

    def report(self, path: Path, bad: Sequence[tuple[FileRow, str]], rows: int, *, any_left: bool) -> None:
        """Notes the bad rows of a file that are left out.

        Raises:
            RequestError: they must not be left out, or no other row remains.
        """
        report_bad_rows(path, bad, rows, any_left=any_left, skip_bad=self.skip_bad)
        if bad:
            self.left_out.setdefault(path.name, []).extend(row.place for row, _ in bad)


def _perturbed_complaint(row: Any) -> str | None:
    """Says what is wrong with a row of a `_perturbed` set; `None` if it is valid."""
    if not isinstance(row, dict):
        return f"{quote(row)}; expected a JSON object; write {{...}}"
    for name in ("question", "answer"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            given = "missing" if row.get(name) is None else quote(row[name])
            return f'field "{name}": {given}; expected a text; write it'
    for name in ("paraphrased_question", "paraphrased_answer"):
        if row.get(name) is not None and not isinstance(row[name], str):
            return f'field "{name}": {quote(row[name])}; expected a text; write it or remove the field'
    wrong = row.get("perturbed_answer") or ()
    if not isinstance(wrong, str) and not _texts(wrong):
        return f'field "perturbed_answer": {quote(wrong)}; expected a list of texts; fix it'
    return None


def _texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(text, str) and text.strip() for text in value)
