"""What a method took: memory that was held for a while, and weights that are other ones."""

from __future__ import annotations

import copy
import mmap
import time

import pytest

from editlib.comparison.meter import changed_weights, measure_resources


def test_weights_that_changed_are_counted_once(tiny_llama):
    other = copy.deepcopy(tiny_llama)
    assert changed_weights(tiny_llama, other).weights == 0
    other.model.embed_tokens.weight.data[5, :3] += 1  # the head is the same tensor
    other.model.layers[1].mlp.down_proj.weight.data[0] += 1
    found = changed_weights(tiny_llama, other)
    assert (found.weights, found.tensors, found.bytes) == (3 + 64, 2, 4 * (3 + 64))
    assert found.of == sum(parameter.numel() for parameter in tiny_llama.parameters())


def test_a_new_tokens_rows_count(tiny_llama_untied):
    other = copy.deepcopy(tiny_llama_untied)
    other.resize_token_embeddings(other.config.vocab_size + 1, mean_resizing=False)
    found = changed_weights(tiny_llama_untied, other)
    assert (found.weights, found.tensors) == (2 * 32, 2)


def test_memory_that_was_held_and_let_go_is_seen():
    with measure_resources() as meter:
        with mmap.mmap(-1, 40 * 1024 * 1024) as held:  # from the system: an allocator may have had room left
            held.write(b"\1" * len(held))
            time.sleep(0.1)
        with pytest.raises(RuntimeError), measure_resources() as inner:
            raise RuntimeError
    assert meter.more_mb > 35 and meter.memory_mb > meter.more_mb and meter.seconds >= 0.1
    assert inner.more_mb < 35
