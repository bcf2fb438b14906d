"""Hold a loaded model with its layer statistics and unlearning token, which are made once and stored in a folder."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlib import data
from editlib.algorithms.causal_trace import causal_trace
from editlib.algorithms.unierase.token import UnlearningToken
from editlib.algorithms.unierase.token_learning import TokenHyperParams, learn_token
from editlib.algorithms.unierase.token_questions import token_questions
from editlib.distributed import ALONE, Process
from editlib.errors import TokenError
from editlib.files import check_file, check_folder
from editlib.models.anatomy import Anatomy, anatomy
from editlib.models.loaded import LoadedModel
from editlib.models.loading import DeviceMap
from editlib.models.outline import Outline, load_checked
from editlib.models.positions import positions_of
from editlib.models.precision import cast_params, fast_dtype
from editlib.models.prompt_settings import PromptSettings, differing
from editlib.models.prompts import THINKING, PromptFormat, settled
from editlib.models.thinking import warn_of_block
from editlib.models.weights import weights_sha256
from editlib.stats.corpus import Corpus, load_corpus
from editlib.stats.file import LayerStats, StatsHeader
from editlib.stats.layer_stats import layer_stats
from editlib.stats.moments import drop_checkpoint
from editlib.stats.self_stats import self_stats
from editlib.stats.store import StatsNotFound, find_layers, model_slug, save_stats
from editlib.version import library_version

log = logging.getLogger(__name__)


@dataclass
class Workbench:
    """Holds a loaded model with everything computed once for it, which is stored in `stats_dir/<model>/`.

    `sha256` is the hash of the weights as loaded, before any token or edit.
    """

    model: PreTrainedModel
    tok: PreTrainedTokenizerBase
    stats_dir: Path
    sha256: str
    name: str
    progress: bool = True
    shard: Process = ALONE  # this process's share of `make_stats`, if several work together
    dtype: str | None = None  # the argument of `load`; none: as stored
    prompts: PromptSettings = field(default_factory=PromptSettings)  # how the model is asked
    unthinking: bool = False  # `enable_thinking=false` in `prompts` is the default, and does not require a chat
    today: bool = False  # the date in `prompts` is only that of this run; a recorded one takes precedence

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tok: PreTrainedTokenizerBase,
        stats_dir: str | Path = "stats",
        *,
        name: str | None = None,
        progress: bool = True,
        shard: Process = ALONE,
        prompts: PromptSettings | None = None,
    ) -> Workbench:
        """Makes a workbench from a loaded model; `name` is its name in receipts and `stats_dir`, by default the path or
        id from which it was loaded."""
        sha256 = weights_sha256(model)
        name = name or model.name_or_path or type(model).__name__
        how = settled(tok, prompts)
        today = how.date is not None and (prompts is None or prompts.date is None)
        shows = progress and shard.first
        chosen = how.arguments != ({} if prompts is None else prompts.arguments)
        return cls(model, tok, Path(stats_dir), sha256, name, shows, shard, prompts=how, unthinking=chosen, today=today)

    @classmethod
    def load(
        cls,
        name: str,
        stats_dir: str | Path = "stats",
        *,
        dtype: str | None = None,
        device_map: DeviceMap = None,
        first: Callable[[Workbench], None] | None = None,
        **options: Any,
    ) -> Workbench:
        """Loads a packaged model, a local folder or a Hugging Face id, as `models.loading.load` does.

        Args:
            first: called before any weight is read, with a draft whose model is on the meta device and which has no
                hash; raises for anything unsuitable.

        Raises:
            OutputError: `stats_dir` is not a folder.
            RequestError: prompts that do not fit the tokenizer.
            ModelError, FetchError: see there.
        """
        check_folder(Path(stats_dir), "--stats-dir", write=False)

        def look(outline: Outline) -> None:
            draft = cls.draft(outline, stats_dir, name, dtype=dtype, prompts=options.get("prompts"))
            warn_of_block(PromptFormat.of(draft.tok, draft.prompts))
            if first is not None:
                first(draft)

        model, tok = load_checked(name, look, dtype=dtype, device_map=device_map)
        return replace(cls.of(model, tok, stats_dir, name=name, **options), dtype=dtype)

    @classmethod
    def draft(
        cls,
        outline: Outline,
        stats_dir: str | Path,
        name: str,
        *,
        dtype: str | None = None,
        prompts: PromptSettings | None = None,
    ) -> Workbench:
        """Makes a workbench from a model without its weights, for checks only; it has no hash.

        Raises:
            RequestError: prompts that do not fit the tokenizer.
        """
        how = settled(outline.tok, prompts)
        chosen = how.arguments != ({} if prompts is None else prompts.arguments)
        return cls(outline.model, outline.tok, Path(stats_dir), "", name, prompts=how, unthinking=chosen, dtype=dtype)

    @cached_property
    def anat(self) -> Anatomy:
        """The anatomy of `model`, found once, with the results of trial passes."""
        return anatomy(self.model)

    @cached_property
    def read_at(self) -> int | None:
        """The last layer at which the subject's state decides the answer, traced once; `None` if the model knows too
        few of the bundled facts."""
        trace = causal_trace(self.anat, self.tok, data.facts())
        return None if trace is None else trace.read_at

    @property
    def loaded(self) -> LoadedModel:
        """The model with its tokenizer and prompt settings, without the rest of the workbench."""
        return LoadedModel(self.anat, self.tok, self.prompts)

    @property
    def usual_token_path(self) -> Path:
        """The path of the first token for a model of this name, with any weights."""
        return self.stats_dir / model_slug(self.name) / "unlearning_token.safetensors"

    @property
    def token_path(self) -> Path:
        """The path of the token for these weights: a distinct name if other weights of the model (another dtype) were
        first."""
        place = self.usual_token_path
        with contextlib.suppress(TokenError):  # missing or damaged: the path is free for this model
            first = UnlearningToken.load(place).header.model_sha256
            if first not in ("", self.sha256):
                return place.with_name(f"unlearning_token@{self.sha256[:12]}.safetensors")
        return place

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
        """Makes the statistics of all `layers` in one pass over `corpus`, writes and returns them. An interrupted pass
        is resumed.

        With a `shard` of several processes all must call it; the first one writes.
        """
        anat = self.anat
        with self.shard.together():
            anat.check_layers(list(layers))
            text = None if corpus == "self" else load_corpus(corpus)
            folder = self.stats_dir / model_slug(self.name)
            check_folder(folder, "--stats-dir")
        header = StatsHeader(
            model=self.name,
            module="",
            d_ff=anat.d_ff,
            tokens=tokens,
            documents=0,
            corpus="self" if text is None else text.name,
            corpus_sha256="" if text is None else text.sha256,
            max_length=self._window(max_length),
            skip_first=skip_first,
            seed=seed,
            model_sha256=self.sha256,
            editlib=library_version(),
        )
        checkpoint = folder / f".{header.corpus}.partial.npz"
        if text is None:
            made = self._stats_of_own_text(layers, header, checkpoint)
        else:
            made = self._stats_of(text, layers, header, checkpoint)
        with self.shard.together():
            for layer in made.values() if self.shard.first else ():
                save_stats(self.stats_dir, layer)
        drop_checkpoint(checkpoint, self.shard)
        return made

    def _stats_of_own_text(self, layers: Sequence[int], header: StatsHeader, checkpoint: Path) -> dict[int, LayerStats]:
        """Makes statistics from text that the model generates in answer to the bundled prompts."""
        prompts = data.questions("train") + [prompt.question for prompt in data.general("anchor")]
        return self_stats(
            self.anat,
            self.tok,
            layers,
            prompts,
            tokens=header.tokens,
            header=header,
            seed=header.seed,
            checkpoint=checkpoint,
            progress=self.progress,
            shard=self.shard,
            how=self.given_prompts,
        )

    def _stats_of(
        self, text: Corpus, layers: Sequence[int], header: StatsHeader, checkpoint: Path
    ) -> dict[int, LayerStats]:
        """Makes statistics from a corpus, in the processor's faster dtype."""
        with cast_params(self.model, fast_dtype(self.model)):
            return layer_stats(
                self.anat,
                self.tok,
                layers,
                text.documents,
                tokens=header.tokens,
                header=header,
                max_length=header.max_length,
                skip_first=header.skip_first,
                checkpoint=checkpoint,
                progress=self.progress,
                shard=self.shard,
            )

    def _window(self, max_length: int) -> int:
        """Returns a window no longer than the model's positions."""
        reach = positions_of(self.model) or max_length
        if reach < max_length:
            log.info("%s reads %d tokens at once: windows are that long, not %d", self.name, reach, max_length)
        return min(reach, max_length)

    def find_or_make_stats(
        self,
        layers: Sequence[int],
        *,
        corpus: str,
        tokens: int,
        seed: int = 0,
        dataset: str | None = None,
        samples: int | None = None,
    ) -> dict[int, LayerStats]:
        """Finds the stored statistics of `layers`; makes missing ones, with a log message.

        Args:
            corpus, tokens, seed: text, number of tokens and seed for missing ones.
            dataset, samples: preferred stored ones, see `find_stats`.

        Raises:
            StatsError: stored ones that are damaged, belong to other weights or have another shape. They are never
                silently replaced.
        """
        stored: dict[int, LayerStats] = {}
        missing = []
        for layer in layers:
            try:
                stored |= find_layers(
                    self.stats_dir,
                    self.name,
                    self.anat,
                    [layer],
                    model_sha256=self.sha256,
                    dataset=dataset,
                    samples=samples,
                )
            except StatsNotFound:
                missing.append(layer)
        if stored:
            folders = sorted({str(stats.path.parent) for stats in stored.values() if stats.path is not None})
            log.info("statistics of layers %s: %s", ", ".join(map(str, stored)), ", ".join(folders))
        if missing:
            log.info(
                "no statistics of layers %s of %s in %s: making them from %s",
                ", ".join(map(str, missing)),
                self.name,
                self.stats_dir,
                corpus,
            )
            stored |= self.make_stats(missing, corpus=corpus, tokens=tokens, seed=seed)
        return {layer: stored[layer] for layer in layers}

    def make_token(
        self,
        *,
        refusals: str | Path | None = None,
        hparams: TokenHyperParams | None = None,
        path: Path | None = None,
    ) -> UnlearningToken:
        """Learns the unlearning token over the bundled questions and saves it at `path`."""
        check_file(path or self.token_path, overwrite=True)
        hp, texts = hparams or TokenHyperParams(), data.refusals(refusals)
        asked, ordinary = token_questions(self.model, self.tok, texts, hp, self.prompts, name=self.name)
        token = learn_token(
            self.anat,
            self.tok,
            asked,
            texts,
            ordinary=ordinary,
            hparams=hp,
            prompts=self.prompts,
            model_sha256=self.sha256,
            progress=self.progress,
        )
        token.save(path or self.token_path)
        return token

    def find_or_make_token(self, path: Path | None = None, *, seed: int = 0) -> UnlearningToken:
        """Finds the token at `path`, or the one stored for this model; learns it first if there is none.

        Raises:
            TokenError: see `find_token`.
        """
        token = self.find_token(path)
        if token is None:
            log.info("no unlearning token for %s in %s: learning one", self.name, self.stats_dir)
            return self.make_token(hparams=TokenHyperParams(seed=seed))
        return token

    def find_token(self, path: Path | None = None) -> UnlearningToken | None:
        """Finds the token at `path`, or the one stored for this model; `None` if there is none.

        Raises:
            TokenError: a file that is not a token, or one that was learned for other weights or another width.
        """
        place = path or self.token_path
        if path is None and not place.exists():
            return None
        token = UnlearningToken.load(place)
        if token.header.model_sha256 and token.header.model_sha256 != self.sha256:
            raise TokenError(
                f"{place}: was learned for other weights ({token.header.model}, hash {token.header.model_sha256[:12]}; "
                f"this model {self.sha256[:12]}): another --dtype, revision or edit; learn one for it with "
                "`editlib token`"
            )
        token.check_width(self.model)
        self.adopt(token.header.prompts)
        if token.header.prompts and token.header.prompts != self.prompts.to_dict():
            log.info("%s: %s", place, differing(token.header.prompts, self.prompts.to_dict(), "the token was learned"))
        return token

    def check_draft_token(self, path: Path | None = None) -> None:
        """Checks the token at `path`, or the one stored for this model, without reading weights of the model.

        Raises:
            TokenError: a file that is not a token, or one of another width.
            OutputError: there is no token, and none can be written.
        """
        if path is None and not self.usual_token_path.exists():
            check_file(self.usual_token_path)  # one will be learned
            return
        token = UnlearningToken.load(path or self.usual_token_path)
        if path is not None or not token.header.model_sha256:  # a first token of other weights is not this model's
            token.check_width(self.model)

    @property
    def given_prompts(self) -> PromptSettings:
        """The prompt settings by which results are stored: all except a date that is only today's."""
        return replace(self.prompts, date=None) if self.today else self.prompts

    def adopt(self, prompts: Mapping[str, Any]) -> None:
        """Adopts the date of recorded `prompts`, if the own one is only today's."""
        if self.today and prompts.get("date"):
            self.prompts = replace(self.prompts, date=prompts["date"])

    def asking(self, chat: bool | None = None) -> PromptSettings:
        """Returns the prompt settings of an edit: `prompts` if given, else plain text if `chat` is false."""
        if chat is None or self.prompts.tags is not None:
            return self.prompts
        given = self.prompts.arguments.keys() - ({THINKING} if self.unthinking else ())
        if not chat and (self.prompts.system is not None or given or self.prompts.chat):
            return self.prompts
        return replace(self.prompts, chat=chat) if chat else PromptSettings(chat=False)
