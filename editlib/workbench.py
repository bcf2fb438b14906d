"""From files to an unlearned model: the jobs behind the commands `stats`, `token` and `unlearn`."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlib import bundled
from editlib.algorithms.edit import EditResult, Timer
from editlib.algorithms.unierase import apply_unierase_to_model, check_fit
from editlib.algorithms.unlearning_token import TokenHyperParams, UnlearningToken, learn_token
from editlib.corpus import load_corpus
from editlib.errors import StatsError, TokenError
from editlib.export import library_version, make_receipt, save_edited
from editlib.hparams import UniEraseHyperParams
from editlib.layer_stats import layer_stats
from editlib.models.anatomy import Anatomy, anatomy
from editlib.models.files import check_output, weights_sha256
from editlib.models.precision import fast_dtype, reduced
from editlib.request import EditRequest
from editlib.self_stats import self_stats
from editlib.stats_store import LayerStats, StatsHeader, find_layers, save_stats, spelling

log = logging.getLogger(__name__)


@dataclass
class Workbench:
    """A loaded model with what is computed once for it, kept in `stats_dir/<model>/`.

    `sha256` is the hash of the weights as loaded, before any token or edit.
    """

    model: PreTrainedModel
    tok: PreTrainedTokenizerBase
    stats_dir: Path
    sha256: str
    name: str
    progress: bool = True

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tok: PreTrainedTokenizerBase,
        stats_dir: str | Path = "stats",
        *,
        name: str | None = None,
        progress: bool = True,
    ) -> Workbench:
        """`name` is what the model is called in receipts and in `stats_dir`; default: what it was loaded from."""
        return cls(model, tok, Path(stats_dir), weights_sha256(model), name or model.name_or_path, progress)

    @property
    def anat(self) -> Anatomy:
        return anatomy(self.model)

    @property
    def token_path(self) -> Path:
        return self.stats_dir / spelling(self.name) / "unlearning_token.safetensors"

    def make_stats(
        self,
        layers: Sequence[int],
        *,
        corpus: str,
        tokens: int,
        seed: int = 0,
        max_length: int = 512,
        skip_first: int = 1,
    ) -> dict[int, LayerStats]:
        """One pass over `corpus` for all `layers`; writes and returns the statistics. An interrupted pass goes on."""
        anat = self.anat
        anat.check_layers(list(layers))
        header = StatsHeader(
            model=self.name,
            module="",
            d_ff=anat.d_ff,
            tokens=tokens,
            documents=0,
            corpus=corpus,
            corpus_sha256="",
            max_length=max_length,
            skip_first=skip_first,
            seed=seed,
            model_sha256=self.sha256,
            editlib=library_version(),
        )
        folder = self.stats_dir / spelling(self.name)
        folder.mkdir(parents=True, exist_ok=True)
        if corpus == "self":
            prompts = bundled.questions("train") + [prompt.question for prompt in bundled.general("anchor")]
            made = self_stats(
                anat,
                self.tok,
                layers,
                prompts,
                tokens=tokens,
                header=header,
                seed=seed,
                checkpoint=folder / ".self.partial.npz",
                progress=self.progress,
            )
        else:
            text = load_corpus(corpus)
            header = StatsHeader(**{**vars(header), "corpus": text.name, "corpus_sha256": text.sha256})
            with reduced(self.model, fast_dtype(self.model)):
                made = layer_stats(
                    anat,
                    self.tok,
                    layers,
                    text.documents,
                    tokens=tokens,
                    header=header,
                    checkpoint=folder / f".{text.name}.partial.npz",
                    max_length=max_length,
                    skip_first=skip_first,
                    progress=self.progress,
                )
        for layer in made.values():
            save_stats(self.stats_dir, layer)
        return made

    def find_or_make_stats(
        self, layers: Sequence[int], *, corpus: str, tokens: int, seed: int = 0
    ) -> dict[int, LayerStats]:
        """The stored statistics of `layers`; made, and said so, when there are none at all for one of them.

        Raises:
            StatsError: stored ones that belong to other weights or another shape. They are never replaced silently.
        """
        try:
            return find_layers(self.stats_dir, self.name, self.anat, layers, model_sha256=self.sha256)
        except StatsError as error:
            if "no layer statistics" not in str(error):
                raise
        log.info("no statistics for %s in %s: making them from %s", self.name, self.stats_dir, corpus)
        return self.make_stats(layers, corpus=corpus, tokens=tokens, seed=seed)

    def make_token(
        self,
        *,
        refusals: str | Path | None = None,
        hparams: TokenHyperParams | None = None,
        path: Path | None = None,
    ) -> UnlearningToken:
        """Learns the unlearning token over the bundled questions and keeps it at `path`."""
        hp = hparams or TokenHyperParams()
        asked = bundled.questions("train")
        random.Random(hp.seed).shuffle(asked)
        token = learn_token(
            self.anat,
            self.tok,
            asked,
            bundled.refusals(refusals),
            ordinary=[prompt.question for prompt in bundled.general("anchor")][: hp.guard_prompts // 3],
            hparams=hp,
            model_sha256=self.sha256,
            progress=self.progress,
        )
        token.save(path or self.token_path)
        return token

    def find_or_make_token(self, path: Path | None = None, *, seed: int = 0) -> UnlearningToken:
        """The token at `path`, or the one kept for this model, which is learned first when there is none.

        Raises:
            TokenError: a token that was learned for other weights.
        """
        place = path or self.token_path
        if path is None and not place.exists():
            log.info("no unlearning token for %s in %s: learning one", self.name, self.stats_dir)
            return self.make_token(hparams=TokenHyperParams(seed=seed))
        token = UnlearningToken.load(place)
        if token.header.model_sha256 and token.header.model_sha256 != self.sha256:
            raise TokenError(
                f"{place}: was learned for other weights ({token.header.model}, hash {token.header.model_sha256[:12]}; "
                f"this model {self.sha256[:12]}); learn one for it with `editlib token`"
            )
        return token


def unlearn(
    bench: Workbench,
    requests: Sequence[EditRequest],
    hparams: UniEraseHyperParams,
    out: str | Path,
    *,
    retain: Sequence[EditRequest] | None = None,
    token: Path | None = None,
    corpus: str = "wiki-sample",
    stats_tokens: int = 20_000,
    known_answers: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> tuple[EditResult, dict[str, Any]]:
    """Unlearns `requests` and writes the edited model with its receipt to `out`; returns the edit and the receipt.

    Raises:
        EditlibError: any input that does not fit; nothing is written then.
    """
    check_output(Path(out), overwrite=overwrite)
    check_fit(bench.anat, hparams)
    if hparams.model_name and hparams.model_name != spelling(bench.name):
        log.warning(
            "these settings were found for %s, not for %s; layers, gate and thresholds seldom carry over: "
            "give your own with --hparams",
            hparams.model_name,
            spelling(bench.name),
        )
    timer = Timer()
    with timer("statistics"):
        stats = bench.find_or_make_stats(hparams.layers, corpus=corpus, tokens=stats_tokens, seed=seed)
    with timer("token"):
        learned = bench.find_or_make_token(token, seed=seed)
    result = apply_unierase_to_model(
        bench.model,
        bench.tok,
        requests,
        hparams,
        token=learned,
        retain=bundled.retain_prompts(requests) if retain is None else retain,
        stats=stats,
        known_answers=known_answers,
        seed=seed,
        progress=bench.progress,
    )
    result.timings = {**timer.seconds, **result.timings}
    receipt = make_receipt(
        result,
        base=bench.name,
        base_sha256=bench.sha256,
        requests=requests,
        hparams=hparams,
        stats=stats,
        token=learned,
        seed=seed,
    )
    receipt["result_sha256"] = save_edited(bench.model, bench.tok, Path(out), receipt, overwrite=overwrite)
    return result, receipt
