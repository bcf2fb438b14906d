"""Turn Wikipedia's markup into plain prose, one string per paragraph.

Not a renderer. A sentence with a gap is worse training text than no sentence. So anything that cannot be turned into
words (a formula, an unknown template) leaves a mark, and a paragraph with a mark is dropped.
"""

from __future__ import annotations

import html
import re

MIN_WORDS = 20
HOLE = "\ufffc"  # marks a gap in running text

_REDIRECT = re.compile(r"\s*#\s*redirect\b", re.I)
_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.S)
_REF_EMPTY = re.compile(r"<ref\b[^<>]*/>", re.I)
_REF = re.compile(r"<ref\b[^<>]*>.*?</ref\s*>", re.I | re.S)
_BLOCK = re.compile(
    r"<(math|chem|source|syntaxhighlight|pre|gallery|imagemap|timeline|score|hiero|poem|ol|ul|s|del)\b[^<>]*>"
    r".*?</\1\s*>",
    re.I | re.S,
)
_SUP = re.compile(r"<sup\b[^<>]*>(.*?)</sup\s*>", re.I)
_BREAK = re.compile(r"<(?:br|hr)\b[^<>]*>", re.I)
_TAG = re.compile(r"</?[a-z][a-z0-9]*\b[^<>]*>", re.I)
_TEMPLATE = re.compile(r"\{\{([^{}]*)\}\}")
_TABLE = re.compile(r"\{\|(?:(?!\{\||\|\}).)*\|\}", re.S)
_WEB_LINK = re.compile(r"\[(?:https?:|ftp:|mailto:)?//[^\s\[\]]*([^\[\]]*)\]", re.I)
_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_NO_TEXT_LINK = re.compile(r"(?:file|image|media|category|template|special)\s*:", re.I)
_LANGUAGE_LINK = re.compile(r"(?:simple|be-x-old|[a-z]{2,3})\s*:")
_MAGIC_WORD = re.compile(r"__[A-Z]+__")
_POSSESSIVE = re.compile(r"(?<!')''(?!')([^'\n]+)'''(?=s\b)")  # ''Title'''s is italics, then 's
_QUOTES = re.compile(r"'{5}|'{2,3}")
_NOT_PROSE = re.compile(r"[=*#:;|!{}\s]|-{4}")  # headings, list items, table rows, indented lines
_DEBRIS = re.compile(rf"\{{\{{|\}}\}}|\{{\||\|\}}|\[\[|\]\]|https?://|www\.|</?[a-z]|{HOLE}", re.I)
_END = re.compile(r"[.!?][\"'”’)\]]*$")

# Templates that render as a footnote, a pronunciation or nothing: removed without a mark.
_SILENT = re.compile(
    r"(?:cit|cite\b|sfn|harv|vcite|rp$|refn?$|efn|note|nb$|ipa|respell|pron|audio|lang-|nihongo|coord|anchor"
    r"|wayback|dead ?link|fact$|clarify|page needed|when$|who$|which$|by whom|vague|dubious|full|verif"
    r"|failed|not in|better source|specify|self-published|original research|pov|update|clear|icd|oclc|isbn"
    r"|flagicon|increase|decrease|wikt|main$|see also|further|sic$|zwnj|weasel|or$|disputed|synthesis)",
    re.I,
)
_UNITS = {"sqmi": "sq mi", "sqkm": "km²", "km2": "km²", "m2": "m²", "C": "°C", "F": "°F"}
_RANGES = {"-": "–", "–": "–", "to": " to ", "and": " and ", "or": " or ", "by": " by ", "x": " × "}
_SUPERSCRIPT = str.maketrans("0123456789+-−", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻")


def clean_wiki(markup: str) -> list[str]:
    """Extracts the prose paragraphs of one article, each of at least 20 words and with whole sentences; [] for a
    redirect."""
    if _REDIRECT.match(markup):
        return []
    text = _COMMENT.sub("", markup)
    text = _REF.sub("", _REF_EMPTY.sub("", text))
    text = _BLOCK.sub(HOLE, text)
    text = _until_stable(_TEMPLATE, _template_text, text)
    text = _until_stable(_TABLE, lambda match: "", text)
    text = _WEB_LINK.sub(lambda match: match[1].strip(), text)
    text = _until_stable(_LINK, _link_text, text)
    text = _SUP.sub(lambda match: match[1].translate(_SUPERSCRIPT), text)
    text = _MAGIC_WORD.sub("", _TAG.sub("", _BREAK.sub(" ", text)))
    text = _POSSESSIVE.sub(r"\1'", text)
    text = _QUOTES.sub("", re.sub(r"(?<!')'{4}(?!')", "'", text))
    paragraphs = (_tidy(line) for line in text.split("\n") if not _NOT_PROSE.match(line))
    return [p for p in paragraphs if _is_prose(p)]


def _until_stable(pattern: re.Pattern, replace, text: str) -> str:
    """Replaces innermost matches first, so that nesting of any depth unwinds."""
    count = 1
    while count:
        text, count = pattern.subn(replace, text)
    return text


def _template_text(match: re.Match) -> str:
    name, *arguments = (part.strip() for part in match[1].split("|"))
    name = name.lower()
    values = [a for a in arguments if not re.match(r"[\w -]+=", a)]  # the unnamed ones
    words = None
    if name in ("convert", "cvt"):
        words = _measure(values)
    elif name in ("lang", "transl", "nowrap", "small", "smaller", "vanchor", "nobr") and values:
        words = values[0] if name in ("small", "smaller", "vanchor", "nowrap", "nobr") else values[-1]
    elif name == "as of" and values:
        words = "As of " + values[0]
    elif name in ("nbsp", "spaces", "'s"):
        words = "'s" if name == "'s" else " "
    elif _SILENT.match(name):
        words = ""
    return HOLE if words is None else words


def _measure(values: list[str]) -> str | None:
    """Turns `5|to|10|km|mi` into "5 to 10 km"; `None` for another form."""
    out = ""
    for i, value in enumerate(values):
        if i % 2 == 0 and re.fullmatch(r"[-−]?[\d,.]+", value):
            out += value
        elif i % 2 and value in _RANGES:
            out += _RANGES[value]
        elif i % 2 and re.fullmatch(r"°?[A-Za-z]+2?", value):
            return f"{out} {_UNITS.get(value, value)}"
        else:
            break
    return None


def _link_text(match: re.Match) -> str:
    target, bar, label = match[1].partition("|")
    target = target.strip()
    if _NO_TEXT_LINK.match(target) or (not bar and _LANGUAGE_LINK.match(target)):
        return ""
    return (label.rpartition("|")[2] if bar else target.lstrip(":")).strip()


def _tidy(line: str) -> str:
    """Tidies entities, spaces, and the empty brackets and double commas that removed templates leave."""
    text = " ".join(html.unescape(line).replace("\u200b", "").split())
    text = re.sub(rf"\([\s,;:{HOLE}]*\)", "", text)
    text = re.sub(r"\((?:\s*[,;:])+\s*", "(", text)
    text = re.sub(r"(?:[,;]\s*)+\)", ")", text)
    text = re.sub(r"\(\s+", "(", text)
    text = re.sub(r"\s+([,.;:!?)])(?=\s|$)", r"\1", text)
    text = re.sub(r",(?:\s*,)+", ",", text)
    return " ".join(text.split())


def _is_prose(text: str) -> bool:
    return len(text.split()) >= MIN_WORDS and bool(_END.search(text)) and not _DEBRIS.search(text)
