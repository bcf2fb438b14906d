"""Find the file of a model folder that is at fault when transformers cannot load the folder."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import PreTrainedConfig

from editlib.errors import first_line, quote

GENERATION = "generation_config.json"
FolderPart = Literal["config", "tokenizer", "weights", "adapter"]

_OBJECTS: dict[FolderPart, tuple[str, ...]] = {
    "config": ("config.json",),
    "tokenizer": (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
    ),
    "weights": (GENERATION, "model.safetensors.index.json", "pytorch_model.bin.index.json"),
    "adapter": ("adapter_config.json", "tokenizer.json", "tokenizer_config.json"),
}
"""Files of each part that hold a JSON object, if they are there."""
_TEXTS = ("chat_template.jinja", "merges.txt", "vocab.txt")
_MISMATCH = re.compile(
    r"^(\S.*?)\s*\|\s*MISMATCH\b(?:.*?ckpt: *\S*?\(?(\[[\d, ]*\]).*?model: *\S*?\(?(\[[\d, ]*\]))?", re.M
)
_COLOURS = re.compile(r"\x1b\[[\d;]*m")
MOST_LAYERS = 10_000  # no model has more; building them would take hours


def reason_of(error: BaseException) -> str:
    """Returns the message of a library's exception on one line."""
    first = first_line(error)
    text = " ".join(str(error).split()) if first.endswith(":") or first.startswith("Validation error") else first
    named = isinstance(error, KeyError | AttributeError | TypeError | IndexError | ZeroDivisionError | RecursionError)
    return (f"{type(error).__name__}: {text}" if named and text != type(error).__name__ else text)[:160]


def fault_of(folder: Path, part: FolderPart) -> tuple[str, str] | None:
    """Finds the first file of `part` that is damaged: its name, and what is wrong; `None` if all look whole."""
    for name in _OBJECTS[part]:
        path = folder / name
        if wrong := object_fault(path):
            return name, wrong
    if part == "tokenizer":
        return _tokenizer_fault(folder)
    return _weights_fault(folder) if part != "config" else None


def config_fault(config: PreTrainedConfig) -> str | None:
    """Names the first impossible number of a configuration, before anything is built from it."""
    text = config.get_text_config(decoder=True)
    for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"):
        value = getattr(text, name, 1)
        most = MOST_LAYERS if name == "num_hidden_layers" else sys.maxsize
        # Some families give one number of heads per layer; numbers alone are judged here.
        if isinstance(value, bool) or (isinstance(value, int | float) and not 1 <= value <= most):
            expected = f"1 to {most}" if most == MOST_LAYERS else "at least 1"
            return f"{text.attribute_map.get(name, name)} is {value}, expected {expected}"
    return None


class LoadWarnings:
    """Collects the warnings of transformers while it loads a model."""

    def __init__(self) -> None:
        self.reports: list[str] = []

    @property
    def mismatch(self) -> str | None:
        """The first tensor whose shape is not that of the configuration; `None` if all fit."""
        for report in self.reports:
            if match := _MISMATCH.search(_COLOURS.sub("", report)):
                name, stored, wanted = match.groups()
                shapes = f" has the shape {stored}, by config.json {wanted}" if stored else " has another shape"
                return f"{name}{shapes}"
        return None


@contextlib.contextmanager
def load_warnings() -> Iterator[LoadWarnings]:
    """Keeps transformers' tables about weights off stderr: the caller reports what matters in one line."""
    warned, logger = LoadWarnings(), logging.getLogger("transformers")

    class Reports(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "LOAD REPORT" in (text := record.getMessage()):
                warned.reports.append(text)
                return
            if record.levelno < wanted:
                return
            for handler in handlers:
                handler.handle(record)

    handlers, catcher, propagate = list(logger.handlers), Reports(), logger.propagate
    level, wanted = logger.level, logger.getEffectiveLevel()
    logger.handlers[:], logger.propagate = [catcher], False
    logger.setLevel(min(wanted, logging.WARNING))  # the user may have silenced them (TRANSFORMERS_VERBOSITY)
    try:
        yield warned
    finally:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


def missing_weights(missing: Collection[str]) -> str:
    """Says which tensors the weights lack."""
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return f"the weights lack {min(missing)}{more}"


def object_fault(path: Path) -> str | None:
    """Says what is wrong with a file that holds a JSON object; `None` for a whole one, or where there is none."""
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        return f"cannot be read: {reason_of(error)}"
    return None if isinstance(value, dict) else f"{quote(json.dumps(value))} is not an object"


def _tokenizer_fault(folder: Path) -> tuple[str, str] | None:
    """Finds the tokenizer's file that is damaged, and what is wrong; `None` if the tokenizer can be built."""
    for name in _TEXTS:
        path = folder / name
        try:
            if path.exists():
                path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            return name, f"cannot be read: {reason_of(error)}"
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_bytes())
    if not isinstance(content.get("added_tokens"), list):
        return path.name, f'"added_tokens" is {quote(content.get("added_tokens"))}, expected a list'
    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises no other class
        return path.name, reason_of(error)
    return None


def _weights_fault(folder: Path) -> tuple[str, str] | None:
    """Finds the file of the weights that is damaged, and what is wrong; an index is judged before its shards."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).exists() and (fault := _index_fault(folder, index)):
            return fault
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]):
        if wrong := _tensors_fault(path):
            return path.name, wrong
    return None


def _index_fault(folder: Path, index: str) -> tuple[str, str] | None:
    """Checks an index of sharded weights, whose JSON can be read: its form, and that every shard is there."""
    content: dict[str, Any] = json.loads((folder / index).read_bytes())
    shards = content.get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        return index, f'"weight_map" is {quote(shards)}, expected an object from tensors to files'
    if not isinstance(content.get("metadata", {}), dict):
        return index, f'"metadata" is {quote(content["metadata"])}, expected an object'
    missing = sorted(name for name in set(shards.values()) if not (folder / name).is_file())
    return (missing[0], f"this file is missing; {index} names it") if missing else None


def _tensors_fault(path: Path) -> str | None:
    """Says what is wrong with a file of tensors; reads only its header, or the shapes."""
    try:
        if path.suffix == ".bin":
            tensors = torch.load(path, map_location="meta", weights_only=True)
            return None if isinstance(tensors, dict) else f"a {type(tensors).__name__}, expected tensors by their names"
        with safe_open(path, framework="pt"):
            return None
    except Exception as error:  # of many classes, by file format and version
        pointer = path.is_file() and path.stat().st_size < 1000 and path.read_bytes().startswith(b"version https://git")
        return "a pointer of Git LFS without the weights" if pointer else reason_of(error)
