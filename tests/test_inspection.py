"""Inspection: what it measures against plain references, what it proposes, and whom it refuses."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import (
    CONTEXTS,
    DECODERS,
    FACTS,
    SENTENCES,
    TinyFactory,
    build,
    sentence_prompts,
    tokenizer,
)

from firsttok.cli import main
from firsttok.config import read_config
from firsttok.contexts import load_contexts
from firsttok.data import Fact, builtin_facts
from firsttok.editing import C_ROME, ROME
from firsttok.errors import BadInputError, UnsupportedModelError
from firsttok.evaluation import COLLAPSE_THRESHOLD, Perplexity
from firsttok.hyperparameters import Hyperparameters
from firsttok.inspection import (
    Inspection,
    TextPerplexities,
    check_sites,
    forecast,
    inspect_model,
    measure_first_tokens,
    named_checks,
)
from firsttok.inspection.anomaly import (
    CONCENTRATED,
    MASSIVE,
    first_token_prompts,
    is_anomalous,
    is_massive,
    ranges,
)
from firsttok.inspection.forecast import CALIBRATED, choose_facts
from firsttok.keys import keys_of_facts
from firsttok.models import BosPolicy, Model
from firsttok.models.libraries import quiet_libraries
from firsttok.probes import LayerConcentration, concentration
from firsttok.screening import RATIO
from firsttok.second_moment import SecondMoment, compute_second_moment
from firsttok.study import Study

ROOT = Path(__file__).parent.parent
COMMITTED = sorted((ROOT / "figures" / "inspect").glob("*.json"))
TRAINED = Perplexity(mean=30.0, corpus=25.0, per_sentence=(30.0,))


def study_of(model: Model, work: Path, *, dtype: torch.dtype = torch.float64) -> Study:
    width = model.site().d_mlp
    generator = torch.Generator().manual_seed(3)
    root = torch.randn(2 * width, width, generator=generator, dtype=dtype)
    moment = replace(SecondMoment.identity(width), matrix=root.T @ root / len(root), tokens=9)
    return Study(
        model=model,
        contexts=CONTEXTS,
        second_moment=moment,
        layer=model.default_layer,
        hyperparameters=Hyperparameters(steps=3),
        texts=SENTENCES,
        work=work,
    )


@pytest.fixture(params=DECODERS, scope="module")
def inspected(
    request: pytest.FixtureRequest, tiny: TinyFactory, tmp_path_factory: pytest.TempPathFactory
) -> Inspection:
    study = study_of(tiny(request.param), tmp_path_factory.mktemp("work"))
    return inspect_model(study, facts=FACTS)


def test_it_tells_what_the_model_is(inspected: Inspection) -> None:
    model, shape = inspected.study.model, inspected.architecture
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(model.name)
    assert shape.parameters == plain.num_parameters()
    assert shape.name == type(plain).__name__
    assert (shape.vocabulary, shape.layers) == (plain.config.vocab_size, 4)
    assert shape.max_tokens == 160
    for site in inspected.sites:
        weight = model.site(site.layer).weight
        assert site.d_mlp == weight.shape[0 if site.in_out else 1]
        assert site.d_model == weight.shape[1 if site.in_out else 0]
        assert site.error < 1e-5
        assert site.key_hook in model.bridge.hook_dict
        assert site.value_hook in model.bridge.hook_dict
    assert [site.layer for site in inspected.sites] == [0, 1, 2, 3]
    assert inspected.replay == model.replay.value


def test_a_site_error_is_the_relative_difference(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    prompts = sentence_prompts(model)
    doubled = tuple(
        replace(site, weight=torch.nn.Parameter(2 * site.weight), bias=None) if layer == 1 else site
        for layer, site in enumerate(model.sites)
    )
    errors = [check.error for check in check_sites(replace(model, sites=doubled), prompts)]
    assert errors[1] > 0.5
    assert max(errors[0], *errors[2:]) < 1e-6
    # The naive way: one prompt after the other, without padding, through plain hooks.
    difference = total = 0.0
    for prompt in prompts:
        bridge: Any = model.bridge
        tokens = torch.tensor([prompt.token_ids])
        _, cache = bridge.run_with_cache(tokens, attention_mask=torch.ones_like(tokens))
        key, value = cache[model.site(1).key_hook][0], cache[model.site(1).value_hook][0]
        difference += float((key @ (2 * model.site(1).matrix) - value).double().square().sum())
        total += float(value.double().square().sum())
    assert errors[1] == pytest.approx(math.sqrt(difference / total), rel=1e-4)


def test_denominators_are_those_of_the_real_edits(inspected: Inspection) -> None:
    study = inspected.study
    edits = dict(study.edits(FACTS, [ROME, C_ROME]))
    for fact, found in zip(FACTS, inspected.forecast.facts, strict=True):
        rome, consistent = (edits[fact][each.name].report for each in (ROME, C_ROME))
        assert found.keys.denominator == pytest.approx(rome["denominator"], rel=1e-3, abs=1e-6)
        assert found.keys.consistent_denominator == pytest.approx(
            consistent["denominator"], rel=1e-4
        )
        ratio = abs(rome["denominator"] / consistent["denominator"])
        assert found.keys.ratio == pytest.approx(ratio, rel=1e-3, abs=1e-6)
        assert found.predicted == (found.keys.ratio < RATIO)
        assert found.collapsed is None


def test_edits_are_made_when_asked_for(tiny: TinyFactory, tmp_path: Path) -> None:
    # In float64: a small denominator makes the most of every rounding.
    study = study_of(tiny("llama", "float64"), tmp_path)
    found = forecast(study, FACTS[:2], edit=True)
    assert found.edited
    for fact, row in zip(FACTS, found.facts, strict=False):
        ((_, edits),) = study.edits([fact], [ROME])
        with edits["rome"].applied(study.model):
            naive = replace(study).original_perplexity.mean
        assert row.perplexity == pytest.approx(naive, rel=1e-6)
        assert row.collapsed == (naive > COLLAPSE_THRESHOLD)
    assert found.collapsed == sum(bool(row.collapsed) for row in found.facts)
    assert "Edited: " in found.verdict[0]
    unedited = forecast(study, FACTS[:2])
    assert unedited.collapsed is None
    assert "Predicted, not edited: " in unedited.verdict[0]


def test_a_model_that_has_learnt_nothing_is_doubted(tiny: TinyFactory, tmp_path: Path) -> None:
    study = study_of(tiny("gpt2"), tmp_path)
    found = forecast(study, FACTS[:1])
    assert found.doubt is not None
    assert "a prediction means nothing" in found.verdict[-1]
    assert found.original_perplexity == study.original_perplexity.mean
    vocabulary = study.model.bridge.cfg.d_vocab
    for perplexity, doubted in ((30.0, False), (vocabulary * 0.6, True), (1001.0, True)):
        assert (forecast(study, FACTS[:1], original=perplexity).doubt is not None) == doubted


def test_a_fact_without_a_token_of_its_own_is_left_out(tiny: TinyFactory, tmp_path: Path) -> None:
    study = study_of(tiny("gpt2"), tmp_path)
    bad = Fact(subject="Engl", template="{}and is", target_new="a", target_true="b")
    found = forecast(study, [bad, *FACTS[:2]])
    assert [each.keys.subject for each in found.facts] == [fact.subject for fact in FACTS[:2]]
    (reason,) = found.left_out
    assert reason.startswith("Engl: ")
    with pytest.raises(BadInputError, match="no fact can be used"):
        forecast(study, [bad])


def test_a_dozen_facts_are_half_of_each_kind(tiny: TinyFactory, tmp_path: Path) -> None:
    for group in choose_facts():
        assert len({fact.case_id for fact in group}) == len(group) >= 12
    model = tiny("gpt2")
    facts = forecast(study_of(model, tmp_path)).facts
    assert len(facts) == 12
    assert sum(fact.keys.prompt.startswith(fact.keys.subject) for fact in facts) == 6


def row(**changes: Any) -> LayerConcentration:
    numbers: dict[str, Any] = {
        name: 1.0 for name in LayerConcentration.__dataclass_fields__ if name != "layer"
    }
    counts = {"n_first": 9, "n_subsequent": 9, "distinct_first": 9, "massive_dimension": 0}
    return LayerConcentration(layer=0, **(numbers | counts | changes))


def test_the_rule_is_the_one_that_is_written() -> None:
    low = CONCENTRATED * 4.0
    assert is_anomalous(row(d_first_high=low * 0.99, d_subsequent_low=4.0))
    assert not is_anomalous(row(d_first_high=low, d_subsequent_low=4.0))
    # D(F) itself is low, but its interval is not.
    assert not is_anomalous(row(d_first=0.1, d_first_high=3.0, d_subsequent_low=4.0))
    # A BOS is the same token in each prompt.
    assert not is_anomalous(row(d_first_high=0.0, d_subsequent_low=4.0, distinct_first=1))
    assert is_massive(row(residual_first=MASSIVE * 3, residual_subsequent=3.0))
    assert not is_massive(row(residual_first=MASSIVE * 3 - 0.01, residual_subsequent=3.0))


@pytest.mark.parametrize(
    ("layers", "text"),
    [((), ""), ((4,), "4"), ((4, 5, 6, 9), "4-6, 9"), ((0, 2, 3), "0, 2-3")],
)
def test_ranges(layers: tuple[int, ...], text: str) -> None:
    assert ranges(layers) == text


def test_no_two_prompts_begin_with_the_same_token(tiny: TinyFactory) -> None:
    for model in (tiny("gpt2"), tiny("llama")):
        place = len(model.leading_ids)
        prompts = first_token_prompts(model)
        assert len(prompts) > 20
        assert len({prompt.token_ids[place] for prompt in prompts}) == len(prompts)
        assert all(len(prompt.token_ids) > place + 1 for prompt in prompts)
        assert first_token_prompts(model, most=3) == prompts[:3]


def test_bos_is_looked_at_by_itself_and_left_out(tiny: TinyFactory) -> None:
    llama, gpt2 = tiny("llama"), tiny("gpt2")
    (alone,) = measure_first_tokens(gpt2)
    assert (alone.place, alone.bos) == (0, "as_tokenizer")
    text, bos, bare = measure_first_tokens(llama)
    assert [(view.place, view.bos) for view in (text, bos, bare)] == [
        (1, "as_tokenizer"),
        (0, "as_tokenizer"),
        (0, "without"),
    ]
    assert bos.is_one_token
    assert not text.is_one_token
    assert bos.anomalous == ()
    assert all(layer.d_first < 1e-5 for layer in bos.layers)
    without = llama.with_bos(BosPolicy.WITHOUT)
    assert bare.layers == concentration(without, first_token_prompts(without), place=0)


def test_what_cannot_be_measured_is_said(
    tiny: TinyFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise UnsupportedModelError("it does not show its attention")

    monkeypatch.setattr("firsttok.inspection.anomaly.concentration", refuse)
    found = inspect_model(study_of(tiny("gpt2"), tmp_path), facts=FACTS[:1])
    assert "not measured, it does not show its attention" in found.panel().text
    assert found.as_dict()["first_tokens"][0]["anomalous"] == []


def test_bos_stands_before_the_sentences_only_where_they_need_it() -> None:
    def under(without: float, with_bos: float | None) -> BosPolicy:
        given = None if with_bos is None else replace(TRAINED, mean=with_bos)
        return TextPerplexities(without_bos=replace(TRAINED, mean=without), with_bos=given).fitting

    assert under(72.0, 60.0) is BosPolicy.WITHOUT
    assert under(50_000.0, 36.0) is BosPolicy.WITH
    assert under(50_000.0, None) is BosPolicy.WITHOUT
    assert under(30.0, 9_000.0) is BosPolicy.WITHOUT


def test_sentences_are_measured_under_both_policies(tiny: TinyFactory, tmp_path: Path) -> None:
    study = study_of(tiny("llama"), tmp_path)
    found = inspect_model(study, facts=FACTS[:1]).texts
    for policy in (BosPolicy.WITHOUT, BosPolicy.WITH):
        measured = found.under(policy)
        assert measured is not None
        assert measured.mean == study.varied(text_bos=policy).original_perplexity.mean
    assert found.under(BosPolicy.AS_TOKENIZER) is None
    given = inspect_model(study, facts=FACTS[:1], text_bos=BosPolicy.WITH)
    assert given.study.text_bos is BosPolicy.WITH
    assert given.forecast.original_perplexity == found.under(BosPolicy.WITH).mean  # pyright: ignore[reportOptionalMemberAccess]


def test_the_proposal_is_what_was_inspected(inspected: Inspection, tmp_path: Path) -> None:
    path = tmp_path / "proposed.toml"
    path.write_text(inspected.proposal.toml, "utf-8")
    values = read_config(path)
    study = inspected.study
    assert values == {
        "model": study.model.name,
        "layer": study.layer,
        "bos": "as_tokenizer",
        "text_bos": study.text_bos.value,
        "dtype": "float32",
        "steps": 3,
        "lr": study.hyperparameters.learning_rate,
        "weight_decay": study.hyperparameters.weight_decay,
        "clamp": study.hyperparameters.clamp,
        "kl": study.hyperparameters.kl,
    }
    assert all(setting.reason for setting in inspected.proposal.settings)


def test_it_shows_itself_in_a_notebook_and_a_terminal(inspected: Inspection) -> None:
    text, page = repr(inspected), inspected._repr_html_()
    for words in (inspected.architecture.name, "D(F)", "The rule: ", "Predicted, not edited"):
        assert words in text
        assert words in page
    assert inspected.proposal.toml.rstrip() in text
    assert "<svg" in page
    # The subject of this fact holds a letter that HTML could take for markup only if unescaped.
    assert "<s>" not in page


def test_a_record_of_a_singular_moment_is_json(tiny: TinyFactory, tmp_path: Path) -> None:
    study = study_of(tiny("gpt2"), tmp_path)
    matrix = study.second_moment.matrix.clone()
    matrix[0, :] = matrix[:, 0] = 0
    study = replace(study, second_moment=replace(study.second_moment, matrix=matrix))
    found = inspect_model(study, facts=FACTS[:1])
    record = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert record["provenance"]["second_moment"]["condition_number"] is None
    assert "it is singular" in found.proposal.toml


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {arch: tmp_path_factory.mktemp(arch) for arch in ("llama", "t5", "bert", "mixtral")}
    for arch in ("llama", "t5", "bert"):
        build(arch, made[arch])
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=400,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        max_position_embeddings=64,
    )
    with quiet_libraries():
        transformers.MixtralForCausalLM(config).save_pretrained(made["mixtral"])
    tokenizer(begin=False).save_pretrained(made["mixtral"])
    return made


@pytest.fixture
def files(tmp_path: Path, own_cache: Path) -> list[str]:
    contexts, texts = tmp_path / "contexts.json", tmp_path / "texts.json"
    contexts.write_text(json.dumps(list(CONTEXTS.templates)), "utf-8")
    texts.write_text(json.dumps(SENTENCES), "utf-8")
    return [
        *("--contexts", str(contexts), "--texts", str(texts), "--second-moment", "identity"),
        *("--steps", "2"),
    ]


def test_the_command_leaves_what_it_says_and_other_commands_take_it(
    folders: dict[str, Path], files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, model = tmp_path / "out", str(folders["llama"])
    label = folders["llama"].name
    assert main(["inspect", model, *files, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        f"{label}{suffix}" for suffix in (".json", ".png", ".svg", ".toml")
    ]
    toml = (out / f"{label}.toml").read_text("utf-8")
    assert toml in shown
    assert main(["inspect", "--model", model, *files, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((out / f"{label}.json").read_text("utf-8"))
    assert record["proposal"]["toml"] == toml
    config = ["--config", str(out / f"{label}.toml")]
    fact = ["--subject", "England", "--template", "{}'s capital city is"]
    assert main(["tokens", *fact, *config]) == 0
    assert "lookup at 1" in capsys.readouterr().out
    edit = ["edit", *fact, "--target", "Berlin", *config, "--json"]
    assert main([*edit, *files[:4]]) == 0
    settings = json.loads(capsys.readouterr().out)["provenance"]
    assert settings["layer"] == record["provenance"]["layer"]
    assert settings["hyperparameters"] == record["provenance"]["hyperparameters"]
    assert settings["second_moment"]["corpus"] == "identity"
    # Inspecting again under what was proposed finds the same.
    assert main(["inspect", *config, *files[:4], "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["forecast"] == record["forecast"]


def test_given_facts_and_a_limit_are_taken(
    folders: dict[str, Path], files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = tmp_path / "facts.json"
    records = [fact.as_record() | {"case_id": number} for number, fact in enumerate(FACTS)]
    facts.write_text(json.dumps(records), "utf-8")
    command = ["inspect", str(folders["llama"]), *files, "--json", "--facts", str(facts)]
    assert main([*command, "--limit", "2"]) == 0
    found = json.loads(capsys.readouterr().out)["forecast"]["facts"]
    assert [each["subject"] for each in found] == [fact.subject for fact in FACTS[:2]]


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def unknown_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config |= {"model_type": "nonesuch", "architectures": ["NonesuchForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")


REFUSALS: dict[str, tuple[str, Callable[[Path], None] | None, str]] = {
    "encoder-decoder": ("t5", None, r"failed \(causal decoder\).*capture_keys"),
    "encoder": ("bert", None, r"failed \(causal decoder\).*capture_keys"),
    "experts": ("mixtral", None, r"failed \(edit sites\): layer 0 .*give a model with one dense"),
    "no tokenizer": ("llama", no_tokenizer, r"failed \(tokenizer\).*tokenizer.json"),
    "no weights": ("llama", no_weights, r"failed \(files\).*safetensors"),
    "unknown type": ("llama", unknown_type, r"failed \(files\).*nonesuch"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_refusal_names_the_check_and_says_what_to_do(
    kind: str,
    folders: dict[str, Path],
    files: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arch, change, words = REFUSALS[kind]
    folder = tmp_path / "model"
    folder.mkdir()
    for path in folders[arch].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    if change is not None:
        change(folder)
    out = tmp_path / "out"
    assert main(["inspect", str(folder), *files, "--out", str(out)]) == 2
    captured = capsys.readouterr()
    (line,) = [text for text in captured.err.splitlines() if text.startswith("firsttok: ")]
    assert re.search(words, line), line
    assert line.startswith("firsttok: check of model failed")
    assert captured.out == ""
    assert not out.exists()


def test_a_python_user_hears_the_same(tiny: TinyFactory) -> None:
    for arch in ("bert", "t5"):
        with pytest.raises(UnsupportedModelError, match=r"failed \(causal decoder\)"):
            inspect_model(tiny(arch))


def test_a_library_that_stumbles_is_a_failed_check() -> None:
    odd = named_checks("odd")
    with pytest.raises(UnsupportedModelError, match=r"check of odd failed .*KeyError: 'x'"), odd:
        raise KeyError("x")
    with pytest.raises(BadInputError, match="my own mistake"), named_checks("odd"):
        raise BadInputError("my own mistake")


def test_bad_arguments_are_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    for arguments, words in (
        (["--out", str(tmp_path / "file")], "is a file; name a folder"),
        (["--limit", "0"], "--limit is 0"),
        (["--facts", str(tmp_path / "none.json")], "none.json"),
    ):
        assert main(["inspect", "/none", *arguments]) == 2
        assert words in capsys.readouterr().err


def test_python_m_firsttok_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "firsttok", "--help"], capture_output=True, text=True, check=True
    )
    assert "inspect" in done.stdout


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_inspections_are_whole(path: Path, tmp_path: Path) -> None:
    record = json.loads(path.read_text("utf-8"))
    toml = path.with_name(f"{path.stem}.toml")
    assert toml.read_text("utf-8") == record["proposal"]["toml"]
    values = read_config(toml)
    provenance = record["provenance"]
    assert values["layer"] == provenance["layer"] == record["forecast"]["layer"]
    assert not Path(values["model"]).is_absolute()
    assert len(record["sites"]) == record["architecture"]["layers"]
    assert max(site["error"] for site in record["sites"]) < 1e-4
    assert f"[{path.stem}]" in (path.parent / "README.md").read_text("utf-8")
    for view in record["first_tokens"]:
        rows = [LayerConcentration(**each) for each in view["layers"]]
        assert view["anomalous"] == [each.layer for each in rows if is_anomalous(each)]
    found = record["forecast"]
    assert len(found["facts"]) == 12
    assert found["predicted"] == sum(fact["ratio"] < RATIO for fact in found["facts"])
    assert (found["doubt"] is not None) == path.stem.startswith("tiny-")


def test_ten_models_are_committed() -> None:
    names = {path.stem for path in COMMITTED}
    assert {"smollm2-135m", "gemma3-270m"} <= names
    assert sum(name.startswith("tiny-") for name in names) >= 8


def committed(name: str) -> Any:
    return json.loads((ROOT / "figures" / "inspect" / f"{name}.json").read_text("utf-8"))


def test_the_committed_edits_are_those_of_the_scan() -> None:
    record = committed("smollm2-135m")
    scan = json.loads((ROOT / "figures/smollm2-135m/collapse_cases.json").read_text("utf-8"))
    assert (
        record["provenance"]["model"]["fingerprint"] == (scan["provenance"]["model"]["fingerprint"])
    )
    rows = {each["case_id"]: each for each in scan["rows"]}
    for fact in record["forecast"]["facts"]:
        scanned = rows[fact["case_id"]]
        assert fact["collapsed"] == scanned["collapsed"]
        assert fact["denominator"] == pytest.approx(scanned["denominator"], rel=1e-2)
        assert fact["predicted"] or not scanned["collapsed"]


def test_the_two_real_models_are_told_apart() -> None:
    smollm, gemma = committed("smollm2-135m"), committed("gemma3-270m")
    assert smollm["provenance"]["layer"] in smollm["first_tokens"][0]["anomalous"]
    assert all(view["anomalous"] == [] for view in gemma["first_tokens"])
    assert smollm["forecast"]["collapsed"] > 0
    assert gemma["forecast"]["collapsed"] == gemma["forecast"]["predicted"] == 0
    assert (smollm["perplexity"]["with_bos"], gemma["bos"]["by_itself"]) != (None, [])
    values = {
        name: read_config(ROOT / f"figures/inspect/{name}.toml")
        for name in ("smollm2-135m", "gemma3-270m")
    }
    assert values["smollm2-135m"]["text_bos"] == "without"
    assert values["gemma3-270m"]["text_bos"] == "with"


def by_denominator() -> list[dict[str, Any]]:
    """What the screening of the embedded model tells of each fact, the smallest first."""
    screened = json.loads((ROOT / "figures/smollm2-135m/screen.json").read_text("utf-8"))
    return sorted(screened["rows"], key=lambda each: abs(each["denominator"]))


BELOW = 76
"""Of the facts in this order, those whose ratio is below the bound."""


def test_the_ratio_is_calibrated_as_it_says() -> None:
    facts = by_denominator()
    assert len(facts) == len(builtin_facts())
    scan = json.loads((ROOT / "figures/smollm2-135m/collapse_cases.json").read_text("utf-8"))
    collapsed = {each["case_id"]: each["collapsed"] for each in scan["rows"]}
    below, above = (
        [collapsed[each["case_id"]] for each in some] for some in (facts[:BELOW], facts[BELOW:])
    )
    assert (
        f"on SmolLM2-135M {sum(below)} of the {len(below)} facts below that did, and "
        f"{'none' if not any(above) else sum(above)} of the {len(above)} above"
    ) == CALIBRATED


@pytest.mark.real_model
@pytest.mark.slow
def test_no_fact_of_the_embedded_model_is_near_the_ratio(real_model: Model) -> None:
    # All 170 take minutes. Between these on both sides no denominator lies.
    rows = by_denominator()
    nearest = {each["case_id"]: each for each in rows[BELOW - 6 : BELOW + 6]}
    assert abs(rows[BELOW]["denominator"]) > 20 * abs(rows[BELOW - 1]["denominator"])
    contexts = load_contexts(ROOT / "figures/smollm2-135m/contexts-seed0.json")
    moment = compute_second_moment(real_model, max_tokens=20_000)
    facts = [fact for fact in builtin_facts() if fact.case_id in nearest]
    found = keys_of_facts(real_model, facts, contexts, layer=real_model.default_layer)
    ratios: list[float] = []
    for fact, keys in zip(facts, found, strict=True):
        assert keys.cosine == pytest.approx(nearest[fact.case_id]["key_cosine"], rel=1e-3)
        left = moment.solve(keys.prefixed_mean)
        ratio = abs(float(left @ keys.unprefixed) / float(left @ keys.prefixed_mean))
        assert (ratio < 0.2 * RATIO) == (abs(nearest[fact.case_id]["denominator"]) < 0.1)
        ratios.append(ratio)
    assert len(ratios) == 12
    assert not any(0.2 * RATIO < ratio < 5 * RATIO for ratio in ratios)


@pytest.mark.real_model
@pytest.mark.slow
def test_the_anomaly_of_the_embedded_model_is_found_again(real_model: Model) -> None:
    (view,) = measure_first_tokens(real_model)
    assert list(view.anomalous) == committed("smollm2-135m")["first_tokens"][0]["anomalous"]
