"""Writes the generated blocks of `docs/reference/` from the code: `python docs/generate.py` (`--check` only compares).

A page is Markdown with blocks of the form `<!-- generated: NAME -->` ... `<!-- end -->`. `BLOCKS` maps each name to the
function that makes the text between the two. Everything outside the blocks is written by hand and left alone.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

import editlib
from editlib import cli
from editlib.attacks.registry import ATTACKS
from editlib.baselines import BASELINES
from editlib.evaluation import metrics
from editlib.hparams import ALGORITHMS, available

PAGES = Path(__file__).parent / "reference"
BLOCK = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
SETTINGS = re.compile(r"(HyperParams|Settings|Budget|.Plan|General)$")  # `Plan` alone is a result of `editlib plan`
LIMITS = {"min": "≥", "above": ">", "max": "≤", "below": "<"}


# ---- Markdown


def linked(text: str) -> str:
    """Text with every `docs/PAGE.md` as a link from a reference page."""

    def link(page: re.Match[str]) -> str:
        path = page[1].removeprefix("reference/") if page[1].startswith("reference/") else f"../{page[1]}"
        return f"[{Path(page[1]).stem}]({path})"

    return re.sub(r"`?\bdocs/([\w/-]+\.md)`?", link, text)


def cell(text: Any) -> str:
    """Text for one cell of a table: on one line, with its bars escaped and its pages linked."""
    return linked(" ".join(str(text).split()).replace("|", "\\|"))


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table; its first column is code."""
    head = list(head)
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, *rest in rows:
        lines.append(f"| `{cell(name)}` | {' | '.join(cell(item) for item in rest)} |")
    return "\n".join(lines) + "\n"


def shown(value: Any) -> str:
    """A default as code; "required" for a value that has to be given."""
    if value is MISSING or value is inspect.Parameter.empty:
        return "required"
    value = value.as_posix() if isinstance(value, Path) else getattr(value, "value", value)  # the value of an enum
    if value is None:
        return "none"
    return f"`{value}`" if isinstance(value, str) and value else f"`{value!r}`"


def docstring(thing: Any) -> str:
    """A docstring as Markdown: `Args`, `Returns` and `Raises` become lists."""
    out: list[str] = []
    for line in (inspect.getdoc(thing) or "").splitlines():
        if head := re.fullmatch(r"(Args|Returns|Raises|Yields):", line.strip()):
            out += ["", f"{head[1]}:", ""]
        elif item := re.match(r"    (?! )([\w`*.<>, ]+?): (.*)", line):
            names = ", ".join(f"`{name.strip('` ')}`" for name in item[1].split(","))
            out.append(f"- {names}: {item[2]}")
        elif line.startswith("    ") and line.strip() and out and out[-1].startswith(("- ", "  ")):
            out.append("  " + line.strip())
        else:
            out.append(line.strip())
    return linked(re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip())


def first_paragraph(thing: Any) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


# ---- Commands


def commands() -> Iterator[tuple[str, Any]]:
    """Every command of the typer app with its full name, groups before their commands."""

    def walk(name: str, command: Any) -> Iterator[tuple[str, Any]]:
        yield name, command
        for child, below in getattr(command, "commands", {}).items():
            yield from walk(f"{name} {child}", below)

    yield from walk("editlib", typer.main.get_command(cli.app))


def parameter_row(param: Any) -> tuple[str, str, str]:
    """Name, default and help of one argument or option."""
    if param.param_type_name == "argument":
        name = f"{param.name.upper()}{' ...' if param.nargs != 1 else ''}"
    else:
        name = ", ".join([*param.opts, *param.secondary_opts])
    default = "required" if param.required else shown(param.default)
    if getattr(param, "is_flag", False) and not param.default:
        default = "off"
    return name, "" if default in ("none", "`()`", "`''`") else default, param.help or ""


def cli_block() -> str:
    """Every command with its arguments and options."""
    parts = []
    for name, command in commands():
        paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
        text = linked("\n\n".join(" ".join(part.split()) for part in paragraphs))
        params = [param for param in command.params if not param.hidden and param.name != "help"]
        part = f"{'###' if name.count(' ') > 1 else '##'} `{name}`\n\n{text}\n"
        if params:
            part += "\n" + table(("argument or option", "default", "meaning"), map(parameter_row, params))
        parts.append(part)
    return "\n".join(parts)


# ---- Settings


@cache
def modules() -> tuple[ModuleType, ...]:
    """Every module of the package."""
    names = [info.name for info in pkgutil.walk_packages(editlib.__path__, "editlib.")]
    return (editlib, *(importlib.import_module(name) for name in names if not name.endswith("__main__")))


def settings_classes() -> dict[str, type]:
    """Every public settings dataclass by name: hyper-parameters, settings of jobs, parts of a config."""
    return {
        name: kind
        for module in modules()
        for name, kind in vars(module).items()
        if inspect.isclass(kind) and kind.__module__ == module.__name__ and is_dataclass(kind)
        if SETTINGS.search(name) and not name.startswith("_")
    }


def documented_args(kind: type) -> dict[str, str]:
    """Help texts in the `Args` of a class's docstring; `a, b: text` goes for both."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in docstring(kind).splitlines():
        if item := re.match(r"- (`[\w`, ]+`): (.*)", line):
            names = re.findall(r"`(\w+)`", item[1])
            found |= dict.fromkeys(names, item[2])
        elif line.startswith("  ") and names:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
        else:
            names = []
    return found


def trailing_comments(kind: type) -> dict[str, str]:
    """Help texts in comments at the end of a field's line."""
    pattern = re.compile(r"^    (\w+): [^#\n]+#\s*(?!noqa|fmt)(.+)$", re.MULTILINE)
    return dict(pattern.findall(inspect.getsource(kind)))


def type_name(hint: Any) -> str:
    """A type as a reader writes it: `list[int]`, `float or none`."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(type_name(part) for part in get_args(hint))
    if hint is type(None):
        return "none"
    if get_origin(hint) is Literal:
        return "str"
    return hint.__name__ if inspect.isclass(hint) and not get_args(hint) else re.sub(r"\w+\.(?=\w)", "", str(hint))


def allowed(item: Field[Any], hint: Any) -> str:
    """Type and range of a field."""
    literal = get_args(hint) if get_origin(hint) is Literal else ()
    if choices := item.metadata.get("choices", literal):
        return ", ".join(shown(choice) for choice in choices)
    limits = [f"{sign} {item.metadata[key]}" for key, sign in LIMITS.items() if key in item.metadata]
    return f"{type_name(hint)}{': ' if limits else ''}{', '.join(limits)}"


def settings_table(kind: type) -> str:
    """The fields that a settings class adds or changes, with default, range and meaning; empty where there are none."""
    hints, args, comments = get_type_hints(kind), documented_args(kind), trailing_comments(kind)
    own = inspect.get_annotations(kind)
    rows = []
    for item in fields(kind):
        if item.name not in own or item.name.startswith("_"):
            continue
        default = item.default if item.default_factory is MISSING else item.default_factory()
        text = item.metadata.get("help") or args.get(item.name) or comments.get(item.name, "")
        rows.append((item.name, shown(default), allowed(item, hints[item.name]), text.rstrip(".")))
    return table(("key", "default", "may be", "meaning"), rows) if rows else ""


def summary(kind: type) -> str:
    """The docstring of a settings class without what the table shows."""
    return re.split(r"^(?:Args|Raises):$", docstring(kind), flags=re.MULTILINE)[0].strip()


def hyperparameters_block() -> str:
    """Every key of every algorithm, shared ones first."""
    algorithms = {kind: name for name, kind in ALGORITHMS.items()}
    order: list[type] = []
    for algorithm in algorithms:
        order += [kind for kind in reversed(algorithm.__mro__) if is_dataclass(kind) and kind not in order]
    order.sort(key=lambda kind: kind in algorithms)  # stable: shared classes first
    parts = []
    for kind in order:
        title, lead = f"Shared: {kind.__name__}", summary(kind)
        if kind in algorithms:
            above = ", ".join(f"`{one.__name__}`" for one in kind.__mro__[1:] if one in order)
            title, lead = algorithms[kind], f"{lead}\n\nClass `{kind.__name__}`; also has the keys of {above}."
        parts.append(f"### {title}\n\n{lead}\n\n{settings_table(kind) or 'No keys of its own.'}".rstrip() + "\n")
    return "\n".join(parts)


def bundled_block() -> str:
    """Which settings come with the package."""
    rows = [(name, ", ".join(f"`{name}/{one}`" for one in available(name)) or "none") for name in ALGORITHMS]
    return table(("algorithm", "bundled settings"), rows)


def group_of_settings(wanted: Callable[[type], bool]) -> str:
    """Tables of the settings classes that `wanted` picks."""
    parts = []
    for name, kind in sorted(settings_classes().items()):
        if wanted(kind) and (rows := settings_table(kind)):
            parts.append(f"### {name}\n\n`{kind.__module__}`. {summary(kind)}\n\n{rows}")
    return "\n".join(parts)


def in_packages(*packages: str) -> Callable[[type], bool]:
    """Picks the settings classes of these packages."""
    return lambda kind: kind.__module__.split(".")[1] in packages


def other_settings_block() -> str:
    """Settings that are on no other page: of the token, of prompts, of training."""
    elsewhere = in_packages("attacks", "baselines", "benches", "comparison", "facts", "tofu", "evaluation", "hparams")
    return group_of_settings(lambda kind: not elsewhere(kind))


def config_block() -> str:
    """Keys of a comparison's config, section by section."""
    return group_of_settings(in_packages("comparison", "facts", "tofu", "evaluation"))


# ---- Python


def signature(thing: Any, name: str) -> str:
    """The signature as code, one parameter a line where it is long."""
    sig = inspect.signature(thing)
    marks: list[str] = []
    for param in sig.parameters.values():
        if param.name in ("self", "cls"):
            continue
        if param.kind is param.KEYWORD_ONLY and "*" not in marks:
            marks.append("*")
        kind = str(param.annotation).strip("'\"") if param.annotation is not param.empty else ""
        default = re.sub(r"<[^>]*>", "...", str(param.default)).replace("PosixPath", "Path")
        if isinstance(param.default, str):
            default = f'"{param.default}"'
        text = f"{param.name}: {kind}" if kind else param.name
        marks.append(text if param.default is param.empty else f"{text} = {default}")
    gives = "" if sig.return_annotation is sig.empty else f" -> {str(sig.return_annotation).strip(chr(39))}"
    line = f"{name}({', '.join(marks)}){gives}"
    if len(line) <= 100:
        return line
    return f"{name}(\n" + "".join(f"    {mark},\n" for mark in marks) + f"){gives}"


def members(kind: type) -> list[tuple[str, str]]:
    """Public methods and properties of a class with the first paragraph of what they do."""
    rows = []
    for name, member in vars(kind).items():
        raw = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if not name.startswith("_") and inspect.isfunction(raw) and inspect.getdoc(raw):
            rows.append((name if isinstance(member, property) else f"{name}()", first_paragraph(raw)))
    return rows


def python_block() -> str:
    """Every public name of `editlib`: functions first, then classes."""
    things = [(name, getattr(editlib, name)) for name in sorted(editlib.__all__, key=str.lower)]
    parts = ["## Functions\n"]
    for name, thing in things:
        if not inspect.isclass(thing):
            parts.append(f"### `{name}`\n\n```python\n{signature(thing, name)}\n```\n\n{docstring(thing)}\n")
    parts.append("## Classes\n")
    for name, kind in things:
        if not inspect.isclass(kind):
            continue
        if SETTINGS.search(name):
            text = f"{summary(kind)}\n\nKeys: [hyper-parameters](hyperparameters.md).\n"
        else:
            call = "" if issubclass(kind, Exception) else f"```python\n{signature(kind, name)}\n```\n\n"
            rows = members(kind)
            text = f"{call}{docstring(kind)}\n" + ("\n" + table(("member", "what it does"), rows) if rows else "")
        parts.append(f"### `{name}`\n\n{text}")
    return "\n".join(parts)


def packages_block() -> str:
    """What the packages below the root offer in their `__all__`."""
    parts = []
    for module in modules():
        names = getattr(module, "__all__", None)
        if module is editlib or not names or not hasattr(module, "__path__"):
            continue
        rows = []
        for name in names:
            thing = getattr(module, name)
            rows.append((name, first_paragraph(thing) if inspect.isclass(thing) or inspect.isroutine(thing) else ""))
        lead = first_paragraph(module)
        parts.append(f"### `{module.__name__}`\n\n{lead}\n\n" + table(("name", "what it is"), rows))
    return "\n".join(parts)


# ---- Registries


def metrics_block() -> str:
    """Every metric: how it is measured, which way is good, what it says."""
    known: dict[str, dict[str, Any]] = {}
    for module in modules():
        if module.__name__.startswith(metrics.__name__):
            for thing in vars(module).values():
                if hasattr(thing, "higher_is_better") and hasattr(thing, "averaged"):
                    known.setdefault(thing.name, {})[thing.meaning] = thing
    arrow = {True: "↑", False: "↓"}
    rows = []
    for name in metrics.__all__:
        function = getattr(metrics, name)
        if not inspect.isfunction(function) or inspect.signature(function).return_annotation != "MetricResult":
            continue
        entries = known.get(name, {})
        kind, ways = "combined", ["", ""]
        for entry in entries.values():
            kind = entry.kind.replace("_", "-")
            ways = [arrow[entry.higher_is_better[on]] for on in ("forget", "retain")]
        rows.append((name, kind, *ways, "; ".join(entries) or first_paragraph(function)))
    return table(("function", "measured", "forget", "retain", "what the number says"), rows)


def attacks_block() -> str:
    """Every attack in words."""
    rows = [(name, entry.meaning, "`peft`" if entry.needs_peft else "") for name, entry in ATTACKS.items()]
    return table(("attack", "what is done", "needs"), rows)


def baselines_block() -> str:
    """Every baseline with its source and the range of its search."""
    rows = []
    for name, entry in BASELINES.items():
        rate, span = (f"{entry.rate:g}", f"{entry.low:g} to {entry.high:g}") if entry.searched else ("", "")
        rows.append((name, entry.meaning, entry.source, rate, span))
    return table(("baseline", "what it does", "source", "learning rate", "searched from, to"), rows)


BLOCKS: Mapping[str, Callable[[], str]] = {
    "attack-settings": lambda: group_of_settings(in_packages("attacks")),
    "attacks": attacks_block,
    "baseline-settings": lambda: group_of_settings(in_packages("baselines")),
    "baselines": baselines_block,
    "bundled": bundled_block,
    "cli": cli_block,
    "config": config_block,
    "hyperparameters": hyperparameters_block,
    "metrics": metrics_block,
    "other-settings": other_settings_block,
    "packages": packages_block,
    "python": python_block,
}


def generated(text: str) -> str:
    """A page's text with its blocks made from the code as it is."""
    return BLOCK.sub(lambda block: f"{block[1]}\n{BLOCKS[block[2]]().strip()}\n\n{block[3]}", text)


def main(arguments: list[str]) -> int:
    """Writes the pages that differ, or with `--check` only names them; then the exit code says whether any did."""
    stale = 0
    for path in sorted(PAGES.glob("*.md")):
        before = path.read_text("utf-8")
        after = generated(before)
        if after != before:
            stale += 1
            sys.stdout.write(f"docs/reference/{path.name}\n")
            if "--check" not in arguments:
                path.write_text(after, "utf-8")
    return int(bool(stale) and "--check" in arguments)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
