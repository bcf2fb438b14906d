"""Estimate the cost of each step of an edit from sizes alone: floating-point operations, bytes moved and bytes held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from editlib.algorithms.dense_system import BLOCK
from editlib.algorithms.low_rank import SLAB
from editlib.algorithms.machine import EIGEN
from editlib.algorithms.unierase.proportion import FEWEST_READ, share_of
from editlib.algorithms.work import (
    DECODE_ROWS,
    ITEM,
    WIDE,
    Rate,
    Step,
    Work,
    answered,
    forward_pass,
    head_pass,
    probes,
)
from editlib.models.size import ModelSize
from editlib.stats.moments import GRAM_SHARE

# A step of the descent in fp32 with at least `FEW_TOKENS` tokens runs requests of different lengths in separate groups.
FEW_TOKENS, FEW_GROUPS = 48, 3
PROBES_VALUES, PROBES_LAYER = 8, 2  # short passes before values are found, and before each layer is solved
KEY_TOKENS = 4096  # tokens of a pass that reads keys
METRIC_ROWS = 32  # prompts of a pass that reads the left metric
KEPT_TOKENS = 20  # tokens of an answer that a row keeps
EXAMPLES, EXAMPLE_ANSWER = 3, 4  # examples of a few-shot prompt, and tokens of an example's answer
REFUSAL_TOKENS = 10  # tokens of a refusal
TEXTS, TEXT_TOKENS = 320, 48  # texts by the edited model, without refusal tokens; tokens of each
BEGINNINGS = 400  # single tokens, each as the beginning of a text
PLACE_STEPS = 300  # steps on states that have been read
TOKEN_BATCH = 16  # refusals per step
LISTS, RELATION_LISTS = 192, 32  # most lists of subjects that the model continues, in all and for each relation
SUBJECTS = 64  # whose rows are held at once
COMPARED = 4096  # neurons that are compared to find those to replace, at most
OTHER_ROWS = 512  # prompts of others at which a subject's neuron must not be active, at most
MOST_NAMES = 600  # other subjects that it names, at most


@dataclass(frozen=True)
class Job:
    """Describes the size of an edit: layers, requests, prompts and steps.

    A request has `contexts` prompts of `prompt_tokens` tokens, `suffix_tokens` of them from the subject's last token
    on, followed by `target_tokens` of the target. `kl_prompts` more prompts are compared at `kl_tokens` positions each.
    `steps` are those of a value, `past` the keys of earlier edits, `anchors` the retain prompts used as constraints,
    each with `answer_tokens` of the model's answer, `kept_out` the directions outside the null space. `v_rate` is the
    arithmetic rate while values are found. `dense`: the solve has one `d_ff x d_ff` system, of ordinary text.

    For values from rows: `wordings` of each question in addition, `examples` of which are also erased in prompts with
    `EXAMPLES` examples, `siblings` other questions about its subject, and whether a `left_metric` is read from the
    anchors.
    """

    layers: Sequence[int]
    requests: int
    contexts: int = 1
    prompt_tokens: int = 16
    suffix_tokens: int = 6
    target_tokens: int = 3
    kl_prompts: int = 1
    kl_tokens: int = 1
    steps: int = 25
    past: int = 0
    anchors: int = 0
    answer_tokens: int = 24
    kept_out: int = 64
    v_rate: Rate = "model"
    dense: bool = False
    wordings: int = 0
    siblings: int = 0
    examples: int = 0
    left_metric: bool = False

    @property
    def shot_tokens(self) -> int:
        """Tokens of a question after examples, each of which is a question with a short answer."""
        return (1 + EXAMPLES) * self.prompt_tokens + EXAMPLES * EXAMPLE_ANSWER if self.examples else 0

    @property
    def held_keys(self) -> int:
        """Counts the anchors' keys: one for every token of each of them."""
        return self.anchors * (self.prompt_tokens + self.answer_tokens)


def statistics(
    size: ModelSize,
    layers: Sequence[int],
    tokens: int,
    decomposed: Literal["spectrum", "factor"] = "spectrum",
    batch_tokens: int = 4096,
) -> Step:
    """Estimates one pass over a corpus through the last of `layers`, the sums of `k k^T` of each, and their
    decompositions: all eigenvectors, or a Cholesky factor."""
    square = size.d_ff**2
    batches = max(1, round(tokens / batch_tokens))
    held = len(layers) * square * WIDE + batch_tokens * (2 * size.d_ff * ITEM + 8 * size.d_model * ITEM)
    return Step(
        "statistics",
        [
            forward_pass(size, tokens, max(layers) + 1, "fast", passes=batches),
            # The upper half of the products, summed in fp64: half of the sums is read and written once per batch.
            Work("product", 2 * GRAM_SHARE * square * tokens * len(layers), square * WIDE * len(layers) * batches),
            decomposition(size, len(layers))
            if decomposed == "spectrum"
            else Work("wide", size.d_ff**3 / 3 * len(layers), 2 * square * WIDE * len(layers)),
        ],
        max(held, 3 * square * WIDE),
    )


def decomposition(size: ModelSize, layers: int) -> Work:
    """Estimates the eigenvectors of the second moment `[d_ff, d_ff]` of a number of `layers`, in fp64."""
    return Work("eigen", EIGEN * size.d_ff**3 * layers)


def values(size: ModelSize, job: Job, *, chunk_rows: int = 64, itemsize: int = ITEM) -> Step:
    """Estimates values by descent: one pass up to the edited layer, then `steps` forward and backward passes above
    it."""
    rows = job.requests * (job.contexts + job.kl_prompts)
    last, above = max(job.layers), size.n_layers - max(job.layers) - 1
    suffix = job.requests * (job.contexts * (job.suffix_tokens + job.target_tokens - 1) + job.kl_prompts * 3)
    scored = job.requests * (job.contexts * job.target_tokens + job.kl_prompts * job.kl_tokens)
    # A pass over few tokens costs as much as reading the weights; more are grouped by length to save padding.
    parted = 1 if job.v_rate == "fast" else min(FEW_GROUPS, -(-suffix // FEW_TOKENS))
    full = max(1, -(-rows // chunk_rows))  # groups of as many prompts as are held at once
    groups = max(full, parted)
    read = 2 * groups * (above * size.layer + size.head) * itemsize  # the weights are read both ways
    logits = 6 * ITEM * size.vocab * scored / full  # log-softmax, targets and their gradients
    graph = suffix / full * above * (12 * size.d_model + 6 * size.d_ff) * itemsize
    prefix = rows / full * job.prompt_tokens * size.n_layers * size.kv_width * itemsize
    steps = forward_pass(
        size, job.steps * suffix, above, job.v_rate, passes=job.steps * groups, kind="gradient", moved=job.steps * read
    )
    return Step(
        "values",
        [
            forward_pass(size, rows * job.prompt_tokens, size.n_layers, job.v_rate, passes=2 * groups),
            steps,
            head_pass(size, job.steps * scored, job.v_rate, passes=job.steps * groups, kind="gradient"),
            # The states before any change, in the model's dtype.
            forward_pass(size, job.requests * job.prompt_tokens, last + 1, "model", passes=1),
            *probes(size, PROBES_VALUES, job.v_rate),
        ],
        logits + graph + prefix,
    )


def anchors(size: ModelSize, job: Job, rate: Rate = "model") -> Step:
    """Estimates the generation of the model's answers to the retain prompts, token by token."""
    prefix = DECODE_ROWS * (job.prompt_tokens + job.answer_tokens) * size.n_layers * size.kv_width * ITEM
    return Step("anchors", answered(size, job.anchors, job.prompt_tokens, job.answer_tokens, rate), prefix)


def row_values(size: ModelSize, job: Job, *, batch_tokens: int = 512, others: int = 0, said: int | None = None) -> Step:
    """Estimates values from rows: the model's answers, the metric of the anchors' answers, and readings of the rows.

    Three of the `steps` Gauss-Newton steps compute a Jacobian; the others, and one reading at the end, read the rows
    alone. If refusal tokens follow, all of it is done again with further rows that read these tokens, and the model
    names `others` subjects for each relation and answers questions about them.

    Args:
        said: further wordings of each request that refusal tokens are fitted to; `None`: there are no tokens.
    """
    last, above = max(job.layers), size.n_layers - max(job.layers) - 1
    asked, keep = job.requests * (1 + job.wordings), job.requests * job.siblings
    shots = job.requests * job.examples  # rows of few-shot prompts, for which nothing is generated
    prompts = asked + keep
    tokens = (prompts + shots) * job.suffix_tokens + keep * (KEPT_TOKENS - 1)  # of the rows, from the subject on
    scored = asked + shots + keep * KEPT_TOKENS
    fronts = prompts * job.prompt_tokens + shots * job.shot_tokens
    passes = max(1, -(-tokens // batch_tokens))
    rate = job.v_rate
    work = [
        *answered(size, prompts, job.prompt_tokens, job.answer_tokens, rate),
        forward_pass(size, fronts, size.n_layers, rate, passes=passes),
        *_row_readings(size, job, tokens, scored, batch_tokens),
    ]
    if said is not None:
        more = 2 * asked + said * job.requests  # at the end of each wording, and where the answer was, if it is known
        work += [
            forward_pass(size, fronts + more * job.prompt_tokens, size.n_layers, rate, passes=passes),
            *_row_readings(size, job, tokens + more * job.suffix_tokens, scored + more, batch_tokens),
        ]
    if job.left_metric:
        read = share_of(job.anchors, job.requests, fewest=FEWEST_READ)
        batches, tokens = max(1, -(-read // METRIC_ROWS)), read * (job.prompt_tokens + job.answer_tokens)
        work += [
            forward_pass(size, tokens, last + 1, rate, passes=batches),
            forward_pass(size, tokens, above, rate, passes=batches, kind="gradient"),
            head_pass(size, read * job.answer_tokens, rate, passes=batches, kind="gradient"),
        ]
    work += _named(size, job, min(MOST_NAMES, job.requests * others)) if others else []
    logits = 3 * ITEM * size.vocab * max(scored / passes, METRIC_ROWS * job.answer_tokens * job.left_metric)
    graph = max(batch_tokens, METRIC_ROWS * 40 * job.left_metric) * above * (12 * size.d_model + 6 * size.d_ff) * ITEM
    held = fronts * min(1.0, SUBJECTS / job.requests)  # tokens before the rows of as many subjects as are read at once
    return Step("values", work, logits + graph + held * size.n_layers * size.kv_width * ITEM)


def _row_readings(size: ModelSize, job: Job, tokens: int, scored: int, batch_tokens: int) -> list[Work]:
    """Estimates Gauss-Newton steps over rows of `tokens` tokens from the subjects on, with logits at `scored`
    positions."""
    above, passes = size.n_layers - max(job.layers) - 1, max(1, -(-tokens // batch_tokens))
    jacobians = min(3, job.steps)
    readings = job.steps + 1 - jacobians
    return [
        forward_pass(size, tokens * jacobians, above, job.v_rate, passes=passes * jacobians, kind="gradient"),
        head_pass(size, scored * jacobians, job.v_rate, passes=passes * jacobians, kind="gradient"),
        forward_pass(size, tokens * readings, above, job.v_rate, passes=passes * readings, kind="step"),
        head_pass(size, scored * readings, job.v_rate, passes=passes * readings, kind="step"),
    ]


def solve(size: ModelSize, job: Job, *, itemsize: int = ITEM) -> Step:
    """Estimates keys, residuals, the closed form and the update of each layer, whose weights of `itemsize` bytes a
    number are kept to go back to."""
    first, last, n, layers = min(job.layers), max(job.layers), job.requests, len(job.layers)
    tokens = n * (job.contexts * job.prompt_tokens + job.shot_tokens)  # one more context has examples
    held = min(job.held_keys, size.d_ff)  # from d_ff keys on, their second moment is held instead
    m = n + job.past + (0 if job.held_keys > size.d_ff else job.held_keys)  # keys in the linear system
    # One pass up to the first layer; then each layer for its keys, once more to advance, and up to the last for H.
    layers_run = first + sum(2 + last - layer + 1 for layer in job.layers)
    dense = job.dense or job.held_keys > size.d_ff
    system = 2 * size.d_ff * m**2 + m**3 / 3 + 2 * m**2 * n + 2 * size.d_ff * m * n
    whole = size.d_ff**3 / 3 + 2 * size.d_ff**2 * m if dense else 0
    moment = 2 * size.d_ff**2 * job.held_keys if job.held_keys > size.d_ff else 0
    project = 4 * size.d_ff * job.kept_out * m
    square = size.d_model * size.d_ff
    work = [
        forward_pass(size, tokens, layers_run, "model", passes=max(1, round(tokens / KEY_TOKENS))),
        Work("wide", (system + whole + moment + project + 2 * square * n) * layers),
        Work("wide", 0, 6 * square * WIDE * layers),  # the update multiplied out, summed and written
        *probes(size, PROBES_LAYER * layers, "model"),
    ]
    if job.anchors:  # their keys are read again at each layer, from the model's beginning
        passes = max(1, round(job.held_keys / KEY_TOKENS))
        work.append(forward_pass(size, job.held_keys, sum(layer + 1 for layer in job.layers), "model", passes=passes))
    # A dense system is built and factored in one matrix; in addition one block of columns is held, twice.
    square_bytes = (size.d_ff + 2 * min(BLOCK, size.d_ff)) * size.d_ff * WIDE if dense else 0
    system_bytes = (3 * m + job.kept_out + held) * size.d_ff * WIDE + square_bytes
    added = 2 * min(square, SLAB) * WIDE  # of the update, and of its sum with the weights
    return Step("solve", work, added + system_bytes + layers * square * itemsize)


def neurons(size: ModelSize, job: Job, *, itemsize: int = ITEM) -> Step:
    """Estimates values written into one neuron of the last layer for each request: what it reads, and which neurons can
    be spared. Three matrices of `itemsize` bytes a number are kept to go back to."""
    layer, square = max(job.layers), size.d_model * size.d_ff
    tokens = job.requests * (job.contexts * job.prompt_tokens + job.shot_tokens)
    others = min(job.anchors, OTHER_ROWS) * (job.prompt_tokens + job.answer_tokens)
    passes = max(1, round((tokens + others) / KEY_TOKENS))
    return Step(
        "solve",
        [
            forward_pass(size, tokens + others, layer + 1, "model", passes=passes),
            *_spared(size, job.requests, others),
            *probes(size, PROBES_LAYER, "model"),
        ],
        3 * min(size.d_ff, COMPARED) ** 2 * WIDE + 3 * square * itemsize,
    )


def _spared(size: ModelSize, neurons: int, positions: int) -> list[Work]:
    """Estimates the choice of `neurons` to replace: the second moment of keys at `positions`, its inverse by a Cholesky
    factor, what the others take over, and the updates of three matrices."""
    compared = min(size.d_ff, COMPARED)
    square = compared**2
    updates = 2 * 3 * neurons * size.d_model * size.d_ff
    return [
        Work("product", 2 * square * positions, square * ITEM),
        Work("wide", compared**3 + neurons**2 * compared + updates, 6 * square * WIDE),
    ]


def descent(size: ModelSize, requests: int, prompt_tokens: int, steps: int) -> Step:
    """Estimates fine-tuning: `steps` forward and backward passes through the whole model, over all requests."""
    tokens = requests * (prompt_tokens + 2)
    passes = max(1, -(-requests // 64))
    return Step(
        "fine-tuning",
        [
            forward_pass(size, steps * tokens, size.n_layers, "model", passes=steps * passes, kind="gradient"),
            head_pass(size, steps * requests * 3, "model", passes=steps * passes, kind="gradient"),
        ],
        tokens / passes * size.n_layers * (12 * size.d_model + 6 * size.d_ff) * ITEM,
    )


def refusal_tokens(
    size: ModelSize,
    job: Job,
    *,
    steps: int,
    wordings: int,
    general: int,
    others: int = 0,
    kept: int = 600,
) -> Step:
    """Estimates the fit of refusal tokens to the edited model: the states of all places, and `steps` passes and
    gradients.

    Each request is assumed to have its own relation. Texts and answers are run again after they were generated.

    Args:
        wordings: wordings of each question after which the tokens should be generated.
        general: general questions, which the edited model answers first.
        others: other subjects of each relation, as named in `row_values`.
        kept: retain prompts after which no token may be generated; each is asked in two further wordings.
    """
    kept, rate = min(job.anchors, kept), job.v_rate
    siblings = job.requests * job.siblings
    named = min(MOST_NAMES, job.requests * others)
    ends = job.requests * (1 + wordings + job.wordings) + 2 * (kept + named)
    answers = kept + named + siblings
    answer_tokens = answers * job.answer_tokens
    texts = (general + TEXTS) * TEXT_TOKENS + BEGINNINGS  # tokens
    run = (ends + answers + general) * job.prompt_tokens + answer_tokens + texts
    positions = ends + answer_tokens + texts
    passes = max(1, -(-(ends + answers + general + TEXTS) // DECODE_ROWS))
    trained = TOKEN_BATCH * (REFUSAL_TOKENS + 2)  # the relation's token, [UNL] and the refusal
    read_out = (PLACE_STEPS + steps) * positions * size.d_model
    return Step(
        "tokens",
        [
            *answered(size, general, job.prompt_tokens, TEXT_TOKENS, rate),
            *answered(size, TEXTS, 1, TEXT_TOKENS, rate),
            # Read twice: when values erase, and when they were moved for the tokens.
            forward_pass(size, 2 * run, size.n_layers, rate, passes=2 * passes),
            head_pass(size, 2 * positions, rate, passes=2 * passes, kind="step"),
            forward_pass(size, steps * trained, size.n_layers, rate, passes=steps, kind="gradient"),
            head_pass(size, steps * trained, rate, passes=steps, kind="gradient"),
            # Log-odds of all tokens at all positions, and their gradient, from states in fp32.
            Work("model", 4 * (1 + job.requests) * read_out, 2 * ITEM * read_out),
        ],
        TOKEN_BATCH * job.prompt_tokens * size.n_layers * size.kv_width * ITEM
        + 6 * ITEM * trained * size.vocab
        + positions * size.d_model * ITEM,
    )


def _named(size: ModelSize, job: Job, names: int) -> list[Work]:
    """Estimates lists of subjects that the model continues, and its answers about `names` of them."""
    return [
        *answered(size, min(LISTS, RELATION_LISTS * job.requests), job.prompt_tokens, TEXT_TOKENS, job.v_rate),
        *answered(size, names, job.prompt_tokens, job.answer_tokens, job.v_rate),
    ]


def token(
    size: ModelSize,
    *,
    steps: int,
    batch: int,
    questions: int = 200,
    guard_prompts: int = 120,
    question_tokens: int = 20,
    answer_tokens: int = 16,
    refusal_tokens: int = 6,
) -> Step:
    """Estimates phase I: prefixes of the questions, the guard's answers, and `steps` forward and backward passes."""
    seen = questions * question_tokens
    answered_tokens = guard_prompts * (question_tokens + answer_tokens)
    scored = seen // 4 + guard_prompts * answer_tokens
    trained = batch * (refusal_tokens + 1)
    return Step(
        "token",
        [
            forward_pass(size, seen + answered_tokens, size.n_layers, "fast", passes=2 * -(-guard_prompts // 64)),
            head_pass(size, scored, "fast", passes=4, kind="step"),
            *answered(size, guard_prompts, question_tokens, answer_tokens, "fast"),
            forward_pass(size, steps * trained, size.n_layers, "fast", passes=steps, kind="gradient"),
            head_pass(size, steps * batch * refusal_tokens, "fast", passes=steps, kind="gradient"),
        ],
        questions * question_tokens * size.n_layers * size.kv_width * 2 + scored * size.vocab * 2,
    )


def with_copy(step: Step, size: ModelSize) -> Step:
    """Adds the bf16 copy of fp32 weights that a step holds if some of its passes run in bf16."""
    fast = any(work.rate == "fast" for work in step.work)
    return replace(step, held=step.held + 2 * size.total) if fast else step


def with_statistics(step: Step, size: ModelSize) -> Step:
    """Adds the second moment of one layer in fp32: large ones are mapped from their files, and one is read at a
    time."""
    return replace(step, held=step.held + size.d_ff**2 * ITEM)


def save(size: ModelSize, itemsize: int) -> Step:
    """Estimates the writing of the edited model to disk."""
    return Step("save", [Work("disk", 0, size.bytes(itemsize))])
