"""Reports as pages: one HTML file that loads nothing, and one Markdown file."""

import base64
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from firsttok.display import Table, cell_text
from firsttok.errors import BadInputError
from firsttok.escapes import printable
from firsttok.paper.claims import Status
from firsttok.paper.figures import RESOLUTION
from firsttok.paper.report import ModelReport, build_report, result_folders
from firsttok.storage import atomic_path

if TYPE_CHECKING:
    from markupsafe import Markup

__all__ = ["render_html", "render_markdown", "write_reports"]

LARGEST_SVG = 150_000
"""Larger drawings, as of many points, are smaller and no worse as PNG."""
SYMBOLS = {
    "C^-1": "<i>C</i><sup>−1</sup>",  # noqa: RUF001
    "k_bar": "<i>k̄</i>",
    "k^u": "<i>k</i><sup>u</sup>",
}
SIGNS = {
    Status.REPRODUCED: "✓",
    Status.PARTLY: "◐",
    Status.NOT: "✗",
    Status.NOT_JUDGED: "–",  # noqa: RUF001
}


def write_reports(out: Path, model: str | None = None) -> list[Path]:
    """Write ``index.html`` and ``README.md`` into the folder of a model below ``out``, or of every.

    Raises:
        BadInputError: If there is no result, or a file is not what a script writes.
        CacheError: If a file cannot be written.
    """
    folders = result_folders(out)
    chosen = [folder for folder in folders if model in (None, folder.name)]
    if not chosen:
        raise BadInputError(_where_else(out, model, [folder.name for folder in folders]))
    written: list[Path] = []
    for folder in chosen:
        report = build_report(folder, folders)
        pages = {"index.html": render_html(report), "README.md": render_markdown(report)}
        for name, text in pages.items():
            with atomic_path(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
            written.append(folder / name)
    return written


def _where_else(out: Path, model: str | None, known: Sequence[str]) -> str:
    """What to do where a folder holds no results, or not those of a model but of known ones."""
    make = "make them with: firsttok reproduce"
    if known:
        return f"no results of {model} in {out}, but of {', '.join(known)}; {make} --model {model}"
    if not out.is_dir():
        return f"no results in {out}, which is no folder; name the folder of all models, or {make}"
    if out in result_folders(out.parent):
        return f"{out} is the folder of one model; give --out {out.parent} --model {out.name}"
    for below in sorted(path for path in out.iterdir() if path.is_dir()):
        if result_folders(below):
            return f"no results in {out} itself, but in {below}; give --out {below}"
    return f"no results{'' if model is None else f' of {model}'} in {out}; {make}"


def render_html(report: ModelReport) -> str:
    """The report as one HTML page with its style and pictures inside."""
    return _render("report.html", report)


def render_markdown(report: ModelReport) -> str:
    """The report as Markdown; pictures lie beside it."""
    return re.sub(r"\n{3,}", "\n\n", _render("report.md", report))


def _render(name: str, report: ModelReport) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("firsttok"),
        autoescape=select_autoescape(("html",)),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
        finalize=_printable,
    )
    filters: Any = environment.filters
    filters.update(cell=cell_text, code=_code, left=_left, math=_math, md=_markdown)
    done = {each.script: each.result for each in report.sections if each.result is not None}
    transfer = done.get("table3_transfer")
    return environment.get_template(name).render(
        report=report,
        Status=Status,
        signs=SIGNS,
        unjudged=[judged for judged in report.judged if judged.status == Status.NOT_JUDGED],
        not_run=[section for section in report.sections if section.result is None],
        # Models that Table 3 would have liked to edit and that were not there.
        missing=[str(name) for name in transfer.provenance.get("missing", ())] if transfer else [],
        picture=_drawn,
    )


def _printable(value: object) -> object:
    """What a page shows of a value; markup of our own is left as it is."""
    return printable(value) if type(value) is str else value


def _left(columns: Sequence[str], lines: Sequence[Sequence[Any]]) -> list[bool]:
    return Table(columns=columns, lines=lines).left


def _code(text: object) -> str:
    """Text as code in Markdown, inside more backticks than there are in it."""
    shown = " ".join(str(text).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    return f"{fence} {shown} {fence}" if "`" in shown else f"{fence}{shown}{fence}"


def _markdown(text: object) -> str:
    """Text that Markdown shows as it is, also inside a table."""
    shown = re.sub(r"[\\|*_`\[\]$~]", r"\\\g<0>", " ".join(str(text).split()))
    return shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _math(text: object) -> "Markup":
    """Text for HTML, escaped, with the few symbols of the paper as it sets them."""
    from markupsafe import Markup, escape

    shown = str(escape(printable(str(text))))
    for plain, symbol in SYMBOLS.items():
        shown = shown.replace(plain, symbol)
    return Markup(shown)  # noqa: S704 (escaped above)


def _drawn(png: Path) -> Mapping[str, str | int]:
    """A picture as a data URI, its SVG if that is small or else the PNG, and its size."""
    data = png.read_bytes()
    if not data.startswith(b"\x89PNG") or len(data) < 24:
        raise BadInputError(f"{png} is no PNG picture; run analyses/{png.stem}.py again")
    # Width and height stand at the head of every PNG; a matplotlib SVG beside it has their ratio.
    width, height = struct.unpack(">II", data[16:24])
    svg = png.with_suffix(".svg")
    kind = "png"
    if svg.is_file() and svg.stat().st_size <= LARGEST_SVG:
        data, kind = svg.read_bytes(), "svg+xml"
    return {
        "source": f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}",
        # Drawn at 160 dots to the inch, shown at 96 to the inch.
        "width": round(width * 96 / RESOLUTION),
        "height": round(height * 96 / RESOLUTION),
        "shape": f"{width / height:.3f}",
    }
