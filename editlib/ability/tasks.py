"""Build lm-eval's task objects from `--tasks`: its own tasks by name, task files (.yaml), files of questions."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from editlib.ability.local_file import SUFFIXES, LocalFile
from editlib.errors import EditlibError, FetchError, MetricError, RequestError, closest, first_line
from editlib.version import install_line

TASK_FILES = (".yaml", ".yml")
RANDOM_SEED, OTHER_SEED = 0, 1234  # lm_eval.defaults


def require_lm_eval() -> ModuleType:
    """Imports the package lm-eval.

    Raises:
        MetricError: it is not installed.
    """
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise MetricError(
            f"tasks are run by lm-eval, which cannot be imported ({error}): {install_line('ability')}, or "
            "leave the tasks out and measure perplexity alone"
        ) from None
    return lm_eval


@dataclass(frozen=True)
class AbilityTask:
    """Holds one task, ready to be run.

    `total`: number of its documents. `identity`: everything that a saved result must agree with.
    """

    name: str
    object: Any
    total: int
    identity: Mapping[str, Any]


def load_tasks(given: Sequence[str], folder: Path) -> tuple[AbilityTask, ...]:
    """Finds the tasks and their documents; files made from local ones go to `folder`, which must exist as long as the
    tasks.

    Args:
        given: names that lm-eval knows (`arc_easy`; a group or a tag means all of its tasks), task files of lm-eval
            (.yaml) or files of questions (.jsonl, see `local_file`).

    Raises:
        MetricError: lm-eval is missing, does not know a name, or cannot make a task from a file; or two tasks share a
            name.
        RequestError: a file that cannot be used; names file, line and field.
        FetchError: a task's documents can be neither found nor downloaded.
    """
    lm_eval = require_lm_eval()
    files = {spec: LocalFile.read(Path(spec)) for spec in given if Path(spec).suffix in SUFFIXES}
    names = [spec for spec in given if spec not in files and Path(spec).suffix not in TASK_FILES]
    # The index of lm-eval's own tasks takes seconds to build.
    manager = lm_eval.tasks.TaskManager(include_defaults=bool(names))
    for name in names:
        _check_name(name, manager)
    tasks: list[AbilityTask] = []
    for spec in dict.fromkeys(given):
        local = files.get(spec)
        name = re.sub(r"[^\w.-]+", "-", Path(spec).stem)
        loaded = _load(manager, spec, spec if local is None else local.config(name, folder))
        tasks += [
            _task(one, loaded[one], None if local is None else {"sha256": local.sha256}) for one in sorted(loaded)
        ]
    twice = {task.name for task in tasks if sum(other.name == task.name for other in tasks) > 1}
    if twice:
        raise MetricError(f"two tasks are named {sorted(twice)[0]!r}; give one of them, or rename a file")
    return tuple(tasks)


def _task(name: str, loaded: Any, identity: Mapping[str, Any] | None) -> AbilityTask:
    if loaded.get_config("num_fewshot") is None:  # this and the seed: as lm-eval's command line does
        loaded.set_config("num_fewshot", 0)
    loaded.set_fewshot_seed(OTHER_SEED)
    total = len(loaded.eval_docs)
    if identity is None:
        digest = hashlib.sha256(str(loaded.VERSION).encode())
        for part in (loaded.dump_config(), *loaded.eval_docs):  # lm-eval dumps functions as their source
            digest.update(json.dumps(part, sort_keys=True, default=str).encode())
        identity = {"sha256": digest.hexdigest()}
    return AbilityTask(name, loaded, total, {"task": name, "total": total, "lm_eval": version("lm-eval"), **identity})


def _check_name(name: str, manager: Any) -> None:
    if name in manager.task_index:
        return
    if Path(name).suffix or len(Path(name).parts) > 1:
        raise RequestError(
            f"task {name!r}: expected a name that lm-eval knows, a file of questions ({', '.join(SUFFIXES)}) or a task "
            f"file of lm-eval ({', '.join(TASK_FILES)})"
        )
    near = closest(name, manager.all_tasks, n=3, cutoff=0.5)
    raise MetricError(
        f"task {name!r}: lm-eval has no task of this name"
        + (f" (near: {', '.join(near)})" if near else "")
        + "; `lm-eval ls tasks` lists them"
    )


def _load(manager: Any, spec: str, wanted: Any) -> dict[str, Any]:
    """Loads the tasks that `spec` names, by name."""
    if isinstance(wanted, str) and Path(wanted).suffix in TASK_FILES and not Path(wanted).is_file():
        raise RequestError(f"task {spec}: no such file; give a task file of lm-eval")
    try:
        with seeds(), _quiet_bars() if isinstance(wanted, dict) else contextlib.nullcontext():
            loaded = manager.load([wanted])["tasks"]
    except EditlibError:
        raise
    except OSError as error:  # the class of errors that datasets and the Hub's client raise without a network
        raise FetchError(
            f"task {spec}: its documents cannot be loaded ({first_line(error)[:160]}); connect once, or give a file of "
            "questions"
        ) from None
    except Exception as error:  # lm-eval and task files raise any kind
        raise MetricError(f"task {spec}: lm-eval cannot make a task from it ({first_line(error)[:160]})") from None
    if not loaded:
        raise MetricError(f"task {spec}: lm-eval finds no task in it; give the name or file of a task")
    return loaded


@contextlib.contextmanager
def seeds() -> Iterator[None]:
    """Sets the seeds of lm-eval's command line, for tasks that draw; the caller's generators are restored
    afterwards."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(RANDOM_SEED)
        np.random.seed(OTHER_SEED)
        torch.manual_seed(OTHER_SEED)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextlib.contextmanager
def _quiet_bars() -> Iterator[None]:
    """Hides the progress bars of local files, which are read too fast to need one; a download's bar stays."""
    import datasets

    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            datasets.enable_progress_bars()
