"""Small tokenizers of every style, made here: byte-level, SentencePiece and WordPiece, fast and slow."""

from __future__ import annotations

import json
from collections.abc import Callable

from tiny_models import SENTENCES, train_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BatchEncoding, PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

TEXTS = [
    *SENTENCES,
    "Is São Paulo larger than Zürich? The Rhône and the café are in 東京都, near Paris. Pari Pariser Nigeria Niger",
]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
START, END, UNKNOWN = "<s>", "</s>", "<unk>"
SPECIAL = [UNKNOWN, START, END]

LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<s>[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' </s>' }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
THINKING = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if m['role'] == 'assistant' %}{{ '<think>\n</think>' }}{% endif %}{{ m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def wrapped(bare: Tokenizer, *, ends: str = "", chat: str | None = None) -> PreTrainedTokenizerFast:
    """`ends` is what the tokenizer adds to a text, such as "<s> $A </s>"."""
    if ends:
        special = [(token, bare.token_to_id(token)) for token in ends.split() if token != "$A"]
        bare.post_processor = processors.TemplateProcessing(single=ends, special_tokens=special)
    tok = PreTrainedTokenizerFast(tokenizer_object=bare, clean_up_tokenization_spaces=False)
    tok.chat_template = chat
    return tok


def metaspace(scheme: str = "always", *, split: bool = True) -> tuple[pre_tokenizers.PreTokenizer, decoders.Decoder]:
    decoder = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme, split=split)]
    return pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split), decoders.Sequence(decoder)


def special(bare: Tokenizer) -> Tokenizer:
    bare.add_special_tokens(SPECIAL)
    return bare


def trained_bpe() -> dict:
    """Vocabulary and merges over words that begin with "▁". Only this training gives the same in every run."""
    bare = Tokenizer(models.BPE(unk_token=UNKNOWN))
    bare.pre_tokenizer = metaspace()[0]
    bare.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False))
    return json.loads(bare.to_str())["model"]


def unigram(scheme: str, *, split: bool = True, byte_fallback: bool = True) -> Tokenizer:
    """As in T5 or XLM-R, with and without byte fallback: a run of unknown characters is one piece to the offsets."""
    vocab = [(piece, -8 - i / 100) for i, piece in enumerate(trained_bpe()["vocab"])]
    if byte_fallback:
        vocab += [(byte, -20.0) for byte in BYTES]
    bare = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=byte_fallback))
    bare.pre_tokenizer, bare.decoder = metaspace(scheme, split=split)
    return special(bare)


def sentencepiece_bpe() -> Tokenizer:
    """A BPE with byte fallback whose words begin with "▁"; without what makes it one family's."""
    model = trained_bpe()
    vocab = model["vocab"] | {byte: len(model["vocab"]) + i for i, byte in enumerate(BYTES)}
    merges = [tuple(pair) for pair in model["merges"]]
    return special(Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token=UNKNOWN, fuse_unk=True)))


def llama_bpe(scheme: str, *, split: bool) -> Tokenizer:
    bare = sentencepiece_bpe()
    bare.pre_tokenizer, bare.decoder = metaspace(scheme, split=split)
    return bare


def legacy_llama_bpe() -> Tokenizer:
    """Llama 2 before `prepend_scheme`: a normalizer writes the "▁", also where the text begins with a space."""
    bare = sentencepiece_bpe()
    bare.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    bare.decoder = decoders.Sequence(parts)
    return bare


def gemma_bpe() -> Tokenizer:
    """No space in front of a text, and no cut between words."""
    bare = sentencepiece_bpe()
    bare.normalizer = normalizers.Replace(" ", "▁")
    bare.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return bare


def wordpiece() -> Tokenizer:
    """As in BERT: lowercase, no accents, every Chinese character a word of its own."""
    words = [piece.lower() for piece in trained_bpe()["vocab"] if piece not in SPECIAL]
    words = [piece[1:] if piece.startswith("▁") else "##" + piece for piece in words]
    words += [character for character in "".join(words) if character != "#"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*SPECIAL, *filter(None, words)]))}
    bare = Tokenizer(models.WordPiece(vocab, unk_token=UNKNOWN))
    bare.normalizer, bare.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    bare.decoder = decoders.WordPiece(cleanup=False)
    return special(bare)


def roberta_bpe() -> Tokenizer:
    """Byte-level, with a space in front of every text."""
    bare = train_tokenizer().backend_tokenizer
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bare.post_processor = processors.ByteLevel(trim_offsets=True)
    return bare


def composing_bpe() -> Tokenizer:
    """Byte-level as Qwen's: a letter and the accent behind it become one character first."""
    bare = train_tokenizer().backend_tokenizer
    bare.normalizer = normalizers.NFC()
    return bare


def unsplit_byte_bpe() -> Tokenizer:
    """Byte-level without a cut between words, so that tokens reach across them and across characters."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bare.decoder = decoders.ByteLevel()
    bare.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    bare.train_from_iterator([*TEXTS, "東京都市🗼👩‍🚀" * 3, "a Paris a Lima a Peru"], trainer)
    return bare


class EmptySpans(PreTrainedTokenizerFast):
    """As some versions for Llama 3: tokens whose span is empty, all of them or only those that end a character."""

    all_empty = True

    def __call__(self, text: str, **options) -> BatchEncoding:
        encoded = super().__call__(text, **options)
        spans = encoded.get("offset_mapping", [])
        for i in reversed(range(len(spans))):
            if self.all_empty or spans[i] == spans[i - 1]:
                spans[i] = spans[i][:1] * 2
        return encoded


class SomeEmptySpans(EmptySpans):
    all_empty = False


class SlowPieces(PreTrainedTokenizer):
    """The longest known piece at each step, bytes for the rest. Puts "▁" in front of every text, whose own leading
    spaces are lost, and adds BOS and EOS."""

    PIECES = ("▁Paris", "Pari", "Par", "s▁is", "▁the▁", "▁Is", "▁São", "ão▁P", "aulo", "東", "京都", "▁a", "é?", "▁")

    def __init__(self, **options) -> None:
        self.pieces = {piece: i for i, piece in enumerate([*SPECIAL, *self.PIECES, *BYTES])}
        super().__init__(bos_token=START, eos_token=END, unk_token=UNKNOWN, **options)

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.pieces)

    def _tokenize(self, text: str) -> list[str]:
        rest, found = "▁" + text.lstrip(" ").replace(" ", "▁"), []
        while rest:
            fitting = [piece for piece in self.PIECES if rest.startswith(piece)]
            found += [max(fitting, key=len)] if fitting else [f"<0x{byte:02X}>" for byte in rest[0].encode()]
            rest = rest[len(max(fitting, key=len)) if fitting else 1 :]
        return found

    def _convert_token_to_id(self, token: str) -> int:
        return self.pieces[token]

    def _convert_id_to_token(self, index: int) -> str:
        return list(self.pieces)[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return b"".join(map(piece_bytes, tokens)).decode(errors="replace").removeprefix(" ")

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None) -> list[int]:
        return [self.bos_token_id, *token_ids_0, self.eos_token_id]


class SlowWords(SlowPieces):
    """Lowercase words in pieces of three characters, the further ones behind "##", decoded with one space between."""

    def _tokenize(self, text: str) -> list[str]:
        found = []
        for word in text.lower().split():
            found += [("##" if i else "") + word[i : i + 3] for i in range(0, len(word), 3)]
        return found

    def _convert_token_to_id(self, token: str) -> int:
        return self.pieces.setdefault(token, len(self.pieces))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return " ".join(tokens).replace(" ##", "")


class Slow(PreTrainedTokenizer):
    """Any tokenizer of the `tokenizers` library behind the slow interface: the same ids, no offsets."""

    def __init__(self, bare: Tokenizer, **options) -> None:
        self.bare = bare
        super().__init__(**options)

    @property
    def vocab_size(self) -> int:
        return self.bare.get_vocab_size()

    def get_vocab(self) -> dict[str, int]:
        return self.bare.get_vocab()

    def _tokenize(self, text: str) -> list[str]:
        return self.bare.encode(text, add_special_tokens=False).tokens

    def _convert_token_to_id(self, token: str) -> int:
        return self.bare.token_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.bare.id_to_token(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.bare.decoder.decode(tokens)


def piece_bytes(token: str) -> bytes:
    """What a token of a SentencePiece vocabulary stands for."""
    return bytes([int(token[3:5], 16)]) if token in BYTES else token.replace("▁", " ").encode()


def byte_level_bytes(token: str) -> bytes:
    """What a token of a byte-level vocabulary stands for: GPT-2 shows each byte as a character of its own."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in shown}
    table |= {chr(256 + i): byte for i, byte in enumerate(byte for byte in range(256) if byte not in shown)}
    return bytes(table[character] for character in token)


BYTE_LEVEL: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "gpt2": train_tokenizer,
    "bos": lambda: train_tokenizer(bos=True),
    "chatml": lambda: train_tokenizer(chat=True),
    "roberta": lambda: wrapped(roberta_bpe()),
    "unsplit": lambda: wrapped(unsplit_byte_bpe()),
    "empty spans": lambda: EmptySpans(tokenizer_object=train_tokenizer().backend_tokenizer),
    "some empty spans": lambda: SomeEmptySpans(tokenizer_object=unsplit_byte_bpe()),
    "slow unsplit": lambda: Slow(unsplit_byte_bpe()),
}
SENTENCEPIECE: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "unigram always": lambda: wrapped(unigram("always"), ends="<s> $A </s>"),
    "unigram first": lambda: wrapped(unigram("first"), ends="$A </s>"),
    "unigram never": lambda: wrapped(unigram("never")),
    "unigram unsplit": lambda: wrapped(unigram("first", split=False), ends="<s> $A"),
    "llama always": lambda: wrapped(llama_bpe("always", split=True), ends="<s> $A"),
    "llama first": lambda: wrapped(llama_bpe("first", split=False), ends="<s> $A"),
    "llama never": lambda: wrapped(llama_bpe("never", split=False)),
    "llama legacy": lambda: wrapped(legacy_llama_bpe(), ends="<s> $A"),
    "gemma": lambda: wrapped(gemma_bpe(), ends="<s> $A"),
    "llama chat": lambda: wrapped(llama_bpe("first", split=False), ends="<s> $A", chat=LLAMA2),
    "legacy chat": lambda: wrapped(legacy_llama_bpe(), ends="<s> $A", chat=LLAMA2),
    "zephyr": lambda: wrapped(llama_bpe("first", split=False), ends="<s> $A", chat=ZEPHYR),
    "slow": SlowPieces,
    "slow unigram": lambda: Slow(unigram("always", split=False)),
}
LOSSY: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "wordpiece": lambda: wrapped(wordpiece(), ends="<s> $A </s>"),
    "composing": lambda: wrapped(composing_bpe()),
    "unigram unknown": lambda: wrapped(unigram("always", byte_fallback=False), ends="$A </s>"),
    "slow words": SlowWords,
}
