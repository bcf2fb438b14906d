"""Convert a GGUF file to an ordinary Hugging Face folder."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path


def convert_gguf(gguf: Path, into: Path) -> None:
    """Writes the model, dequantised to fp32, and its tokenizer into a folder, deterministically.

    Prints nothing and draws no random number. Raises whatever gguf, safetensors and transformers raise.
    """
    # Imported here, since transformers takes seconds to import and a finished folder does not need it.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

    with _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config = loaded.config
        for noise in ("quantization_config", "_model_name_or_path"):  # they describe the GGUF file, not this model
            config.__dict__.pop(noise, None)
        # transformers counts a model from GGUF as quantised and refuses to save it. Its weights are assigned to a model
        # on the meta device instead: no random weights are drawn, and no second copy of the weights is made.
        build: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config
        with torch.device("meta"):
            fresh = build(config, dtype=torch.float32)
        fresh.load_state_dict(loaded.state_dict(), assign=True)
        fresh.generation_config = loaded.generation_config
        fresh.save_pretrained(into)
        for noise in ("is_local", "local_files_only"):  # they record how the file was opened
            tokenizer.init_kwargs.pop(noise, None)
        tokenizer.model_max_length = config.max_position_embeddings
        tokenizer.save_pretrained(into)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silences log lines, warnings and bars; the GGUF reader's bar has no switch, hence the redirection."""
    from transformers.utils import logging as chatter

    verbosity = chatter.get_verbosity()
    chatter.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        chatter.set_verbosity(verbosity)
