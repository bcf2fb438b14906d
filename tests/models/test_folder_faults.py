"""A damaged model folder: one line that names the folder and the file at fault, and exit code 2."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_llama, train_tokenizer

from editlib.errors import ModelError, RequestError
from editlib.models.loading import load
from editlib.models.prompts import PromptFormat
from editlib.models.source import read_config
from editlib.models.weights import save_model

CONFIG, TOKENIZER, SETTINGS = "config.json", "tokenizer.json", "tokenizer_config.json"
GENERATION, WEIGHTS, INDEX = "generation_config.json", "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A saved tiny model; not to be changed."""
    path = tmp_path_factory.mktemp("whole") / "tiny"
    path.mkdir()
    save_model(make_llama(), train_tokenizer(chat=True), path)
    return path


@pytest.fixture
def model(whole, tmp_path):
    """A copy to damage."""
    return shutil.copytree(whole, tmp_path / "model")


def refused(folder, file):
    with pytest.raises(ModelError) as error:
        load(str(folder), progress=False)
    said = str(error.value)
    assert str(folder) in said and file in said, said
    assert "\n" not in said and len(said) < 420, said
    return said


def changed(path, key, value):
    """Sets one field of a JSON file; a dot goes one level down."""
    content = json.loads(path.read_text())
    *above, last = key.split(".")
    inner = content
    for name in above:
        inner = inner[name]
    inner[last] = value
    path.write_text(json.dumps(content))


def without(path, key):
    content = json.loads(path.read_text())
    del content[key]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "content", [b"", b"null", b"3", b'"x"', b"[1]", b"{nope", b"\0\0", b'{"a": "\xff"}', b"[" * 5000]
)
@pytest.mark.parametrize("file", [CONFIG, TOKENIZER, SETTINGS, GENERATION, INDEX])
def test_a_file_that_holds_no_object(model, file, content):
    (model / file).write_bytes(content)
    if file == INDEX:
        (model / WEIGHTS).unlink()
    refused(model, file)


@pytest.mark.parametrize("file", [CONFIG, TOKENIZER, SETTINGS, GENERATION, WEIGHTS])
@pytest.mark.parametrize("share", [0.3, 0.98])
def test_a_truncated_file(model, file, share):
    whole = (model / file).read_bytes()
    (model / file).write_bytes(whole[: int(share * len(whole))])
    refused(model, file)


VALUES = (None, [], [1], {}, "x", "", True, 1.5, 0, -1, 10**12)
FIELDS = ("model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim",
          "intermediate_size", "vocab_size", "hidden_act", "rms_norm_eps", "rope_parameters", "dtype", "eos_token_id",
          "max_position_embeddings", "tie_word_embeddings")  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_the_configuration_with_another_value(model, field):
    """Any value either loads or is refused in one line that names the file."""
    before = (model / CONFIG).read_text()
    refusals = 0
    for value in VALUES:
        (model / CONFIG).write_text(before)
        changed(model / CONFIG, field, value)
        try:
            load(str(model), progress=False)
        except ModelError as error:
            refusals += 1
            assert str(model) in str(error) and "\n" not in str(error)
            assert CONFIG in str(error) or "the weights" in str(error), error
    assert refusals


@pytest.mark.parametrize("field", ["hidden_size", "num_attention_heads", "vocab_size", "intermediate_size"])
def test_a_field_that_is_missing(model, field):
    """The default is another model's: the weights do not fit it."""
    without(model / CONFIG, field)
    assert "the weights" in refused(model, CONFIG)


def test_numbers_that_no_model_has_are_refused_before_it_is_built(model):
    changed(model / CONFIG, "num_hidden_layers", 10**12)
    with pytest.raises(ModelError, match=r"config\.json: num_hidden_layers is 1000000000000, expected 1 to 10000"):
        read_config(str(model))


BAD_TOKENIZER = [
    *[(TOKENIZER, key, value) for key in ("added_tokens", "model", "model.vocab", "model.merges", "version")
      for value in ("x", 0, {})],
    *[(TOKENIZER, key, value) for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder", "padding")
      for value in ([], "x", 7)],
    *[(SETTINGS, "eos_token", value) for value in (0, [], {})],
    *[(SETTINGS, "model_max_length", value) for value in ("x", [], {})],
]  # fmt: skip


@pytest.mark.parametrize(("file", "key", "value"), BAD_TOKENIZER)
def test_a_tokenizer_with_a_value_of_the_wrong_type(model, file, key, value):
    changed(model / file, key, value)
    refused(model, file if file == TOKENIZER else "tokenizer")


@pytest.mark.parametrize("files", [[TOKENIZER], [TOKENIZER, SETTINGS]])
def test_a_missing_tokenizer(model, files):
    for file in files:
        (model / file).unlink()
    refused(model, "tokenizer")


def test_a_tokenizer_of_another_model(model):
    vocab = json.loads((model / TOKENIZER).read_text())["model"]["vocab"]
    changed(model / TOKENIZER, "model.vocab", vocab | {f"more {i}": len(vocab) + i for i in range(50)})
    assert "350 tokens and its embedding 300 rows" in refused(model, "tokenizer")


@pytest.mark.parametrize("template", [0, 3, 1.5, True])
def test_a_chat_template_of_the_wrong_type(model, template):
    (model / "chat_template.jinja").unlink()
    changed(model / SETTINGS, "chat_template", template)
    assert "chat_template" in refused(model, "tokenizer")


@pytest.mark.parametrize("template", ["{% for", "{{ a.b }}", "{{ 1/0 }}", "{{ messages + 1 }}", "{{ messages[9].x }}"])
def test_a_chat_template_that_fails(tok_chat, template):
    tok_chat.chat_template = template
    with pytest.raises(RequestError, match="the chat template cannot be used"):
        PromptFormat.of(tok_chat, None).render("Who?")


@pytest.mark.parametrize("ends", ["x", 1.5, True, {"a": 1}, ["x"], [1, None]])
def test_the_end_of_an_answer_is_no_token(model, ends):
    changed(model / GENERATION, "eos_token_id", ends)
    refused(model, GENERATION)


def split(model, index=None):
    """Stores the weights in two files with an index."""
    tensors = load_file(model / WEIGHTS)
    names = sorted(tensors)
    placed = {name: SHARDS[i % 2] for i, name in enumerate(names)}
    for shard in SHARDS:
        save_file({name: tensors[name] for name in names if placed[name] == shard}, model / shard, {"format": "pt"})
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed} if index is None else index))
    (model / WEIGHTS).unlink()


def test_weights_in_several_files(model):
    split(model)
    load(str(model), progress=False)
    (model / SHARDS[1]).unlink()
    assert "missing" in refused(model, SHARDS[1])


BAD_INDEXES = [
    {"metadata": {}},
    {"weight_map": []},
    {"weight_map": {}},
    {"metadata": {}, "weight_map": {"a": 3}},
    {"metadata": 3, "weight_map": {"a": SHARDS[0]}},
]


@pytest.mark.parametrize("index", BAD_INDEXES)
def test_an_index_of_the_wrong_shape(model, index):
    split(model, index)
    refused(model, INDEX)


def test_an_index_that_names_another_file(model):
    split(model, {"metadata": {}, "weight_map": {"a": "other.safetensors"}})
    refused(model, "other.safetensors")


BAD_WEIGHTS = {
    "empty": b"",
    "no tensors": b"\x08\0\0\0\0\0\0\0{}      ",
    "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n",
}


@pytest.mark.parametrize("content", BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_a_file_without_weights(model, content):
    (model / WEIGHTS).write_bytes(content)
    refused(model, "weights lack" if content.endswith(b" ") else WEIGHTS)


@pytest.mark.parametrize("content", [b"junk", [1, 2]])
def test_weights_of_pytorch(model, content):
    (model / WEIGHTS).unlink()
    path = model / "pytorch_model.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    refused(model, path.name)


@pytest.mark.parametrize("level", [logging.WARNING, logging.ERROR, logging.CRITICAL])
def test_weights_that_are_not_the_configuration_s(model, level):
    """Whatever transformers is told to say (TRANSFORMERS_VERBOSITY), which stays as it was."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(level)
    try:
        _refused_by_shape(model)
        assert logger.level == level
    finally:
        logger.setLevel(before)


def _refused_by_shape(model):
    tensors = load_file(model / WEIGHTS)
    name = "model.layers.2.mlp.down_proj.weight"
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, model / WEIGHTS, {"format": "pt"})
    said = refused(model, "down_proj.weight")
    assert "[31, 64], by config.json [32, 64]" in said


def test_missing_weights_are_not_made_up(model, capfd):
    """Transformers fills them with random numbers, and prints a table."""
    tensors = load_file(model / WEIGHTS)
    save_file({name: some for name, some in tensors.items() if ".3.mlp" not in name}, model / WEIGHTS, {"format": "pt"})
    assert "and 2 more" in refused(model, "the weights lack model.layers.3.mlp.down_proj.weight")
    assert capfd.readouterr().err == ""


DAMAGED = {
    "configuration": lambda model: changed(model / CONFIG, "num_attention_heads", "x"),
    "tokenizer": lambda model: (model / TOKENIZER).write_text("{}"),
    "weights": lambda model: (model / WEIGHTS).write_bytes(b"\0" * 100),
    "generation": lambda model: (model / GENERATION).write_text("[]"),
    "template": lambda model: (model / "chat_template.jinja").write_text("{{ 1/0 }}"),
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("command", ["ask", "unlearn", "stats", "eval", "eval edited", "plan", "attack", "finetune"])
def test_every_command_says_it_in_one_line(call, model, whole, tmp_path, command, damage):
    DAMAGED[damage](model)
    requests, out = tmp_path / "requests.jsonl", tmp_path / "out"
    requests.write_text(json.dumps({"id": "a", "prompt": "Where is {}?", "subject": "Bonn", "answer": "France"}))
    arguments = {
        "ask": ["ask", model, "Who?"],
        "unlearn": ["unlearn", model, "--requests", requests, "--out", out, "--stats-dir", tmp_path / "stats"],
        "stats": ["stats", model, "--layers", 1, "--tokens", 500, "--stats-dir", tmp_path / "stats"],
        "eval": ["eval", model, whole, "--requests", requests, "--out", out],
        "eval edited": ["eval", whole, model, "--requests", requests, "--out", out],
        "plan": ["plan", model],
        "attack": ["attack", model, "--base", whole, "--requests", requests, "--out", out],
        "finetune": ["finetune", model, "--out", out],
    }[command]
    code, _, err = call(*arguments)
    if command in ("stats", "plan") and code == 0:  # they need no prompts, or no weights
        assert damage == "template" or command == "plan"
        return
    assert code == 2, err
    assert len([line for line in err.splitlines() if line.startswith("editlib:")]) == 1, err
    assert "Traceback" not in err
    assert not out.exists()
