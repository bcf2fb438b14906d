"""Run `editlib finetune`: teach a model question-answer pairs, to be forgotten afterwards."""

from __future__ import annotations

import json
import logging
import random
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlib import data
from editlib.errors import RequestError
from editlib.evaluation.metrics import probability, read_answers, rouge_l_recall
from editlib.evaluation.metrics.generated import require_rouge
from editlib.evaluation.perplexity import text_windows
from editlib.export import asked_as
from editlib.files import atomic_folder, check_folder, check_output, check_room, write_json
from editlib.models.anatomy import Anatomy, anatomy
from editlib.models.generation import end_tokens, greedy, perplexity
from editlib.models.loading import DeviceMap
from editlib.models.outline import Outline, load_checked
from editlib.models.packaged.terms import terms_of
from editlib.models.positions import check_prompts
from editlib.models.prompt_settings import PromptSettings
from editlib.models.prompts import PromptFormat, TokenRow, settled
from editlib.models.thinking import answer_texts
from editlib.models.weights import save_model, stored_bytes, weights_sha256
from editlib.requests.reading import read_requests, requests_hash, write_requests
from editlib.requests.request import EditRequest
from editlib.settings import check_fields, setting
from editlib.shelf import check_same_job
from editlib.stats.corpus import check_corpus, load_corpus
from editlib.training import Checkpoint, Part, TrainSettings, answer_nll, answered, text_rows, train
from editlib.training.weights import trainable
from editlib.version import library_version

log = logging.getLogger(__name__)

RECEIPT, LEARNED = "finetune.json", "learned.jsonl"
PAIRS_AN_AUTHOR = 20  # TOFU: the pairs of an author are adjacent
SELF_TOKENS, TEXT_TOKENS = 32, 96  # tokens of the model's own answer, and of a window of plain text
KEPT_TEXTS = 160
CHECKED, CHECKED_TOKENS = 40, 96


@dataclass(frozen=True)
class FinetuneSettings:
    """Holds the settings of fine-tuning on pairs.

    Args:
        epochs: passes over all pairs.
        learning_rate: largest learning rate.
        batch_size: pairs per step.
        warmup_steps: steps of the linear warm-up.
        rank: rank of a LoRA adapter that is merged at the end; `None`: all weights are trained.
        keep: share of the batch that is added to preserve the model's behaviour: its own answers to the bundled general
            prompts, and as much plain text from `text`.
        text: corpus of the plain text; `None`: the general prompts alone.

    Raises:
        HparamsError: a value out of range.
    """

    epochs: int = setting(4, min=1)
    learning_rate: float = setting(3e-4, above=0)
    batch_size: int = setting(16, min=1)
    warmup_steps: int = setting(5, min=0)
    rank: int | None = setting(None, min=1)
    keep: float = setting(0.0625, min=0, max=1)
    text: str | None = "wiki-sample"

    def __post_init__(self) -> None:
        check_fields(self)

    def training(self, pairs: int, seed: int) -> TrainSettings:
        """Returns the trainer's settings for `pairs` pairs."""
        size = min(self.batch_size, pairs)
        return TrainSettings(
            learning_rate=self.learning_rate,
            steps=-(-self.epochs * pairs // size),
            batch_size=size,
            warmup_steps=self.warmup_steps,
            decay="cosine",
            seed=seed,
        )


def read_pairs(
    files: Sequence[str | Path],
    authors: int | None = None,
    *,
    skip_bad: bool = False,
    left_out: dict[str, list[str]] | None = None,
) -> list[EditRequest]:
    """Reads the pairs of all files, without questions that are in an earlier file too.

    Args:
        authors: number of authors to take from the beginning of each file; each has 20 adjacent pairs, as in TOFU.
        skip_bad, left_out: see `read_requests`.

    Raises:
        RequestError: a file that cannot be read, or has fewer authors, or a pair without an answer.
    """
    by_question: dict[str, EditRequest] = {}
    ids: set[str] = set()
    for file in files:
        pairs = read_requests(file, skip_bad=skip_bad, left_out=left_out)
        if authors is not None:
            if not 1 <= authors <= len(pairs) // PAIRS_AN_AUTHOR:
                held = f"holds {len(pairs)} pairs, {PAIRS_AN_AUTHOR} an author"
                raise RequestError(f"{file}: {held}; --authors {authors} is too many; give fewer")
            pairs = pairs[: authors * PAIRS_AN_AUTHOR]
        for pair in pairs:
            if pair.answer is None:
                raise RequestError(f'{pair.source}: field "answer": missing; expected the text to learn; add it')
            if pair.question not in by_question:
                by_question[pair.question] = pair if pair.id not in ids else replace(pair, id=f"{file}:{pair.id}")
                ids.add(pair.id)
    return list(by_question.values())


def finetune(
    model: str,
    files: Sequence[str | Path],
    out: str | Path,
    *,
    authors: int | None = None,
    settings: FinetuneSettings | None = None,
    skip_bad: bool = False,
    prompts: PromptSettings | None = None,
    seed: int = 0,
    dtype: str | None = None,
    device_map: DeviceMap = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Teaches `model` the pairs of `files` and writes it to `out` as an ordinary folder, with `finetune.json` (the
    training, and how well the model knows the pairs) and `learned.jsonl` (the pairs, as requests).

    If `out` is already the result of the same job, nothing is done; an interrupted job resumes from its checkpoint
    beside `out`.

    Args:
        prompts: how the pairs are asked; recorded in `finetune.json`.

    Returns:
        The content of `finetune.json`, and `done_before`.

    Raises:
        EditlibError: any input that does not fit; nothing is written then.
    """
    out, settings = Path(out), settings or FinetuneSettings()
    _check(out, settings, overwrite)
    left_out: dict[str, list[str]] = {}
    pairs = read_pairs(files, authors, skip_bad=skip_bad, left_out=left_out)
    asked = _asked(pairs, settings, prompts, seed)
    kept = None if overwrite else _kept_of(out, asked)
    look = partial(_check_fit, pairs=pairs, prompts=prompts, out=None if kept else out)
    loaded, tok = load_checked(model, look, dtype=dtype, device_map=device_map)
    job, form = {"base": weights_sha256(loaded), **asked}, PromptFormat.of(tok, prompts)
    if kept is not None:
        _check_kept(out, kept, job)
        return {**kept, "done_before": True}
    check_output(out, overwrite=overwrite)
    anat, checkpoint = anatomy(loaded), Checkpoint(out.parent / f".{out.name}.training" / "checkpoint.safetensors", job)
    plan = settings.training(len(pairs), seed)
    before = measure(anat, form, pairs, settings.text, seed)
    training = _learn(anat, form, pairs, settings, plan, checkpoint, progress=progress)
    after = measure(anat, form, pairs, settings.text, seed)
    receipt = {
        "editlib": library_version(),
        "model": model,
        "files": [str(file) for file in files],
        "authors": authors,
        "job": job,
        **asked_as(tok, settled(tok, prompts), pairs),
        "pairs": len(pairs),
        **({"left_out": left_out} if left_out else {}),
        "training": training,
        "before": before,
        "after": after,
        "result_sha256": weights_sha256(loaded),
    }
    _write(out, loaded, tok, pairs, receipt, overwrite=overwrite)
    shutil.rmtree(checkpoint.path.parent, ignore_errors=True)
    return {**receipt, "done_before": False}


def _check(out: Path, settings: FinetuneSettings, overwrite: bool) -> None:
    """Raises for an unusable folder, a missing package or corpus: everything that can be checked before files are
    read."""
    check_folder(out)
    if overwrite:
        check_output(out, overwrite=True)
    require_rouge()
    if settings.text is not None:
        check_corpus(settings.text)


def _asked(
    pairs: Sequence[EditRequest], settings: FinetuneSettings, prompts: PromptSettings | None, seed: int
) -> dict[str, Any]:
    """Identifies a training of one base model: equal jobs have equal results."""
    job = {"pairs": requests_hash(pairs), "settings": asdict(settings), "seed": seed}
    return job if prompts is None else {**job, "prompts": prompts.to_dict()}


def _check_fit(
    outline: Outline, pairs: Sequence[EditRequest], prompts: PromptSettings | None, out: Path | None
) -> None:
    """Raises `EditlibError` for prompts that do not fit the model, and for too little free space at `out`."""
    form = PromptFormat.of(outline.tok, settled(outline.tok, prompts))
    for pair in pairs:  # each with its own answer, which may be long
        answer_tokens = len(form.answer_ids(pair.answer or "")) + 1
        check_prompts(outline.model, form, [(pair.id, pair.question)], answer_tokens=answer_tokens)
    if out is not None:
        check_room(out, stored_bytes(outline.model))


def _kept_of(out: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the receipt in `out` of a training that may be this one; `None` if nothing is there.

    Raises:
        OutputError: the folder holds something else.
    """
    if (kept := _receipt(out)) is None:
        check_output(out)
        return None
    known = kept.get("job")
    _check_kept(out, kept, {"base": known.get("base") if isinstance(known, dict) else None, **asked})
    return kept


def _check_kept(out: Path, kept: Mapping[str, Any], job: Mapping[str, Any]) -> None:
    """Raises `OutputError` if the receipt in `out` is that of another job."""
    known = kept.get("job")
    held, remedy = "another model's training", "choose another --out or add --overwrite"
    check_same_job(out, known if isinstance(known, dict) else {}, job, held=held, remedy=remedy)


def _learn(
    anat: Anatomy,
    form: PromptFormat,
    pairs: Sequence[EditRequest],
    settings: FinetuneSettings,
    plan: TrainSettings,
    checkpoint: Checkpoint,
    *,
    progress: bool,
) -> dict[str, Any]:
    """Trains the model in place and returns the receipt's entries about the training."""
    rows = [answered(form.tok, pair.question, pair.answer or "", form=form) for pair in pairs]
    parts = [Part("pairs", [(row,) for row in rows], answer_nll)]
    parts += _kept(anat, form, pairs, settings, plan.seed) if settings.keep else []
    shown = "learning" if progress else None
    with trainable(anat, rank=settings.rank, seed=plan.seed) as parameters:
        result = train(anat, parts, parameters, plan, checkpoint=checkpoint, progress=shown)
    return {
        **plan.to_dict(),
        "parameters": result.parameters,
        "tokens": result.tokens,
        "seconds": round(result.seconds, 1),
        "loss_first": result.losses[0],
        "loss_last": result.losses[-1],
        "losses": {name: [round(loss, 4) for loss in losses] for name, losses in result.parts.items()},
    }


def measure(
    anat: Anatomy, form: PromptFormat, pairs: Sequence[EditRequest], text: str | None, seed: int
) -> dict[str, float | int | None]:
    """Measures how well a model knows a sample of `pairs`: the probability of the answers (teacher-forced) and ROUGE-L
    recall of the generated ones; and perplexity on held-out text if the training used the other part of that text."""
    tok = form.tok
    sampled = random.Random(seed).sample(list(pairs), min(CHECKED, len(pairs)))
    read = read_answers(anat, form, [pair.question for pair in sampled], [pair.answer or "" for pair in sampled])
    said = greedy(anat, [form.encode(pair.question) for pair in sampled], max_new_tokens=CHECKED_TOKENS)
    texts = answer_texts(form, said)
    windows = text_windows(tok, load_corpus("wiki-sample:heldout").documents) if text == "wiki-sample" else []
    return {
        "probability": probability([answer.mean for answer in read], on="retain").agg_value,
        "rouge_l_recall": rouge_l_recall(texts, [pair.answer or "" for pair in sampled], on="retain").agg_value,
        "asked": len(sampled),
        "perplexity": perplexity(anat, windows) if windows else None,
    }


def _kept(
    anat: Anatomy, form: PromptFormat, pairs: Sequence[EditRequest], settings: FinetuneSettings, seed: int
) -> list[Part]:
    """Builds the part of the loss that preserves behaviour: the model's own answers to general prompts, and plain
    text."""
    tok = form.tok
    rows = [form.encode(prompt.question) for prompt in data.without_overlap(data.general("anchor"), pairs)]
    said = greedy(anat, rows, max_new_tokens=SELF_TOKENS)
    end = form.end_ids(end_tokens(anat))
    answered_rows = [
        row.followed_by((*ids, *(end if len(ids) < SELF_TOKENS else ()))) for row, ids in zip(rows, said, strict=True)
    ]
    parts = [_share("own answers", answered_rows, settings)]
    if settings.text is not None:
        texts = list(text_rows(tok, load_corpus(settings.text).documents, TEXT_TOKENS))
        random.Random(seed).shuffle(texts)
        parts.append(_share("text", texts[:KEPT_TEXTS], settings))
    return parts


def _share(name: str, rows: Sequence[TokenRow], settings: FinetuneSettings) -> Part:
    return Part(name, [(row,) for row in rows if row.extra], answer_nll, weight=settings.keep, share=settings.keep)


def _receipt(out: Path) -> dict[str, Any] | None:
    try:
        value = json.loads((out / RECEIPT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _write(
    out: Path,
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    pairs: Sequence[EditRequest],
    receipt: Mapping[str, Any],
    *,
    overwrite: bool,
) -> None:
    with atomic_folder(out, overwrite=overwrite) as folder:
        save_model(model, tok, folder)
        write_json(folder / RECEIPT, receipt)
        write_requests(folder / LEARNED, pairs)
        terms = terms_of(model)
        terms.copy_to(folder)
        summary = (
            f"`{receipt['model']}` after learning {len(pairs)} question-answer pairs (`{LEARNED}`) with editlib "
            f"{receipt['editlib']}, to be made to forget some of them again. `{RECEIPT}` holds settings and measures."
        )
        (folder / "README.md").write_text(
            f"---\nbase_model: {json.dumps(receipt['model'])}\n{terms.header}tags:\n- editlib\n---\n\n"
            f"# {Path(str(receipt['model'])).name}, fine-tuned\n\n{textwrap.fill(summary, 118)}\n{terms.sentence}",
            encoding="utf-8",
        )
