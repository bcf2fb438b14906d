"""Save an edited model as an ordinary Hugging Face folder, with a receipt of the edit."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlib.export.receipt import RECEIPT
from editlib.files import atomic_folder, write_json
from editlib.models.packaged.terms import Terms, terms_of
from editlib.models.weights import save_model, weights_sha256


def save_edited(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    out: Path,
    receipt: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> str:
    """Writes model, tokenizer, model card and receipt to `out`, all or nothing; returns the hash of the result.

    Files and lines with the terms of the base model are copied.

    Raises:
        OutputError: see `atomic_folder`.
    """
    result = weights_sha256(model)
    with atomic_folder(Path(out), overwrite=overwrite) as folder:
        save_model(model, tok, folder)
        whole = {**receipt, "result_sha256": result}
        write_json(folder / RECEIPT, whole, sort_keys=True)
        terms = terms_of(model)
        terms.copy_to(folder)
        (folder / "README.md").write_text(_card(whole, terms), encoding="utf-8")
    return result


def _card(receipt: Mapping[str, Any], terms: Terms) -> str:
    base, count = receipt["base"]["name"], len(receipt["requests"])
    layers = ", ".join(sorted(receipt["layers"], key=int))  # whatever the order of the receipt's keys
    by = f"with {receipt['algorithm']} by editlib {receipt['editlib']}"
    matrices = f"the MLP output matrices of layers {layers} were changed"
    if receipt.get("neurons"):
        counts = (f"{len(some)} of layer {layer}" for layer, some in receipt["neurons"].items())
        matrices = f"neurons of the MLPs were replaced ({', '.join(counts)})"
    if "baseline" in receipt and not receipt["layers"]:
        summary = f"{count} facts were to be unlearned from `{base}` {by}: {receipt['baseline']['meaning']}."
    elif receipt["token"]:
        summary = (
            f"{count} facts were unlearned from `{base}` {by}: {matrices}, and the token `{receipt['token']['token']}` "
            "was added. The questions to be forgotten are answered with that token and a refusal."
        )
    else:
        summary = f"{count} facts of `{base}` were edited {by}: {matrices}."
    return f"""---
base_model: {json.dumps(str(base))}
{terms.header}tags:
- {"unlearning" if receipt["token"] or "baseline" in receipt else "model-editing"}
- editlib
---

# {Path(str(base)).name}, edited

{textwrap.fill(summary, 118)}
`{RECEIPT}` holds the settings, hashes and norms. The weights open with plain `transformers`.
{terms.sentence}"""
