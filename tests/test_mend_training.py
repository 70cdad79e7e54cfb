"""Training of MEND: what is trained is what edits, and a training that goes on is the same one."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import DECODERS, TinyFactory, same_weights, weights

from firsttok.cli import main
from firsttok.console import own_bar
from firsttok.data import Fact, builtin_facts, find_corpus
from firsttok.editing import MendEditor, MendNetwork, MendStatistics, load_mend, mend_texts
from firsttok.editing import mend_training as training
from firsttok.editing.mend import edit_labels
from firsttok.editing.mend_edits import MOST_EDITS, mend_edits
from firsttok.editing.mend_plan import MendPlan, MendTarget
from firsttok.editing.mend_training import train_mend
from firsttok.errors import BadInputError
from firsttok.models import Model
from firsttok.prompts import pad
from firsttok.storage import read_tensors, write_tensors

PLAN = MendPlan(steps=5, batch=2, edits=6, texts=4, validation=3, rank=4, every=2, lr=1e-3)


@pytest.fixture(autouse=True)
def short_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the shipped text, which takes seconds to tokenise."""
    corpus = find_corpus("sampled")
    short = replace(corpus, documents=corpus.documents[:20])
    monkeypatch.setattr(mend_texts, "find_corpus", lambda _: short)


def nll_behind(model: Model, fact: Fact) -> float:
    """NLL of the labels after a prompt, by a whole pass."""
    prompt, labels = edit_labels(model, fact)
    batch = pad(model, [prompt])
    with torch.no_grad():
        logits, _ = model.run_with_cache(batch.tokens, names_filter=[])
    log_probs = logits[0, -len(labels) :].double().log_softmax(-1)
    return -float(log_probs[range(len(labels)), labels].mean())


def prepared(model: Model, plan: MendPlan) -> tuple[Any, Any]:
    with own_bar(None) as bar, model.standing():
        places = plan.places(model)
        data = mend_texts.prepare_training(model, plan, places[0].layer, bar)
        network = MendNetwork.initial(model, places, rank=plan.rank, rate=-1e-3, seed=1)
        return data, training._with_statistics(model, network, data.training)


@pytest.mark.parametrize("arch", DECODERS)
def test_what_is_trained_is_what_edits(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch, "float64")
    before = weights(model)
    data, network = prepared(model, PLAN)
    noise = torch.Generator().manual_seed(0)
    moved = {
        name: each + 0.02 * torch.randn(each.shape, generator=noise)
        if name.endswith((".up", ".shift"))
        else each
        for name, each in network.tensors().items()
    }
    network = network.with_tensors(moved)
    trainer = training._Trainer.begin(model, PLAN, network)
    (fact,) = mend_edits(model, PLAN.edits, PLAN.validation, seed=PLAN.seed).training[:1]
    with torch.no_grad(), model.standing():
        found = trainer._loss(network, data.training[0], data.text[0])
    edit = MendEditor(network=network, statistics=MendStatistics.KEPT).edit(model, [fact])
    view = model.edited(edit)
    rephrase = replace(fact, template=fact.paraphrases[0].replace(fact.subject, "{}"))
    assert float(found["edit_nll"]) == pytest.approx(nll_behind(view, fact), rel=1e-6)
    assert float(found["rephrase_nll"]) == pytest.approx(nll_behind(view, rephrase), rel=1e-6)
    tokens = data.text[0].tail.batch.tokens
    with torch.no_grad():
        old, new = (
            each.run_with_cache(tokens, names_filter=[])[0][0, -8:].double().log_softmax(-1)
            for each in (model, view)
        )
    divergence = float((old.exp() * (old - new)).sum(1).mean())
    assert float(found["kl"]) == pytest.approx(divergence, rel=1e-5)
    expected = 0.1 * float(found["rephrase_nll"]) + float(found["kl"])
    assert float(found["loss"]) == pytest.approx(expected)
    assert same_weights(before, weights(model))


def test_a_training_that_was_killed_ends_as_one_that_was_not(
    tiny: TinyFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    whole = train_mend(model, PLAN, folder=tmp_path / "whole")
    advance = training._Trainer.advance

    def killed(self: Any, data: Any) -> None:
        # Behind the look at step 2, of which the file is.
        if self.step == 3:
            raise KeyboardInterrupt
        advance(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(training._Trainer, "advance", killed)
        with pytest.raises(KeyboardInterrupt):
            train_mend(model, PLAN, folder=tmp_path / "parts")
    again = train_mend(model, PLAN, folder=tmp_path / "parts")
    assert again.network.content_hash == whole.network.content_hash
    assert again.curves == whole.curves
    assert [row["step"] for row in whole.curves] == [0, 2, 4, 5]
    with pytest.raises(BadInputError, match="the state of another training"):
        train_mend(model, replace(PLAN, seed=1), folder=tmp_path / "parts")


def test_steps_make_the_loss_of_their_edits_smaller(tiny: TinyFactory) -> None:
    model, plan = tiny("gpt2"), replace(PLAN, target=MendTarget.SAME, batch=1)
    data, network = prepared(model, plan)
    data = replace(data, training=data.training[:1], text=data.text[:1])
    trainer = training._Trainer.begin(model, plan, network)

    def loss() -> float:
        with torch.no_grad():
            measured = trainer._loss(trainer.network, data.training[0], data.text[0])
        return float(measured["loss"])

    with model.standing():
        before = loss()
        for _ in range(25):
            trainer.advance(data)
        assert loss() < 0.8 * before
    # What rows are standardised by is not trained.
    for shape, held in trainer.network.statistics.items():
        assert torch.equal(held.mean, network.statistics[shape].mean)


def test_a_training_without_a_better_look_ends(tiny: TinyFactory, tmp_path: Path) -> None:
    # Rates so large that no step of this size makes the loss smaller.
    plan = replace(PLAN, steps=1000, every=1, patience=2, lr=10.0)
    found = train_mend(tiny("gpt2"), plan, folder=tmp_path)
    assert found.steps == found.best_step + 2 < 1000


def test_no_edit_is_of_a_subject_that_is_tested(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    examples = mend_edits(model, 60, 8, seed=3)
    tested = {fact.subject for fact in builtin_facts()}
    subjects = [
        {fact.subject for fact in part} for part in (examples.training, examples.validation)
    ]
    assert not tested & (subjects[0] | subjects[1])
    assert not subjects[0] & subjects[1]
    assert (len(examples.training), len(examples.validation)) == (60, 8)
    for fact in (*examples.training, *examples.validation):
        assert fact.paraphrases[0] != fact.prompt
        assert fact.subject in fact.paraphrases[0]
    # Another number of edits begins with the same ones.
    assert mend_edits(model, 20, 8, seed=3).training == examples.training[:20]
    assert mend_edits(model, 20, 8, seed=4).training != examples.training[:20]


def test_the_command_leaves_network_curves_and_figure(
    tiny: TinyFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tiny("llama"), tmp_path / "mend.safetensors"
    settings = ["--steps", "2", "--batch", "1", "--edits", "4", "--windows", "3", "--rank", "3"]
    more = ["--validation", "2", "--every", "1", "--target", "same", "--seed", "5"]
    argv = ["train-mend", model.name, "--out", str(out), *settings, *more]
    assert main([*argv, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {path.name for path in tmp_path.iterdir()} >= {
        *("mend.safetensors", "mend.json", "mend.csv", "mend.png", "mend.svg", "mend.work"),
    }
    mend = load_mend(out, model)
    assert mend.network is not None
    made = mend.network.record["training"]
    assert made["validation"]["loss"] == printed["loss"]
    assert made["plan"]["seed"] == 5
    assert "--target=same" in made["command"]
    assert mend.statistics is MendStatistics.KEPT
    kept = json.loads((tmp_path / "mend.json").read_text("utf-8"))
    assert [row["step"] for row in kept["rows"]] == [0, 1, 2]
    assert main(argv) == 0
    with pytest.raises(BadInputError, match="no network of MEND is shipped for"):
        load_mend(None, model)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": 0}, "steps is 0; give a whole number from 1 to"),
        ({"steps": 10**400}, "give a whole number from 1 to 1000000000"),
        ({"edits": 10**9}, f"edits is 1000000000; give a whole number from 1 to {MOST_EDITS}"),
        ({"validation": 10**9}, "validation is 1000000000; give"),
        ({"batch": 7}, "batch is 7, and there are 6 edits to train on"),
        ({"seed": -1}, "seed is -1"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"rate": float("inf")}, "rate is inf"),
        ({"rate_lr": float("nan")}, "rate_lr is nan"),
        ({"edit_weight": -1.0}, "edit_weight and locality_weight are -1.0 and 1.0"),
        ({"layers": (2, 2)}, "give each once"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInputError, match=sentence):
        replace(PLAN, **changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layers": (0, 1)}, "leave layer 0 out"),
        ({"layers": (2, 9)}, "has no layer 9"),
        ({"texts": 8_999_997}, "windows, and 9000000 are asked for"),
        ({"rank": 65}, "rank is 65, and the rows of .* are 64 wide; give at most so much"),
    ],
)
def test_what_the_model_does_not_allow_is_refused_before_it_is_run(
    tiny: TinyFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    sentence: str,
) -> None:
    monkeypatch.setattr(mend_texts, "capture_tail", lambda *_, **__: pytest.fail("it was run"))
    with pytest.raises(BadInputError, match=sentence):
        train_mend(tiny("gpt2"), replace(PLAN, **changes), folder=tmp_path)


def test_so_many_edits_are_not_drawn(tiny: TinyFactory) -> None:
    with pytest.raises(BadInputError, match="training is 1000000000; give"):
        mend_edits(tiny("gpt2"), 10**9, 1, seed=0)


STATES: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], object], str]] = {
    "a tensor less": (lambda t, _: t.pop("now.rates"), "the state of another training"),
    "a tensor of another shape": (
        lambda t, _: t.update({"best.rates": torch.ones(7)}),
        "the state of another training",
    ),
    "no moments of Adam": (
        lambda t, _: [t.pop(name) for name in list(t) if name.startswith("adam")],
        "the state of another training",
    ),
    "no steps": (lambda _, s: s.pop("step"), "no state of a training that firsttok kept"),
    "no owner": (lambda _, s: s.pop("of"), "no state of a training that firsttok kept"),
    "of another model": (lambda _, s: s.update(of="other"), "the state of another training"),
}
"""States that somebody else wrote, and what is said of each."""


def test_a_state_that_cannot_be_used_is_told_before_the_texts_are_run(
    tiny: TinyFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, file = tiny("llama"), tmp_path / "training.safetensors"
    train_mend(model, PLAN, folder=tmp_path)
    whole = file.read_bytes()
    tensors, metadata = read_tensors(file, "a state")
    monkeypatch.setattr(mend_texts, "capture_tail", lambda *_, **__: pytest.fail("it was run"))
    for change, said in STATES.values():
        changed, state = dict(tensors), json.loads(metadata["state"])
        change(changed, state)
        write_tensors(file, changed, {"state": json.dumps(state)})
        with pytest.raises(BadInputError, match=said):
            train_mend(model, PLAN, folder=tmp_path)
    MendNetwork.initial(model, PLAN.places(model), rank=4).save(file)
    with pytest.raises(BadInputError, match="no state of a training that firsttok kept"):
        train_mend(model, PLAN, folder=tmp_path)
    for damaged in (whole[:-9], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(damaged)
        with pytest.raises(BadInputError, match=r"is damaged, or no state .* delete it to begin"):
            train_mend(model, PLAN, folder=tmp_path)
    file.unlink()
    file.mkdir()
    with pytest.raises(BadInputError, match="is damaged, or no state"):
        train_mend(model, PLAN, folder=tmp_path)
