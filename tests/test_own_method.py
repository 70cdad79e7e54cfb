"""A method of one's own goes through edit, table, sweep and report, from Python and the command."""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CONTEXTS, FACTS, SENTENCES, TinyFactory, same_weights, weights

import firsttok as ft
from firsttok.cli import main
from firsttok.data import Fact
from firsttok.editing import METHODS, SLOTS, Edit, Method, Slot, find_methods, load_methods
from firsttok.errors import BadInputError
from firsttok.measuring import Plan
from firsttok.models import Model
from firsttok.paper.pages import render_html, write_reports
from firsttok.paper.report import build_report, result_folders
from firsttok.prompts import fact_prompt, with_target
from firsttok.rows import read_rows
from firsttok.second_moment import SecondMoment
from firsttok.study import Study

OWN = Method(
    name="half",
    label="Half-ROME",
    direction=Slot.PREFIXED_MEAN,
    residual=Slot.UNPREFIXED,
    denominator=Slot.PREFIXED_MEAN,
    anchor=Slot.UNPREFIXED,
)
SPELLED = "half=direction:prefixed,residual:bare,denominator:prefixed,anchor:bare"
TOML = """
[half]
label = "Half-ROME"
direction = "prefixed"
residual = "bare"
denominator = "prefixed"
anchor = "bare"
"""
KEYS = {"prefixed": Slot.PREFIXED_MEAN, "bare": Slot.UNPREFIXED}


@pytest.fixture
def study(tiny: TinyFactory, tmp_path: Path) -> Study:
    return study_of(tiny("gpt2"), tmp_path / "work")


def study_of(model: Model, work: Path) -> Study:
    return ft.prepare_study(
        model,
        layer=1,
        contexts=CONTEXTS,
        second_moment=SecondMoment.identity(model.site(1).d_mlp),
        hyperparameters=ft.Hyperparameters(steps=3),
        texts=SENTENCES[:2],
        work=work,
    )


def test_every_choice_of_slots_can_be_spelled_out(tmp_path: Path) -> None:
    texts: list[str] = []
    for index, keys in enumerate(itertools.product(KEYS, repeat=4)):
        slots = dict(zip(SLOTS, keys, strict=True))
        text = f"own{index}=" + ",".join(f"{slot}:{key}" for slot, key in slots.items())
        (method,) = find_methods([text])
        assert method.name == method.label == f"own{index}"
        assert {slot: getattr(method, slot) for slot in SLOTS} == {
            slot: KEYS[key] for slot, key in slots.items()
        }
        # What a manifest says about a method can be given again.
        again = f"own{index}=" + ",".join(f"{s}:{value}" for s, value in method.slots.items())
        assert find_methods([again, text]) == (method,)
        texts.append(text)
    assert len(find_methods(texts)) == 16
    file = tmp_path / "methods.toml"
    file.write_text(TOML, "utf-8")
    assert load_methods(file) == find_methods([str(file)]) == (OWN,)
    assert find_methods(["rome", str(file), "r-rome", "rome"]) == (ft.ROME, OWN, ft.C_ROME)
    assert replace(find_methods([SPELLED])[0], label=OWN.label) == OWN


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["memoir"], "no method is called 'memoir'; choose from rome"),
        (["half=direction"], "cannot be read; write NAME=direction:KEY"),
        (["half="], "cannot be read"),
        (["half=direction:bare"], "has no residual; give all of direction"),
        ([SPELLED + ",clamp:4"], "has 'clamp', which is no slot"),
        ([SPELLED + ",anchor:bare"], "gives anchor twice"),
        ([SPELLED.replace("anchor:bare", "anchor:mean")], "anchor is 'mean'; take 'prefixed'"),
        (["=" + SPELLED.partition("=")[2]], "'' is no name"),
        (["a b=" + SPELLED.partition("=")[2]], "'a b' is no name"),
        (["rome=" + SPELLED.partition("=")[2]], "cannot be called 'rome'"),
        (["R-ROME=" + SPELLED.partition("=")[2]], "cannot be called 'R-ROME'"),
        ([SPELLED, SPELLED.replace("residual:bare", "residual:prefixed")], "two methods are"),
        (["nowhere.toml"], "no file of methods at nowhere.toml"),
    ],
)
def test_what_is_no_method_is_refused(given: list[str], message: str) -> None:
    with pytest.raises(BadInputError, match=message.replace("(", r"\(")):
        find_methods(given)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no method"),
        ("half = 3", "is not a table of slots"),
        ("[half", "is not valid TOML"),
        (TOML.replace('"bare"', "7", 1), "residual is 7; take"),
        (TOML.replace('"Half-ROME"', '" "'), "the label is ' '"),
        (TOML.replace('"Half-ROME"', '"rome"'), "are both shown as 'rome'"),
        (TOML.replace("anchor", "anker"), "has no anchor"),
        ("\udcff", "is not UTF-8"),
    ],
)
def test_a_bad_file_of_methods_is_refused(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "methods.toml"
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(BadInputError, match=message) as caught:
        load_methods(file)
    assert "methods.toml" in str(caught.value) or "shown as" in message


def test_results_could_not_tell_such_methods_apart() -> None:
    other = replace(OWN, residual=Slot.PREFIXED_MEAN)
    for methods in ((OWN, other), (replace(OWN, name="rome"),), (replace(OWN, label="ROME"),)):
        with pytest.raises(BadInputError, match="give"):
            Plan(methods=methods)
    assert Plan(methods=(*METHODS, OWN)).methods[-1] is OWN
    with pytest.raises(BadInputError, match="at least one method"):
        Plan(methods=())


def test_an_edit_has_the_slots_keys(study: Study) -> None:
    fact = FACTS[0]
    rome, own, c_rome = (
        ft.what_if(study, fact, method=method) for method in (ft.ROME, OWN, ft.C_ROME)
    )
    assert own.report["numerator"] == pytest.approx(rome.report["numerator"], rel=1e-5)
    assert own.report["denominator"] == pytest.approx(c_rome.report["denominator"], rel=1e-5)
    assert own.report["denominator"] != pytest.approx(rome.report["denominator"], rel=1e-3)
    scale = rome.report["denominator"] / own.report["denominator"]
    torch.testing.assert_close(own.edit.right, rome.edit.right * scale, rtol=1e-3, atol=1e-5)
    assert own.edit.provenance["method"] == {"name": "half", **OWN.slots}


def test_a_sweep_from_python_is_measured_like_facts(study: Study, tmp_path: Path) -> None:
    facts = [replace(fact, case_id=index) for index, fact in enumerate(FACTS)]
    run = ft.sweep_facts(tmp_path / "run", study, FACTS, [ft.ROME, OWN], chunk=2)
    rows = {(row.case_id, row.method): row for row in run.rows if row.status == "done"}
    plain = ft.measure_facts(study, facts, [ft.ROME, OWN])
    assert len(rows) == len(plain) == 2 * len(FACTS)
    for expected in plain:
        found = rows[expected.case_id, expected.method]
        for name, value in expected.items():
            assert found[name] == (
                pytest.approx(value, rel=1e-3, abs=1e-6) if isinstance(value, float) else value
            )
    assert run.manifest["methods"]["half"] == OWN.slots
    # Done already: nothing is measured again, nothing changes.
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.parquet")}
    again = ft.sweep_facts(tmp_path / "run", study, FACTS, [ft.ROME, OWN], chunk=2)
    assert again.rows == run.rows
    assert {path: path.stat().st_mtime_ns for path in shards} == shards
    other = replace(OWN, anchor=Slot.PREFIXED_MEAN)
    with pytest.raises(BadInputError, match="begun with something else"):
        ft.sweep_facts(tmp_path / "run", study, FACTS, [ft.ROME, other], chunk=2)


def test_tables_show_the_label(study: Study, tmp_path: Path) -> None:
    run = ft.sweep_facts(tmp_path / "run", study, FACTS[:2], [ft.ROME, OWN])
    tables = {table.name: table for table in run.tables()}
    assert "Half-ROME" in tables["Table 1"].columns
    assert any(str(line[0]).startswith("Half-ROME, ") for line in tables["Table 2"].lines)
    summary = run.summary(study.model.label)
    line = next(line for line in summary.lines if line[0] == "Half-ROME")
    cells = dict(zip(summary.columns, line, strict=True))
    own = [row for row in run.rows if row.method == "half"]
    assert cells["residual"] == "unprefixed"
    assert cells["denominator"] == "prefixed mean"
    assert cells["cases"] == 2
    assert cells["least |denominator|"] == min(abs(row.denominator or 0.0) for row in own)
    assert cells["max perplexity"] == max(row.perplexity or 0.0 for row in own)
    assert cells["collapsed"] == f"{sum(bool(row.collapsed) for row in own)} of 2"
    for shown in (repr(run), run._repr_html_(), tables["Table 2"]._repr_html_()):
        assert "Half-ROME" in shown


def test_facts_need_numbers_of_their_own(study: Study, tmp_path: Path) -> None:
    twice = [replace(FACTS[0], case_id=3), replace(FACTS[1], case_id=3)]
    with pytest.raises(BadInputError, match="two facts have the case_id 3"):
        ft.sweep_facts(tmp_path / "run", study, twice, [OWN])
    with pytest.raises(BadInputError, match="there are no facts"):
        ft.sweep_facts(tmp_path / "run", study, [], [OWN])
    assert not (tmp_path / "run").exists()


def test_the_report_has_a_section_on_a_published_run(study: Study, tmp_path: Path) -> None:
    run = ft.sweep_facts(tmp_path / "my run", study, FACTS[:2], [ft.ROME, OWN])
    out = tmp_path / "figures"
    (path,) = run.publish(out)
    label = study.model.label
    # Not sweep_my_run.json, which is that of a run called my_run.
    assert path.parent == out / label
    assert re.fullmatch(r"sweep_my_run-[0-9a-f]{8}\.json", path.name)
    record = json.loads(path.read_text("utf-8"))
    assert [row["method"] for row in record["rows"]] == ["rome", "half"] * 2
    assert record["provenance"]["methods"]["half"] == OWN.slots
    assert path.with_suffix(".csv").is_file()
    assert result_folders(out) == [out / label]
    html, markdown = write_reports(out)
    for page in (html, markdown):
        text = page.read_text("utf-8")
        assert "A sweep: my_run" in text.replace("\\_", "_")
        assert "Half-ROME" in text
        assert str(tmp_path) not in text
    section = build_report(out / label).sections[-1]
    assert section.result is not None
    assert section.result.lines == tuple(tuple(line) for line in record["lines"])
    assert ("layer", "1") in (*section.facts, *build_report(out / label).facts)
    assert "sweep_my_run" in render_html(build_report(out / label))
    path.write_text("{}", "utf-8")
    with pytest.raises(BadInputError, match="not a result of a firsttok sweep; publish the run"):
        write_reports(out)


def test_an_empty_run_is_not_published(study: Study, tmp_path: Path) -> None:
    run = ft.sweep_facts(tmp_path / "run", study, FACTS[:1], [OWN])
    for file in (tmp_path / "run").rglob("*.parquet"):
        file.unlink()
    with pytest.raises(BadInputError, match="holds no rows yet"):
        ft.read_run(run.folder).publish(tmp_path / "figures")
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize("form", ["spelled", "file"])
def test_the_command_takes_it_up(
    form: str,
    tiny: TinyFactory,
    tmp_path: Path,
    own_cache: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tiny("gpt2")
    facts = tmp_path / "facts.json"
    numbered = [replace(fact, case_id=index) for index, fact in enumerate(FACTS[:2])]
    facts.write_text(json.dumps([fact.as_record() for fact in numbered]), "utf-8")
    CONTEXTS.save(tmp_path / "contexts.json")
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps([{"Text": text} for text in SENTENCES[:2]]), "utf-8")
    file = tmp_path / "methods.toml"
    file.write_text(TOML, "utf-8")
    options = ["--texts", str(texts), "--model", model.name, "--layer", "1", "--steps", "3"]
    options += ["--contexts", str(tmp_path / "contexts.json"), "--second-moment", "identity"]
    method = ["--method", "rome", SPELLED if form == "spelled" else str(file)]
    run = tmp_path / "run"
    swept = ["sweep", str(run), "--facts", str(facts), *options, *method]
    assert main([*swept, "--metrics", "perplexity"]) == 0
    found = ft.read_run(run)
    assert found.methods == ("rome", "half")
    assert found.manifest["methods"]["half"] == OWN.slots
    assert main(["results", str(run)]) == 0
    assert ("half" if form == "spelled" else "Half-ROME") in capsys.readouterr().out
    edit = ["edit", *options, "--subject", "England", "--template", "{}'s capital city is"]
    assert main([*edit, "--target", "Berlin", "--json", *method]) == 0
    states = json.loads(capsys.readouterr().out)["states"]
    assert list(states) == ["before", "rome", "half"]
    assert states["half"]["numerator"] == pytest.approx(states["rome"]["numerator"], rel=1e-5)
    # Python goes on where the command stopped: the same facts, methods and settings.
    study = study_of(model, tmp_path / "work")
    again = ft.sweep_facts(run, study, numbered, [ft.ROME, OWN], metrics=["perplexity"])
    assert again.rows == found.rows


def test_the_command_refuses_in_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["sweep", str(tmp_path / "run"), "--method", "half=direction:bare"]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert "has no residual" in told
    assert "Traceback" not in told
    assert not (tmp_path / "run").exists()


@dataclass(frozen=True)
class Nudge:
    """Adds the new target's unembedding to the value of the prompt's own key, at several layers."""

    name: str = "nudge"
    label: str = "nudge"
    layers: tuple[int, ...] = (1, 2)

    def edit(self, model: Model, facts: Sequence[Fact]) -> Edit:
        made: list[Edit] = []
        for fact in facts:
            target = with_target(model, fact_prompt(model, fact), fact.target_new).target_ids[0]
            unembedding: Any = ft.plain_model(model).get_output_embeddings()
            right = unembedding.weight[target]
            for layer in self.layers:
                key = ft.fact_keys(model, fact, CONTEXTS, layer=layer).unprefixed
                left = key / key.norm() ** 2
                made.append(Edit.of(model, layer, left, right, name=self.name, facts=[fact]))
        return reduce(add, made)


def test_an_editor_of_ones_own_stands_beside_the_methods(tiny: TinyFactory, tmp_path: Path) -> None:
    model = tiny("llama")
    study = study_of(model, tmp_path)
    before = weights(model)
    compared = ft.compare_methods(study, FACTS[0], methods=["rome", Nudge()])
    own = compared["nudge"]
    assert compared["rome"].edit.content_hash == (
        ft.what_if(study, FACTS[0], method="rome").edit.content_hash
    )
    assert own.edit.layers == (1, 2)
    assert own.edit.facts == (FACTS[0],)
    with own.edit.applied(model):
        said = ft.perplexity(model, study.texts)
    assert own.after.perplexity.mean == pytest.approx(said.mean, rel=1e-5)
    assert "nudge" in compared.panel().text
    assert same_weights(weights(model), before)
    found = dict(study.edits(FACTS[:2], ["rome", Nudge()]))
    assert list(found[FACTS[1]]) == ["rome", "nudge"]
    assert found[FACTS[0]]["nudge"].content_hash == own.edit.content_hash
    path = tmp_path / "nudge.safetensors"
    own.edit.save(path)
    assert ft.load_edit(path).content_hash == own.edit.content_hash


def test_two_editors_of_one_name_are_refused(tiny: TinyFactory, tmp_path: Path) -> None:
    study = study_of(tiny("llama"), tmp_path)
    with pytest.raises(BadInputError, match="two editors are called 'nudge'"):
        study.edits(FACTS[:1], [Nudge(), Nudge(layers=(1,))])
    with pytest.raises(BadInputError, match="writes one fact at a time, not 2"):
        study.editors(["rome"])[0].edit(study.model, FACTS[:2])


class WordCount:
    """How many words follow the prompt, and the first of them."""

    name = "words"
    columns = {"word_count": int, "first_word": str}  # noqa: RUF012

    def measure(self, study: Study, fact: Fact, edits: Sequence[Edit]) -> list[dict[str, Any]]:
        said = [ft.continuation(study.model.edited(edit), fact.prompt).split() for edit in edits]
        return [{"word_count": len(words), "first_word": (*words, None)[0]} for words in said]


def test_an_editor_and_a_metric_of_ones_own_are_measured_and_swept(
    tiny: TinyFactory, tmp_path: Path
) -> None:
    study = study_of(tiny("llama"), tmp_path)
    facts = [replace(fact, case_id=index) for index, fact in enumerate(FACTS[:3])]
    methods, metrics = ["rome", Nudge()], ["perplexity", WordCount()]
    rows = ft.measure_facts(study, facts, methods, metrics=metrics)
    assert [(row.case_id, row.method) for row in rows] == [
        (fact.case_id, name) for fact in facts for name in ("rome", "nudge")
    ]
    edits = dict(study.edits(facts, methods))
    for row, fact in zip(rows[1::2], facts, strict=True):
        edit = edits[fact]["nudge"]
        with edit.applied(study.model) as view:
            words = ft.continuation(view, fact.prompt).split()
        assert row.word_count == len(words)
        assert row.delta_norm == pytest.approx(edit.report["delta_norm"], rel=1e-6)
        assert row.perplexity == pytest.approx(study.perplexities([edit])[0].mean, rel=1e-6)
        assert row.get("denominator") is None
    assert ft.measure_facts(study, facts, methods, metrics=metrics) == rows
    run = ft.sweep_facts(tmp_path / "run", study, facts, methods, metrics=metrics, chunk=2)
    for row, swept in zip(rows, run.rows, strict=True):
        assert (swept.first_word, swept.word_count) == (row.first_word, row.word_count)
        assert swept.perplexity == pytest.approx(row.perplexity, rel=1e-4)
    assert run.sql("SELECT count(word_count) FROM rows").iloc[0, 0] == len(rows)
    assert "nudge" in repr(run)
    with pytest.raises(BadInputError, match=r"methods\.nudge\.editor"):
        ft.sweep_facts(run.folder, study, facts, ["rome", Nudge(layers=(1,))], metrics=metrics)


class Clash(WordCount):
    name = "clash"
    columns = {"perplexity": float}  # noqa: RUF012


class Unnamed(WordCount):
    columns = {"word_count": int}  # noqa: RUF012


class Odd(WordCount):
    columns = {"word_count": list}  # noqa: RUF012


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (["words"], "no metric is called 'words'; take perplexity"),
        ([], "there is no metric; give at least one"),
        ([Clash()], "has a column 'perplexity', which 'perplexity' has already"),
        ([Odd()], "take str, int, float or bool"),
        ([WordCount(), Unnamed()], "two metrics are called 'words'"),
        ([Unnamed()], "fills 'first_word', which is not among its columns"),
    ],
)
def test_a_metric_that_rows_cannot_hold_is_refused(
    metrics: list[Any], message: str, study: Study
) -> None:
    with pytest.raises(BadInputError, match=re.escape(message)):
        ft.measure_facts(study, FACTS[:1], ["rome"], metrics=metrics)


def test_what_cannot_be_described_is_measured_and_not_kept(study: Study, tmp_path: Path) -> None:
    class Open(WordCount):
        def __init__(self) -> None:
            self.file = (tmp_path / "log").open("w")

    for _ in range(2):
        (row,) = ft.measure_facts(study, FACTS[:1], ["rome"], metrics=["perplexity", Open()])
        assert row.word_count >= 0
    (kept,) = (tmp_path / "work" / "rows").glob("*.parquet")
    assert "word_count" not in read_rows(kept)[0]
    with pytest.raises(BadInputError, match="'words' cannot be told from another one"):
        ft.sweep_facts(tmp_path / "run", study, FACTS[:1], ["rome"], metrics=[Open()])


def test_an_attribute_of_a_globals_name_is_no_global(study: Study) -> None:
    # In a notebook there is a global model, and a metric reads study.model.
    source = (
        "class Rows:\n"
        "    name = 'layers'\n"
        "    columns = {'layers': int}\n"
        "    def measure(self, study, fact, edits):\n"
        "        return [{'layers': study.model.n_layers + extra} for _ in edits]\n"
    )
    page: dict[str, Any] = {"model": study.model, "__name__": "page", "extra": 0}
    exec(source, page)
    for extra in (0, 1):
        page["extra"] = extra
        (row,) = ft.measure_facts(study, FACTS[:1], ["rome"], metrics=[page["Rows"]()])
        assert row.layers == study.model.n_layers + extra
    assert len(list((study.work or Path()).glob("rows/*.parquet"))) == 2
