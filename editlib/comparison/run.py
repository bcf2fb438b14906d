"""Run every method on every set with every seed, once; processes share the work without communication."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from editlib.comparison.cells import EDIT, FORMAT, SEARCH, RunCell
from editlib.comparison.config import Config
from editlib.comparison.evaluator import Measurement, SetEvaluator
from editlib.comparison.meter import changed_weights, measure_resources
from editlib.comparison.method import Cost, Method, Prepared
from editlib.comparison.results import collect
from editlib.comparison.store import FAILED, ResultStore, try_lock
from editlib.distributed import ALONE, Process
from editlib.errors import ConfigError, EditlibError, OutputError, RequestError
from editlib.evaluation.forget_set import Base, Benchmark, Task
from editlib.files import check_folder, check_output, make_folder
from editlib.models.outline import Outline, outline_of
from editlib.models.positions import check_requests_fit
from editlib.models.prompts import PromptFormat, settled
from editlib.models.weights import weights_sha256
from editlib.shelf import JsonStore
from editlib.stats.store import model_slug
from editlib.version import library_version
from editlib.workbench import Workbench

log = logging.getLogger(__name__)

MARK = "comparison.json"


LOOK_AGAIN = 0.5  # seconds between two checks for cells that other processes work on

Load = Callable[[str], Workbench]


class _Busy(Exception):
    """Signals that another process is making the inputs of a cell; the cell is tried again later."""


def compare(
    config: Config,
    out: str | Path,
    *,
    shard: Process = ALONE,
    load: Load | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Runs the missing cells of a comparison, and returns its results (see `results.collect`).

    Each cell is a method with a seed on a set; it runs on a freshly loaded model. Its results are in `out/cells` under
    the hash of the set's contents, the model's weights, the method's settings and the seed, and every measurement
    beside it under the hash of its own settings. An interrupted run resumes; a changed config runs only its new cells.
    A cell that fails is recorded with its reason and tried again in the next run; the others continue.

    Several processes share the cells through locks in `out`, which must be a folder that all of them can access. They
    wait only for work that is done once per model; the first one returns when all cells are done.

    Args:
        load: loads a base model by its name; default: `Workbench.load`.

    Raises:
        EditlibError: an unsuitable config, model or folder. Failed cells raise nothing.
    """
    out = Path(out)
    if (out / MARK).is_file():
        check_folder(out)
    else:
        check_output(out)
    if load is None:
        check_all_models(config)
    return _Run(config, out, shard, load or _loader(config, shard), progress and shard.first).all()


def check_all_models(config: Config) -> None:
    """Raises `EditlibError`, before any model is loaded, for an unsuitable model folder or prompts of any set, or a
    method that cannot handle a set's model or requests."""
    outlines: dict[str, Outline] = {}
    for protocol in config.sets:
        for name in filter(None, (protocol.model, protocol.reference)):
            if name not in outlines:
                outlines[name] = outline_of(name, dtype=config.general.dtype)
            settled(outlines[name].tok, config.prompts)
        _check_draft(config, protocol, outlines[protocol.model])


def _check_draft(config: Config, protocol: Benchmark, outline: Outline) -> None:
    general, planned = config.general, protocol.planned
    draft = Workbench.draft(outline, general.stats_dir, protocol.model, dtype=general.dtype, prompts=config.prompts)
    if planned is not None:
        try:
            check_requests_fit(draft.model, PromptFormat.of(draft.tok, draft.prompts), planned.all)
        except RequestError as error:
            raise ConfigError(f"{protocol.where}: {error}") from None
    for method in config.methods:
        with _naming(method, protocol):
            method.check_draft(draft, planned)


@contextmanager
def _naming(method: Method, protocol: Benchmark) -> Iterator[None]:
    """Names the method and the set in errors raised inside the block."""
    try:
        yield
    except EditlibError as error:
        where = f"{method.where} ({method.label}), on the set {protocol.name}"
        raise ConfigError(f"{where}: {error}") from None


def _loader(config: Config, shard: Process) -> Load:
    general = config.general
    place = general.device_map or (None if shard.device is None else {"": str(shard.device)})

    def load(name: str) -> Workbench:
        return Workbench.load(name, general.stats_dir, dtype=general.dtype, device_map=place, prompts=config.prompts)

    return load


class _Run:
    """Carries out one call of `compare`."""

    def __init__(self, config: Config, out: Path, shard: Process, load: Load, progress: bool) -> None:
        self.config, self.shard, self.progress = config, shard, progress
        self._load = load
        self.store = ResultStore(out)
        self.name = shard.gather(uuid.uuid4().hex)[0]  # name of this run, shared by all of its processes
        self._evaluator: SetEvaluator | None = None

    def all(self) -> dict[str, Any]:
        cells, sets = [], {}
        for protocol in self.config.sets:  # all faults are reported before the first cell runs
            evaluator = self._enter(protocol)
            sets[protocol.name] = self._about(protocol, evaluator)
            cells += self._cells(protocol, evaluator)
        bar = tqdm(total=len(cells), desc="cells", disable=not self.progress, unit="cell")
        with bar:
            self._work(cells, bar)
        if not self.shard.first:
            return {}
        return collect(self.config, sets, cells, {cell.key: self._failure(cell) for cell in cells})

    # --- what is not done yet -----------------------------------------------------------------------------------

    def load(self, name: str) -> Workbench:
        bench = self._load(name)
        bench.progress = bench.progress and self.progress
        return bench

    def _enter(self, protocol: Benchmark) -> SetEvaluator:
        """Makes the evaluator of a set; one base model is in memory at a time."""
        if self._evaluator is not None and self._evaluator.name == protocol.name:
            return self._evaluator
        self._evaluator = None
        bench = self.load(protocol.model)
        what = {"protocol": protocol.protocol, **protocol.settings.to_dict(), "model": bench.sha256, **self._asked()}
        if protocol.planned is not None:  # before the base's answers are generated, which takes minutes
            self._check(protocol, bench, protocol.planned)
        self._begin()
        shelf = self.store.set(what)
        with try_lock(shelf, wait=True):
            made = protocol.make(Base(bench, shelf.path))
        form = PromptFormat.of(bench.tok, bench.prompts)
        check_requests_fit(bench.model, form, made.fewshot_pool)
        self._check(protocol, bench, made.task)
        self._evaluator = SetEvaluator(self.config, protocol.name, made, shelf, progress=bench.progress)
        return self._evaluator

    def _begin(self) -> None:
        """Marks the folder as a comparison's; nothing is written to it before the first model has been checked."""
        make_folder(self.store.root)
        if self.shard.first:
            JsonStore(self.store.root).put(MARK.removesuffix(".json"), {"format": FORMAT, "config": self.config.source})

    def _check(self, protocol: Benchmark, bench: Workbench, task: Task) -> None:
        """Raises `EditlibError` if prompts are too long, or a method cannot be run on this set."""
        form = PromptFormat.of(bench.tok, bench.prompts)
        check_requests_fit(bench.model, form, task.all)
        for method in self.config.methods:
            with _naming(method, protocol):
                method.fit(bench)
                method.check(bench, task)

    def _asked(self) -> dict[str, Any]:
        """Returns the config's prompts, which affect every cell; empty if there are none."""
        given = self.config.prompts
        return {} if given is None else {"prompts": given.to_dict()}

    def _about(self, protocol: Benchmark, evaluator: SetEvaluator) -> dict[str, Any]:
        """Returns the description of a set in the results."""
        return {
            "protocol": protocol.protocol,
            "model": protocol.model,
            "identity": evaluator.identity,
            "forget": len(evaluator.set.forget),
            "retain": len(evaluator.set.retain),
            "attacked": len(evaluator.attacked) if self.config.attacks else 0,
            "axes": list(protocol.axes),
            "kinds": dict(protocol.kinds),
            "to_forget": list(protocol.to_forget),
            **({"left_out": protocol.left_out} if protocol.left_out else {}),
        }

    def _cells(self, protocol: Benchmark, evaluator: SetEvaluator) -> list[RunCell]:
        seeds = self.config.general.seeds
        parts = tuple(part.key for part in evaluator.parts())
        cells = []
        for method in self.config.methods:
            for seed in seeds if method.seeded else seeds[:1]:
                identity = {
                    "format": FORMAT,
                    "editlib": library_version(),
                    "set": evaluator.identity,
                    "method": [method.stored_name, method.identity()],
                    "seed": seed if method.seeded else None,
                    "dtype": self.config.general.dtype,
                    **self._asked(),
                }
                cells.append(RunCell(protocol.name, method, seed, identity, self.store.cell(identity), parts))
        return cells

    # --- doing it ----------------------------------------------------------------------------------------------

    def _work(self, cells: Sequence[RunCell], bar: Any) -> None:
        start = len(cells) * self.shard.rank // self.shard.world
        pending = [*cells[start:], *cells[:start]]
        while pending:
            left, searching = [], False
            for cell in pending:
                if not self._settled(cell):
                    with try_lock(cell.shelf) as mine:
                        if not mine:
                            left.append(cell)
                            continue
                        if not self._settled(cell):
                            try:
                                self._run(cell)
                            except _Busy:
                                left.append(cell)
                                searching = True
                                continue
                bar.update()
            if len(left) == len(pending):
                if not (self.shard.first or searching):
                    return  # other processes work on the last ones
                time.sleep(LOOK_AGAIN)
            pending = left

    def _settled(self, cell: RunCell) -> bool:
        failed = cell.shelf.get(FAILED)
        return cell.complete or (failed is not None and failed.get("run") == self.name)

    def _failure(self, cell: RunCell) -> str | None:
        failed = cell.shelf.get(FAILED)
        return None if failed is None or cell.complete else str(failed.get("reason"))

    def _run(self, cell: RunCell) -> None:
        begun = time.perf_counter()
        cell.shelf.put("cell", cell.identity)
        try:
            self._measure(cell)
        except (OutputError, _Busy):
            raise  # a full disk stops every cell
        except Exception as error:
            reason = one_line(error)
            log.warning("%s failed: %s", cell.label, reason)
            log.debug("%s", cell.label, exc_info=True)
            cell.shelf.put(FAILED, {"run": self.name, "reason": reason})
            return
        cell.shelf.drop(FAILED)
        scores = cell.shelf.get("scores") or {}
        axes = [scores.get(axis, {}).get("value") for axis in ("forget", "retain")]
        shown = ["-" if value is None else f"{value:.2f}" for value in axes]
        log.info("%s: forget %s, retain %s, %.0f s", cell.label, *shown, time.perf_counter() - begun)

    def _measure(self, cell: RunCell) -> None:
        protocol = next(benchmark for benchmark in self.config.sets if benchmark.name == cell.set)
        evaluator = self._enter(protocol)
        task, method = evaluator.set.task, cell.method
        searched: dict[str, Any] = {"found": None, "seconds": 0.0}
        if method.searches:
            searched = self._search(cell, evaluator)
        bench = self.load(protocol.model)
        ready = self._prepare(method, bench, task, cell.seed)
        with measure_resources() as meter:
            cost = method.forget(bench, task, cell.seed, ready=ready.made, found=searched["found"])
        before: Mapping[str, float] = searched.get("prepared", {})
        prepared = {name: before.get(name, 0.0) + ready.seconds.get(name, 0.0) for name in {**before, **ready.seconds}}
        took = {**asdict(meter), "search_seconds": searched["seconds"], "prepared": prepared}
        self._keep_edit(cell, evaluator, bench, cost, took)
        failed = self._parts(cell, evaluator.parts(), bench)
        if failed:
            raise EditlibError("; ".join(f"{name}: {reason}" for name, reason in failed.items()))

    @staticmethod
    def _prepare(method: Method, bench: Workbench, task: Task, seed: int) -> Prepared:
        if not method.prepares:
            return Prepared()
        with try_lock(JsonStore(bench.stats_dir / model_slug(bench.name)), wait=True):
            return method.prepare(bench, task, seed)

    def _search(self, cell: RunCell, evaluator: SetEvaluator) -> dict[str, Any]:
        """Runs the method's search on this set once; its result is stored and used for all seeds.

        Raises:
            _Busy: another process is running it.
        """
        method, task, seed = cell.method, evaluator.set.task, self.config.general.seeds[0]
        shelf = self.store.search({**cell.identity, "seed": seed})
        with try_lock(shelf) as mine:
            kept = shelf.get(SEARCH)
            if kept is None and not mine:
                raise _Busy
            if kept is None:
                bench = self.load(evaluator.base.bench.name)
                ready = self._prepare(method, bench, task, seed)
                log.info("%s: searching for settings", cell.label)
                result = method.search(bench, task, seed, shelf.path / "trials", ready=ready.made)
                seconds = sum(trial["seconds"] for trial in result.get("trials", ()))
                kept = {"found": result, "seconds": seconds, "prepared": dict(ready.seconds)}
                shelf.put(SEARCH, kept)
        cell.shelf.put(SEARCH, kept)
        return kept

    def _keep_edit(
        self, cell: RunCell, evaluator: SetEvaluator, bench: Workbench, cost: Cost, took: Mapping[str, Any]
    ) -> None:
        """Records the result of the method; measurements of other weights are dropped."""
        sha, known = weights_sha256(bench.model), cell.shelf.get(EDIT)
        if known is not None and known["sha256"] == sha:
            return
        if known is not None:
            log.warning("%s gave other weights than before: all of it is measured again", cell.label)
            cell.shelf.empty(SEARCH, "cell")
        changed = changed_weights(evaluator.base.bench.model, bench.model)
        size = changed.bytes if cost.update_bytes is None else cost.update_bytes
        measured = {**took, "touched": asdict(changed), "update_bytes": size}
        cell.shelf.put(EDIT, {"sha256": sha, "cost": measured, "notes": dict(cost.notes)})

    def _parts(self, cell: RunCell, parts: Iterable[Measurement], bench: Workbench) -> dict[str, str]:
        """Measures all missing parts; returns the reasons of failed ones."""
        failed = {}
        for part in parts:
            if cell.shelf.get(part.key) is not None:
                continue
            begun = time.perf_counter()
            try:
                value = part.measure(bench)
            except OutputError:
                raise
            except Exception as error:
                failed[part.name] = one_line(error)
                log.debug("%s, %s", cell.label, part.name, exc_info=True)
                continue
            cell.shelf.put(part.key, {**value, "took": round(time.perf_counter() - begun, 3)})
        return failed


def one_line(error: BaseException) -> str:
    """Returns the error in words, short enough for a table."""
    text = " ".join(str(error).split()) or "no message"
    text = text if isinstance(error, EditlibError) else f"{type(error).__name__}: {text}"
    return text if len(text) <= 400 else text[:399] + "…"
