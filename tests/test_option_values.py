"""What an option may be is checked before a model is loaded; a bad one leaves nothing behind."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from firsttok.arguments import SEEDS
from firsttok.cli import _parser, main
from firsttok.config import configured
from firsttok.errors import BadInputError
from firsttok.models import loading
from firsttok.storage import cache_folder

ROOT = Path(__file__).parent.parent
FACT = ["--subject", "England", "--template", "{}'s capital city is"]
EDIT = ["edit", *FACT, "--target", "Berlin"]
MADE = ["data", "synthesize", "--count", "3"]
COMMANDS: dict[str, list[str]] = {
    "edit": EDIT,
    "scan": ["scan"],
    "screen": ["screen"],
    "hard": ["hard", "--out", "hard.json"],
    "inspect": ["inspect"],
    "sweep": ["sweep", "run"],
}
"""Commands that edit, with what each needs."""
BAD: dict[str, tuple[list[str], str]] = {
    "steps": (["--steps", "0"], "steps is 0"),
    "rate": (["--lr", "-1"], "learning_rate is -1"),
    "rate of infinity": (["--lr", "inf"], "learning_rate is inf"),
    "decay": (["--weight-decay", "nan"], "weight_decay is nan"),
    "clamp": (["--clamp", "0"], "clamp is 0"),
    "KL": (["--kl", "-0.1"], "kl is -0.1"),
    "layer": (["--layer", "-1"], "no layer -1"),
    "seed": (["--seed", "-1"], "--seed is -1; give a whole number from 0 to 4294967295"),
    "large seed": (["--seed", str(SEEDS)], f"--seed is {SEEDS}"),
    "huge seed": (["--seed", str(2**70)], "--seed is 1180591620717411303424"),
    "Apple's device": (["--device", "mps"], "'mps' is not supported; use cpu, cuda or cuda:N"),
    "Intel's device": (["--device", "xpu"], "'xpu' is not supported"),
    "no device": (["--device", "meta"], "'meta' is not supported"),
    "third CPU": (["--device", "cpu:3"], "'cpu:3' is not supported"),
    "device without number": (["--device", "cuda:"], "'cuda:' is not supported"),
    "negative device": (["--device", "cuda:-1"], "'cuda:-1' is not supported"),
    "far device": (["--device", "cuda:99"], "device 'cuda:99' is not"),
    "contexts": (["--contexts", "no.json"], "no file of"),
    "corpus": (["--corpus", "no.txt"], "no file of text"),
    "corpus without end": (["--corpus", "/dev/full"], "/dev/full is a device"),
    "contexts without end": (["--contexts", "/dev/full"], "/dev/full is a device"),
    "configuration without end": (["--config", "/dev/full"], "/dev/full is a device"),
    "texts": (["--texts", "no.json"], "no.json"),
    "second moment": (["--second-moment", "no.safetensors"], "no second moment at"),
    "configuration": (["--config", "no.toml"], "no.toml"),
}
"""Bad values of options that all of them have."""
OTHERS: dict[str, tuple[list[str], str]] = {
    "edit, several methods saved": (
        [*EDIT, "--method", "rome", "c-rome", "--save", "e"],
        "--save takes one method, not 2",
    ),
    "edit, a file of several methods saved": (
        [*EDIT, "--method", "methods.toml", "--save", "e"],
        "--save takes one method, not 2",
    ),
    "edit, saved in no folder": ([*EDIT, "--save", "no/e"], "folder of --save no/e does not exist"),
    "edit, saved as a folder": ([*EDIT, "--save", "folder"], "--save folder is a folder"),
    "edit, saved below a file": ([*EDIT, "--save", "file/e"], "file/e cannot be written (Not a"),
    "edit, saved in a circle": ([*EDIT, "--save", "loop/e"], "no usable path"),
    "edit, saved under a long name": ([*EDIT, "--save", "x" * 300], "no usable path (File name"),
    "edit, saved where nobody may": (
        [*EDIT, "--save", "closed/e"],
        "the folder of --save closed/e cannot be written",
    ),
    "screen, a method that edits nothing": (
        ["screen", "--method", "memit"],
        "--method memit is for --measure",
    ),
    "screen, two methods": (
        ["screen", "--measure", "--method", "rome", "ft"],
        "--method takes one method here, not 2",
    ),
    "sweep, layers twice": (
        ["sweep", "run", "--method", "memit", "--layer", "1", "2", "--layers", "1", "2"],
        "give one of both",
    ),
    "edit, steps of no method": (
        [*EDIT, "--method", "ft", "--steps", "3"],
        "--steps is for none of the methods ft",
    ),
    "edit, a learning rate of fine-tuning": ([*EDIT, "--method", "ft", "--ft-lr", "0"], "above 0"),
    "train-mend, a network that its own table would replace": (
        ["train-mend", "llama", "--out", "net.json"],
        "let it end in .safetensors",
    ),
    "edit, saved over its network": (
        [*EDIT, "--method", "mend", "--network", "file", "--save", "file"],
        "is a file of --network, which it would replace",
    ),
    "edit, saved over its methods": (
        [*EDIT, "--method", "methods.toml", "--save", "methods.toml"],
        "--save methods.toml is a file of --method",
    ),
    "edit, saved over its configuration": (
        [*EDIT, "--config", "good.toml", "--save", "good.toml"],
        "--save good.toml is a file of --config",
    ),
    "edit, saved over its contexts by another name": (
        [*EDIT, "--contexts", "file", "--save", "link"],
        "--save link is a file of --contexts",
    ),
    "edit, saved over its corpus": (
        [*EDIT, "--corpus", "file", "--save", "file"],
        "is a file of --corpus",
    ),
    "edit, saved over the second of two edits": (
        [*EDIT, "--after", "bad.toml", "file", "--save", "file"],
        "is a file of --after",
    ),
    "edit, saved over the weights": (
        [*EDIT, "--model", "net", "--save", "net/model.safetensors"],
        "--save net/model.safetensors is a file of the model net, which it would replace",
    ),
    "screen, a hard list over the facts": (
        ["screen", "--facts", "file", "--build-hard", "file"],
        "is a file of --facts",
    ),
    "screen, a hard list over the list of cases": (
        ["screen", "--scan", "file", "--build-hard", "file"],
        "is a file of --scan",
    ),
    "screen, a hard list's record over the facts": (
        ["screen", "--facts", "h.provenance.json", "--build-hard", "h.json"],
        "--build-hard h.json: h.provenance.json, which is written too, is a file of --facts",
    ),
    "screen, a hard list over the ranking": (
        ["screen", "--out", "new", "--build-hard", "folder/../new/smollm2-135m/screen.json"],
        "the folder of --build-hard",
    ),
    "screen, a hard list over a ranking that is there": (
        ["screen", "--out", "old", "--build-hard", "old/smollm2-135m/screen.json"],
        "a file that --build-hard old/smollm2-135m/screen.json stands for, too",
    ),
    "screen, a hard list as Parquet": (
        ["screen", "--build-hard", "h.parquet.gz"],
        "is written as JSON",
    ),
    "hard, normal facts over the facts": (
        ["hard", "--facts", "h.normal.json", "--normal", "--out", "h.json"],
        "--out h.json: h.normal.json, which is written too, is a file of --facts",
    ),
    "hard, out over what is left out": (
        ["hard", "--exclude", "file", "--out", "file"],
        "is a file of --exclude",
    ),
    "hard, out over a data set that was pulled": (
        ["hard", "--facts", "counterfact", "--out", "pulled"],
        "--out pulled is a file of --facts",
    ),
    "hard, out to a device": (
        ["hard", "--out", "/dev/null"],
        "--out /dev/null is no file, and others are written beside it",
    ),
    "hard, more than are looked at": (
        ["hard", "--out", "h.json", "--count", "3", "--limit", "2"],
        "--count is 3, and --limit takes the first 2 facts alone",
    ),
    "hard, out where the work is kept": (
        ["hard", "--generate", "--out", "new.json", "--work", "new.json"],
        "is to be a file, and --work new.json a folder at the same place",
    ),
    "hard, out above where the work is kept": (
        ["hard", "--generate", "--out", "new", "--work", "new/work"],
        "is to be a file, and --work new/work a folder at the same place",
    ),
    "inspect, out over its configuration": (
        ["inspect", "--config", "smollm2-135m.toml", "--out", "."],
        "smollm2-135m.toml, which is written too, is a file of --config",
    ),
    "scan, a model's folder that is a file": (
        ["scan", "--out", "old", "--model", "file"],
        "--out old: old/file/collapse_cases.json cannot be written (Not a directory)",
    ),
    "results, rows over the run": (
        ["results", "begun", "--csv", "begun/manifest.json"],
        "is a file of the run, which it would replace",
    ),
    "results, rows where figures are to be": (
        ["results", "begun", "--csv", "new", "--figures", "new"],
        "--csv new is to be a file, and --figures new a folder at the same place",
    ),
    "data, facts over those that are left out": (
        [*MADE, "--kind", "hard", "--exclude", "file", "--out", "file"],
        "is a file of --exclude",
    ),
    "data, facts as Parquet": ([*MADE, "--out", "f.parquet"], "is written as JSON"),
    "sequence, run": (["sequence", "file"], "the run file: file is a file; name a folder"),
    "train-mend, a state that is a file": (
        ["train-mend", "--out", "busy.safetensors"],
        "--out busy.safetensors: busy.work/training.safetensors cannot be written",
    ),
    "train-mend, curves as a folder": (
        ["train-mend", "--out", "curves.safetensors"],
        "--out curves.safetensors: curves.json is a folder",
    ),
    "train-mend, over the model": (
        ["train-mend", "net", "--out", "net/model.safetensors"],
        "is a file of the model net",
    ),
    "train-mend, edits": (
        ["train-mend", "--out", "m.safetensors", "--edits", "1000000000"],
        "edits is 1000000000; give a whole number from 1 to 20000",
    ),
    "train-mend, batch": (
        ["train-mend", "--out", "m.safetensors", "--edits", "3", "--batch", "4"],
        "batch is 4, and there are 3 edits to train on",
    ),
    "train-mend, seed": (["train-mend", "--out", "m", "--seed", "-1"], "--seed is -1"),
    "edit, a bound that no float holds": ([*EDIT, "--method", "ft", "--eps", "1e300"], "no larger"),
    "edit, layers of no method": (
        [*EDIT, "--layers", "1", "2"],
        "--layers is for none of the methods rome; leave it out",
    ),
    "edit, layers out of order": (
        [*EDIT, "--method", "memit", "--layers", "2", "1"],
        "from the lowest on",
    ),
    "edit, lambda of another method": (
        [*EDIT, "--method", "emmet", "--mom2-weight", "10"],
        "--mom2-weight is for none of the methods emmet",
    ),
    "edit, lambda": ([*EDIT, "--method", "memit", "--mom2-weight", "0"], "a number above 0"),
    "edit, no method": ([*EDIT, "--method", "memoir"], "no method is called 'memoir'"),
    "edit, half a method": ([*EDIT, "--method", "a=direction:bare"], "has no residual"),
    "edit, no target": (["edit", *FACT, "--target", " "], "is empty"),
    "edit, no place for the subject": (
        ["edit", "--subject", "a", "--template", "b", "--target", "c"],
        "exactly once",
    ),
    "tokens, no subject": (["tokens", "--subject", " ", "--template", "{} b"], "subject"),
    "tokens, device": (["tokens", *FACT, "--device", "mps"], "'mps' is not supported"),
    "scan, limit": (["scan", "--limit", "0"], "--limit is 0; give at least 1"),
    "scan, facts": (["scan", "--facts", "no.json"], "no file of facts"),
    "scan, out": (["scan", "--out", "file"], "--out file: file is a file; name a folder"),
    "scan, out below a file": (["scan", "--out", "file/a/b"], "file is a file; name a folder"),
    "scan, out in a circle": (["scan", "--out", "loop/a"], "no usable path"),
    "scan, out under a long name": (["scan", "--out", "x" * 300], "no usable path"),
    "scan, out where nobody may": (["scan", "--out", "closed/a"], "closed cannot be written to"),
    "screen, limit": (["screen", "--limit", "-3"], "--limit is -3"),
    "screen, out": (["screen", "--out", "file"], "file is a file"),
    "screen, threshold": (["screen", "--threshold", "0"], "--threshold is 0"),
    "screen, no threshold": (["screen", "--threshold", "nan"], "--threshold is nan"),
    "screen, list": (["screen", "--scan", "no.json"], "no list of edited cases"),
    "screen, hard list in no folder": (
        ["screen", "--build-hard", "no/h", "--threshold", "1"],
        "folder of --build-hard no/h does not exist",
    ),
    "screen, hard list as a folder": (
        ["screen", "--build-hard", "folder", "--threshold", "1"],
        "--build-hard folder is a folder",
    ),
    "inspect, limit": (["inspect", "--limit", "0"], "--limit is 0"),
    "inspect, out": (["inspect", "--out", "file"], "file is a file"),
    "sweep, two folders": (["sweep", "a", "b"], "give one run folder"),
    "sweep, run": (["sweep", "file"], "the run file: file is a file"),
    "sweep, run below a file": (["sweep", "file/a"], "file is a file"),
    "sweep, share": (["sweep", "run", "--shard", "5/4"], "--shard is 5/4"),
    "sweep, no share": (["sweep", "run", "--shard", "a/b"], "--shard is 'a/b'"),
    "sweep, limit": (["sweep", "run", "--limit", "0"], "--limit is 0"),
    "sweep, chunk": (["sweep", "run", "--chunk", "0"], "--chunk is 0"),
    "sweep, address": (["sweep", "run", "--address", "auto"], "--address is for --engine ray"),
    "sweep, workers": (["sweep", "run", "--engine", "ray", "--actors", "0"], "--actors is 0"),
    "sweep, CPUs": (
        ["sweep", "run", "--engine", "ray", "--cpus-per-actor", "0"],
        "--cpus-per-actor is 0",
    ),
    "sweep, no cluster": (
        ["sweep", "run", "--engine", "ray", "--address", "127.0.0.1:1"],
        "no Ray cluster answers at 127.0.0.1:1",
    ),
    "sweep, no address": (
        ["sweep", "run", "--engine", "ray", "--address", "host"],
        "host is not HOST:PORT",
    ),
    "sweep, a model twice": (
        ["sweep", "run", "--model", "a/b", "a/b"],
        "rows would be in one folder",
    ),
    "sweep, an unknown second model": (
        ["sweep", "run", "--model", "smollm2-135m", "gpt-9"],
        "no model is called 'gpt-9'",
    ),
    "sweep, method": (["sweep", "run", "--method", "memoir"], "no method is called"),
    "sweep, a changed run": (["sweep", "begun"], "begun with something else"),
    "data, count": (["data", "synthesize", "--count", "0", "--out", "f"], "--count is 0"),
    "data, out": ([*MADE, "--out", "folder"], "--out folder is a folder"),
    "data, out in no folder": ([*MADE, "--out", "no/f"], "folder of --out no/f does not exist"),
    "data, seed": ([*MADE, "--out", "f", "--seed", "-1"], "--seed is -1"),
    "data, pulled into a file": (["data", "pull", "me-ppl-50", "--out", "file"], "file is a file"),
    "edit, saved nowhere": ([*EDIT, "--save", ""], "--save is empty"),
    "edit, no contexts": ([*EDIT, "--contexts", " "], "--contexts is empty"),
    "edit, no model": ([*EDIT, "--model", ""], "--model is empty"),
    "inspect, no model": (["inspect", ""], "the name is empty"),
    "inspect, nobody's home": (["inspect", "~no-such-user/x"], "write the path in full"),
    "inspect, a NUL": (["inspect", "a\0b"], "no model is called"),
    "scan, out nowhere": (["scan", "--out", ""], "--out is empty"),
    "scan, out in a link to nothing": (
        ["scan", "--out", "dangling/a"],
        "dangling is a link to nothing; name a folder",
    ),
    "sweep, no run": (["sweep", ""], "the run is empty"),
    "hard, out": (["hard", "--out", "folder"], "is a folder"),
    "hard, out nowhere": (["hard", "--out", "no/h.json"], "does not exist"),
    "hard, work": (["hard", "--out", "h.json", "--work", "file"], "file is a file"),
    "hard, count": (["hard", "--out", "h.json", "--count", "0"], "--count is 0"),
    "hard, facts twice": (
        ["hard", "--out", "h.json", "--generate", "--facts", "zsre"],
        "--generate makes the facts itself",
    ),
    "data, out nowhere": ([*MADE, "--out", ""], "--out is empty"),
    "models, name": (["models", "pull", "gpt-9"], "no model is called 'gpt-9'"),
    "reproduce, scripts": (["reproduce", "--analyses", "no"], "in a checkout"),
    "reproduce, jobs": (["reproduce", "--jobs", "0"], "--jobs is 0"),
    "reproduce, out": (["reproduce", "--out", "file"], "file is a file"),
    "reproduce, device": (["reproduce", "--device", "tpu"], "'tpu' is not supported"),
    "reproduce, configuration": (["reproduce", "--config", "bad.toml"], "steps is 0"),
    "results, answer in a file": (["results", "begun", "--csv", "file/f"], "file is a file"),
    "results, answer as a folder": (["results", "begun", "--csv", "folder"], "is a folder"),
    "results, figures": (["results", "begun", "--figures", "file"], "file is a file"),
    "results, no query": (["results", "begun", "--sql", "SELEC 1"], "cannot be answered"),
    "report, out": (["report", "--out", "file"], "file is a file"),
    "train-mend, out as a folder": (["train-mend", "--out", "folder"], "is a folder"),
    "train-mend, steps": (["train-mend", "--out", "m", "--steps", "0"], "steps is 0"),
    "train-mend, rank": (["train-mend", "--out", "m", "--rank", "0"], "--rank is 0"),
}
"""Bad values of options of one command, or of those that no model is needed for."""
CASES = OTHERS | {
    f"{command}, {name}": ([*argv, *options], said)
    for command, argv in COMMANDS.items()
    for name, (options, said) in BAD.items()
}


@pytest.fixture
def place(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with places that cannot be written, in which no model can be loaded."""
    del own_cache
    folder = tmp_path / "place"
    for name in ("folder", "closed", "begun", "net", "old/smollm2-135m", "curves.json"):
        (folder / name).mkdir(parents=True)
    empty = ("file", "h.normal.json", "h.provenance.json", "net/model.safetensors", "busy.work")
    for name in (*empty, "old/file", "old/smollm2-135m/screen.json"):
        (folder / name).write_text("", "utf-8")
    (folder / "link").symlink_to("file")
    pulled = cache_folder("data") / "counterfact.json"
    pulled.write_text("", "utf-8")
    (folder / "pulled").symlink_to(pulled)
    for name in ("good", "smollm2-135m"):
        (folder / f"{name}.toml").write_text("steps = 3\n", "utf-8")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "dangling").symlink_to(folder / "nowhere")
    slots = 'direction="bare"\nresidual="bare"\ndenominator="bare"\nanchor="prefixed"\n'
    (folder / "methods.toml").write_text(f"[a]\n{slots}[b]\n{slots}", "utf-8")
    (folder / "bad.toml").write_text("steps = 0\n", "utf-8")
    manifest = {
        "format": 2,
        "models": {},
        "facts": {"hash": "abc", "count": 1},
        "methods": {"rome": {}},
        "metrics": ["perplexity"],
        "seed": 0,
        "chunk": 24,
    }
    (folder / "begun" / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    (folder / "analyses").symlink_to(ROOT / "analyses")
    monkeypatch.chdir(folder)
    may = os.access
    # Nobody is forbidden anything as root.
    monkeypatch.setattr(
        os, "access", lambda path, mode: "closed" not in str(path) and may(path, mode)
    )

    def load(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loading, "_load_files", load)
    monkeypatch.setattr("firsttok.models.location.embedded_folder", load)
    return folder


def tree(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "analyses" not in path.parts}


@pytest.mark.parametrize("name", CASES)
def test_a_bad_option_is_refused_before_a_model_is_loaded(
    name: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv, said = CASES[name]
    before = tree(place)
    assert main(argv) == 2
    captured = capsys.readouterr()
    (line,) = filter(str.strip, captured.err.splitlines())
    assert line.startswith("firsttok: ")
    assert said in line
    assert captured.out == ""
    assert tree(place) == before


def test_a_good_option_would_have_loaded_one(place: Path) -> None:
    for argv in ([*EDIT, "--seed", str(SEEDS - 1)], ["tokens", *FACT], ["scan", "--out", "new"]):
        with pytest.raises(AssertionError, match="a model was loaded"):
            main(argv)
    assert not (place / "new").exists()


@pytest.mark.parametrize(
    "argv",
    [
        [*EDIT, "--save", "e.safetensors"],
        [*EDIT, "--save", "file"],
        [*EDIT, "--save", "/dev/null", "--method", "rome", "rome"],
        ["scan", "--out", "a/b/c", "--seed", "0", "--limit", "1"],
        ["sweep", "status", "closed"],
        ["sweep", "a/b", "--chunk", "1"],
        [*MADE, "--out", "f.json", "--seed", str(SEEDS - 1)],
        ["results", "begun", "--csv", "folder/f", "--figures", "folder"],
        ["reproduce", "--jobs", "1", "--device", "cuda:11"],
        ["edit", *FACT, "--target", "a", "--device", "cuda"],
        ["screen", "--threshold", "0.1", "--build-hard", "folder/hard.json"],
        ["screen", "--facts", "file", "--build-hard", "h.json"],
        ["hard", "--facts", "h.normal.json", "--out", "h.json"],
        ["edit", *FACT, "--target", "a", "--model", "net", "--save", "net/e.safetensors"],
        ["results", "begun", "--csv", "begun/rows.csv"],
        ["hard", "--generate", "--normal", "--out", "folder/hard.json", "--work", "new/work"],
    ],
)
def test_what_can_be_right_is_not_refused(argv: list[str], place: Path) -> None:
    del place
    parser = _parser()
    assert configured(parser.parse_args(argv), parser, argv).command == argv[0]


def test_values_of_a_configuration_are_checked_as_options_are(place: Path) -> None:
    Path("seed.toml").write_text("seed = 18446744073709551616\n", "utf-8")
    Path("device.toml").write_text('device = "mps"\n', "utf-8")
    Path("digits.toml").write_text(f"seed = {'1' * 5000}\n", "utf-8")
    for name, said in (("seed", "--seed is 18446744073709551616"), ("device", "'mps'")):
        argv = [*EDIT, "--config", f"{name}.toml"]
        parser = _parser()
        with pytest.raises(BadInputError, match=said):
            configured(parser.parse_args(argv), parser, argv)
    assert main([*EDIT, "--config", "digits.toml"]) == 2
    del place


PARSES: dict[str, Callable[[Path], list[str]]] = {
    "several methods saved": lambda p: [*EDIT, "--method", "a", "b", "--save", str(p / "e")],
    "an unknown device": lambda _: [*EDIT, "--device", "mps"],
    "an output in no folder": lambda p: [*EDIT, "--save", str(p / "no" / "e")],
    "no limit": lambda _: ["scan", "--limit", "0"],
}


@pytest.mark.parametrize("name", PARSES)
def test_what_needs_no_library_to_be_seen_is_told_without_one(name: str, tmp_path: Path) -> None:
    code = (
        "import sys; from firsttok.cli import main; code = main(sys.argv[1:]); "
        "print([m for m in ('torch', 'numpy', 'rich') if m in sys.modules]); sys.exit(code)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, *PARSES[name](tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (ended.returncode, ended.stdout) == (2, "[]\n"), ended.stderr
