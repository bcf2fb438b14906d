"""The pages: links resolve, the reference is what the code says, sentences are short, figures have a day."""

import importlib.util
import re
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

import editlib
from editlib.attacks.registry import ATTACKS
from editlib.baselines import BASELINES
from editlib.cli import app
from editlib.requests.request import EditRequest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])
PAGES = [page for page in PAGES if "_build" not in page.parts]
REFERENCE = sorted((DOCS / "reference").glob("*.md"))
SHORT = [page for page in PAGES if page.name not in ("CHANGELOG.md", "CONTRIBUTING.md")]
LONGEST = 25  # words of a sentence
GENERATED = re.compile(r"<!-- generated: ([\w-]+) -->.*?<!-- end -->", re.DOTALL)


def name(page):
    return str(page.relative_to(ROOT))


def without_code(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """The anchors of a page's headings, as GitHub and MyST make them."""
    heads = re.findall(r"^#{1,4} (.+)$", without_code(page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def links(page):
    return re.findall(r"\]\((?!https?:)([^)\s]+)\)", without_code(page.read_text("utf-8")))


def sentences(text):
    """The prose of a page, sentence by sentence: no code, tables, headings, links' targets or generated blocks."""
    text = without_code(GENERATED.sub("", text))
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    text = re.sub(r"^(?:[|#<!]|    \S*[=‖]|---).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "code", text))
    for block in re.split(r"\n\s*\n|^\s*(?:[-*]|\d+\.) ", text, flags=re.MULTILINE):
        yield from (part for part in re.split(r"(?<=[.!?])(?:\*\*|[\"')])*\s+", block.strip()) if part)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_inside_the_repository_leads_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_a_link_that_leads_nowhere_would_be_found(tmp_path):
    (tmp_path / "other.md").write_text("# Some head, with a comma\n")
    page = tmp_path / "page.md"
    page.write_text("[a](other.md#some-head-with-a-comma) [b](https://x.org) ![c](no.png)\n```\n[d](code.md)\n```\n")
    assert links(page) == ["other.md#some-head-with-a-comma", "no.png"]
    assert anchors(tmp_path / "other.md") == {"some-head-with-a-comma"}


@pytest.mark.parametrize("path", sorted(Path(editlib.__file__).parent.rglob("*.*")), ids=str)
def test_pages_that_the_package_names_exist(path):
    if path.suffix in (".py", ".json", ".html"):
        for page in re.findall(r"\bdocs/[\w/-]+\.(?:md|toml)", path.read_text("utf-8")):
            assert (ROOT / page).is_file(), page


def generator():
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_says_what_the_code_says():
    made = generator()
    assert {block for page in REFERENCE for block in GENERATED.findall(page.read_text("utf-8"))} == set(made.BLOCKS)
    for page in REFERENCE:
        text = page.read_text("utf-8")
        assert made.generated(text) == text, f"{name(page)} is stale: run python docs/generate.py"


def test_the_reference_names_everything_public():
    """Independent of the generator: the names themselves, looked for in the pages."""
    texts = {page.stem: page.read_text("utf-8") for page in REFERENCE}
    assert not [one for one in editlib.__all__ if f"### `{one}`" not in texts["python"]]
    assert not [one for one in ATTACKS if texts["attacks"].count(f"`{one}`") < 2]  # in words, and its limits
    assert not [one for one in BASELINES if texts["baselines"].count(f"`{one}`") < 2]  # in words, and its loss
    assert not [
        one
        for one in fields(EditRequest)
        if one.init and one.name != "source" and f"`{one.name}`" not in texts["file-formats"]
    ]
    told = CliRunner().invoke(app, ["chain", "--help"]).output
    for command in ("init", "add", "undo", "revoke", "verify", "export", "status", "log"):
        assert command in told and f"### `editlib chain {command}`" in texts["cli"]


def test_the_readme_fits_one_screen_or_two_and_says_the_limits_first():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 110
    assert text.index("hidden, not erased") < text.index("## Install") < text.index("## I want to")
    mapped = {(ROOT / link.partition("#")[0]).resolve() for link in links(ROOT / "README.md")}
    assert {*(DOCS / "how-to").glob("*.md"), *REFERENCE} <= mapped


@pytest.mark.parametrize("page", SHORT, ids=name)
def test_no_sentence_is_long(page):
    long = [one for one in sentences(page.read_text("utf-8")) if len(one.split()) > LONGEST]
    assert not long, "\n".join(long)


@pytest.mark.parametrize("page", sorted((DOCS / "how-to").glob("*.md")), ids=name)
def test_a_how_to_page_says_what_it_is_for_and_holds_no_lab_log(page):
    lead = page.read_text("utf-8").split("\n\n")[1]
    assert lead.startswith("You want ") and "You need" in lead.replace("\n", " "), lead
    rows = [line for line in page.read_text("utf-8").splitlines() if line.startswith("|")]
    assert not [row for row in rows if len(re.findall(r"\| *-?[.\d]+ *(?=\|)", row)) > 2]  # a row of figures


def sections(page):
    """The sections of a page, each from a heading of any depth to the next."""
    return re.split(r"^(?=#)", page.read_text("utf-8"), flags=re.MULTILINE)


def has_figures(section):
    """Whether one of its tables has a number in a cell of its own."""
    return re.search(r"^\|.*\| *\**[-+]?\d*\.?\d+\b", section, re.MULTILINE) is not None


MEASURED = [page for page in sorted((DOCS / "results").glob("*.md")) if page.name != "README.md"]


@pytest.mark.parametrize("page", MEASURED, ids=name)
def test_measured_tables_have_a_day_a_commit_a_machine_and_a_model(page):
    tables = [section for section in sections(page) if has_figures(section)]
    assert tables
    for section in tables:
        assert re.search(r"[Rr]ecorded\s+\d{4}-\d\d-\d\d\b[^.]*?\bcommit\s+`[0-9a-f]{7}`", section), section[:200]
    text = page.read_text("utf-8")
    assert re.search(r"\bcores?\b|\bH[12]00\b|was\s+not\s+written\s+down", text)
    assert re.search(r"SmolLM2|Gemma", text)
