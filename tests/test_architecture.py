"""The house holds: imports run one way, and only `models/` reaches into transformers."""

import ast
import io
import re
import tokenize
from functools import cache
from pathlib import Path

import pytest

import editlib

ROOT = Path(editlib.__file__).parent
FLOORS = [
    {"errors", "answers", "version"},
    {"requests", "files", "settings", "distributed"},
    {"models", "hparams", "data", "shelf"},
    {"training", "stats"},
    {"algorithms"},
    {"export"},
    {"reports", "workbench"},
    {"evaluation", "editing", "finding"},
    {"facts", "tofu", "attacks", "ability", "baselines", "chain"},
    {"jobs", "comparison", "benches"},
    {"cli"},
    {"__main__", "__init__"},
]
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
FILES = sorted(ROOT.rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    """Each file is parsed once for all tests."""
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part(module: str) -> str | None:
    pieces = module.split(".")
    return pieces[1] if pieces[0] == "editlib" and len(pieces) > 1 else None


def test_every_package_has_its_floor():
    inside = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in FILES}
    assert inside == set(LEVEL)
    assert len(list(ROOT.glob("*.py"))) <= 11


def test_the_picture_for_contributors_shows_the_floors():
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    picture = re.search(r"```text\n(.*?)```", text, re.DOTALL)[1]
    drawn = [set(line.replace(",", " ").split()) for line in picture.strip().splitlines()]
    assert drawn[::-1] == FLOORS[:-1]


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
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", path


def test_traits_of_an_algorithm_are_asked_of_its_settings():
    """Outside `hparams/` nobody asks which class settings are of."""
    for path in FILES:
        if path.relative_to(ROOT).parts[0] == "hparams":
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
                assert "HyperParams" not in ast.unparse(node.args[1]), f"{path}: {ast.unparse(node)}"
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
                named = ast.unparse(node.args[0]) in ("hparams", "hp") and isinstance(node.args[1], ast.Constant)
                assert not named, f"{path}: {ast.unparse(node)}"


def test_no_device_literals():
    for path in FILES:
        for node in ast.walk(tree(path)):
            assert not (isinstance(node, ast.Constant) and str(node.value).startswith("cuda")), path


def test_public_names_exist():
    for name in editlib.__all__:
        assert getattr(editlib, name).__module__.startswith("editlib.")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = editlib.nothing


def test_no_module_imports_itself_through_others():
    known = {".".join(("editlib", *path.relative_to(ROOT).with_suffix("").parts)): path for path in FILES}
    known = {name.removesuffix(".__init__"): path for name, path in known.items()}
    arrows = {name: (imports(path) & known.keys()) - {name} for name, path in known.items()}
    arrows = {name: {other for other in others if not name.startswith(f"{other}.")} for name, others in arrows.items()}
    done: set[str] = set()
    while free := {name for name, others in arrows.items() if name not in done and others <= done}:
        done |= free
    assert done == known.keys()


def code_lines(function: ast.FunctionDef, text: str) -> int:
    """How many lines of a function's body hold code: neither its docstring, nor comments, nor blank lines."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    if not body:
        return 0
    nothing = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    last = function.end_lineno or 0
    found = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in nothing]
    lines = {line for token in found for line in range(token.start[0], token.end[0] + 1)}
    return len(lines & set(range(body[0].lineno, last + 1)))


def test_files_have_one_subject():
    lengths = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("\n") for path in FILES}
    assert not {name: lines for name, lines in lengths.items() if lines >= 400}


def defined_type(node: ast.AST) -> str | None:
    """The name of the class, or of the type that is made up of others, that a statement defines."""
    if isinstance(node, ast.ClassDef):
        return node.name
    if not isinstance(node, ast.Assign) or "TypeVar(" in ast.unparse(node.value):
        return None
    name = ast.unparse(node.targets[0])
    return name if re.fullmatch("[A-Z]+[a-z][A-Za-z]*", name) else None


def test_a_type_name_means_one_thing():
    homes: dict[str, list[str]] = {}
    for path in FILES:
        for node in tree(path).body:
            if (name := defined_type(node)) is not None:
                homes.setdefault(name, []).append(str(path.relative_to(ROOT)))
    assert not {name: places for name, places in homes.items() if len(places) > 1}


def test_numerical_code_says_why():
    """At least 50 comments for 1,000 lines of code, so that a reader of the papers can follow."""
    for package in ("algorithms", "models"):
        texts = [path.read_text(encoding="utf-8") for path in FILES if path.relative_to(ROOT).parts[0] == package]
        lines = sum(bool(line.strip()) for text in texts for line in text.splitlines())
        tokens = (token for text in texts for token in tokenize.generate_tokens(io.StringIO(text).readline))
        assert sum(token.type == tokenize.COMMENT for token in tokens) >= 50 * lines / 1000, package


def test_functions_are_short_lists_of_named_steps():
    """At most 40 lines of code each."""
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno > 40:
                assert code_lines(node, text) <= 40, f"{path}: {node.name}"


NOT_VERBS = {
    "a",
    "all",
    "an",
    "any",
    "each",
    "every",
    "for",
    "how",
    "keys",
    "logits",
    "of",
    "one",
    "operations",
    "prompts",
    "rows",
    "seconds",
    "the",
    "those",
    "tokens",
    "values",
    "what",
    "where",
    "whether",
}


def is_property(node: ast.AST) -> bool:
    return any("property" in ast.unparse(one) for one in getattr(node, "decorator_list", ()))


def test_docstrings_start_with_a_verb():
    """Those of functions and classes, in the third person; a property is named by what it is."""
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not is_property(node):
                first = (ast.get_docstring(node) or "Says").split()[0].rstrip(",")
                assert re.fullmatch("[A-Z][a-z-]*s", first) and first.lower() not in NOT_VERBS, (
                    f"{path}: {node.name}: {first}"
                )


# fmt: off
OTHER_VERBS = {
    "Access", "Aim", "Attack", "Bound", "Cache", "Evaluate", "Export", "Fine-tune", "Invert", "Judge", "Locate",
    "Observe", "Recognise", "Revoke", "Save", "Store", "Stream", "Vary",
}
# fmt: on
"""Verbs that modules start with and no function does."""


def test_modules_say_first_what_they_do():
    """In the imperative, with a verb that some function starts with in the third person; phases are the paper's."""
    docstrings = {
        ast.get_docstring(node)
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not is_property(node)
    }
    third_person = {text.split()[0].rstrip(",") for text in docstrings if text}
    for path in FILES:
        text = ast.get_docstring(tree(path))
        if path.name in ("__init__.py", "__main__.py") or text is None or re.match(r"Phase II?: ", text):
            continue
        verb = text.split()[0].rstrip(",")
        forms = {f"{verb}s", f"{verb}es", re.sub("y$", "ies", verb)}
        assert verb in OTHER_VERBS or forms & third_person, f"{path}: {verb}"
