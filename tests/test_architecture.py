"""The house holds: imports run one way, and only `models/` reaches into transformers."""

import ast
from pathlib import Path

import pytest

import editlib

ROOT = Path(editlib.__file__).parent
FLOORS = [
    {"errors"},
    {"answers", "request_formats", "subjects", "wiki_markup", "sharding"},
    {"request"},
    {"models", "hparams", "data"},
    {"stats_file"},
    {"stats_store", "moments"},
    {"corpus", "layer_stats", "bundled", "stats_cache"},
    {"self_stats", "algorithms", "training"},
    {"spectrum", "export"},
    {"workbench"},
    {"jobs", "evaluation"},
    {"demo", "chain", "attacks", "ability", "baselines", "finetuning", "tofu"},
    {"sequential", "comparison", "protocols"},
    {"cli"},
    {"__main__", "__init__"},
]
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
FILES = sorted(ROOT.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part(module: str) -> str | None:
    pieces = module.split(".")
    return pieces[1] if pieces[0] == "editlib" and len(pieces) > 1 else None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for module in imports(path):
        other = part(module)
        if other in LEVEL and other != own:
            assert LEVEL[other] < LEVEL[own], f"{own} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_models_touches_what_is_inside_transformers(path):
    if path.relative_to(ROOT).parts[0] == "models":
        return
    assert not {module for module in imports(path) if module.startswith("transformers.models")}
    text = path.read_text(encoding="utf-8")
    for inside in (".self_attn", ".mlp.", "past_key_value.", ".model.layers", "embed_tokens"):
        assert inside not in text, inside


def test_nothing_prints_below_the_command_line():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", path


def test_no_device_literals():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.Constant) and str(node.value).startswith("cuda")), path


def test_public_names_exist():
    for name in editlib.__all__:
        assert getattr(editlib, name).__module__.startswith("editlib.")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = editlib.nothing
