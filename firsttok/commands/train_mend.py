"""``firsttok train-mend``: train the network of MEND on a model."""

import argparse
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from firsttok.console import print_table, progress_bar, show, show_json
from firsttok.editing.mend_plan import MendPlan, MendTarget
from firsttok.editing.mend_training import CURVES, TrainedMend, train_mend
from firsttok.file_options import training_folder
from firsttok.models import BosPolicy, load
from firsttok.paper.figures import PALETTE, figure, save_figure
from firsttok.provenance import versions
from firsttok.storage import save_result

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Train, or go on training, and leave the network with its curves beside it.

    Raises:
        FirsttokError: If a setting does not go with the model.
    """
    out = Path(args.out)
    given = {each.name: getattr(args, each.name, None) for each in fields(MendPlan)}
    given |= {"layers": tuple(args.layers or ()), "texts": args.windows}
    given |= {"target": MendTarget(args.target)}
    plan = MendPlan(**{name: value for name, value in given.items() if value is not None})
    with progress_bar() as progress:
        model = load(args.model, bos=BosPolicy(args.bos), device=args.device)
        found = train_mend(model, plan, folder=training_folder(out), progress=progress)
    words = [args.model, "--out", out.name, *_options(plan)]
    words += ["--bos", args.bos] if args.bos != BosPolicy.AS_TOKENIZER.value else []
    command = shlex.join(["firsttok", "train-mend", *words])
    provenance = {"command": command, "versions": versions()}
    found.network.with_record(
        model=model.record(),
        training={
            "plan": plan.as_dict(),
            "best_step": found.best_step,
            "steps": found.steps,
            "validation": found.validation,
            "curves": [dict(row) for row in found.curves],
            **provenance,
        },
    ).save(out, dtype=torch.float16)
    _keep(out.with_suffix(""), found, provenance | {"model": model.record()})
    if args.json:
        show_json({"best_step": found.best_step, "steps": found.steps, **found.validation})
        return
    lines = [[row[name] for name in CURVES] for row in found.curves]
    print_table(f"MEND on {model.label}: validation edits", CURVES, lines)
    show(f"{out}: the network of step {found.best_step}; as it is stored:")
    show(", ".join(f"{name} {value:.4g}" for name, value in found.validation.items()))


def _options(plan: MendPlan) -> list[str]:
    """The options that differ from their defaults."""
    words: list[str] = []
    for each in fields(MendPlan):
        value: Any = getattr(plan, each.name)
        if value != each.default:
            name = "windows" if each.name == "texts" else each.name.replace("_", "-")
            values = value if isinstance(value, tuple) else [value]
            shown = [v.value if isinstance(v, MendTarget) else str(v) for v in values]
            # Behind a blank, a negative number would be taken for an option.
            words += [f"--{name}={shown[0]}"] if len(shown) == 1 else [f"--{name}", *shown]
    return words


def _keep(stem: Path, found: TrainedMend, provenance: dict[str, Any]) -> None:
    save_result(
        stem,
        {
            "title": "MEND's training, on the validation edits",
            "columns": list(CURVES),
            "lines": [[row[name] for name in CURVES] for row in found.curves],
            "rows": [dict(row) for row in found.curves],
            "best_step": found.best_step,
            "provenance": provenance,
        },
    )
    drawn, axes = figure(3, height=3.4)
    steps = [row["step"] for row in found.curves]
    panels = (
        ("negative log-likelihood of the target", ("edit_nll", "rephrase_nll")),
        ("KL divergence at other text", ("kl",)),
        ("share of edits that succeed", ("success", "rephrase_success")),
    )
    for axis, (title, names) in zip(axes, panels, strict=True):
        for name, colour in zip(names, PALETTE.values(), strict=False):
            curve = [row[name] for row in found.curves]
            axis.plot(steps, curve, color=colour, marker="o", markersize=3, label=name)
        axis.axvline(found.best_step, color="black", linewidth=1, linestyle=":")
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.legend(fontsize=8)
    for axis in axes[:2]:
        axis.set_yscale("log")
    save_figure(stem, drawn)
