"""Pages that are written while the site is built, and files taken over as they are.

The notebooks as tutorials, a reference page for each part of the package, the commands' own help,
and the committed pictures and reports.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

from firsttok.cli import _parser

__all__ = ["FIRST_NOTEBOOKS", "PARTS", "on_config", "on_files", "on_page_markdown"]

ROOT = Path(__file__).resolve().parents[2]
FIRST_NOTEBOOKS = (
    "collapse_in_ten_minutes",
    "hooks_and_keys",
    "who_writes_it",
    "edit_after_edit",
    "your_own_model",
    "your_own_method",
)
"""The order tutorials are read in; other notebooks follow."""
PARTS = {
    "Models": ("models", "hyperparameters", "tensors"),
    "Facts and texts": ("data", "synthetic"),
    "Prompts and contexts": ("prompts", "contexts"),
    "Keys and second moment": ("keys", "second_moment"),
    "Edits": ("editing",),
    "Evaluation": ("evaluation", "metrics"),
    "Studies, rows, screening": ("study", "measuring", "rows", "screening", "hard_lists"),
    "Exploring": ("exploration", "auditing", "inspection", "token_strips", "display", "svg"),
    "Probes": ("probes", "probing"),
    "Sequences": ("sequences",),
    "Sweeps": ("sweep",),
    "Papers, claims, report": ("paper",),
    "Errors": ("errors",),
}
"""Pages of the reference and the parts of the package on them; the last page holds all others."""
OTHERS = "Inner parts"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the notebooks and the reference pages into the navigation."""
    for section in config.nav or ():
        if "Tutorials" in section:
            section["Tutorials"] += [_page_of(path) for path in _notebooks()]
        if "Reference" in section:
            section["Reference"] += ["reference/commands.md", *map(_reference_uri, _pages())]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is generated or taken over."""

    def add(uri: str, content: str | bytes) -> None:
        files.append(File.generated(config, uri, content=content))

    def take(uri: str, path: Path) -> None:
        files.append(File.generated(config, uri, abs_src_path=str(path)))

    add("reference/index.md", _names_page())
    add("reference/commands.md", _commands_page())
    for title, parts in _pages().items():
        add(_reference_uri(title), _reference_page(title, parts))
    for path in _notebooks():
        _add_notebook(path, add)
    for path in sorted((ROOT / "figures").glob("*/*.png")):
        take(path.relative_to(ROOT).as_posix(), path)
    for path in sorted((ROOT / "figures").glob("*/index.html")):
        take(f"reports/{path.parent.name}.html", path)
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Write the list of notebooks where a page asks for it."""
    return markdown.replace("{{ notebooks() }}", "\n".join(map(_listed, _notebooks())))


def _listed(notebook: Path) -> str:
    """A notebook's title and first paragraph, as an entry of a list."""
    (first, *_) = json.loads(notebook.read_text("utf-8"))["cells"]
    title, _, rest = "".join(first["source"]).partition("\n")
    summary = " ".join(rest.strip().partition("\n\n")[0].split())
    return f"- [{title.lstrip('# ')}]({notebook.stem}.md). {summary}"


def _notebooks() -> list[Path]:
    found = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
    first = [found.pop(name) for name in FIRST_NOTEBOOKS if name in found]
    return [*first, *found.values()]


def _page_of(notebook: Path) -> str:
    return f"tutorials/{notebook.stem}.md"


def _add_notebook(path: Path, add: Callable[[str, str | bytes], None]) -> None:
    """A notebook as a page, with the outputs that were committed."""
    exporter = MarkdownExporter()
    resources = {"output_files_dir": f"{path.stem}_files"}
    body, found = exporter.from_filename(str(path), resources)
    add(_page_of(path), body)
    outputs: dict[str, bytes] = found["outputs"]
    for name, data in outputs.items():
        add(f"tutorials/{name}", data)


@cache
def _package() -> griffe.Module:
    """The package as its source says it is; nothing of it is imported."""
    package = griffe.load("firsttok", search_paths=[str(ROOT)], docstring_parser="google")
    if not isinstance(package, griffe.Module):
        raise TypeError(f"firsttok is no module but {package}")
    return package


def _modules(part: str) -> Iterable[griffe.Module]:
    """The modules of a part that export something, a package before what is in it."""
    module = _package().members.get(part)
    if isinstance(module, griffe.Module):
        yield from _exporting(module)


def _exporting(module: griffe.Module) -> Iterable[griffe.Module]:
    if module.exports:
        yield module
    for name in sorted(module.modules):
        inner = module.modules[name]
        if not inner.is_alias and not name.startswith("_"):
            yield from _exporting(inner)


@cache
def _pages() -> dict[str, tuple[str, ...]]:
    named = {part for parts in PARTS.values() for part in parts}
    modules = (name for name, module in _package().modules.items() if not module.is_alias)
    others = tuple(sorted(set(modules) - named))
    return {**PARTS, OTHERS: others}


def _reference_uri(title: str) -> str:
    return f"reference/{title.lower().replace(', ', '-').replace(' ', '-')}.md"


def _reference_page(title: str, parts: Iterable[str]) -> str:
    lines = [f"# {title}", ""]
    for part in parts:
        for module in _modules(part):
            lines += [f"::: {module.path}"]
            if module.is_package or module.is_subpackage:
                # What a package exports is written down where it is defined.
                lines += ["    options:", "      members: false", ""]
                lines += [*_name_table(module), ""]
            lines.append("")
    return "\n".join(lines)


def _names_page() -> str:
    return "\n".join(
        [
            "# Reference",
            "",
            "Everything public. Shapes stand in the signatures, in the words of",
            "[`firsttok.tensors`][firsttok.tensors]: `prompt` counts prompts of a batch, `pos`",
            "token positions, `layer` captured layers, `d_mlp` the width of a key, `d_model` that",
            "of a value, `vocab` tokens. Keys are rows: a value is `key @ W + b` with `W` as",
            "`[d_mlp, d_model]`. Norms and perplexities have no unit; losses are in nats.",
            "",
            "## From `import firsttok as ft`",
            "",
            *_name_table(_package()),
            "",
            "On the command line: [the commands](commands.md).",
        ]
    )


def _name_table(module: griffe.Module) -> list[str]:
    """The names a package exports, linked to where they are defined."""
    rows: list[str] = []
    for name in sorted(map(str, module.exports or ()), key=str.lower):
        target = module.members[name]
        if isinstance(target, griffe.Alias):
            target = target.final_target
        summary = target.docstring.value.splitlines()[0] if target.docstring else ""
        rows.append(f"| [`{name}`][{target.path}] | {summary.replace('|', chr(92) + '|')} |")
    return ["| name | what it is |", "|---|---|", *rows]


def _commands_page() -> str:
    lines = ["# Commands", "", "What `firsttok COMMAND --help` says.", ""]
    for title, text in _helps(_parser()):
        lines += [f"## {title}", "", "```text", text, "```", ""]
    return "\n".join(lines)


def _helps(parser: argparse.ArgumentParser) -> Iterable[tuple[str, str]]:
    """The help of a command and of those below it, in a width that does not hang on a terminal."""
    parser.formatter_class = partial(argparse.HelpFormatter, width=98)
    yield parser.prog, parser.format_help().rstrip()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _helps(command)
