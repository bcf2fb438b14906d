"""Generate answers for many prompts at once, and score given answers by their likelihood.

`greedy`, `sample` and `sample_each` continue prompts; all return token ids without the end token. `teacher_forced` and
`continuation_nll` score answers that are given, in nats per token. `perplexity` scores running text.

Three things save time and change no result. A prefix that all prompts share is run once. Rows that have ended leave the
batch. A draft, an answer that is likely to be repeated (say, the base model's), is checked in one pass instead of being
generated token by token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from editlib.models.anatomy import Anatomy
from editlib.models.forward import encode_prefix, forward, new_cache, shared_length, split
from editlib.models.freezing import no_param_grad
from editlib.models.positions import positions_of
from editlib.models.prefix import KVCache, Prefix
from editlib.models.prompts import TokenBatch, TokenRow, pad

BATCH_ROWS = 64
BATCH_TOKENS = 32_768  # of all rows, padding included: every layer caches keys and values of each
BATCH_SCORED = 1536  # positions with logits, each as wide as the vocabulary


def end_tokens(anat: Anatomy) -> frozenset[int]:
    """Returns the token ids at which generation ends, from the model's generation config."""
    ends = anat.model.generation_config.eos_token_id
    return frozenset() if ends is None else frozenset([ends] if isinstance(ends, int) else ends)


@dataclass(frozen=True)
class _Front:
    """Holds the shared first `length` tokens of all rows of a call, run once for all its batches."""

    prefix: Prefix | None
    length: int

    @classmethod
    def of(cls, anat: Anatomy, rows: Sequence[TokenRow]) -> _Front:
        """Runs the tokens that all `rows` begin with."""
        anat.check_one_device()
        length = shared_length(list(rows)) if rows else 0
        if not length:
            return cls(None, 0)
        return cls(encode_prefix(anat, split([rows[0]], [length])[0]), length)

    def cut(self, rows: Sequence[TokenRow]) -> tuple[Prefix | None, list[TokenRow]]:
        """Returns the front, repeated for each of `rows`, and what remains of them."""
        if self.prefix is None:
            return None, list(rows)
        zeros = torch.zeros(len(rows), dtype=torch.long, device=self.prefix.attention_mask.device)
        return self.prefix.select(zeros), split(list(rows), [self.length] * len(rows))[1]


def greedy(
    anat: Anatomy,
    rows: Sequence[TokenRow],
    *,
    max_new_tokens: int = 24,
    drafts: Sequence[Sequence[int]] | None = None,
    banned: Collection[int] = (),
    batch_rows: int = BATCH_ROWS,
    progress: str | None = None,
) -> list[tuple[int, ...]]:
    """Generates the greedy continuation of every row, without the end token, in the order of `rows`.

    A draft (say, the answer of the model before an edit) is verified in one pass, and only the tokens after the first
    difference are generated; the result is the same with and without drafts.

    Args:
        banned: token ids that are never generated; the likeliest other token is taken.
        progress: a label for a progress bar on stderr; none without it.
    """
    ends, limits = end_tokens(anat), _limits(anat, rows, max_new_tokens)
    known: list[tuple[int, ...]] = [()] * len(rows)
    if max_new_tokens < 1:
        return known
    with (
        no_param_grad(anat.model),
        torch.no_grad(),
        tqdm(total=len(rows), desc=progress, disable=progress is None, leave=False) as bar,
    ):
        front = _Front.of(anat, rows)
        if drafts is not None:
            known = _accept(anat, rows, front, drafts, limits, ends, batch_rows, banned)
        # Rows whose draft was right to its end, or to the limit, need no decoding.
        todo = [i for i in range(len(rows)) if len(known[i]) < limits[i] and not (known[i] and known[i][-1] in ends)]
        bar.update(len(rows) - len(todo))
        todo.sort(key=lambda i: len(rows[i]) + len(known[i]))  # rows of similar length share a batch, to save padding
        lengths = [len(row) + limit for row, limit in zip(rows, limits, strict=True)]
        for chunk in chunks(todo, lengths, rows=batch_rows):
            begun = [rows[i].followed_by(known[i]) for i in chunk]
            rest = [limits[i] - len(known[i]) for i in chunk]
            choose = lambda logits, _: _without(logits, banned).argmax(-1)  # noqa: E731
            for i, new in zip(chunk, _decode(anat, begun, front, rest, ends, choose), strict=True):
                known[i] = known[i] + new
            bar.update(len(chunk))
    return [answer[:-1] if answer and answer[-1] in ends else answer for answer in known]


def _accept(
    anat: Anatomy,
    rows: Sequence[TokenRow],
    front: _Front,
    drafts: Sequence[Sequence[int]],
    limits: Sequence[int],
    ends: frozenset[int],
    batch_rows: int,
    banned: Collection[int],
) -> list[tuple[int, ...]]:
    """Verifies drafts: for each row the part that greedy decoding would produce, and the token after it."""
    accepted: list[tuple[int, ...]] = [()] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]) + len(drafts[i]))
    device = anat.device
    lengths = [len(row) + min(len(draft), most) for row, draft, most in zip(rows, drafts, limits, strict=True)]
    for chunk in chunks(order, lengths, rows=batch_rows):
        tried = [tuple(drafts[i])[: limits[i] - 1] for i in chunk]  # one less: the pass yields the next token
        prefix, rests = front.cut([rows[i] for i in chunk])
        batch = pad([rest.followed_by(draft) for rest, draft in zip(rests, tried, strict=True)], device=device)
        # The last prompt token predicts a draft's first token, and each draft token the next one.
        places = [(r, len(rests[r]) - 1 + j) for r, draft in enumerate(tried) for j in range(len(draft) + 1)]
        score = tuple(torch.tensor(places).T)  # rows [m], columns [m]
        best = _without(forward(anat, batch, prefix=prefix, score=score), banned).argmax(-1).tolist()
        at = 0
        for i, draft in zip(chunk, tried, strict=True):
            picks = best[at : at + len(draft) + 1]
            at += len(draft) + 1
            agree = next(
                (j for j, (pick, want) in enumerate(zip(picks, draft, strict=False)) if pick != want),
                len(draft),
            )
            accepted[i] = (*draft[:agree], picks[agree])
            stop = next((j for j, token in enumerate(accepted[i]) if token in ends), None)
            if stop is not None:
                accepted[i] = accepted[i][: stop + 1]
    return accepted


def sample(
    anat: Anatomy,
    rows: Sequence[TokenRow],
    *,
    max_new_tokens: int,
    top_k: int,
    generator: torch.Generator,
    progress: str | None = None,
) -> list[tuple[int, ...]]:
    """Samples a continuation of every row at temperature 1 from the `top_k` likeliest tokens, without the end token.

    All random numbers come from `generator`, on the CPU. Rows are taken `BATCH_ROWS` at a time, in their order.

    Args:
        progress: a label for a progress bar on stderr; none without it.
    """

    def draw(logits: Tensor, _: list[int]) -> Tensor:
        best = logits.float().cpu().topk(min(top_k, logits.shape[-1]))  # [n, k]
        picked = torch.multinomial(best.values.softmax(-1), 1, generator=generator)  # [n, 1], places in `best`
        return best.indices.gather(-1, picked)[:, 0]

    ends, answers = end_tokens(anat), []
    with (
        no_param_grad(anat.model),
        torch.no_grad(),
        tqdm(total=len(rows), desc=progress, disable=progress is None, leave=False) as bar,
    ):
        front = _Front.of(anat, rows)
        for begin in range(0, len(rows), BATCH_ROWS):
            chunk = list(rows[begin : begin + BATCH_ROWS])
            answers += _decode(anat, chunk, front, _limits(anat, chunk, max_new_tokens), ends, draw)
            bar.update(len(chunk))
    return [answer[:-1] if answer and answer[-1] in ends else answer for answer in answers]


def sample_each(
    anat: Anatomy,
    rows: Sequence[TokenRow],
    seeds: Sequence[int],
    *,
    max_new_tokens: int,
    batch_rows: int = BATCH_ROWS,
) -> list[tuple[int, ...]]:
    """Samples a continuation of every row at temperature 1 from the whole vocabulary, without the end token.

    Each row has its own seed, so its draws do not depend on the batch. A uniform number in [0, 1) picks the token whose
    interval of the cumulative probabilities contains it.
    """
    ends = end_tokens(anat)
    answers: list[tuple[int, ...]] = [()] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    with no_param_grad(anat.model), torch.no_grad():
        front = _Front.of(anat, rows)
    for chunk in chunks(order, [len(row) + max_new_tokens for row in rows], rows=batch_rows):
        generators = [torch.Generator().manual_seed(seeds[i]) for i in chunk]

        def draw(logits: Tensor, alive: list[int], generators: list[torch.Generator] = generators) -> Tensor:
            sums = logits.cpu().double().softmax(-1).cumsum(-1)  # [n, vocab], fp64: the same draw on every device
            uniform = torch.cat([torch.rand(1, generator=generators[i], dtype=torch.float64) for i in alive])  # [n]
            # Scaled to the last sum, which is not exactly 1 because of rounding.
            return torch.searchsorted(sums, uniform[:, None] * sums[:, -1:], right=True)[:, 0]

        with no_param_grad(anat.model), torch.no_grad():
            prompts = [rows[i] for i in chunk]
            drawn = _decode(anat, prompts, front, _limits(anat, prompts, max_new_tokens), ends, draw)
        for i, answer in zip(chunk, drawn, strict=True):
            answers[i] = answer[:-1] if answer and answer[-1] in ends else answer
    return answers


def _limits(anat: Anatomy, rows: Sequence[TokenRow], most: int) -> list[int]:
    """Returns how many tokens are generated for each row: `most`, or fewer if the model's positions end before."""
    positions = positions_of(anat.model)
    return [most if positions is None else max(1, min(most, positions - len(row))) for row in rows]


def _without(logits: Tensor, banned: Collection[int]) -> Tensor:
    """Returns `logits [n, vocab]` with those of `banned` tokens at minus infinity."""
    return logits.index_fill(-1, torch.tensor(sorted(banned), device=logits.device), -torch.inf) if banned else logits


def _decode(
    anat: Anatomy,
    rows: list[TokenRow],
    front: _Front,
    limits: list[int],
    ends: frozenset[int],
    choose: Callable[[Tensor, list[int]], Tensor],
) -> list[tuple[int, ...]]:
    """Decodes one batch; the end tokens are part of the result.

    `choose` picks tokens `[n]` from logits `[n, vocab]` and the indices of their rows; rows that have ended are left
    out.
    """
    device = anat.device
    prefix, rests = front.cut(rows)
    batch = pad(rests, side="left", device=device)
    mask = batch.attention_mask if prefix is None else torch.cat([prefix.attention_mask, batch.attention_mask], dim=1)
    cache = new_cache(anat, len(rows)) if prefix is None else prefix.cache()
    new: list[list[int]] = [[] for _ in rows]
    alive = list(range(len(rows)))  # indices of the rows that have not ended
    ids = batch.input_ids  # [n, T] at first, then [n alive, 1]
    while True:
        logits = _last_logits(anat, ids, mask, cache)
        picks = choose(logits, alive).tolist()  # one token for each row that has not ended
        if prefix is not None:
            # After the first pass padding lies between the prefix and the rest, where sliding windows would count it:
            # a `Prefix` moves it to the left.
            prefix = Prefix.of(cache, mask)
            cache, mask, prefix = prefix.cache(), prefix.attention_mask, None
        for i, pick in zip(alive, picks, strict=True):
            new[i].append(pick)
        keep = [j for j, i in enumerate(alive) if new[i][-1] not in ends and len(new[i]) < limits[i]]
        if not keep:
            return [tuple(tokens) for tokens in new]
        if len(keep) < len(alive):  # rows that have ended leave the cache, so that they cost nothing
            index = torch.tensor(keep, device=device)
            cache.batch_select_indices(index)
            mask = mask[index]
            alive = [alive[j] for j in keep]
        ids = torch.tensor([[new[i][-1]] for i in alive], device=device)
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)


def _last_logits(anat: Anatomy, ids: Tensor, mask: Tensor, cache: KVCache) -> Tensor:
    """Computes logits `[n, vocab]` after the last column of `ids`, which extend `cache`; `mask` covers both."""
    zeros = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    batch = TokenBatch(ids, mask, zeros, zeros)
    rows = torch.arange(len(ids), device=ids.device)
    return forward(anat, batch, cache=cache, score=(rows, zeros + ids.shape[1] - 1))


@dataclass(frozen=True)
class Forced:
    """Holds the scores of a given answer after its prompt (teacher-forced), without its end token.

    `nll`: nats of each answer token. `hits`: whether greedy decoding would produce it after the true tokens.
    """

    nll: tuple[float, ...]
    hits: tuple[bool, ...]

    @property
    def mean(self) -> float:
        """Mean NLL in nats per token; `nan` for an empty answer."""
        return math.fsum(self.nll) / len(self.nll) if self.nll else math.nan


def teacher_forced(
    anat: Anatomy, rows: Sequence[TokenRow], answers: Sequence[Sequence[int]], *, progress: str | None = None
) -> list[Forced]:
    """Scores each answer after its prompt, in the order of `rows`.

    Args:
        progress: a label for a progress bar on stderr; none without it.
    """
    scores = [Forced((), ())] * len(rows)
    order = sorted((i for i in range(len(rows)) if answers[i]), key=lambda i: len(rows[i]) + len(answers[i]))
    device = anat.device
    with (
        no_param_grad(anat.model),
        torch.no_grad(),
        tqdm(total=len(order), desc=progress, disable=progress is None, leave=False) as bar,
    ):
        front = _Front.of(anat, [rows[i] for i in order])
        lengths = [len(row) + len(answer) for row, answer in zip(rows, answers, strict=True)]
        for chunk in chunks(order, lengths, [len(answer) for answer in answers]):
            prefix, rests = front.cut([rows[i] for i in chunk])
            batch = pad([rest.followed_by(answers[i]) for rest, i in zip(rests, chunk, strict=True)], device=device)
            places = [(r, len(rests[r]) - 1 + j) for r, i in enumerate(chunk) for j in range(len(answers[i]))]
            logits = forward(anat, batch, prefix=prefix, score=tuple(torch.tensor(places).T)).float()  # [m, vocab]
            wanted = torch.tensor([token for i in chunk for token in answers[i]], device=logits.device)
            nll = torch.nn.functional.cross_entropy(logits, wanted, reduction="none").tolist()
            hits = (logits.argmax(-1) == wanted).tolist()
            at = 0
            for i in chunk:
                end = at + len(answers[i])
                scores[i] = Forced(tuple(nll[at:end]), tuple(hits[at:end]))
                at = end
            bar.update(len(chunk))
    return scores


def chunks(
    order: Sequence[int], lengths: Sequence[int], scored: Sequence[int] | None = None, *, rows: int = BATCH_ROWS
) -> Iterator[list[int]]:
    """Splits `order` into batches of at most `rows` rows.

    Long rows make a batch smaller, and so do scored tokens: each costs logits as wide as the vocabulary.

    Args:
        order: indices of rows.
        lengths: tokens of each row.
        scored: tokens of each row that logits are computed at.
    """
    chunk: list[int] = []
    width = read = 0
    for i in order:
        width, read = max(width, lengths[i]), read + (scored[i] if scored else 0)
        if chunk and (len(chunk) == rows or (len(chunk) + 1) * width > BATCH_TOKENS or read > BATCH_SCORED):
            yield chunk
            chunk, width, read = [], lengths[i], scored[i] if scored else 0
        chunk.append(i)
    if chunk:
        yield chunk


def continuation_nll(anat: Anatomy, rows: Sequence[TokenRow], answers: Sequence[Sequence[int]]) -> list[float]:
    """Computes the mean NLL in nats per token of each answer after its prompt; `nan` for an empty answer."""
    return [answer.mean for answer in teacher_forced(anat, rows, answers)]


def perplexity(anat: Anatomy, windows: Sequence[Sequence[int]]) -> float:
    """Computes `exp` of the mean NLL over all tokens of `windows` but the first of each; lower is better."""
    total, count = 0.0, 0
    for ids in windows:
        batch = pad([TokenRow(tuple(ids), 0)], device=anat.device)
        with no_param_grad(anat.model), torch.no_grad():
            logits = forward(anat, batch)[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, batch.input_ids[0, 1:], reduction="sum"))
        count += len(ids) - 1
    return math.exp(min(total / count, 700.0))  # exp of more overflows, and a destroyed model may reach it
