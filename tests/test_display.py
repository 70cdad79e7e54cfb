"""What objects show: the same in HTML and in a terminal, escaped, and with where they came from."""

import html.parser
import xml.etree.ElementTree as ET
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BARE_ONLY, CONTEXTS, FACTS, SENTENCES, TinyFactory, same_weights, weights

import firsttok as ft
from firsttok.display import Note, Panel, Shown, Strip, Table, cell_text
from firsttok.editing import METHODS, compute_edit
from firsttok.errors import BadInputError, FirsttokError, LayerOutOfRangeError
from firsttok.evaluation import perplexity, target_probabilities
from firsttok.exploration import WhatIf
from firsttok.keys import ORDINARY_KEYS, keys_at
from firsttok.models import Model
from firsttok.probes import IDENTITY_CELLS, SECOND2FIRST, SeesAll, distinct_with_space
from firsttok.second_moment import SecondMoment
from firsttok.study import Study
from firsttok.svg import Plot, sparkline
from firsttok.tensors import TokenBatch

EVIL = "<script>alert('x')</script> & \"y\""
SETTINGS = ft.Hyperparameters(steps=3)


class Reader(html.parser.HTMLParser):
    """Collects text and tags, and holds that every element is closed in order."""

    VOID = ("br", "img", "hr")

    def __init__(self, source: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def study_of(model: Model, folder: Path) -> Study:
    return ft.prepare_study(
        model,
        layer=1,
        contexts=CONTEXTS,
        second_moment=SecondMoment.identity(model.site(1).d_mlp),
        hyperparameters=SETTINGS,
        texts=SENTENCES[:2],
        work=folder,
    )


def objects(model: Model, folder: Path) -> dict[str, Shown]:
    study = study_of(model, folder)
    result = ft.what_if(study, FACTS[0])
    return {
        "model": model,
        "fact": FACTS[0],
        "tokens": ft.tokens(model, FACTS[0]),
        "contexts": CONTEXTS,
        "second moment": study.second_moment,
        "keys": ft.capture_keys(model, FACTS[:2]),
        "fact keys": ft.fact_keys(model, FACTS[0], CONTEXTS, layer=1),
        "method": ft.ROME,
        "study": study,
        "what if": result,
        "comparison": ft.compare_methods(study, FACTS[0], methods=METHODS[:2]),
        "edit": result.edit,
        "perplexity": result.before.perplexity,
        "probe": ft.probe(study, FACTS[0], "attention"),
    }


def test_every_object_shows_itself_in_both_ways(tiny: TinyFactory, tmp_path: Path) -> None:
    model = tiny("llama")
    found = objects(model, tmp_path)
    evaluable = {"fact", "contexts", "method"}
    for name, each in found.items():
        source = each._repr_html_()
        read = Reader(source)
        assert "http" not in source.replace("http://www.w3.org/2000/svg", ""), name
        shown = "".join(read.texts)
        for part in each.panel().parts:
            if isinstance(part, Table):
                cells = [cell_text(cell) for line in part.lines for cell in line]
                assert all(cell in shown for cell in cells), name
                assert name in evaluable or all(cell in repr(each) for cell in cells), name
        assert each.panel().title in shown
        if name not in evaluable:
            assert repr(each) == str(each) == each.panel().text
            assert "tensor(" not in repr(each)
    namespace = {"Fact": ft.Fact, "Method": ft.Method, "ContextSet": ft.ContextSet}
    for name in ("fact", "contexts"):
        assert eval(repr(found[name]), namespace) == found[name]


def test_results_say_where_they_came_from(tiny: TinyFactory, tmp_path: Path) -> None:
    model = tiny("gpt2")
    found = objects(model, tmp_path)
    for name in ("model", "tokens", "keys", "study", "what if", "comparison", "edit", "probe"):
        for shown in (repr(found[name]), found[name]._repr_html_()):
            assert f"weights {model.fingerprint[:10]}" in shown, name
            assert str(Path(model.name).parent) not in shown, name
    for name in ("study", "what if", "edit", "probe"):
        assert "layer 1" in repr(found[name])
        assert CONTEXTS.content_hash[:10] in repr(found[name])
    view = model.intervened(SeesAll(position=0))
    assert "position 0 sees all" in repr(ft.capture_keys(view, FACTS[0]))
    assert "position 0 sees all" in repr(ft.tokens(view, FACTS[0]))


def test_what_comes_from_outside_is_escaped() -> None:
    panel = Panel(
        title=EVIL,
        parts=[
            Note(text=EVIL),
            Table(columns=("", EVIL), lines=[[EVIL, EVIL]]),
            Strip(pieces=(EVIL, "b"), marked=0, mark=EVIL),
            Plot(title=EVIL, series={EVIL: [1.0, 2.0]}, x_label=EVIL, y_label=EVIL),
        ],
        source={EVIL: EVIL},
    )
    read = Reader(panel.html)
    assert "script" not in read.tags
    # Once for the title, the note, the heading, two cells, the piece, its mark, the origin twice,
    # and in the plot for its title twice, both axes and the line.
    assert "".join(read.texts).count(EVIL) == 14
    assert panel.text.count(EVIL) == 12


def test_facts_tokens_and_templates_are_escaped(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    fact = ft.Fact(subject="<b>", template="{} & co", target_new="<i>", target_true="</i>")
    for shown in (fact, ft.tokens(model, fact), ft.ContextSet(templates=("<b>{}",))):
        read = Reader(shown._repr_html_())
        assert "b" not in read.tags
        assert "i" not in read.tags
    assert "<b>" in "".join(Reader(fact._repr_html_()).texts)


def test_a_plot_is_drawn_where_its_values_are() -> None:
    series = {"up": [1.0, 10.0, 100.0], "gap": [5.0, float("nan"), -1.0]}
    drawn = Plot(series=series, title="t", x_label="x", y_label="y", log=True).html
    root = ET.fromstring(drawn)
    lines = [node.attrib["points"].split() for node in root if node.tag.endswith("polyline")]
    points = [[tuple(map(float, point.split(","))) for point in line] for line in lines]
    assert [len(line) for line in points] == [3, 1]
    (x0, y0), (x1, y1), (x2, y2) = points[0]
    assert x2 - x1 == pytest.approx(x1 - x0, abs=0.2)
    assert x1 > x0
    # On a logarithmic scale each power of ten is as far from the last, and more is higher.
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert y1 < y0
    assert root.attrib["aria-label"] == "t"
    labels = [node.text for node in root if node.tag.endswith("text")]
    assert {"1", "10", "100", "up", "gap", "x", "y"} <= set(labels)


@pytest.mark.parametrize(
    "values",
    [[], [0.0], [3.0, 3.0], [float("nan")] * 3, [float("inf"), 1.0], [-1e-30, 1e30], [1e-300]],
)
@pytest.mark.parametrize("log", [False, True])
def test_no_values_are_too_odd_to_draw(values: list[float], log: bool) -> None:
    drawn = Plot(series={"a": values}, title="t", x_label="x", y_label="y", log=log).html
    ET.fromstring(drawn)
    assert "nan" not in drawn
    assert "inf" not in drawn.replace("infinite", "").replace("nothing finite", "")
    assert len(sparkline(values, log=log)) == len(values)


def test_a_sparkline_rises_with_its_values() -> None:
    assert sparkline([1.0, 2.0, 3.0]) == "▁▄█" or sparkline([1.0, 2.0, 3.0]) == "▁▅█"
    assert sparkline([1.0, 10.0, 100.0], log=True) == sparkline([0.0, 1.0, 2.0])
    assert sparkline([2.0, float("nan"), 1.0]) == "█·▁"
    assert sparkline([5.0, 5.0]) == "▁▁"


def test_tokens_mark_the_looked_up_one(tiny: TinyFactory) -> None:
    for arch in ("gpt2", "llama"):
        model = tiny(arch)
        for fact in FACTS:
            for context in CONTEXTS.templates:
                strip = ft.tokens(model, fact, context)
                prompt = ft.fact_prompt(model, fact, context)
                assert strip.looked_up == prompt.subject_position
                assert strip.token_ids == prompt.token_ids
                assert strip.first_token == (prompt.subject_position == 0)
                assert strip.lines == ft.show_tokens(model, fact, context)
                marked = strip._repr_html_().split("<mark")
                assert len(marked) == 2
                assert marked[1].startswith(f' title="position {strip.looked_up}"')
        plain = ft.tokens(model, "The capital")
        assert plain.looked_up is None
        assert "<mark" not in plain._repr_html_()
    assert ft.tokens(tiny("gpt2"), FACTS[0]).first_token
    assert not ft.tokens(tiny("llama"), FACTS[0]).first_token


def test_keys_of_one_fact_at_all_layers(tiny: TinyFactory) -> None:
    model = tiny("mistral")
    keys = ft.capture_keys(model, FACTS[0])
    assert keys.layers == tuple(range(model.n_layers))
    several = ft.capture_keys(model, [FACTS[0]], layers=range(model.n_layers))
    assert torch.equal(keys.values, several.values)
    torch.testing.assert_close(keys.norms, keys.values.double().norm(dim=-1))
    prompt = ft.fact_prompt(model, FACTS[0])
    one = keys_at(model, [prompt], [prompt.subject_position or 0], layers=[2])
    assert keys.at(2).equal(one.at(2))


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_what_if_is_the_edit_measured_the_plain_way(
    arch: str, tiny: TinyFactory, tmp_path: Path
) -> None:
    model = tiny(arch)
    study = study_of(model, tmp_path)
    state = weights(model)
    for method in METHODS:
        found = ft.what_if(study, FACTS[1], method=method)
        edit = compute_edit(
            model,
            FACTS[1],
            method=method,
            contexts=CONTEXTS,
            second_moment=study.second_moment,
            layer=1,
            hyperparameters=SETTINGS,
        )
        torch.testing.assert_close(found.edit.left, edit.left)
        torch.testing.assert_close(found.edit.right, edit.right)
        for seen, edits in ((found.before, []), (found.after, [edit])):
            applied = [each.apply_(model) for each in edits]
            plain = perplexity(model, SENTENCES[:2])
            probabilities = target_probabilities(model, FACTS[1], CONTEXTS)
            top = ft.top_predictions(model, FACTS[1].prompt)
            assert seen.perplexity.mean == pytest.approx(plain.mean, rel=1e-4)
            assert seen.target_probability == pytest.approx(probabilities[0], rel=1e-3)
            mean = sum(probabilities[1:]) / 3
            assert seen.target_probability_prefixed == pytest.approx(mean, rel=1e-3)
            assert [token for token, _ in seen.top_predictions] == [token for token, _ in top]
            for each in applied:
                each.undo_()
        assert same_weights(weights(model), state)


def test_methods_compared_are_what_ifs_side_by_side(tiny: TinyFactory, tmp_path: Path) -> None:
    study = study_of(tiny("llama"), tmp_path)
    compared = ft.compare_methods(study, FACTS[0], methods=[ft.ROME, ft.FC_ROME])
    assert [result.method for result in compared.results] == [ft.ROME, ft.FC_ROME]
    for method in (ft.ROME, ft.FC_ROME):
        alone = ft.what_if(study, FACTS[0], method=method)
        torch.testing.assert_close(compared[method].edit.right, alone.edit.right)
        assert compared[method.name] is compared[method]
    with pytest.raises(BadInputError, match="'c-rome' is not among"):
        compared["c-rome"]
    for wrong in ([], [ft.ROME, ft.ROME]):
        with pytest.raises(BadInputError, match="methods need a name each"):
            ft.compare_methods(study, FACTS[0], methods=wrong)


def test_the_verdict_does_not_blame_the_edit_for_a_bad_model(
    tiny: TinyFactory, tmp_path: Path
) -> None:
    found = ft.what_if(study_of(tiny("gpt2"), tmp_path), FACTS[0])

    def with_perplexities(before: float, after: float) -> WhatIf:
        def changed(seen: Any, mean: float) -> Any:
            return replace(seen, perplexity=replace(seen.perplexity, mean=mean))

        return replace(
            found, before=changed(found.before, before), after=changed(found.after, after)
        )

    destroyed, spared = with_perplexities(20.0, 5000.0), with_perplexities(20.0, 900.0)
    bad = with_perplexities(3000.0, 5000.0)
    assert [each.collapsed for each in (destroyed, spared, bad)] == [True, False, False]
    assert "ROME collapsed the model: perplexity 20 before, 5000 after" in repr(destroyed)
    assert "ROME damaged the model: perplexity 20 before, 900 after, 45.0 times" in repr(spared)
    assert [each.damage for each in (destroyed, spared, bad)] == ["collapsed", "damaged", None]
    assert with_perplexities(20.0, 29.9).damage == "intact"
    assert "ROME left the model intact" in repr(with_perplexities(20.0, 29.9))
    assert "nothing can be said to collapse" in repr(bad)
    assert with_perplexities(20.0, float("nan")).collapsed


def test_what_is_not_given_is_found_or_made(
    tiny: TinyFactory, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from firsttok import exploration

    model = tiny("gpt2")
    short = ("A first text of the corpus.", "And another one.")
    monkeypatch.setattr(exploration, "builtin_sentences", lambda: SENTENCES[:2])
    study = ft.prepare_study(
        model, second_moment=ft.compute_second_moment(model, corpus=short, max_tokens=50)
    )
    assert len(study.contexts.templates) == 21
    assert study.contexts.model_fingerprint == model.fingerprint
    assert study.layer == model.default_layer
    assert study.hyperparameters == model.hyperparameters
    assert study.texts == SENTENCES[:2]
    again = ft.prepare_study(model, second_moment=study.second_moment)
    assert again.contexts == study.contexts
    assert len(list(own_cache.rglob("*-seed0.json"))) == 1


def test_refusals(tiny: TinyFactory, tmp_path: Path) -> None:
    with pytest.raises(FirsttokError, match="only decoders can be edited"):
        ft.prepare_study(tiny("bert"))
    model = tiny("gpt2")
    study = study_of(model, tmp_path)
    with pytest.raises(BadInputError, match=r"prepare another one with ft.prepare_study"):
        ft.what_if(study, FACTS[0], layer=2)
    with pytest.raises(LayerOutOfRangeError):
        ft.prepare_study(model, layer=99, contexts=BARE_ONLY)
    with pytest.raises(BadInputError, match="no probe is called 'magic'; choose from attention"):
        ft.probe(study, FACTS[0], "magic")


@pytest.mark.parametrize("name", ["attention", "positions", "concentration", "tracing", "bos"])
def test_probes_by_name(name: str, tiny: TinyFactory, tmp_path: Path) -> None:
    model = tiny("llama")
    study = study_of(model, tmp_path)
    state = weights(model)
    found = ft.probe(study, FACTS[1], name)
    assert found.name == name
    assert len(found.frame()) == len(found.rows) > 0
    assert same_weights(weights(model), state)
    Reader(found._repr_html_())


def test_the_identity_probe_suits_some_facts_only(tiny: TinyFactory, tmp_path: Path) -> None:
    study = study_of(tiny("gpt2"), tmp_path)
    own = ft.Fact(subject="I", template="{} left early", target_new="it", target_true="and")
    suited = distinct_with_space(study.model, [*FACTS, own])
    for fact in (*FACTS, own):
        if fact in suited:
            rows = ft.probe(study, fact, "identity").rows
            assert [row["k^u from"] for row in rows] == [cell.name for cell in IDENTITY_CELLS]
            assert rows[0]["cosine with the usual k^u"] == pytest.approx(1.0)
        else:
            with pytest.raises(BadInputError, match="choose another fact"):
                ft.probe(study, fact, "identity")
    assert suited == [own]


def test_a_key_probe_gives_the_denominator_of_the_edit(tiny: TinyFactory, tmp_path: Path) -> None:
    study = study_of(tiny("gpt2"), tmp_path)
    own = ft.IntervenedKeys(name="swapped", interventions=(SECOND2FIRST,))
    for which in (SECOND2FIRST, own):
        rows = ft.probe(study, FACTS[0], which).rows
        sources = (ORDINARY_KEYS, ft.IntervenedKeys(name="x", interventions=(SECOND2FIRST,)))
        for row, source in zip(rows, sources, strict=True):
            edit = ft.what_if(study, FACTS[0], method=ft.ROME, key_source=source).edit
            assert row["denominator"] == pytest.approx(edit.report["denominator"], rel=1e-4)
            assert row["cosine with k_bar"] == pytest.approx(edit.report["key_cosine"], rel=1e-4)
    assert rows[0]["cosine with the usual k^u"] == pytest.approx(1.0)
    assert rows[1]["denominator"] != pytest.approx(rows[0]["denominator"], rel=1e-3)


def test_probes_of_ones_own(tiny: TinyFactory, tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Nothing:
        name: str = "nothing"

        def __call__(self, batch: TokenBatch) -> TokenBatch:
            return batch

    @dataclass(frozen=True)
    class Count:
        name: str = "count"
        question: str = "How many tokens?"

        def measure(self, study: Study, fact: ft.Fact) -> ft.ProbeResult:
            count = len(ft.tokens(study.model, fact).pieces)
            return ft.ProbeResult(
                name=self.name, question=self.question, rows=({"n": count},), origin={"by": "me"}
            )

    study = study_of(tiny("llama"), tmp_path)
    unchanged = ft.probe(study, FACTS[0], Nothing()).rows
    first, second = ({k: v for k, v in row.items() if k != "k^u from"} for row in unchanged)
    assert second == pytest.approx(first)
    counted = ft.probe(study, FACTS[0], Count())
    assert counted.rows == ({"n": len(ft.tokens(study.model, FACTS[0]).pieces)},)
    assert "from: by me" in repr(counted)


def test_it_mixes_with_hooks_and_other_edits(tiny: TinyFactory, tmp_path: Path) -> None:
    model = tiny("llama")
    bridge: Any = model.bridge
    study = study_of(model, tmp_path)
    site, prompt = model.site(1), ft.fact_prompt(model, FACTS[0])
    ids = torch.tensor([prompt.token_ids])
    with torch.no_grad():
        _, before = bridge.run_with_cache(ids)
    position = prompt.subject_position or 0
    torch.testing.assert_close(
        before[site.key_hook][0, position], ft.capture_keys(model, FACTS[0]).at(1)[0]
    )
    first = ft.what_if(study, FACTS[0], method=ft.C_ROME)
    with first.edit.applied(model), torch.no_grad():
        _, inside = bridge.run_with_cache(ids)
        # A study made here looks at the model as it is here.
        second = ft.what_if(study_of(model, tmp_path), FACTS[1], method=ft.C_ROME)
    moved = inside[site.residual_hook][0] - before[site.residual_hook][0]
    expected = torch.outer(before[site.key_hook][0] @ first.edit.left, first.edit.right)
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-4)
    assert second.before.perplexity.mean == pytest.approx(first.after.perplexity.mean, rel=1e-3)
    alone = ft.what_if(study, FACTS[1], method=ft.C_ROME)
    assert alone.before.perplexity.mean == pytest.approx(first.before.perplexity.mean)
    # Values are kept, those of the edited model apart from those of the model.
    assert len(list((tmp_path / "values").iterdir())) == 3


def test_columns_begin_where_their_cells_do() -> None:
    table = Table(columns=("a", "text", "n"), lines=[["x", "yy", 1.5], ["longer", "z", 10.25]])
    assert table.text.splitlines() == [
        "a       text      n",
        "x       yy     1.50",
        "longer  z     10.25",
    ]
    assert Table(columns=("", "b"), lines=[]).text == "  b"


@pytest.mark.parametrize(
    ("cell", "text"),
    [(None, "-"), (True, "yes"), (False, "no"), (3, "3"), (0.5, "0.50"), (1e-7, "1e-07")],
)
def test_cells(cell: object, text: str) -> None:
    assert cell_text(cell) == text


def test_panels_need_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from firsttok.display import *; from firsttok.svg import Plot; "
        "p = Panel(title='t', parts=[Plot(title='p', series={'a': [1, 2]}, x_label='', "
        "y_label='')]); p.html; p.text; "
        "print([m for m in ('torch', 'numpy', 'jinja2', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
