"""Benchmarks in processes of their own: a parent that listens, and what the child says."""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from cases import CASES
from measuring import Report, environment, measure_memory, run_plan
from naive import MAX_TOKENS
from setting import Amounts, Setting

__all__ = ["ChildFailedError", "child_main", "run_child"]

_SCRIPT = Path(__file__).resolve().with_name("bench.py")


class ChildFailedError(Exception):
    """A benchmark's process ended without a result."""


def run_child(
    name: str, setting: Setting, report: Report, *, side: str | None = None
) -> dict[str, Any]:
    """Run one benchmark, or one of its sides for memory, and return what it found.

    Raises:
        ChildFailedError: If it fails.
    """
    told = {
        "name": name,
        "side": side,
        "amounts": asdict(setting.amounts),
        "folder": str(setting.folder),
        "model": setting.name,
        "size": setting.size,
        "device": setting.device,
        "dtype": setting.dtype,
    }
    result: dict[str, Any] | None = None
    command = [sys.executable, str(_SCRIPT), "--child", json.dumps(told)]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            try:
                for line in process.stdout or ():
                    said = _parse(line)
                    if "step" in said:
                        report(*said["step"])
                    result = said.get("result", result)
            except BaseException:
                process.terminate()
                raise
        errors.seek(0)
        reason = errors.read().strip()[-3000:] or f"exit code {process.returncode}"
    if process.returncode or result is None:
        raise ChildFailedError(reason)
    return result


def child_main(told: str) -> int:
    """Do what the parent asked for; progress and result go to standard output, line by line."""
    asked: dict[str, Any] = json.loads(told)
    amounts = asked["amounts"]
    setting = Setting(
        amounts=Amounts(**amounts | {"growth_facts": tuple(amounts["growth_facts"])}),
        folder=Path(asked["folder"]),
        name=asked["model"],
        size=asked["size"],
        device=asked["device"],
        dtype=asked["dtype"],
        for_memory=asked["side"] is not None,
    )
    case, device = CASES[asked["name"]], torch.device(asked["device"])
    if asked["side"] is not None:
        # The longest naive fact needs as much memory as all of them, one after another; two steps
        # as much as many, and two batches of the second moment, too.
        tokens = min(setting.amounts.moment_tokens, 2 * MAX_TOKENS)
        few = replace(setting.amounts, naive_edits=1, steps=2, moment_tokens=tokens)
        plan = case.plan(replace(setting, amounts=few))
        (side,) = [side for side in plan.sides if side.label == asked["side"]]
        _say({"result": measure_memory(side, device)})
        return 0
    where = environment(device, setting.dtype)
    plan = case.plan(setting)
    outcome = run_plan(
        plan,
        repeats=setting.amounts.repeats,
        device=device,
        report=lambda done, total, what: _say({"step": [done, total, what]}),
    )
    _say(
        {
            "result": asdict(outcome)
            | {
                "model": plan.model or setting.label,
                "repeats": setting.amounts.repeats,
                "environment": where,
            }
        }
    )
    return 0


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def _parse(line: str) -> dict[str, Any]:
    """What a child said; nothing, if a library printed the line."""
    try:
        said = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return said if isinstance(said, dict) else {}
