"""Progress where no bar can be drawn: a line now and then."""

import pytest
from rich.console import Console

from firsttok import bars, console
from firsttok.console import progress_bar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(bars, "monotonic", lambda: now[0])
    return now


def test_in_a_pipe_a_line_comes_at_least_every_minute(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    silent = longest = 0.0
    # A line every fifth time, since 28 seconds are too few.
    lines: list[str] = []
    with progress_bar() as progress:
        task = progress.add_task("[/red] x[0]", total=40)
        for _ in range(400):
            clock[0] += 7.0
            silent += 7.0
            progress.advance(task, 0.1)
            said = capsys.readouterr().err.splitlines()
            lines += said
            silent = 0.0 if said else silent
            longest = max(longest, silent)
    assert longest < 60
    assert len(lines) < 400 * 7 / 30 + 1
    # A subject or a label is no markup.
    assert lines[0].startswith("[/red] x[0]: 0 of 40")
    assert lines[40].startswith("[/red] x[0]: 20 of 40, about ")


def test_a_line_says_what_is_done_inside_a_task_and_no_stale_estimate(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_bar() as progress:
        whole = progress.add_task("whole", total=4)
        for _ in range(3):
            progress.advance(whole)
        part = progress.add_task("part", total=10)
        clock[0] += 40.0
        progress.advance(part)
        assert capsys.readouterr().err.startswith("whole: 3 of 4; part: 1 of 10")
        progress.update(part, completed=10)
        clock[0] += 4000.0
        progress.update(whole, description="whole")
        # One of four was left, and nothing has moved for longer than the others took together.
        assert capsys.readouterr().err.splitlines() == ["whole: 3 of 4"]


def test_quick_work_and_terminals_get_no_lines(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with progress_bar() as progress:
        task = progress.add_task("quick", total=3)
        for _ in range(3):
            clock[0] += 0.5
            progress.advance(task)
        assert capsys.readouterr().err == ""
    drawn = Console(stderr=True, force_terminal=True)
    monkeypatch.setattr(console, "_stderr", lambda: drawn)
    with progress_bar() as progress:
        task = progress.add_task("slow", total=3)
        for _ in range(3):
            clock[0] += 100.0
            progress.advance(task)
    assert "slow: " not in capsys.readouterr().err
