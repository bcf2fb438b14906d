"""Load a PEFT adapter given in place of a model, by merging it into its base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from editlib.errors import ModelError, quote
from editlib.models.anatomy import Anatomy, anatomy
from editlib.models.lora import peft_missing
from editlib.models.placement import input_embedding
from editlib.version import install_line

CONFIG = "adapter_config.json"
TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")  # any of them: the adapter has a tokenizer


def is_adapter(name: str | Path) -> bool:
    """Returns whether a folder holds a PEFT adapter."""
    return (Path(name) / CONFIG).is_file()


def base_of(folder: str | Path) -> str:
    """Returns the model that an adapter was trained on, as its config names it.

    A relative path counts from the working directory, or from the adapter's folder.

    Raises:
        ModelError: the config cannot be read or names no model, or `peft` is not installed.
    """
    path = Path(folder) / CONFIG
    if peft_missing():
        raise ModelError(f"{folder} is an adapter, which needs peft: {install_line('lora')}")
    try:
        config: Any = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{path} cannot be read ({type(error).__name__}); give a whole folder by save_pretrained"
        ) from None
    name = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(name, str) or not name:
        wanted = 'expected "base_model_name_or_path", the model that it was trained on; add it'
        raise ModelError(f"{path}: {quote(name)}; {wanted}")
    beside = Path(folder) / name
    return str(beside) if not Path(name).exists() and beside.is_dir() else name


def merge(
    model: PreTrainedModel, tok: PreTrainedTokenizerBase, folder: str | Path
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Adds the adapter in `folder` to the weights of its base; the adapter's own tokenizer is used if it has one.

    Raises:
        ModelError: an adapter that does not change weights (prompts, prefixes), or that changes the embedding or the
            head of a model with tied embeddings.
    """
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    whole = (LoraLayer, ModulesToSaveWrapper)  # peft itself ties single rows (`trainable_token_indices`)

    if any((Path(folder) / name).is_file() for name in TOKENIZER):
        tok = AutoTokenizer.from_pretrained(folder)
    if len(tok) > input_embedding(model).weight.shape[0]:  # rows for the adapter's own tokens, which it overwrites
        model.resize_token_embeddings(len(tok), mean_resizing=False)
    shared = _shared(anatomy(model))
    adapted = PeftModel.from_pretrained(model, str(folder))
    if not hasattr(adapted.base_model, "merge_and_unload"):
        kind = str(getattr(adapted.active_peft_config, "peft_type", "")).rpartition(".")[2]
        raise ModelError(f"{folder}: an adapter of the type {kind} changes no weights; expected LoRA or a relative")
    # PEFT would merge the update into both ends of a tied matrix.
    changed = [name for name in shared if isinstance(adapted.get_base_model().get_submodule(name), whole)]
    if changed:
        given = f"{folder}: changes {', '.join(changed)} alone, but this model ties its embeddings"
        raise ModelError(f"{given}; save the base with tie_word_embeddings=False and merge the adapter into that")
    return adapted.merge_and_unload(safe_merge=True), tok


def _shared(anat: Anatomy) -> list[str]:
    """Returns the names of embedding and head if they are tied: merging one would change the other."""
    names = {id(module): name for name, module in anat.model.named_modules()}
    return [names[id(module)] for module in (anat.embedding, anat.head)] if anat.tied else []
