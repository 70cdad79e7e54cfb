"""The command line on a tiny model: what it prints, saves and leaves behind."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SENTENCES, build, edits_of, relative

from firsttok.cli import main
from firsttok.contexts import ContextSet
from firsttok.data import Fact
from firsttok.editing import ROME, load_edit
from firsttok.evaluation import perplexity, target_probabilities
from firsttok.models import CATALOG, load
from firsttok.paper.registry import EXPERIMENTS, SCRIPTS
from firsttok.second_moment import SecondMoment

pytestmark = pytest.mark.usefixtures("short_continuations")
FACT = ["--subject", "England", "--template", "{}'s capital city is", "--target", "Berlin"]
CONTEXTS = ["{}", "The answer. {}", "I know. {}"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    build("llama", folder)
    return folder


@pytest.fixture
def quick(llama: Path, tmp_path: Path, own_cache: Path) -> list[str]:
    contexts = tmp_path / "contexts.json"
    contexts.write_text(json.dumps(CONTEXTS), "utf-8")
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps(SENTENCES), "utf-8")
    return [
        *("--model", str(llama), "--contexts", str(contexts), "--second-moment", "identity"),
        *("--texts", str(texts), "--steps", "4"),
    ]


def test_edit_prints_one_json_object(quick: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["edit", *FACT, *quick, "--method", "rome", "r-rome", "fc-rome", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert list(record["states"]) == ["before", "rome", "c-rome", "fc-rome"]
    assert record["provenance"]["contexts"] == CONTEXTS
    assert record["provenance"]["hyperparameters"]["steps"] == 4
    assert record["provenance"]["second_moment"]["corpus"] == "identity"
    for name in ("rome", "c-rome", "fc-rome"):
        state = record["states"][name]
        assert len(state["losses"]) == 4
        assert state["perplexity"] > 0
        ratio = state["numerator"] / abs(state["denominator"])
        assert state["delta_norm"] == pytest.approx(ratio, rel=1e-5)


def test_edit_is_repeatable(quick: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["edit", *FACT, *quick, "--json"])
    first = capsys.readouterr().out
    main(["edit", *FACT, *quick, "--json"])
    assert capsys.readouterr().out == first


def test_edit_shows_before_and_after(quick: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["edit", *FACT, *quick, "--method", "rome", "c-rome"]) == 0
    shown = capsys.readouterr().out
    for text in ("lookup at", "denominator", "perplexity", "before", "c-rome", "next:"):
        assert text in shown


def test_options_change_the_edit(quick: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    base = ["edit", *FACT, *quick, "--json"]
    traces: dict[str, list[float]] = {}
    for options in (
        "",
        "--lr 0.1",
        "--kl 5",
        "--weight-decay 30",
        "--clamp 0.01",
        "--layer 1",
        "--bos without",
        "--dtype float64",
    ):
        main([*base, *options.split()])
        traces[options] = json.loads(capsys.readouterr().out)["states"]["rome"]["losses"]
    reference = traces.pop("")
    for options, losses in traces.items():
        assert losses != reference, options


def test_saved_edit_is_the_one_that_was_shown(
    quick: list[str], llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "edit.safetensors"
    assert main(["edit", *FACT, *quick, "--json", "--save", str(path)]) == 0
    shown = json.loads(capsys.readouterr().out)["states"]["rome"]
    tensors = load_file(path)
    edit = load_edit(path)
    assert sorted(tensors) == [f"layer{edit.layer}.out.{part}" for part in ("left", "right")]
    assert float(edit.left.norm()) == pytest.approx(1.0, abs=1e-5)
    assert edit.report["denominator"] == shown["denominator"]
    model = load(str(llama))
    before = model.site(edit.layer).weight.detach().clone()
    with edit.applied(model):
        change = model.site(edit.layer).weight.detach() - before
    assert torch.allclose(change, torch.outer(edit.left, edit.right).T, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "reason"), [("I", "has one token"), ("Rome is " * 200, "reads at most")]
)
def test_what_cannot_be_measured_is_refused_before_the_optimisation(
    text: str,
    reason: str,
    quick: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path(quick[quick.index("--texts") + 1]).write_text(json.dumps([text]), "utf-8")
    monkeypatch.delattr("firsttok.study.Study.edits")
    assert main(["edit", *FACT, *quick]) == 2
    assert reason in capsys.readouterr().err


def test_second_moment_and_contexts_are_made_once(
    llama: Path, tmp_path: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("England is far away. " * 30 + "\n\n" + "The city of Rome. " * 30, "utf-8")
    command = ["edit", *FACT, "--model", str(llama), "--steps", "2", "--json"]
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps(SENTENCES), "utf-8")
    command += ["--corpus", str(corpus), "--texts", str(texts)]
    assert main(command) == 0
    first = capsys.readouterr().out
    made = {path: path.stat().st_mtime_ns for path in own_cache.rglob("*.*") if path.is_file()}
    assert any("second_moments" in str(path) for path in made)
    assert any(path.parent.name == "contexts" for path in made)
    assert main(command) == 0
    assert capsys.readouterr().out == first
    kept = {path for path in made if path.suffix in {".safetensors", ".json"}}
    assert all(path.stat().st_mtime_ns == made[path] for path in kept)


def test_tokens_marks_the_looked_up_one(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokens", "--model", str(llama), *FACT[:4], "--bos", "without"]) == 0
    line, mark, joint = capsys.readouterr().out.splitlines()
    assert line.startswith("England|")
    assert mark.startswith("^ lookup at 0")
    assert joint == "A target in this script is joined by one space."
    assert main(["tokens", "--model", str(llama), *FACT[:4], "--bos", "with"]) == 0
    line, mark, _ = capsys.readouterr().out.splitlines()
    assert line.startswith("<s>|England|")
    assert mark.strip() == "^ lookup at 1"
    assert line[mark.index("^") :].startswith("England|")


def test_models_list_names_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "list"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{spec.name}: {spec.note}" in shown for spec in CATALOG)


def test_a_normal_run_is_quiet(quick: list[str], own_cache: Path) -> None:
    environment = os.environ | {"FIRSTTOK_CACHE": str(own_cache)}
    command = [sys.executable, "-W", "default", "-m", "firsttok.cli", "edit", *FACT, *quick]
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=True, timeout=300
    )
    for word in ("warn", "deprecat", "traceback", "error"):
        assert word not in result.stderr.lower(), result.stderr
        assert word not in result.stdout.lower()


@pytest.mark.real_model
@pytest.mark.slow
def test_readme_example_on_the_embedded_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contexts = ["{}", "The long road north. {}", "Because it rained. {}", "You never know. {}"]
    path = tmp_path / "contexts.json"
    path.write_text(json.dumps(contexts), "utf-8")
    assert (
        main(
            [
                *("edit", *FACT, "--method", "rome", "c-rome", "--json"),
                *("--second-moment", "identity", "--contexts", str(path), "--steps", "8"),
            ]
        )
        == 0
    )
    states = json.loads(capsys.readouterr().out)["states"]
    assert states["rome"]["perplexity"] > 1000 > states["before"]["perplexity"]
    assert states["c-rome"]["perplexity"] < 1.1 * states["before"]["perplexity"]
    assert abs(states["rome"]["denominator"]) * 20 < abs(states["c-rome"]["denominator"])


STUB = """
import json, pathlib, sys
name = pathlib.Path(__file__).stem
with open({log!r}, "a") as log:
    log.write(" ".join([name, *sys.argv[1:]]) + "\\n")
if pathlib.Path({stop!r}).exists() and name == "table3_transfer":
    raise SystemExit(int(pathlib.Path({stop!r}).read_text()))
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1]) / "some-model"
out.mkdir(parents=True, exist_ok=True)
record = {{"title": name, "columns": [], "lines": [], "rows": [], "provenance": {{}}}}
(out / f"{{name}}.json").write_text(json.dumps(record))
"""


def stub_command(tmp_path: Path, log: Path, stop: Path) -> list[str]:
    analyses = tmp_path / "analyses"
    analyses.mkdir()
    for name in SCRIPTS:
        stub = STUB.format(log=str(log), stop=str(stop))
        (analyses / f"{name}.py").write_text(stub, "utf-8")
    return ["reproduce", "--model", "some-model", "--analyses", str(analyses)]


def test_a_script_waits_only_for_earlier_ones() -> None:
    for each in EXPERIMENTS:
        assert all(SCRIPTS.index(other) < SCRIPTS.index(each.name) for other in each.after)


@pytest.mark.slow
def test_reproduce_runs_scripts_side_by_side_but_none_before_what_it_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, stop = tmp_path / "log", tmp_path / "stop"
    command = [*stub_command(tmp_path, log, stop), "--jobs", "2", "--cases", str(log)]
    command += ["--out", str(tmp_path / "out")]
    assert main([*command[:-2], "--jobs", "0"]) == 2
    assert "--jobs is 0" in capsys.readouterr().err
    assert main(command) == 0
    names = [line.split()[0] for line in log.read_text("utf-8").splitlines()]
    assert sorted(names) == sorted(SCRIPTS)
    for each in EXPERIMENTS:
        assert all(names.index(other) < names.index(each.name) for other in each.after)
    printed = capsys.readouterr().out
    assert all(re.search(rf"^{name} \(\d+ s\)$", printed, re.M) for name in SCRIPTS)
    assert str(tmp_path / "out" / "some-model" / "index.html") in printed
    stop.write_text("2", "utf-8")
    assert main(command) == 2
    assert "table3_transfer" in capsys.readouterr().err
    stop.write_text("3", "utf-8")
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 3


def test_reproduce_runs_every_script_in_order_and_then_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, stop = tmp_path / "log", tmp_path / "stop"
    command = [*stub_command(tmp_path, log, stop), "--jobs", "1"]
    command += ["--out", str(tmp_path / "out"), "--cases", "list.json", "--bos", "without"]
    stop.write_text("3", "utf-8")
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 3
    assert len(log.read_text("utf-8").splitlines()) == SCRIPTS.index("table3_transfer") + 1
    assert not (tmp_path / "out" / "some-model" / "index.html").exists()
    # A script that does not apply says so with exit code 2, and the others go on.
    stop.write_text("2", "utf-8")
    log.unlink()
    assert main(command) == 2
    assert "table3_transfer" in capsys.readouterr().err
    assert len(log.read_text("utf-8").splitlines()) == len(SCRIPTS)
    stop.unlink()
    log.unlink()
    assert main(command) == 0
    lines = [line.split() for line in log.read_text("utf-8").splitlines()]
    assert [words[0] for words in lines] == list(SCRIPTS)
    for words in lines:
        options = dict(zip(words[1::2], words[2::2], strict=True))
        assert options["--profile"] == "quick"
        assert options["--cases"] == "list.json"
        assert options["--bos"] == "without"
    printed = capsys.readouterr().out
    for page in ("index.html", "README.md"):
        path = tmp_path / "out" / "some-model" / page
        assert path.stat().st_size > 1000
        assert str(path) in printed


def test_what_every_script_refuses_is_not_blamed_on_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = stub_command(tmp_path, tmp_path / "log", tmp_path / "stop")
    for name in SCRIPTS:
        (tmp_path / "analyses" / f"{name}.py").write_text("raise SystemExit(2)", "utf-8")
    assert main([*command, "--jobs", "1", "--out", str(tmp_path / "out")]) == 2
    assert "no script could be run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_edit_after_others_is_that_of_the_model_in_which_they_stand(
    quick: list[str], llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, alone = (str(tmp_path / f"{name}.safetensors") for name in ("one", "two", "alone"))
    other = [*FACT[:-1], "Rome"]
    assert main(["edit", *FACT, *quick, "--save", one]) == 0
    assert main(["edit", *other, *quick, "--save", alone]) == 0
    capsys.readouterr()
    assert main(["edit", *other, *quick, "--after", one, "--save", two, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    first, second = load_edit(one), load_edit(two)
    assert [each["hash"] for each in record["provenance"]["model"]["edits"]] == [first.content_hash]

    model = load(str(llama))
    ((_, edits),) = edits_of(
        model.edited(first),
        [Fact(subject="England", template="{}'s capital city is", target_new="Rome")],
        methods=[ROME],
        contexts=ContextSet(templates=tuple(CONTEXTS)),
        second_moment=SecondMoment.identity(model.site(None).d_mlp),
        hyperparameters=replace(model.hyperparameters, steps=4),
    )
    assert relative(second.right, edits["rome"].right) < 1e-6
    assert relative(second.right, load_edit(alone).right) > 1e-3
    before = record["states"]["before"]["perplexity"]
    assert before == pytest.approx(perplexity(model.edited(first), SENTENCES).mean, rel=1e-5)


def test_show_tells_what_saved_edits_are_and_do(
    quick: list[str], llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = (str(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert main(["edit", *FACT, *quick, "--save", one]) == 0
    assert main(["edit", *FACT[:-1], "Rome", *quick, "--after", one, "--save", two]) == 0
    capsys.readouterr()

    assert main(["show", one, two]) == 0
    said = capsys.readouterr().out
    assert "England's capital city is Berlin" in said
    assert "It was computed after: England's capital city is Berlin (rome, layer 2)." in said

    texts = quick[quick.index("--texts") + 1]
    run = ["show", one, two, "--run", "--model", str(llama), "--texts", texts]
    assert main([*run, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    model = load(str(llama))
    views = [model, model.edited(load_edit(one)), model.edited(load_edit(one), load_edit(two))]
    assert list(record["perplexity"]) == ["before", "with edit 1", "with edits 1 to 2"]
    for view, found in zip(views, record["perplexity"].values(), strict=True):
        assert found == pytest.approx(perplexity(view, SENTENCES).mean, rel=1e-5)
    for fact, target in zip(record["facts"], ("Berlin", "Rome"), strict=True):
        asked = Fact(subject="England", template="{}'s capital city is", target_new=target)
        (right,) = target_probabilities(views[2], asked, ContextSet(templates=("{}",)))
        assert fact["with edits 1 to 2"]["target_probability"] == pytest.approx(right, rel=1e-4)
    assert main(run) == 0
    assert record["verdicts"][1] in capsys.readouterr().out

    # The second edit does not belong on the bare model, and the message names the first.
    assert main(["show", two, "--run", "--model", str(llama)]) == 2
    assert "England's capital city is Berlin (rome, layer 2)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "value"),
    [("contexts", {"templates": 5}), ("hyperparameters", ["steps"]), ("facts", [{"subject": "a"}])],
)
def test_an_edit_with_odd_provenance_is_refused_before_a_model_is_loaded(
    part: str,
    value: object,
    quick: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "edit.safetensors"
    assert main(["edit", *FACT, *quick, "--save", str(path)]) == 0
    tensors, provenance = load_file(path), {**load_edit(path).provenance, part: value}
    record = {"components": {}, "losses": [], "provenance": provenance}
    save_file(tensors, path, {"firsttok_edit": json.dumps(record)})
    monkeypatch.setattr("firsttok.commands.show.load", lambda *_, **__: pytest.fail("loaded"))
    capsys.readouterr()
    assert main(["show", str(path), "--run"]) == 2
    assert capsys.readouterr().err.startswith(f"firsttok: {path} ")


def test_a_status_of_no_run_begins_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "status"]) == 2
    assert "firsttok sweep status RUN" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["edit", "scan", "screen", "hard", "tokens", "inspect", "show"])
def test_a_command_says_what_it_does_before_it_imports_what_takes_seconds(
    command: str, tmp_path: Path
) -> None:
    # Where torch cannot be imported, what is said can only have been said before.
    (tmp_path / "torch.py").write_text("raise SystemExit(7)", "utf-8")
    (tmp_path / "any.safetensors").write_text("", "utf-8")
    needed = {
        "edit": FACT,
        "hard": ["--out", "h.json"],
        "tokens": FACT[:4],
        "show": ["any.safetensors"],
    }.get(command, [])
    path = f"{tmp_path}{os.pathsep}{Path.cwd()}"
    done = subprocess.run(
        [sys.executable, "-m", "firsttok.cli", command, *needed],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 7
    opened = "any.safetensors" if command == "show" else "smollm2-135m"
    assert done.stderr.splitlines()[0] == f"{command}: opening {opened}"
