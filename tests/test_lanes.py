"""Scripts side by side: order, lanes, output, and what happens when one is given up."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from firsttok.cli import main
from firsttok.paper.registry import EXPERIMENTS, SCRIPTS, in_lanes
from firsttok.paper.reproduce import Job, run_in_lanes

ROOT = Path(__file__).parent.parent
BODY = """
import sys, time
log, name, seconds = sys.argv[1:]
with open(log, "a") as file:
    print("start", name, file=file, flush=True)
    time.sleep(float(seconds))
    print("end", name, file=file)
"""


def job(log: Path, name: str, seconds: float, *after: str) -> Job:
    script = log.with_name("body.py")
    script.write_text(BODY, "utf-8")
    return Job(name=name, command=(str(script), str(log), name, str(seconds)), after=after)


def most_at_once(lines: list[str]) -> int:
    open_now = most = 0
    for line in lines:
        open_now += 1 if line.startswith("start") else -1
        most = max(most, open_now)
    return most


def test_a_script_has_the_path_of_its_parent_and_no_standard_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "statistics.py").write_text("raise SystemExit('that of the folder')", "utf-8")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "found_by_the_parent.py").touch()
    script = tmp_path / "scripts" / "one.py"
    script.parent.mkdir()
    text = "import statistics, sys, found_by_the_parent; print(repr(sys.stdin.read()))"
    script.write_text(text, "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    (ended,) = run_in_lanes([Job(name="one", command=(str(script),))], lanes=1)
    assert (ended.code, ended.output) == (0, "''\n")


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_no_more_than_the_lanes_run_and_none_before_what_it_waits_for(
    tmp_path: Path, lanes: int
) -> None:
    log = tmp_path / "log"
    jobs = [
        job(log, "a", 0.4),
        job(log, "b", 0.1, "a"),
        job(log, "c", 0.3),
        job(log, "d", 0.1, "a", "c", "not a job"),
        job(log, "e", 0.2),
    ]
    ended = list(run_in_lanes(jobs, lanes=lanes))
    assert sorted(each.job.name for each in ended) == ["a", "b", "c", "d", "e"]
    assert {each.code for each in ended} == {0}
    assert all(each.seconds > 0.1 for each in ended)
    lines = log.read_text("utf-8").splitlines()
    assert most_at_once(lines) == lanes
    assert lines.index("end a") < lines.index("start b")
    assert max(lines.index("end a"), lines.index("end c")) < lines.index("start d")
    if lanes == 1:
        assert [each.job.name for each in ended] == ["a", "b", "c", "d", "e"]


def test_output_and_exit_code_come_back_and_the_cores_are_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("firsttok.paper.reproduce.cores", lambda: 6)
    text = "import os, sys; print(os.environ['OMP_NUM_THREADS']); sys.exit('what is wrong')"
    script = tmp_path / "one.py"
    script.write_text(text, "utf-8")
    one = Job(name="one", command=(str(script),))
    (ended,) = run_in_lanes([one], lanes=2)
    assert ended.code == 1
    assert {"3", "what is wrong"} == set(ended.output.split("\n")) - {""}
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    (ended,) = run_in_lanes([one], lanes=2)
    assert "5" in ended.output.split("\n")


def test_closing_ends_what_still_runs(tmp_path: Path) -> None:
    log = tmp_path / "log"
    running = run_in_lanes([job(log, "short", 0.1), job(log, "long", 30)], lanes=2)
    assert next(running).job.name == "short"
    start = time.monotonic()
    running.close()
    assert time.monotonic() - start < 15
    time.sleep(0.2)
    assert "end long" not in log.read_text("utf-8")


BUSY = """
import os, sys
from pathlib import Path
Path(sys.argv[sys.argv.index("--out") + 1], f"{os.getpid()}.pid").touch()
while True:
    sum(range(10_000))
"""
START = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from firsttok.cli import main
if __name__ == "__main__":
    sys.exit(main())
"""


def computes(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("jobs", "number", "code"),
    [
        (1, signal.SIGKILL, -signal.SIGKILL),
        (1, signal.SIGTERM, 143),
        (1, signal.SIGINT, 130),
        pytest.param(2, signal.SIGKILL, -signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(2, signal.SIGHUP, 129, marks=pytest.mark.slow),
    ],
)
def test_no_script_computes_on_when_its_reproduction_is_gone(
    jobs: int, number: int, code: int, tmp_path: Path
) -> None:
    if number != signal.SIGKILL and signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("the tests run under nohup, and so would the command")
    out = tmp_path / "out"
    out.mkdir()
    scratch = Path(tempfile.mkdtemp())
    for name in SCRIPTS:
        (tmp_path / f"{name}.py").write_text(BUSY, "utf-8")
    command = [sys.executable, "-c", START, "reproduce", "--jobs", str(jobs), "--model", "no-model"]
    command += ["--analyses", str(tmp_path), "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(scratch)}
    running = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def workers() -> list[int]:
        return [int(path.stem) for path in out.glob("*.pid")]

    try:
        deadline = time.monotonic() + 180
        while len(workers()) < jobs and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(workers()) == jobs
        assert all(map(computes, workers()))
        running.send_signal(number)
        assert running.wait(60) == code
        deadline = time.monotonic() + 30
        while any(map(computes, workers())) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(computes, workers()))
        assert list(scratch.iterdir()) == []
    finally:
        running.kill()
        for pid in filter(computes, workers()):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(scratch, ignore_errors=True)


def test_a_script_that_was_killed_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in SCRIPTS:
        (tmp_path / f"{name}.py").write_text("import os; os.kill(os.getpid(), 9)", "utf-8")
    command = ["reproduce", "--jobs", "1", "--analyses", str(tmp_path), "--out", str(tmp_path)]
    assert main(command) == 2
    assert f"{SCRIPTS[0]} was killed by signal 9" in capsys.readouterr().err


def test_a_circle_is_refused() -> None:
    jobs = [Job(name=a, command=("none",), after=(b,)) for a, b in ("ab", "ba")]
    with pytest.raises(ValueError, match="wait for each other"):
        list(run_in_lanes(jobs, lanes=2))


def test_every_script_has_its_turn_after_those_it_waits_for() -> None:
    order = [each.name for each in in_lanes()]
    assert sorted(order) == sorted(SCRIPTS)
    assert len({each.name for each in EXPERIMENTS}) == len(EXPERIMENTS)
    assert sum(len(each.after) for each in EXPERIMENTS) > 5
    for each in EXPERIMENTS:
        assert all(order.index(other) < order.index(each.name) for other in each.after)
