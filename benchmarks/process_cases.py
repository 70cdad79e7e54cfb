"""Benchmarks of whole processes: import, help, loading, and a whole reproduction."""

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from measuring import Extras, Plan, Side, Table
from setting import REPOSITORY, Setting

__all__ = ["processes", "reproduce"]

COMMAND = Path(sys.executable).with_name("firsttok")
PLAIN_LOAD = (
    "import sys, transformers as t; "
    "t.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=sys.argv[2]); "
    "t.AutoTokenizer.from_pretrained(sys.argv[1])"
)
LOAD = "import sys, firsttok; firsttok.load(sys.argv[1], dtype=sys.argv[2])"


def processes(setting: Setting) -> Plan:
    """Processes from start to end; a process that only imports torch is the measure of the rest."""
    from random_models import SIZES, random_folder

    from firsttok.models import embedded_folder, load

    if setting.size:
        name = folder = str(random_folder(SIZES[setting.size], setting.folder))
    else:
        name = setting.name
        folder = name if Path(name).is_dir() else str(embedded_folder(name))
    python = sys.executable
    commands = {
        "python -c pass": [python, "-c", "pass"],
        "import torch": [python, "-c", "import torch"],
        "import firsttok": [python, "-c", "import firsttok"],
        "firsttok --help": [str(COMMAND), "--help"],
        "load": [python, "-c", LOAD, name, setting.dtype],
        "plain load": [python, "-c", PLAIN_LOAD, folder, setting.dtype],
    }

    def runner(command: Sequence[str]) -> Any:
        return lambda: _run(command)

    def load_here() -> None:
        load(name, dtype=setting.dtype)

    def warm() -> None:
        load_here()
        for command in commands.values():
            _run(command)

    whole = (
        Side(label=label, run=runner(command), items=1, unit="process")
        for label, command in commands.items()
    )
    return Plan(
        sides=(*whole, Side(label="load, all imported", run=load_here, items=1, unit="model")),
        pairs=(("load a model from the cache, against transformers alone", "load", "plain load"),),
        warm=warm,
    )


def reproduce(setting: Setting) -> Plan:
    """``make reproduce`` as a whole, with a new folder and a new cache each time.

    Only the models that the user's cache holds are linked into the new one: second moments and
    whatever else is kept are made inside the clock.
    """
    from firsttok.models import embedded_folder, find_spec
    from firsttok.storage import cache_folder

    if find_spec(setting.name) is not None and not setting.size:
        embedded_folder(setting.name)
    models = [path for path in cache_folder("models").iterdir() if path.is_dir()]
    command = [str(COMMAND), "reproduce", "--profile", "quick", "--model", setting.name]

    def check(_results: Mapping[str, Any], seconds: Mapping[str, Sequence[float]]) -> Extras:
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        unit = 2**20 if sys.platform == "darwin" else 2**10
        rows = (
            ("wall time, minutes", median(seconds["reproduce"]) / 60),
            ("largest peak memory of one of its processes, MiB", peak / unit),
        )
        return Extras(
            tables=(Table(title="The whole", columns=("quantity", "value"), rows=rows),),
            notes=(
                "Every run has a new cache, into which only the models that were pulled before are "
                "linked: second moments and contexts are made inside the clock.",
            ),
        )

    def run() -> None:
        with tempfile.TemporaryDirectory(dir=setting.folder) as name:
            folder = Path(name)
            linked = folder / "cache" / "models"
            linked.mkdir(parents=True)
            for model in models:
                (linked / model.name).symlink_to(model.resolve(), target_is_directory=True)
            _run([*command, "--out", str(folder / "figures")], cache=linked.parent)

    side = Side(label="reproduce", run=run, items=1, unit="process")
    return Plan(sides=(side,), check=check)


def _run(command: Sequence[str], *, cache: Path | None = None) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    if cache is not None:
        environment["FIRSTTOK_CACHE"] = str(cache)
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"a process ended with code {done.returncode}: {done.stderr[-2000:]}")
