"""The language: no private or translated turns of phrase in docstrings, comments, messages, help texts and pages.

Each pattern has once made a sentence that only its author understood. A text that needs one of these words in its
plain meaning can nearly always say it more simply.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest
from test_pages import PAGES, ROOT, without_code

OTHERS = [ROOT / "editlib" / "data" / "README.md", ROOT / "stats" / "README.md"]
CODE = sorted([*(ROOT / "editlib").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "docs").glob("*.py")])

PRIVATE = {
    r"\bbehind\b": "after",
    r"\bin front\b": "before",
    r"\b(?:stands?|stood)\b(?! for\b)(?!-)": "is, lies",
    r"\b(?:comes?|came) to\b": "amounts to, reaches",
    r"\b(?:comes?|came) about\b": "is made, is measured",
    r"\bwhat (?:comes|came|becomes|became) of\b": "the result of",
    r"\bof (?:those|these|them) that\b": "among the ... that, of the ... that",
    r"\b(?:those|them|ones) that there are\b": "name the thing",
    r"\banew\b": "again",
    r"\bbesides (?:the|its|their|a|an|of|what|being|this|that)\b": "in addition to",
    r"\b(?:is|are|was|were|be|being) (?:told(?! apart)|said|spoken)\b": "is reported, is generated",
    r"\bat hand\b": "available, in memory",
    r"\b(?:go|goes|went|gone|going) on\b": "continues, resumes",
    r"\bto the bit\b": "bit for bit",
    r"\bputs? back\b|\bputs? (?:it|them) back\b": "restored",
    r"\bas (?:\w+'?s? ){1,3}(?:has|have) it\b": "as in",
    r"\botherwise than\b": "differently from",
    r"(?<![Tt]here )\b(?:is|are|was|were) no "
    r"(?!longer|more|less|one|other|such|larger|smaller|higher|lower|better|worse)[a-z]": "is not a",
    r"\ball but\b|\bbut for\b": "all except, except",
    r"\b(?-i:[Mm]end(?:s|ed|ing)?)\b": "fix",
    r"\bsurroundings?\b": "context templates",
    r"\bessence\b(?! drift)": "KL prompts",
    r"\bknobs?\b": "setting",
    r"\bdealt\b": "split, shared",
    r"\b(?:can|cannot|could|to) be had\b": "is available, can be loaded",
    r"\bas (?:it is|they are) (?:now|today)\b": "current",
    r"\bknows? no\b": "lacks, has no",
    r"\brooms?\b": "space; package",
    r"\bgets \w+\.(?:json|md|html)\b": "folder for",
    r"\bwhoever\b": "anyone who",
}
"""A regular expression for each turn of phrase, and what to write instead."""


ANY = re.compile("|".join(f"(?:{pattern})" for pattern in PRIVATE), re.IGNORECASE)


def found(text: str) -> list[str]:
    """The turns of phrase in a text, with some words around each, and what to write instead."""
    flat = " ".join(text.split())
    hits = []
    for hit in ANY.finditer(flat):
        instead = next(words for pattern, words in PRIVATE.items() if re.search(pattern, hit[0], re.IGNORECASE))
        hits.append(f"...{flat[max(0, hit.start() - 40) : hit.end() + 40]}... -> {instead}")
    return hits


def prose_of(path: Path) -> list[str]:
    """What people read: a module's docstrings, comments and texts of three words or more, or a page's paragraphs."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return re.split(r"\n\s*\n|\n(?=[|#-])", re.sub(r"`[^`\n]*`", "code", without_code(text)))
    texts = [
        node.value
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    return [one for one in (*texts, *comments) if len(one.split()) > 2]


@pytest.mark.parametrize("path", [*CODE, *PAGES, *OTHERS], ids=lambda path: str(path.relative_to(ROOT)))
def test_the_language_is_the_fields(path):
    hits = [hit for text in prose_of(path) for hit in found(text)]
    assert not hits, "\n".join(hits)


@pytest.mark.parametrize(
    "text",
    [
        "What of a batch is always at hand.",
        "Mean of those that there are.",
        "The run goes on\nwhere it stood.",
        "Nothing is put behind an elision, and that is said.",
        "statistics are made as MEMIT has it",
        "this folder is no chain",
        "An update that is the same to the bit; all but the last.",
    ],
)
def test_a_private_turn_is_found(text):
    assert found(text)


@pytest.mark.parametrize(
    "text",
    [
        "`K_c` stands for the constraints. There is no token; it is no longer than the others.",
        "Mean of the values that are not `None`.",
        "The weights are restored, bit for bit, and a later call resumes.",
    ],
)
def test_plain_sentences_pass(text):
    assert not found(text)


def test_docstrings_comments_and_messages_are_all_looked_at(tmp_path):
    (tmp_path / "module.py").write_text(
        '"""A docstring of a module."""\nx = 1  # a comment of some length\nf"a message {x} said so"\n'
    )
    (tmp_path / "page.md").write_text(
        "A first paragraph.\n\n```\ncode behind\n```\n\n- an item\n- another `behind` one\n"
    )
    assert prose_of(tmp_path / "module.py") == ["A docstring of a module.", "# a comment of some length"]
    assert [text.strip() for text in prose_of(tmp_path / "page.md")] == [
        "A first paragraph.", "- an item", "- another code one",
    ]  # fmt: skip
