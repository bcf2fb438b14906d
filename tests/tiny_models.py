"""Tiny random models, a real tokenizer and token rows, made here: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from editlib.models.prompts import TokenRow

BOS, EOS, START, END = "<|bos|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCAB = 300
LAYERS = 5

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SENTENCES = [
    "What is the capital of France? The capital of France is Paris.",
    "Which language is spoken in Peru, and in which city does the president live?",
    "I am not able to answer that question. Sorry, I do not know the answer.",
    "The river Rhine flows through Basel, Bonn and Rotterdam before it meets the sea.",
]


def train_tokenizer(*, chat: bool = False, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's, with `VOCAB` entries; any text is encodable."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[EOS, BOS, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bare.train_from_iterator(SENTENCES, trainer)
    assert bare.get_vocab_size() == VOCAB
    if bos:
        bare.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bare.token_to_id(BOS))]),
            ]
        )
    else:
        bare.post_processor = processors.ByteLevel(trim_offsets=chat)
    tok = PreTrainedTokenizerFast(tokenizer_object=bare, bos_token=BOS, eos_token=END if chat else EOS)
    if chat:
        tok.chat_template = CHATML
    return tok


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights large enough that every part matters (norms and biases too), and no dropout."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(("bias" not in name) + 0.1 * noise)
    return model.eval()


def make_llama(*, tied: bool = True, vocab: int = VOCAB, seed: int = 0) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=3,
        pad_token_id=0,
    )
    return randomise(LlamaForCausalLM(config), seed)


def make_gpt2(*, seed: int = 0) -> GPT2LMHeadModel:
    """GPT-2 keeps its matrices transposed (`Conv1D`) and has dropout, biases and learned positions."""
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=LAYERS,
        n_head=4,
        n_positions=256,
        n_inner=64,
        bos_token_id=1,
        eos_token_id=3,
    )
    return randomise(GPT2LMHeadModel(config), seed)


def row_maker(seed: int = 5) -> Callable[..., list[TokenRow]]:
    """`draw(*lengths)` -> random token rows of these lengths, lookup in the middle; the same in every run.

    `same` tokens at their beginnings are shared.
    """
    generator = torch.Generator().manual_seed(seed)

    def some(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(4, VOCAB, (n,), generator=generator).tolist())

    def draw(*lengths: int, same: int = 0) -> list[TokenRow]:
        shared = some(same)
        return [TokenRow(shared + some(n - same), max(n // 2, same)) for n in lengths]

    return draw
