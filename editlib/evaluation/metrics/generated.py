"""Measure text that the model generated: ROUGE-L, token entropy, cosine similarity, entailment."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from editlib.answers.scripts import script_of
from editlib.errors import MetricError, first_line
from editlib.evaluation.metrics.result import KNOWN, MORE, Metric, MetricResult, Split, same_number
from editlib.models.weights import quiet_bars
from editlib.version import install_line

log = logging.getLogger(__name__)

LEAST_ROUGE = 0.1
ENTAILED = "entailment"

ROUGE_L = Metric(
    "rouge_l_recall",
    "generated",
    KNOWN,
    "share of the reference's words that the generated answer holds in the same order (ROUGE-L recall, stemmed)",
)
ENTROPY = Metric(
    "token_entropy",
    "generated",
    MORE,
    "how varied the tokens of the generated text are: 1 no token twice, 0 one token over and over",
)
COSINE = Metric(
    "cosine_similarity",
    "generated",
    KNOWN,
    "how close in meaning the generated answer and the reference are: cosine of their sentence embeddings, 0 at least",
)
ENTAILMENT = Metric(
    "entailment_score",
    "generated",
    KNOWN,
    "share of generated answers that say the same as the reference, as an inference model judges it",
)


class Encoder(Protocol):
    """Defines the interface of a sentence encoder that `cosine_similarity` needs; a `SentenceTransformer` has it."""

    def encode(self, sentences: list[str]) -> Any:
        """Maps texts to one vector each, `[n, d]`."""
        ...


Classifier = Callable[[list[dict[str, str]]], list[dict[str, Any]]]
"""Maps pairs `{"text": premise, "text_pair": hypothesis}` to `{"label": ...}` each, like transformers' pipeline."""


def rouge_l_recall(generated: Sequence[str], references: Sequence[str], *, on: Split) -> MetricResult:
    """Computes ROUGE-L recall of generated answers (Lin 2004; TOFU, 2401.06121, sec. 2.2), 0..1.

    `LCS(reference, generated) / |reference|`, both in words, Porter-stemmed as TOFU and open-unlearning do. Mean over
    the answers. Lower is better on a forget set, higher on a retain set. Generated, not teacher-forced.

    The words are Google's (`rouge-score`): runs of a-z and 0-9. A reference without such words, or mostly in another
    script than Latin, cannot be scored and does not count, since the package's 0 would look like "forgotten". The
    result's meaning and a warning give the number of such references.

    Raises:
        MetricError: the numbers of texts differ, or `rouge-score` is not installed.
    """
    same_number(generated=generated, references=references)
    items: list[dict[str, Any]] = [
        {"rougeL_recall": score, "ground_truth": reference, "generation": text}
        for score, reference, text in zip(_rouge_l(generated, references), references, generated, strict=True)
    ]
    result = ROUGE_L.averaged(on, items, "rougeL_recall")
    if not (unread := [item["ground_truth"] for item in items if item["rougeL_recall"] is None]):
        return result
    log.warning(
        "ROUGE-L reads words of a-z and 0-9 only: %d of %d references are in another script and do not count; the "
        "first is %r",
        len(unread),
        len(items),
        unread[0][:60],
    )
    note = f"; {len(unread)} of {len(items)} references are in a script that it cannot read and do not count"
    return replace(result, meaning=result.meaning + note)


def token_entropy(tokens: Sequence[Sequence[Hashable]], *, on: Split) -> MetricResult:
    """Computes token entropy of generated texts (2410.08109; used by UniErase, 2505.15674), 0..1.

    `-Σ f_i log2 f_i / log2 n` over the `n` tokens of a text, `f_i` the share of the i-th distinct one; 0 for a text of
    at most one token. Mean over the texts. Higher is better on both sets: a model that was damaged repeats itself. It
    does not measure knowledge, so it is not part of forget efficacy. Generated, not teacher-forced.

    Args:
        tokens: a sequence of token ids (or words) for each text, without the end token; as `greedy` returns them.
    """
    return ENTROPY.averaged(on, [{"score": _entropy(text), "tokens": len(text)} for text in tokens], "score")


def cosine_similarity(
    generated: Sequence[str], references: Sequence[str], encoder: str | Path | Encoder, *, on: Split
) -> MetricResult:
    """Computes cosine similarity of generated answers and references (2410.08109; used by UniErase), 0..1.

    `max(0, cos(e(generated), e(reference)))` of sentence embeddings. Mean over the answers. Lower is better on a forget
    set, higher on a retain set. Generated, not teacher-forced. Numbers of different encoders cannot be compared; the
    paper's is `paraphrase-MiniLM-L6-v2`.

    Args:
        encoder: the name or folder of a sentence-transformers model, or anything with its `encode`.

    Raises:
        MetricError: the numbers of texts differ, `sentence-transformers` is not installed, or there is no such model.
    """
    same_number(generated=generated, references=references)
    loaded = _load_encoder(encoder) if isinstance(encoder, (str, Path)) else encoder
    items = []
    if generated:
        said, meant = (
            np.asarray(loaded.encode(list(texts)), dtype=np.float64).reshape(len(texts), -1)
            for texts in (generated, references)
        )
        norms = np.linalg.norm(said, axis=1) * np.linalg.norm(meant, axis=1)
        cosines = (said * meant).sum(1) / np.where(norms > 0, norms, 1.0)
        items = [{"score": min(1.0, max(0.0, float(cosine)))} for cosine in cosines]
    return COSINE.averaged(on, items, "score")


def entailment_score(
    generated: Sequence[str],
    references: Sequence[str],
    classifier: str | Path | Classifier,
    *,
    on: Split,
    premise: Literal["generated", "reference"] | None = None,
    least_rouge: float = LEAST_ROUGE,
) -> MetricResult:
    """Computes the share of answers that entail their reference (2410.08109; used by UniErase), 0..1.

    A natural language inference model reads premise and hypothesis; an item scores 1 if the label is "entailment" and 0
    otherwise. Lower is better on a forget set, higher on a retain set. Generated, not teacher-forced. Numbers of
    different classifiers cannot be compared; the paper's is `sileod/deberta-v3-base-tasksource-nli`.

    Args:
        classifier: the name or folder of a sequence classification model with a label "entailment" (in any case), or a
            function that answers as transformers' text-classification pipeline does.
        premise: which text is the premise. The paper's code uses the generated text for TOFU's forget set (does it
            still contain the truth?) and for all of its real-world sets, and the reference for TOFU's other sets (does
            the generated text follow from the truth?); `None`: chosen by `on`.
        least_rouge: an answer with a smaller ROUGE-L recall scores 0 without the classifier, as in the paper's code;
            with 0 the classifier reads every answer.

    Raises:
        MetricError: the numbers of texts differ, a package is missing, or the classifier cannot be used.
    """
    same_number(generated=generated, references=references)
    judge = _load_classifier(classifier) if isinstance(classifier, (str, Path)) else classifier
    first = premise or ("generated" if on == "forget" else "reference")
    texts = list(zip(generated, references, strict=True))
    pairs = [
        {"text": said, "text_pair": meant} if first == "generated" else {"text": meant, "text_pair": said}
        for said, meant in texts
    ]
    shared = _rouge_l(generated, references) if least_rouge > 0 else [None] * len(texts)
    asked = [i for i, share in enumerate(shared) if share is None or share >= least_rouge]
    answers = judge([pairs[i] for i in asked]) if asked else []
    if len(answers) != len(asked) or not all(isinstance(answer, dict) and "label" in answer for answer in answers):
        raise MetricError(f'the classifier did not answer each of {len(asked)} pairs with one {{"label": ...}}')
    labels = dict(zip(asked, (str(answer["label"]) for answer in answers), strict=True))
    items = [{"score": float(labels.get(i, "").lower() == ENTAILED), "label": labels.get(i)} for i in range(len(texts))]
    return ENTAILMENT.averaged(on, items, "score")


def check_judges(encoder: str | Path | Encoder | None, classifier: str | Path | Classifier | None) -> None:
    """Checks that packages and models for scoring generated text are available; call it before answers are generated.

    Raises:
        MetricError: a package, the encoder or the classifier is missing.
    """
    require_rouge()
    if isinstance(encoder, (str, Path)):
        _load_encoder(encoder)
    if isinstance(classifier, (str, Path)):
        _load_classifier(classifier)


def require_rouge() -> None:
    """Raises `MetricError` if the package that computes ROUGE is missing."""
    try:
        import rouge_score.rouge_scorer  # noqa: F401
    except ImportError:
        raise MetricError(f"ROUGE needs rouge-score: {install_line('eval')}") from None


def _rouge_l(generated: Sequence[str], references: Sequence[str]) -> list[float | None]:
    require_rouge()
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    words = DefaultTokenizer(use_stemmer=True)
    scorer = RougeScorer(["rougeL"], tokenizer=words)
    return [
        scorer.score(reference, text)["rougeL"].recall if _is_read(reference) and words.tokenize(reference) else None
        for reference, text in zip(references, generated, strict=True)
    ]


def _is_read(text: str) -> bool:
    """Returns whether at least half of the letters of `text` are Latin, with or without accents."""
    letters = [character for character in text if character.isalpha()]
    return 2 * sum(script_of(letter) == "LATIN" for letter in letters) >= len(letters)


def _entropy(text: Sequence[Hashable]) -> float:
    n = len(text)
    if n <= 1:
        return 0.0
    entropy = -math.fsum(count / n * math.log2(count / n) for count in Counter(text).values())
    return min(1.0, max(0.0, entropy / math.log2(n)))


def _load_encoder(name: str | Path) -> Encoder:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise MetricError(f"cosine similarity needs sentence-transformers: {install_line('similarity')}") from None
    try:
        with quiet_bars():
            return SentenceTransformer(str(name))
    except (OSError, ValueError) as error:
        raise MetricError(_not_loaded("sentence encoder", name, error)) from None


def _load_classifier(name: str | Path) -> Classifier:
    from transformers import pipeline

    try:
        with quiet_bars():
            judge = pipeline("text-classification", model=str(name), truncation=True)
    except (OSError, ValueError) as error:
        raise MetricError(_not_loaded("classifier", name, error)) from None
    labels = [str(label) for label in (judge.model.config.id2label or {}).values()]
    if ENTAILED not in {label.lower() for label in labels}:
        raise MetricError(f'the labels of {name} are {", ".join(labels)}; expected a model with a label "entailment"')
    return judge


def _not_loaded(what: str, name: str | Path, error: Exception) -> str:
    return f"cannot load the {what} {name}: {first_line(error)}; give the name or the folder of one"
