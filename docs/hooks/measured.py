"""Numbers of the pages, read from the committed results while the site is built.

A page writes ``{{ cell("table1_update_components", "denominator, collapse (n=24)", 1) }}`` and the
like; a file, a line or a column that is not there ends the build.
"""

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.pages import Page

from firsttok.display import Table, cell_text
from firsttok.models import CATALOG
from firsttok.paper.claims import Status
from firsttok.paper.inconsistencies import find_inconsistencies
from firsttok.paper.report import ModelReport, build_report, result_folders

__all__ = ["on_page_markdown"]

FIGURES = Path(__file__).resolve().parents[2] / "figures"
MODEL = "smollm2-135m"


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Fill in the numbers of a written page; generated ones are left as they are."""
    source = page.file.abs_src_path
    if source is None or not Path(source).is_relative_to(config.docs_dir):
        return markdown
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        comment_start_string="{##",
        comment_end_string="##}",
        autoescape=False,  # noqa: S701 - the pages are our own, and Markdown
    )
    return environment.from_string(markdown).render(_FUNCTIONS)


@cache
def _result(script: str, model: str) -> dict[str, Any]:
    return json.loads((FIGURES / model / f"{script}.json").read_text("utf-8"))


def _line(script: str, label: str, model: str) -> list[Any]:
    found = [line for line in _result(script, model)["lines"] if line[0] == label]
    if len(found) != 1:
        raise LookupError(f"{script} of {model} has {len(found)} lines {label!r}")
    return found[0]


def cell(script: str, label: str, column: str, model: str = MODEL) -> str:
    """One number of a script's table, as the report shows it."""
    return cell_text(_line(script, label, model)[_result(script, model)["columns"].index(column)])


def table(
    script: str,
    labels: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    model: str = MODEL,
) -> str:
    """A script's table, whole or some of its lines and columns, with the command below it."""
    result = _result(script, model)
    names: list[str] = list(result["columns"])
    shown = names if columns is None else [names[0], *columns]
    lines = result["lines"] if labels is None else [_line(script, name, model) for name in labels]
    rows = [[cell_text(line[names.index(name)]) for name in shown] for line in lines]
    return f"{_markdown(shown, rows)}\n\nMade with `{command(script, model)}`."


def row(script: str, column: str, model: str = MODEL, **match: str) -> str:
    """One number of the measured rows: of the one whose other columns have the given values."""
    rows = _result(script, model)["rows"]
    found = [each for each in rows if all(each[name] == match[name] for name in match)]
    if len(found) != 1:
        raise LookupError(f"{script} of {model} has {len(found)} rows with {match}")
    return cell_text(found[0][column])


def inspected(model: str, what: str, column: str) -> str:
    """What inspecting a model found of a token at the layer that it proposes."""
    record = json.loads((FIGURES / "inspect" / f"{model}.json").read_text("utf-8"))
    (found,) = [view for view in record["first_tokens"] if view["what"] == what]
    (at,) = [each for each in found["layers"] if each["layer"] == record["provenance"]["layer"]]
    return cell_text(at[column])


def circuit(model: str = MODEL) -> str:
    """What ``firsttok circuit`` found on a model, a sentence a line."""
    found = [f"- {sentence}" for sentence in _result("circuit", model)["verdict"]]
    return "\n".join([*found, "", f"Made with `firsttok circuit {model} --out figures`."])


def command(script: str, model: str = MODEL) -> str:
    """The command that made a script's result."""
    return str(_result(script, model)["provenance"]["command"])


def scanned(what: str) -> int:
    """A count of the scan over the built-in facts."""
    return int(_result("collapse_cases", MODEL)["summary"][what])


def highest_unedited() -> str:
    """Perplexity of the model before any edit."""
    return cell_text(_result("collapse_cases", MODEL)["provenance"]["original_perplexity"])


def screened(what: str) -> str:
    """How well screening foretold the real edits, with its interval."""
    found = _result("screen", MODEL)["provenance"]["calibration"][what]
    return f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def screening_seconds(what: str) -> str:
    """Seconds that screening the built-in facts took, or editing and evaluating them."""
    return f"{_result('screen', MODEL)['provenance']['seconds'][what]:.0f}"


def contexts() -> int:
    """How many contexts a key is averaged over."""
    return len(_result("contexts-seed0", MODEL)["templates"])


def settings() -> str:
    """What each model of the catalog is edited with."""
    rows = [
        [
            f"`{spec.name}`",
            str(spec.layer),
            str(spec.hyperparameters.steps),
            str(spec.hyperparameters.learning_rate),
            str(spec.hyperparameters.weight_decay),
            str(spec.hyperparameters.kl),
        ]
        for spec in CATALOG
        if spec.layer is not None
    ]
    return _markdown(["model", "layer", "iterations", "rate", "weight decay", "KL factor"], rows)


def reason(claim: str, model: str = MODEL) -> str:
    """What was measured on a claim, in the words of the rule that judged it."""
    (found,) = [judged for judged in _report(model).judged if judged.id == claim]
    if found.status == Status.NOT_JUDGED:
        raise LookupError(f"nothing was measured on {claim} for {model}")
    return found.reason


def verdict(claim: str, model: str = MODEL) -> str:
    """The verdict on a claim in one or two words."""
    (found,) = [judged for judged in _report(model).judged if judged.id == claim]
    return found.label


def claim(claim: str, model: str = MODEL) -> str:
    """A claim, what was known of it, and the verdict."""
    (found,) = [judged for judged in _report(model).judged if judged.id == claim]
    return f"{found.sentence} (*{found.label}*; {found.place})"


def verdicts(*, own: bool, model: str = MODEL) -> str:
    """All claims of the paper, or of our own, with what was measured."""
    found = [judged for judged in _report(model).judged if judged.own == own]
    rows = [[judged.place, judged.sentence, judged.label] for judged in found]
    return _markdown(["where", "claim", "verdict"], rows)


def differing() -> str:
    """Claims that come out differently on the models that have results."""
    report = _report(MODEL)
    rows = [
        [each.claim.sentence, *(found.label if found else "not run" for found in each.found)]
        for each in report.differing
    ]
    return _markdown(["claim", *report.models], rows)


def inconsistencies(*, numeric: bool) -> str:
    """Where the paper contradicts itself, or is silent, as the report has it."""
    return "\n".join(
        f"- **{found.places}.** {found.sentence}"
        for found in find_inconsistencies()
        if (found.confirmed is not None) == numeric
    )


@cache
def _report(model: str) -> ModelReport:
    return build_report(FIGURES / model, result_folders(FIGURES))


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|") or " " for text in cells) + " |"

    flush = Table(columns=columns, lines=rows).left
    rule = "|" + "|".join("---" if left else "--:" for left in flush) + "|"
    return "\n".join([line(columns), rule, *map(line, rows)])


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        cell,
        circuit,
        claim,
        command,
        contexts,
        differing,
        highest_unedited,
        inconsistencies,
        inspected,
        reason,
        row,
        scanned,
        screened,
        screening_seconds,
        settings,
        table,
        verdict,
        verdicts,
    )
}
