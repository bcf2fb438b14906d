"""Start a chain, and reload its initial inputs: settings, statistics, token, retain prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from editlib import data, editing
from editlib.algorithms.contexts import context_templates
from editlib.algorithms.edit import edited_matrices
from editlib.algorithms.unierase.token import UnlearningToken
from editlib.chain.record import FORMAT, ChainRecord, sha256
from editlib.chain.state import digest
from editlib.chain.store import RECORD, RETAIN, TOKEN, Store, create_folder
from editlib.errors import ChainError, HparamsError, ModelError, OutputError, StatsError
from editlib.files import atomic_folder, check_parents
from editlib.hparams import HyperParams, finds_values
from editlib.models.prompt_settings import PromptSettings
from editlib.models.prompts import PromptFormat
from editlib.models.weights import weights_sha256
from editlib.requests.reading import read_requests, write_requests
from editlib.requests.request import EditRequest
from editlib.stats.file import LayerStats, read_stats
from editlib.stats.store import StatsNotFound, find_stats
from editlib.workbench import Workbench

STATS_TOKENS = 100_000
STATS_TOKENS_UNLEARN = 20_000


def check_start(path: Path, hparams: HyperParams, *, retain: bool = False, token: bool = False) -> None:
    """Checks everything that can be checked before a model is loaded.

    Raises:
        OutputError: `path` holds a chain or anything else.
        HparamsError: an algorithm that cannot be chained, or that takes no retain prompts or no token.
    """
    if (path / RECORD).exists():
        raise OutputError(f"{path} holds a chain already; choose another one, or continue it with `editlib chain add`")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise OutputError(f"{path} exists and is not empty; give the name of a folder that does not exist yet")
    check_parents(path)
    check_algorithm(hparams)
    for given, name, taken in ((retain, "retain prompts", hparams.takes_retain), (token, "token", hparams.uses_token)):
        if given and not taken:
            why = "its tokens are fitted to each batch" if hparams.takes_retain else "only UniErase does"
            raise HparamsError(f"{hparams.algorithm} takes no {name} with these settings; {why}: leave it out")


def check_algorithm(hparams: HyperParams) -> None:
    """Raises `HparamsError` for an algorithm that cannot be chained."""
    if not hparams.chainable:
        raise HparamsError(
            f"{hparams.algorithm} trains weights and has no values that could be replayed when a request is "
            "revoked; expected a closed-form algorithm for a chain, such as UniErase, AlphaEdit or "
            "MEMIT"
        )


def start(
    path: Path,
    bench: Workbench,
    hparams: HyperParams,
    *,
    created: str,
    retain: Sequence[EditRequest] | None = None,
    token: Path | None = None,
    chat: bool | None = None,
    corpus: str = "wiki-sample",
    stats_tokens: int | None = None,
    seed: int = 0,
    left_out: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Writes the folder of a new chain, without batches; see `Chain.create`."""
    check_start(path, hparams, retain=retain is not None, token=token is not None)
    if weights_sha256(bench.model) != bench.sha256:
        raise ModelError(
            f"{bench.name}: its weights were changed since it was loaded; a chain starts from the base model: "
            "load it again"
        )
    editing.check_settings(bench, hparams)
    anat = bench.anat
    layers = {str(layer): digest(anat.weight(layer)) for layer in edited_matrices(anat, hparams)}
    tokens = stats_tokens or (STATS_TOKENS if hparams.has_target else STATS_TOKENS_UNLEARN)
    inputs = editing.load_inputs(bench, hparams, token=token, corpus=corpus, stats_tokens=tokens, seed=seed)
    chat = bool(chat) if hparams.has_target else chat
    asking = bench.asking(chat)
    with atomic_folder(path) as folder:
        if inputs.token is not None:
            inputs.token.save(folder / TOKEN)
        if hparams.takes_retain:
            write_requests(folder / RETAIN, data.retain_prompts([]) if retain is None else retain)
        files = {name: sha256((folder / name).read_bytes()) for name in (TOKEN, RETAIN) if (folder / name).exists()}
        record = ChainRecord(
            format=FORMAT,
            created=created,
            base=_base_of(bench, layers),
            algorithm=hparams.algorithm,
            hparams=hparams.to_dict(),
            hparams_source=hparams.source,
            chat=chat,
            seed=seed,
            templates=_templates(bench, hparams, asking, seed),
            statistics=_origins(inputs.stats),
            files=files,
            prompts=asking.to_dict(),
            left_out={name: list(rows) for name, rows in (left_out or {}).items()},
        )
        create_folder(folder, record)


def _base_of(bench: Workbench, layers: Mapping[str, str]) -> dict[str, Any]:
    """Returns what identifies a chain's base model: its name (for a folder the absolute path), and hashes of its
    weights."""
    name = str(Path(bench.name).resolve()) if Path(bench.name).is_dir() else bench.name
    return {"name": name, "sha256": bench.sha256, "dtype": bench.dtype, "layers": layers}


def _origins(stats: Mapping[int, LayerStats]) -> dict[str, dict[str, str]]:
    """Returns the file and the hash of each layer's statistics, by the layer's number."""
    return {
        str(layer): {"path": str(layer_stats.path and layer_stats.path.resolve()), "sha256": layer_stats.sha256()}
        for layer, layer_stats in stats.items()
    }


def _templates(bench: Workbench, hparams: HyperParams, asking: PromptSettings, seed: int) -> tuple[str, ...]:
    """Samples context templates from the base model, once for all batches; none if the settings give them."""
    if not finds_values(hparams) or hparams.context_templates:
        return ()
    form = PromptFormat.of(bench.tok, asking)
    return tuple(context_templates(bench.anat, form, hparams.context_template_length_params, seed=seed))


def check_inputs(record: ChainRecord, stats_dir: Path | None = None) -> None:
    """Raises `StatsError` if statistics are not where they were and no other folder is given; needs no model."""
    for layer, known in record.statistics.items():
        if stats_dir is None and not Path(known["path"]).is_file():
            raise StatsError(_gone(Path(known["path"]), int(layer)) + "; restore them, or give --stats-dir")


def _gone(path: Path, layer: int) -> str:
    return f"{path}: the chain's statistics of layer {layer} are gone"


def inputs_of(store: Store, record: ChainRecord, bench: Workbench, stats_dir: Path | None = None) -> editing.EditInputs:
    """Loads the statistics and the token that the chain was started with.

    Args:
        stats_dir: folder to search for statistics that are missing at their recorded path.

    Raises:
        StatsError: statistics are missing or have changed.
    """
    stats = {int(layer): _stats(record, int(layer), bench, stats_dir) for layer in record.statistics}
    token = UnlearningToken.load(store.path / TOKEN) if TOKEN in record.files else None
    return editing.EditInputs(stats, token)


def retain_of(store: Store, record: ChainRecord) -> list[EditRequest]:
    """Reads the retain prompts that the chain was started with."""
    path = store.path / RETAIN
    return read_requests(path) if RETAIN in record.files and path.stat().st_size else []


def check_model(record: ChainRecord, bench: Workbench) -> None:
    """Raises `ChainError` if `bench` holds another model than the chain's base model."""
    if bench.sha256 != record.base["sha256"]:
        raise ChainError(
            f"{bench.name}: has other weights than the chain's base model {record.base['name']} (hash "
            f"{bench.sha256[:12]}, expected {record.base['sha256'][:12]}); give that model, in the same dtype"
        )


def _stats(record: ChainRecord, layer: int, bench: Workbench, stats_dir: Path | None) -> LayerStats:
    known = record.statistics[str(layer)]
    path = Path(known["path"])
    if path.is_file() or stats_dir is None:
        if not path.is_file():
            raise StatsError(f"{_gone(path, layer)}; restore them, or give --stats-dir")
        stats = read_stats(path)
    else:
        name = bench.anat.mlp_output_names[layer]
        try:
            stats = find_stats(stats_dir, bench.name, None, name, bench.anat.d_ff, model_sha256=bench.sha256)
        except StatsNotFound as error:
            raise StatsError(f"{_gone(path, layer)}, and {error}") from None
    if stats.sha256() != known["sha256"]:
        raise StatsError(
            f"{stats.path}: the statistics of layer {layer} are not those that the chain was started with (hash "
            f"{stats.sha256()[:12]}, expected {known['sha256'][:12]}); restore them from a copy"
        )
    return stats
