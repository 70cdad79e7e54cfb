"""How a command ends: one sentence and code 2 for what the user can help, a traceback for a bug."""

import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import SENTENCES, build
from tokenizers import Tokenizer

from firsttok.cli import main
from firsttok.console import exit_on_error
from firsttok.errors import BadInputError, sentence_of
from firsttok.storage import write_json

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def loop(folder: Path) -> object:
    (folder / "loop").symlink_to(folder / "loop")
    return (folder / "loop" / "x").read_text("utf-8")


def resolved_loop(folder: Path) -> object:
    # Python 3.13 returns the path itself.
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "loop").resolve()
    return (folder / "loop").stat()


TROUBLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "path too long": (lambda p: (p / ("x" * 300)).read_text("utf-8"), "give a shorter name"),
    "a folder for a file": (lambda p: p.read_text("utf-8"), "Is a directory"),
    "a file for a folder": (
        lambda p: ((p / "f").write_text("", "utf-8"), (p / "f" / "g").read_text("utf-8")),
        "Not a directory",
    ),
    "no such file": (lambda p: (p / "no").read_text("utf-8"), "no cannot be used"),
    "links in a circle": (loop, "link that points to itself"),
    "a path resolved in a circle": (resolved_loop, "link that points to itself"),
    "nobody's home": (lambda _: Path("~no-such-user/x").expanduser(), "write the path in full"),
    "NUL in a path": (lambda p: (p / "a\0b").open(), "holds a NUL"),
    "NUL in a path to make": (lambda p: (p / "a\0b").mkdir(), "holds a NUL"),
    "too many digits": (lambda _: int("1" * 5000), "more than 4300 digits"),
    "half a character": (lambda _: "a\ud800".encode(), "half a surrogate pair"),
    "half a character in a file": (lambda p: write_json(p / "f", ["\udcff"]), "half a surrogate"),
    "memory for bytes": (lambda _: bytearray(2**62), "not enough memory"),
    "memory for an array": (lambda _: np.empty(2**55), "not enough memory"),
    "memory for a tensor": (lambda _: torch.empty(2**55), "not enough memory"),
    "memory of a GPU": (lambda _: fail(torch.OutOfMemoryError("CUDA out of memory.")), "memory"),
    "memory of cuBLAS": (
        lambda _: fail(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling x")),
        "not enough memory",
    ),
    "memory for a library": (
        lambda _: fail(ImportError("libx.so: failed to map segment from shared object")),
        "not enough memory",
    ),
    "threads": (lambda _: fail(RuntimeError("can't start new thread")), "close other programs"),
    "safetensors in no folder": (
        lambda p: save_file({"a": torch.ones(1)}, str(p / "no" / "x")),
        "No such file or directory",
    ),
    "a tokenizer that is not there": (
        lambda p: Tokenizer.from_file(str(p / "no")),
        "No such file or directory",
    ),
    "full disk": (lambda _: full(), "free some space"),
    "a library's full disk": (
        lambda _: fail(Exception("I/O error: No space left on device (os error 28)")),
        "free some space",
    ),
    "a network that is gone": (lambda _: fail(ConnectionError("reset by peer")), "reset by peer"),
    "a sentence of ours": (lambda _: fail(BadInputError("what; where")), "what; where"),
    "a sentence with line ends": (lambda _: fail(BadInputError("a\nb\x1b")), "a\\nb\\x1b"),
    "an endless sentence": (lambda _: fail(BadInputError("x" * 10**6)), "x ... x"),
}


def fail(error: BaseException) -> None:
    raise error


def full() -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as file:
        file.write("x")


@pytest.mark.parametrize("name", TROUBLES)
def test_trouble_of_the_machine_is_one_sentence_and_code_2(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cause, expected = TROUBLES[name]
    assert exit_on_error(lambda: void(cause(tmp_path))) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"firsttok: [^\n]{1,1600}\n", captured.err)
    assert expected in captured.err


def void(_: object) -> None:
    """What a command returns."""


@pytest.mark.parametrize(
    "bug",
    [
        KeyError("name"),
        ValueError("not enough values to unpack"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        AssertionError(),
        TypeError("'NoneType' object is not callable"),
        ImportError("cannot import name 'x'"),
        RecursionError("maximum recursion depth exceeded"),
        AttributeError("'list' object has no attribute 'errno'"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    ],
    ids=lambda bug: type(bug).__name__,
)
def test_a_bug_keeps_its_traceback(bug: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(type(bug)) as raised:
        exit_on_error(lambda: fail(bug))
    assert raised.value is bug
    assert sentence_of(bug) is None
    assert capsys.readouterr().err == ""


def test_what_is_raised_to_end_the_command_ends_it() -> None:
    with pytest.raises(SystemExit) as ended:
        exit_on_error(lambda: fail(SystemExit(7)))
    assert ended.value.code == 7
    assert exit_on_error(lambda: fail(KeyboardInterrupt())) == 130


def run(shell: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """A command by a shell, whose FT is firsttok with its output kept in a buffer."""
    settings = ENVIRONMENT | {"PYTHONUNBUFFERED": "", "FT": f"{sys.executable} -m firsttok"}
    command = ["bash", "-c", shell]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=settings | environment,
        timeout=120,
        errors="surrogateescape",
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("shell", "code", "said"),
    [
        ("$FT data list > /dev/full", 2, "the output cannot be written (No space left on device)"),
        ("$FT --version > /dev/full", 2, "the output cannot be written"),
        ("$FT data list 2> /dev/full", 0, ""),
        ("$FT data list >&-", 0, ""),
        ("$FT data list 2>&-", 0, ""),
        ("$FT data pull nothing >&- 2>&-", 2, ""),
        ("$FT data pull nothing 2> /dev/full", 2, ""),
        ("$FT data list | head -c 1 > /dev/null; exit ${PIPESTATUS[0]}", 0, ""),
        ("exec 3> >(exec true); wait $!; $FT data list >&3", 0, ""),
        ("$FT tokens --subject $'caf\\xe9' --template '{}'", 2, "'caf\\udce9' holds half"),
        ("$FT edit --steps 1$(printf '0%.0s' {1..5000}) x", 2, "invalid int value: '1000"),
        ("$FT $'\\e[2J'", 2, "\\x1b[2J"),
        ("$FT report $'--out=a\\e[2J' $'b\\e[2J'", 2, "unrecognized arguments: b\\x1b[2J"),
    ],
)
def test_output_that_goes_nowhere_and_arguments_that_are_no_text(
    shell: str, code: int, said: str, unbuffered: str
) -> None:
    ended = run(shell, PYTHONUNBUFFERED=unbuffered)
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "Exception ignored" not in ended.stderr
    assert "\x1b" not in ended.stderr
    assert len(ended.stderr) < 2000
    if said:
        assert said in ended.stderr
    else:
        assert ended.stderr == ""


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_an_output_of_another_encoding_escapes_what_it_lacks(encoding: str) -> None:
    code = "show('Zoë 中'); print_table('中', ['é'], [['😀']])"
    shell = f'{sys.executable} -c "from firsttok.console import *; {code}"'
    ended = run(shell, PYTHONIOENCODING=encoding)
    assert ended.returncode == 0
    assert ended.stderr == ""
    escaped = {"cp1252": "Zo\udceb \\u4e2d", "ascii": "Zo\\xeb \\u4e2d", "utf-8": "Zoë 中"}
    assert escaped[encoding] in ended.stdout
    assert ("😀" in ended.stdout) == (encoding == "utf-8")


SLEEPER = """
import signal, sys, time
from pathlib import Path
from firsttok.console import exit_on_error
signal.signal(signal.SIGINT, signal.default_int_handler)
if sys.argv[2] == "ignored":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
def main():
    try:
        Path(sys.argv[1]).write_text("begun")
        time.sleep(3 if sys.argv[2] == "ignored" else 60)
    finally:
        Path(sys.argv[1]).write_text("put in order")
sys.exit(exit_on_error(main))
"""


@pytest.mark.parametrize(
    ("number", "how", "code"),
    [
        (signal.SIGINT, "default", 130),
        (signal.SIGTERM, "default", 143),
        (signal.SIGHUP, "default", 129),
        (signal.SIGHUP, "ignored", 0),
    ],
)
def test_a_signal_ends_a_command_in_order(
    number: signal.Signals, how: str, code: int, tmp_path: Path
) -> None:
    if (how, signal.getsignal(number)) == ("default", signal.SIG_IGN):
        pytest.skip("the tests run under nohup, and so would the command")
    log = tmp_path / "log"
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER, str(log), how],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text("utf-8")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert log.read_text("utf-8") == "put in order"
    interrupted = "firsttok: interrupted; run the same command again to resume\n"
    assert errors == (interrupted if number == signal.SIGINT else "")


def test_handlers_of_signals_are_given_back() -> None:
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]
    assert exit_on_error(lambda: None) == 0
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)] == before


@contextlib.contextmanager
def largest_file(size: int) -> Generator[None, None, None]:
    """The system lets no file grow larger, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    build("llama", folder)
    return folder


FULL: dict[str, list[str]] = {
    "edit": ["edit", "FACT", "--save", "OUT/edit.safetensors", "--second-moment", "identity"],
    "second moment": ["edit", "FACT", "--corpus", "TEXTS"],
    "scan": ["scan", "--limit", "1", "--out", "OUT/scan", "--second-moment", "identity"],
    "sweep": ["sweep", "OUT/run", "--limit", "1", "--second-moment", "identity", "--chunk", "1"],
    "data": ["data", "synthesize", "--count", "40", "--out", "OUT/facts.json"],
    "screen": ["screen", "--limit", "3", "--out", "OUT/screen", "--second-moment", "identity"],
}


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_is_one_sentence_and_leaves_no_part_of_a_file(
    name: str, llama: Path, tmp_path: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts.json"
    contexts = tmp_path / "contexts.json"
    write_json(texts, list(SENTENCES))
    write_json(contexts, ["{}", "I know. {}"])
    out = tmp_path / "out"
    out.mkdir()
    fact = ["--subject", "England", "--template", "{} is", "--target", "Berlin"]
    words: dict[str, list[str]] = {"FACT": fact}
    argv = [part for word in FULL[name] for part in words.get(word, [word])]
    argv = [word.replace("OUT", str(out)).replace("TEXTS", str(texts)) for word in argv]
    if name != "data":
        argv += ["--contexts", str(contexts), "--texts", str(texts), "--steps", "2"]
    with largest_file(64):
        assert main([*argv, "--model", str(llama)]) == 2
    errors = capsys.readouterr().err
    (line,) = [line for line in errors.splitlines() if line.startswith("firsttok: ")]
    assert "File too large" in line
    assert "Traceback" not in errors
    left = [path for path in (*out.rglob("*"), *own_cache.rglob("*")) if path.is_file()]
    assert [path.name for path in left if path.stat().st_size > 0] == []
