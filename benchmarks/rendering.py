"""RESULTS.md, rendered from results.json alone."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

__all__ = ["render"]

_HEAD = """# Benchmarks

Rendered from [results.json](results.json), which `make bench` writes. "Naive" is
[naive.py](naive.py): the released algorithm written down plainly, on a Hugging Face model that
TransformerLens never touched, with the same weights, threads and numbers; only for the second
moment it is a full forward pass, where the released code stops at the edited layer. Both sides run
in turn in one process, warmed up before. A time is the median over the repeats, with the smallest
and largest in brackets; a ratio is that of the throughputs within one repeat, naive time over fast
time.
"""


def render(results: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        results: Record of each benchmark by name, in the order they are shown.
    """
    parts = [_HEAD, _overview(results)]
    parts += [_section(name, record) for name, record in results.items()]
    return "\n".join(parts)


def _overview(results: Mapping[str, Any]) -> str:
    rows: list[list[str]] = []
    for name, record in results.items():
        for pair in record["comparisons"]:
            rows.append([f"`{name}`", pair["label"], _ratio(pair)])
    return _table(["benchmark", "what", "naive over fast"], rows) if rows else ""


def _section(name: str, record: Mapping[str, Any]) -> str:
    parts = [f"## {record['title']} (`{name}`)", _conditions(record)]
    if record["comparisons"]:
        parts.append(
            _table(
                ["what", "fast, s per item", "naive, s per item", "naive over fast"],
                [
                    [
                        f"{pair['label']} ({pair['fast']['unit']})",
                        _per_item(pair["fast"]),
                        _per_item(pair["naive"]),
                        _ratio(pair),
                    ]
                    for pair in record["comparisons"]
                ],
            )
        )
    if record["timings"]:
        parts.append(
            _table(
                ["what", "whole time, s", "items", "s per item"],
                [
                    [
                        sample["label"],
                        _spread(sample["seconds"]),
                        f"{sample['items']:g} {sample['unit']}",
                        _per_item(sample),
                    ]
                    for sample in record["timings"]
                ],
            )
        )
    for table in record["extras"]["tables"]:
        cells = [[_cell(cell) for cell in row] for row in table["rows"]]
        parts += [f"{table['title']}:\n", _table(table["columns"], cells)]
    if record["memory"]:
        parts += ["Peak memory, each side once in a process of its own:\n", _memory(record)]
    parts += [f"{note}\n" for note in record["extras"]["notes"]]
    return "\n".join(parts)


def _conditions(record: Mapping[str, Any]) -> str:
    where = record["environment"]
    versions = where["versions"]
    repeats = record["repeats"]
    return (
        f"`{record['command']}`; {record['model']} on {where['device']} in {where['dtype']}; "
        f"repeats: {repeats}; "
        f"threads: {where['threads']}, CPUs: {where['cpus']} ({where['architecture']}, "
        f"{where['vectors']}), load {where['load']:g} at the start; Python {versions['python']}, "
        f"torch {versions['torch']}, transformers {versions['transformers']}, "
        f"transformer-lens {versions['transformer-lens']}.\n"
    )


def _memory(record: Mapping[str, Any]) -> str:
    cuda = any("cuda_peak" in found for found in record["memory"].values())
    columns = ["side", "resident before, MiB", "resident at most, MiB"]
    rows: list[list[str]] = []
    for label, found in record["memory"].items():
        row = [label, _mebibytes(found["rss_before"]), _mebibytes(found["rss_peak"])]
        rows.append(row + ([f"{found['cuda_peak']:,.0f}"] if cuda else []))
    return _table(columns + (["GPU at most, MiB"] if cuda else []), rows)


def _mebibytes(size: float | None) -> str:
    return "not measured" if size is None else f"{size:,.0f}"


def _ratio(pair: Mapping[str, Any]) -> str:
    fast, naive = pair["fast"], pair["naive"]
    ratios = [
        (slow / naive["items"]) / (quick / fast["items"])
        for quick, slow in zip(fast["seconds"], naive["seconds"], strict=True)
    ]
    return _spread(ratios)


def _per_item(sample: Mapping[str, Any]) -> str:
    return _spread([seconds / sample["items"] for seconds in sample["seconds"]])


def _spread(values: Sequence[float]) -> str:
    middle = _number(median(values))
    return f"{middle} ({_number(min(values))} to {_number(max(values))})"


def _cell(cell: Any) -> str:
    return _number(cell) if isinstance(cell, float) else str(cell)


def _number(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    # A bar would end the cell.
    clean = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in clean) + "\n"
