"""Every analysis script, run as a user runs it, on a tiny model."""

import argparse
import json
import math
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from running import in_a_process, in_this_process
from tiny import CONTEXTS, FACTS, SENTENCES, TinyFactory, build

from firsttok.cli import main
from firsttok.console import progress_bar
from firsttok.contexts import ContextSet
from firsttok.data import Fact, load_facts
from firsttok.editing import C_ROME, compute_edit, find_method
from firsttok.evaluation import continuation
from firsttok.paper.cases import all_listed_cases, load_collapse_ids
from firsttok.paper.claims import Claim, GapError
from firsttok.paper.experiment import parse_script
from firsttok.paper.registry import EXPERIMENTS, SCRIPTS
from firsttok.paper.report import build_report, load_result
from firsttok.rows import Row
from firsttok.second_moment import SecondMoment
from firsttok.storage import read_json, write_record
from firsttok.study import Study
from firsttok.sweep.results import read_run

pytestmark = pytest.mark.usefixtures("short_continuations")
ROOT = Path(__file__).parent.parent
ANALYSES = ROOT / "analyses"
MORE_FACTS = (
    Fact(
        subject="I",
        template="{} left early because",
        target_new="it rained",
        target_true="I",
        paraphrases=("You left early because",),
        neighbours=("Japan is",),
    ),
    Fact(subject="Japan", template="I {} the capital", target_new="Rome", target_true="it"),
    Fact(subject="France", template="a {} the capital", target_new="Berlin", target_true="it"),
)
"""A one-token subject at the beginning, and subjects that are the second token."""
GIVEN = ("model", "facts", "texts", "contexts", "out")
OPTIONS = {"figure6_encoder_contrast": ["encoder"], "table3_transfer": ["others"]}
"""Options of single scripts that name another model."""


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("scripts")
    for arch in ("llama", "bert", "gpt2", "t5"):
        build(arch, folder / arch)
    facts = (*FACTS, *MORE_FACTS)
    numbered = [replace(fact, case_id=index) for index, fact in enumerate(facts)]
    contents = {
        "facts": [fact.as_record() for fact in numbered],
        "texts": list(SENTENCES),
        "contexts": list(CONTEXTS.templates),
    }
    paths = {name: folder / f"{name}.json" for name in contents}
    for name, content in contents.items():
        paths[name].write_text(json.dumps(content), "utf-8")
    return paths | {
        "model": folder / "llama",
        "encoder": folder / "bert",
        "others": folder / "gpt2",
        "t5": folder / "t5",
        "out": folder / "out",
        "cache": folder / "cache",
    }


def run(
    setting: dict[str, Path],
    *command: str,
    expected: int = 0,
    warning: str = "",
    as_process: bool = False,
) -> "subprocess.CompletedProcess[str]":
    options = ["--second-moment", "identity", "--steps", "3", "--bos", "without"]
    # The script on the anchor draws contexts of its own; a sweep has a folder of its own.
    left_out = {"contexts"} if "extra_value_anchor" in command[0] else set[str]()
    left_out |= {"out"} if "sweep" in command else set()
    for name in GIVEN:
        if name not in left_out:
            options += [f"--{name}", str(setting[name])]
    environment = {"FIRSTTOK_CACHE": str(setting["cache"]), "OMP_NUM_THREADS": "1"}
    runs = in_a_process if as_process else in_this_process
    result = runs([*command, *options], environment)
    assert result.returncode == expected, result.stderr
    assert ("warning" in result.stderr.lower()) == bool(warning), result.stderr
    assert warning in " ".join(result.stderr.split())
    return result


@pytest.fixture(scope="module")
def cases(setting: dict[str, Path]) -> Path:
    # A random model is none to begin with.
    run(setting, "-m", "firsttok.cli", "scan", warning="nothing can be said to collapse")
    path = setting["out"] / "llama" / "collapse_cases.json"
    facts = load_facts(setting["facts"])
    assert len(load_collapse_ids(path, facts)) > 2
    # A random model is never good, so a few facts have to stand for the normal ones.
    record = read_json(path, "collapse cases")
    record["collapse"] = [fact.case_id for fact in facts if fact.template.startswith("{}")]
    write_record(path, record)
    return path


def test_every_script_is_known_to_reproduce() -> None:
    assert {path.stem for path in ANALYSES.glob("*.py")} == {each.name for each in EXPERIMENTS}


@pytest.mark.parametrize("name", [each.name for each in EXPERIMENTS if not each.alone])
def test_script_leaves_its_files(name: str, setting: dict[str, Path], cases: Path) -> None:
    script = str(ANALYSES / f"{name}.py")
    own = [word for option in OPTIONS.get(name, []) for word in (f"--{option}", setting[option])]
    count = ["--collapse", "3", "--normal", "3"]
    # One of them as a user runs it.
    process = name == SCRIPTS[0]
    result = run(setting, script, "--cases", str(cases), *count, *map(str, own), as_process=process)
    stem = setting["out"] / "llama" / name
    for suffix in (".csv", ".json", ".png", ".svg"):
        assert stem.with_suffix(suffix).stat().st_size > 100
    record = json.loads(stem.with_suffix(".json").read_text("utf-8"))
    provenance = record["provenance"]
    common = ("model", "contexts", "second_moment", "hyperparameters", "versions", "seconds")
    for key in (*common, "original_perplexity", "case_list", "seed"):
        assert key in provenance
    assert provenance["command"].startswith(f"python analyses/{name}.py")
    assert str(setting["out"].parent) not in json.dumps(provenance)
    assert record["rows"]
    assert all(math.isfinite(value) for row in record["rows"] for value in numbers(row))
    lines = stem.with_suffix(".csv").read_text("utf-8").splitlines()
    assert len(lines) == len(record["rows"]) + 1
    assert record["title"] in " ".join(result.stdout.split())
    assert all(len(line) == len(record["columns"]) for line in record["lines"])
    for claim in import_module(f"analyses.{name}").CLAIMS:
        # A verdict may lack cases here, but never a field that the script should have written.
        reason = reason_of(claim, name, stem.parent)
        assert "has no number for" not in reason
        assert "has no row" not in reason
        assert f"not judged ({claim.place}): {claim.sentence}" in " ".join(result.stdout.split())


def reason_of(claim: Claim, name: str, folder: Path) -> str:
    """The rule's own reason, though a random model is not judged."""
    result = load_result(folder, name)
    (judged,) = [each for each in result.claims or () if each.id == claim.id]
    assert "above 1000 itself" in judged.reason
    try:
        return claim.decide(result).reason
    except GapError as gap:
        return str(gap)


def numbers(row: dict[str, Any]) -> list[float]:
    return [value for value in row.values() if isinstance(value, float)]


@pytest.mark.parametrize("name", [each.name for each in EXPERIMENTS])
def test_script_has_help(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ANALYSES / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for option in ("--model", "--facts", "--device", "--seed", "--out", "--profile"):
        assert option in shown


def test_script_without_a_list_says_how_to_make_one(setting: dict[str, Path]) -> None:
    script = str(ANALYSES / f"{SCRIPTS[0]}.py")
    command = [script, "--model", str(setting["model"]), "--cases", "/none.json"]
    result = in_this_process(command, {})
    assert result.returncode == 2
    assert "firsttok scan" in result.stderr
    assert "Traceback" not in result.stderr


def test_contexts_that_a_script_cannot_use_are_refused_before_a_model_is_loaded() -> None:
    script = str(ANALYSES / "extra_value_anchor.py")
    command = [script, "--model", "no-such-model", "--contexts", "contexts.json"]
    result = in_this_process(command, {})
    assert result.returncode == 2
    assert "leave --contexts out" in result.stderr
    assert "no-such-model" not in result.stderr


def test_options_are_parsed_once_and_all_listed_cases_are_taken(
    setting: dict[str, Path], cases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--second-moment", "identity", "--cases", str(cases), "--collapse", "1"]
    for name in GIVEN:
        given += [f"--{name}", str(setting[name])]
    monkeypatch.setattr(sys, "argv", ["script.py", *given, "--normal", "2", "--own", "7"])
    parsed: list[argparse.Namespace] = []

    class Parser(argparse.ArgumentParser):
        def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
            found = super().parse_known_args(*args, **kwargs)
            parsed.append(found[0])
            return found

    parser = Parser()
    parser.add_argument("--own", type=int)
    options = parse_script(parser, progress_bar())
    assert parsed == [options.args]
    assert options.args.own == 7
    listed = load_collapse_ids(cases, options.facts)
    assert (options.collapse, options.normal) == (1, 2)
    assert len(listed) > 2
    chosen = all_listed_cases(options)
    assert [fact.case_id for fact in chosen.collapse] == listed
    others = len(options.facts) - len(listed)
    assert len(chosen.normal) == min(len(listed), others)
    assert not {fact.case_id for fact in chosen.normal} & set(listed)
    many = all_listed_cases(replace(options, normal=len(options.facts)))
    assert len(many.normal) == others


def test_a_borrowed_list_is_not_called_the_model_s_own(
    setting: dict[str, Path], cases: Path, tmp_path: Path
) -> None:
    record = read_json(cases, "collapse cases")
    record["provenance"]["model"] |= {"name": "lender", "fingerprint": "another"}
    write_record(tmp_path / "borrowed.json", record)
    script = str(ANALYSES / "table3_transfer.py")
    own = ["--cases", str(tmp_path / "borrowed.json"), "--collapse", "2", "--others"]
    run(setting | {"out": tmp_path}, script, *own, warning="was made on another model")
    found = json.loads((tmp_path / "llama" / "table3_transfer.json").read_text("utf-8"))
    assert found["title"].endswith("collapse cases of lender")
    assert found["lines"][0][0] == "llama"
    assert not any(row["source"] for row in found["rows"])


Scanned = Callable[[int], dict[str, Path]]


@pytest.fixture(scope="module")
def scanned(setting: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Scanned:
    """The setting with so many facts, which were scanned."""

    @cache
    def scan(count: int) -> dict[str, Path]:
        folder = tmp_path_factory.mktemp("scanned")
        records = json.loads(setting["facts"].read_text("utf-8"))[:count]
        (folder / "facts.json").write_text(json.dumps(records), "utf-8")
        changed = setting | {"facts": folder / "facts.json", "out": folder / "out"}
        run(changed, "-m", "firsttok.cli", "scan", warning="nothing can be said to collapse")
        return changed

    return scan


@pytest.mark.parametrize(
    ("name", "facts", "own", "sentence"),
    [
        ("figure6_encoder_contrast", 8, ["--encoder", "{model}"], "is a decoder"),
        ("table3_transfer", 8, ["--others", "gpt-9"], "no model is called 'gpt-9'"),
        ("table7_first2second", 6, [], "no fact has a subject that is the second token"),
        ("extra_token_identity", 5, [], "no collapse case is one token without a leading space"),
        ("table5_prefixed_efficacy", 8, ["--normal", "0"], "--normal is 0; give at least 1"),
    ],
)
def test_scripts_say_what_they_cannot_do(
    name: str, facts: int, own: list[str], sentence: str, setting: dict[str, Path], scanned: Scanned
) -> None:
    changed = scanned(facts)
    out = changed["out"]
    cases = str(out / "llama" / "collapse_cases.json")
    options = [word.format(model=setting["model"]) for word in own]
    script = str(ANALYSES / f"{name}.py")
    result = run(changed, script, "--cases", cases, *options, expected=2)
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
    assert not (out / "llama" / f"{name}.json").exists()


def test_the_mask_needs_sentences_that_reach_its_places(
    setting: dict[str, Path], cases: Path, tmp_path: Path
) -> None:
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps(["Rome is.", "Japan is."]), "utf-8")
    script, out = str(ANALYSES / "extra_attention_mask.py"), tmp_path / "out"
    changed = setting | {"texts": texts, "out": out}
    result = run(changed, script, "--cases", str(cases), expected=2)
    assert "no sentence of --texts has a token at place 10; give longer ones" in result.stderr
    assert not (out / "llama" / "extra_attention_mask.json").exists()


def test_edited_models_write_freely_behind_one_prompt_of_each_kind(tiny: TinyFactory) -> None:
    anchor = import_module("analyses.extra_value_anchor")
    model = tiny("llama")
    study = Study(
        model=model,
        contexts=CONTEXTS,
        second_moment=SecondMoment.identity(48),
        layer=2,
        hyperparameters=replace(model.hyperparameters, steps=3),
        texts=SENTENCES,
    )
    templates = ("Yes. {}", "It rained. {}", "{}")
    tests = {
        kind: ContextSet(templates=(template,))
        for kind, template in zip(anchor.KINDS, templates, strict=True)
    }
    fact = MORE_FACTS[0]
    edit = compute_edit(
        model,
        fact,
        method=C_ROME,
        contexts=CONTEXTS,
        second_moment=study.second_moment,
        layer=study.layer,
        hyperparameters=study.hyperparameters,
    )
    view = model.edited(edit)
    for kind, template in zip(anchor.KINDS, templates, strict=True):
        text = continuation(view, template.format(fact.prompt), tokens=anchor.TOKENS)
        first = text.split()[0]
        for target, expected in ((first, True), (f"{first}{first}", False)):
            asked = replace(fact, target_new=target)
            (row,) = anchor.Outcome(tests, 0).measure(study, asked, [edit])
            assert row[f"{kind}_written"] is expected
            assert row[f"{kind}_text"].startswith(first)
    (silent,) = anchor.Outcome(tests, None).measure(study, fact, [edit])
    assert silent.keys() == set(anchor.KINDS)


def test_the_encoder_of_an_encoder_decoder_is_contrasted_too(
    setting: dict[str, Path], cases: Path
) -> None:
    script = str(ANALYSES / "figure6_encoder_contrast.py")
    own = ["--cases", str(cases), "--normal", "3", "--encoder", str(setting["t5"])]
    out = setting["out"].parent / "t5-out"
    run(setting | {"out": out}, script, *own)
    rows = json.loads((out / "llama" / "figure6_encoder_contrast.json").read_text("utf-8"))["rows"]
    encoder = [row for row in rows if row["kind"] == "encoder" and row["bos"] == "without"]
    assert [row["layer"] for row in encoder] == [0, 1, 2]


@pytest.fixture(scope="module")
def swept(
    setting: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, str], Row]:
    """Rows of a sweep of all facts, by their number and their method's label."""
    folder = tmp_path_factory.mktemp("swept") / "run"
    words = ["sweep", str(folder), "--method", "rome", "c-rome", "p-rome", "fc-rome"]
    run(setting, "-m", "firsttok.cli", *words, warning="nothing can be said to collapse")
    return {(row.case_id, find_method(row.method).label): row for row in read_run(folder).rows}


@pytest.mark.parametrize("name", ["table1_update_components", "table2_perplexity"])
def test_a_sweep_finds_what_the_tables_show(
    name: str, setting: dict[str, Path], cases: Path, swept: dict[tuple[int, str], Row]
) -> None:
    count = ["--collapse", "3", "--normal", "3"]
    run(setting, str(ANALYSES / f"{name}.py"), "--cases", str(cases), *count)
    record = json.loads((setting["out"] / "llama" / f"{name}.json").read_text("utf-8"))
    assert record["rows"]
    for row in record["rows"]:
        found = swept[row["case_id"], row["method"]]
        for column in found.keys() & row.keys() - {"method"}:
            value = found[column]
            if column == "denominator":
                # Table 1 shows its size.
                value, row[column] = abs(value), abs(row[column])
            wanted = (
                pytest.approx(row[column], rel=1e-5) if isinstance(value, float) else row[column]
            )
            assert value == wanted, (row["case_id"], column)


def test_an_experiment_of_one_s_own_is_one_file(
    setting: dict[str, Path],
    cases: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (ROOT / "docs" / "howto" / "new-experiment.md").read_text("utf-8")
    (source, *_) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(source.splitlines()) < 40
    script = tmp_path / "analyses" / "edit_size.py"
    script.parent.mkdir()
    script.write_text(source, "utf-8")
    words = ["--second-moment", "identity", "--steps", "3", "--bos", "without"]
    words += ["--cases", str(cases), "--collapse", "3", "--normal", "3"]
    for name in GIVEN:
        words += [f"--{name}", str(tmp_path / "out" if name == "out" else setting[name])]
    monkeypatch.setattr(sys, "argv", [str(script), *words])
    # A random model is none to begin with.
    monkeypatch.setattr("firsttok.paper.claims.COLLAPSE_THRESHOLD", 1e9)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    folder = tmp_path / "out" / "llama"
    record = json.loads((folder / "edit_size.json").read_text("utf-8"))
    (claim,) = record["claims"]
    assert claim["status"] in ("reproduced", "partly", "not")
    assert (claim["id"], claim["own"]) == ("own-edit-size", True)
    assert claim["reason"].startswith("The median norm is ")
    assert len(record["rows"]) == 6
    claims = load_result(folder, "edit_size").claims
    assert claims is not None
    (judged,) = claims
    assert f"{judged.label} (in no paper found): {claim['sentence']}" in " ".join(
        capsys.readouterr().out.split()
    )
    assert main(["report", "--out", str(tmp_path / "out")]) == 0
    report = build_report(folder)
    assert report.judged == (judged,)
    assert [each.heading for each in report.sections][-1] == "Norm of ROME's update"
    markdown = (folder / "README.md").read_text("utf-8")
    assert f"{judged.label}** (in no paper found): {claim['sentence']}" in markdown
    assert claim["reason"] in markdown
    assert claim["reason"] in (folder / "index.html").read_text("utf-8")
