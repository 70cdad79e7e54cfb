"""MEND: what its network promises, and a plain writing of an edit on a Hugging Face copy."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import (
    CONTEXTS,
    DECODERS,
    FACTS,
    SENTENCES,
    TinyFactory,
    relative,
    same_weights,
    weights,
)

from benchmarks.naive import naive_model
from firsttok.data import Fact, builtin_sentences
from firsttok.editing import load_edit, load_mend
from firsttok.editing.mend import MendEditor, MendStatistics
from firsttok.editing.mend_edits import mend_edits
from firsttok.editing.mend_network import MendNetwork, RowStatistics
from firsttok.errors import BadInputError
from firsttok.evaluation import perplexity, score_targets
from firsttok.hyperparameters import Hyperparameters
from firsttok.models import PORTS, BosPolicy, Model, Place
from firsttok.prompts import fact_prompt, with_target
from firsttok.second_moment import SecondMoment
from firsttok.sequences import EditSequence, SequencePlan, run_sequences
from firsttok.study import Study

LAYERS = (2, 3)


def places_of(model: Model) -> list[Place]:
    found = [Place("blocks", layer, port) for layer in LAYERS for port in PORTS]
    return [place for place in found if place in model.weights.sites]


def network_of(model: Model, *, seed: int = 3) -> MendNetwork:
    """A network of random numbers, far from the identity."""
    plain = MendNetwork.initial(model, places_of(model), rank=5, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, own in plain.tensors().items():
        noise = torch.randn(own.shape, generator=generator)
        tensors[name] = own + 0.1 * noise
        if name.endswith("squares"):
            tensors[name] = 50 * (0.5 + noise.abs())
        if name.endswith("tokens"):
            tensors[name] = torch.tensor(50.0)
    return plain.with_tensors(tensors)


def editor(model: Model, statistics: MendStatistics = MendStatistics.KEPT) -> MendEditor:
    return MendEditor(network=network_of(model), statistics=statistics)


class NaiveMend:
    """The released arithmetic token by token, on a Hugging Face model that is edited in place."""

    def __init__(self, model: Model, network: MendNetwork, *, restarted: bool) -> None:
        self.model, self.network = model, network
        self.hf = naive_model(model, LAYERS[0]).network
        # Own weights: the copy shares them with the model until they are edited.
        for name in (model.weights.name_of(place) for place in network.places):
            module = self.hf.get_submodule(name.removesuffix(".weight"))
            module.weight = torch.nn.Parameter(module.weight.detach().clone())
        self.modules = [
            self.hf.get_submodule(model.weights.name_of(place).removesuffix(".weight"))
            for place in network.places
        ]
        self.seen: dict[Any, list[torch.Tensor]] = {shape: [] for shape in network.transforms}
        self.restarted = restarted

    def edit(self, facts: Sequence[Fact]) -> list[torch.Tensor]:
        """The change of each weight ``[d_in, d_out]``, which is put into the copy."""
        tokenizer: Any = self.model.tokenizer
        given: dict[int, list[torch.Tensor]] = {i: [] for i in range(len(self.modules))}
        slopes: dict[int, list[torch.Tensor]] = {i: [] for i in range(len(self.modules))}

        def watch(number: int) -> Any:
            def hook(_: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
                given[number].append(args[0].detach()[0])
                marked = output if output.requires_grad else output.clone().requires_grad_()
                marked.register_hook(lambda slope: slopes[number].append(slope[0]))
                return marked

            return hook

        handles = [m.register_forward_hook(watch(i)) for i, m in enumerate(self.modules)]
        losses: list[torch.Tensor] = []
        for fact in facts:
            prompt = fact_prompt(self.model, fact)
            text = f"{prompt.text} {fact.target_new}"
            lead = list(self.model.leading_ids)
            ids = lead + tokenizer.encode(text, add_special_tokens=False)
            labels = lead + tokenizer.encode(f" {fact.target_new}", add_special_tokens=False)
            logits = self.hf(torch.tensor([ids]), use_cache=False).logits[0, :-1]
            log_probs = logits[-len(labels) :].log_softmax(-1)
            losses += [-log_probs[i, label] for i, label in enumerate(labels)]
        torch.stack(losses).mean().backward()
        for handle in handles:
            handle.remove()
        changes: list[torch.Tensor] = []
        # Hooks fire from the last prompt back.
        rows = [
            [
                torch.cat([u, d])
                for us, ds in zip(given[i], reversed(slopes[i]), strict=True)
                for u, d in zip(us, ds, strict=True)
                if bool((u != 0).any()) and bool((d != 0).any())
            ]
            for i in range(len(self.modules))
        ]
        for number, own in enumerate(rows):
            changes.append(self._change(number, own))
        with torch.no_grad():
            for module, change in zip(self.modules, changes, strict=True):
                module.weight += change.T if isinstance(module, torch.nn.Linear) else change
        return changes

    def _change(self, number: int, rows: list[torch.Tensor]) -> torch.Tensor:
        shape = self.network.shapes[number]
        transform = self.network.transforms[shape]
        mode = [i for i, each in enumerate(self.network.shapes) if each == shape].index(number)
        held = transform.statistics
        mean, std = held.mean.double(), (held.squares.double() / (held.tokens - 1)).sqrt()
        if self.restarted:
            self.seen[shape] += rows
            mean = torch.stack(self.seen[shape]).mean(0)
            std = torch.stack(self.seen[shape]).std(0)
        change = torch.zeros(shape, dtype=torch.float64)
        for row in rows:
            x = (row - mean) / (std + 1e-7)
            for block in transform.blocks:
                inner = block.up.double() @ (block.down.double() @ x) + block.bias
                x = x + torch.relu(inner * block.scale[mode] + block.shift[mode])
            change += self.network.rates[number] * torch.outer(x[: shape[0]], x[shape[0] :])
        return change


@pytest.mark.parametrize("statistics", MendStatistics)
@pytest.mark.parametrize("arch", DECODERS)
@pytest.mark.usefixtures("softmax_in_float64")
def test_a_sequence_is_plain_editing_step_by_step(
    tiny: TinyFactory, arch: str, statistics: MendStatistics
) -> None:
    model = tiny(arch, "float64")
    before, mend = weights(model), editor(model, statistics)
    assert mend.network is not None
    naive = NaiveMend(model, mend.network, restarted=statistics is MendStatistics.RESTARTED)
    view = model
    # One fact, then two at once, then one again.
    for facts in ([FACTS[1]], [FACTS[0], FACTS[2]], [FACTS[3]]):
        edit = mend.edit(view, facts)
        view = view.edited(edit)
        for delta, expected in zip(edit.deltas, naive.edit(facts), strict=True):
            assert relative(delta.matrix, expected) < 1e-8
    assert same_weights(before, weights(model))


@pytest.mark.parametrize("arch", DECODERS)
def test_an_untrained_network_passes_the_standardised_factors_on(
    tiny: TinyFactory, arch: str
) -> None:
    model = tiny(arch, "float64")
    plain = MendNetwork.initial(model, places_of(model), rank=5, rate=0.25)
    rows = torch.randn(9, sum(plain.shapes[0]), dtype=torch.float64)
    statistics = RowStatistics.none(rows.shape[1]).with_rows(rows)
    left, right = plain.factors(0, rows, statistics)
    expected = (rows - rows.mean(0)) / (rows.std(0) + 1e-7)
    assert relative(torch.cat([left.T, right / 0.25], dim=1), expected) < 1e-12


def test_the_block_learns_from_where_it_is_zero(tiny: TinyFactory) -> None:
    plain = MendNetwork.initial(tiny("gpt2"), places_of(tiny("gpt2")), rank=5)
    shape = plain.shapes[0]
    block = plain.transforms[shape].blocks[0]
    up = block.up.clone().requires_grad_()
    replace(block, up=up)(torch.randn(4, sum(shape)), 0).sum().backward()
    assert up.grad is not None
    assert float(up.grad.norm()) > 0


def test_statistics_do_not_depend_on_how_the_tokens_came() -> None:
    rows = torch.randn(12, 7, dtype=torch.float64) * 3 + 5
    whole = RowStatistics.none(7).with_rows(rows)
    parts = RowStatistics.none(7)
    for part in (rows[:1], rows[1:1], rows[1:9], rows[9:]):
        parts = parts.with_rows(part)
    assert parts.tokens == whole.tokens == 12
    assert relative(parts.mean, rows.mean(0)) < 1e-12
    assert relative((parts.squares / 11).sqrt(), rows.std(0)) < 1e-12


def test_a_sequence_goes_on_from_saved_edits(tiny: TinyFactory, tmp_path: Path) -> None:
    model = tiny("llama", "float64")
    mend = editor(model, MendStatistics.RESTARTED)
    view, again = model, model
    edit = mend.edit(model, [FACTS[0]])
    for number, fact in enumerate(FACTS[:3]):
        edit = mend.edit(view, [fact])
        same = mend.edit(again, [fact])
        assert same.content_hash == edit.content_hash
        same.save(tmp_path / f"{number}.safetensors")
        view = view.edited(edit)
        again = again.edited(load_edit(tmp_path / f"{number}.safetensors"))
    # Without the earlier edits the tokens counted are others, and so is the edit.
    assert relative(mend.edit(model, [FACTS[2]]).deltas[0].left, edit.deltas[0].left) > 1e-3


@pytest.mark.parametrize(
    "held",
    [
        None,
        [],
        {"24x40": 3},
        {"24x40": {"tokens": 5, "mean": "no", "squares": [1.0] * 64}},
        {"24x40": {"tokens": 5, "mean": [0.0] * 3, "squares": [1.0] * 3}},
        {"24x40": {"tokens": 5, "mean": [0.0] * 64, "squares": [-1.0] * 64}},
        {"24x40": {"tokens": 5, "mean": [float("nan")] * 64, "squares": [1.0] * 64}},
        {"24x40": {"tokens": 2.5, "mean": [0.0] * 64, "squares": [1.0] * 64}},
        {"24x40": {"tokens": 5, "mean": [[0.0], [1.0, 2.0]], "squares": [1.0] * 64}},
    ],
)
def test_statistics_of_an_earlier_edit_that_are_none_are_refused(
    tiny: TinyFactory, held: Any
) -> None:
    model = tiny("gpt2")
    mend = editor(model, MendStatistics.RESTARTED)
    edit = mend.edit(model, [FACTS[0]])
    record: Any = {**edit.provenance, "statistics": held}
    with pytest.raises(BadInputError, match="statistics that an earlier edit of MEND left"):
        mend.edit(model.edited(replace(edit, provenance=record)), [FACTS[1]])


def test_a_network_is_saved_and_read(tiny: TinyFactory, tmp_path: Path) -> None:
    model = tiny("mistral")
    network = replace(network_of(model), record={"training": {"seed": 3}, "model": model.record()})
    network.save(tmp_path / "mend.safetensors")
    again = MendNetwork.load(tmp_path / "mend.safetensors")
    assert again.content_hash == network.content_hash
    assert again.places == network.places
    assert again.record.get("training") == {"seed": 3}
    one, other = (
        MendEditor(network=each, statistics=MendStatistics.KEPT).edit(model, [FACTS[0]])
        for each in (network, again)
    )
    assert one.content_hash == other.content_hash
    network.save(tmp_path / "small.safetensors", dtype=torch.float16)
    small = MendNetwork.load(tmp_path / "small.safetensors")
    assert torch.equal(small.rates, network.rates)
    for name, tensor in small.tensors().items():
        assert relative(tensor, network.tensors()[name]) < 1e-3


def test_the_released_rates_go_to_the_matrix_that_they_were_applied_to(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    network = network_of(model)
    released = released_from(network)
    same = MendNetwork.from_released(released, network.places)
    assert same.content_hash == network.content_hash
    # As GPT-2-XL's: stored with the second matrix of each layer first, applied in the other order.
    swapped = [network.places[i] for i in (1, 0, 3, 2)]
    found = MendNetwork.from_released(released, network.places, applied=swapped)
    assert torch.equal(found.rates, network.rates[[1, 0, 3, 2]])


def released_from(network: MendNetwork) -> dict[str, torch.Tensor]:
    """The network's numbers under the names of the released code."""
    released: dict[str, torch.Tensor] = {"edit_lrs": network.rates}
    for shape, transform in network.transforms.items():
        about = transform.statistics
        own: dict[str, torch.Tensor] = {"k": torch.tensor([float(about.tokens)])}
        for name, each in (("mean", about.mean), ("s", about.squares)):
            own[f"u_{name}"], own[f"v_{name}"] = each.split(list(shape))
        for number, block in enumerate(transform.blocks):
            start = f"mlp.layers.{number}"
            own |= {
                f"{start}.u": block.up,
                f"{start}.v": block.down,
                f"{start}.bias": block.bias,
                f"{start}.mode_scale.weight": block.scale,
                f"{start}.mode_shift.weight": block.shift,
            }
        released |= {f"mend.{shape}.{name}": each for name, each in own.items()}
    return released


Change = Callable[[dict[str, Any], dict[str, Any]], object]


def _put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors, _: tensors.update({name: change(tensors[name])})


def _said(name: str, value: Any) -> Change:
    return lambda _, record: record.update({name: value})


def _with(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed.flatten()[-1] = value
        return changed

    return change


def _without_rank(tensors: dict[str, Any], _: object) -> None:
    tensors["40x24.0.up"], tensors["40x24.0.down"] = torch.zeros(64, 0), torch.zeros(0, 64)


FOREIGN: dict[str, tuple[Change, str]] = {
    "a tensor less": (lambda t, _: t.pop("40x24.1.down"), "lacks its tensor 40x24.1.down"),
    "no rates": (lambda t, _: t.pop("rates"), "lacks its tensor rates"),
    "no block": (
        lambda t, _: [t.pop(n) for n in list(t) if ".up" in n],
        "lacks its tensor 24x40.0.up",
    ),
    "no tensor": (lambda t, _: t.clear() or t.update(x=torch.ones(1)), "lacks its tensor"),
    "tensors more": (
        lambda t, _: t.update({f"x{n}": torch.ones(1) for n in range(5)}),
        "do not belong to its matrices (x0, x1, x2 and 2 more); leave them out",
    ),
    "a block of rank 0": (_without_rank, "40x24.0.down is of shape [0, 64], and its matrices take"),
    "ranks that differ": (_put("40x24.0.up", lambda t: t[:, 1:]), "is of shape [64, 4]"),
    "another width": (_put("40x24.mean", lambda t: t[1:]), "40x24.mean is of shape [63]"),
    "a number for a matrix": (
        _put("40x24.0.down", lambda t: t[0, 0]),
        "40x24.0.down is of shape []",
    ),
    "modes of fewer matrices": (_put("40x24.1.shift", lambda t: t[1:]), "is of shape [1, 64]"),
    "too few rates": (_put("rates", lambda t: t[1:]), "rates is of shape [3]"),
    "whole numbers": (_put("40x24.0.up", torch.Tensor.long), "is of type torch.int64"),
    "truth values": (_put("rates", torch.Tensor.bool), "is of type torch.bool"),
    "complex numbers": (
        _put("rates", lambda t: t.to(torch.complex64)),
        "is of type torch.complex64",
    ),
    "a small type": (_put("40x24.0.up", lambda t: t.to(torch.float8_e5m2)), "torch.float8_e5m2"),
    "NaN": (_put("40x24.0.bias", _with(float("nan"))), "40x24.0.bias is not finite"),
    "infinity": (_put("rates", _with(float("inf"))), "rates is not finite"),
    "too large for float32": (_put("rates", lambda t: t.double() * 1e300), "rates is not finite"),
    "a square below 0": (_put("40x24.squares", _with(-1.0)), "40x24.squares is below 0"),
    "half a token": (_put("40x24.tokens", _with(2.5)), "is 2.5, which is no number of tokens"),
    "fewer than no tokens": (_put("40x24.tokens", _with(-2.0)), "40x24.tokens is below 0"),
    "one token": (_put("40x24.tokens", _with(1.0)), "of 1 tokens, and a variance needs two"),
    "no matrices": (lambda _, r: r.update(places=[], shapes=[]), "names 0 matrices"),
    "a matrix twice": (
        lambda _, r: r.update(places=[r["places"][0]] * 4),
        "names 4 matrices, 1 of them different",
    ),
    "a shape less": (
        lambda _, r: r["shapes"].pop(),
        "names 4 matrices, 4 of them different, and 3",
    ),
    "shapes of another model": (_said("shapes", [[7, 5]] * 4), "lacks its tensor 7x5"),
    "shapes below 0": (_said("shapes", [[-40, 24]] * 4), "lacks its tensor -40x24"),
    "places that are none": (_said("places", "blocks"), "record has an unusable places"),
    "a layer in words": (
        lambda _, r: r["places"][1].__setitem__(1, "two"),
        "record has an unusable places.1.1",
    ),
    "no places": (lambda _, r: r.pop("places"), "record has an unusable places"),
    "a model that is none": (_said("model", 3), "record has an unusable model"),
    "a layer that is not there": (
        lambda _, r: r["places"][0].__setitem__(1, 99),
        "changes a matrix at layer 99 (in), which",
    ),
    "a layer below 0": (
        lambda _, r: r["places"][0].__setitem__(1, -1),
        "a matrix at layer -1 (in)",
    ),
    "a stack that is not there": (
        lambda _, r: r["places"][0].__setitem__(0, "decoder_blocks"),
        "a matrix at decoder_blocks, layer 2 (in)",
    ),
    "a port that is not there": (
        lambda _, r: r["places"][0].__setitem__(2, "sideways"),
        "a matrix at layer 2 (sideways)",
    ),
    "matrices the other way round": (
        lambda _, r: r["shapes"].reverse(),
        "changes matrices [40, 24] at layer 2 (in), and that of",
    ),
    "of another model": (
        lambda _, r: r["model"].update(fingerprint="other"),
        "was trained on gpt2",
    ),
}
"""Networks that somebody else wrote, and what is said of each."""


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_network_is_refused_before_any_work(
    name: str, tiny: TinyFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = tiny("gpt2"), tmp_path / "foreign.safetensors"
    network = network_of(model)
    tensors: dict[str, Any] = {n: each.contiguous() for n, each in network.tensors().items()}
    record = {"model": model.record(), "places": network.places, "shapes": network.shapes}
    record = json.loads(json.dumps(record))
    change, said = FOREIGN[name]
    change(tensors, record)
    plain = {n: each.clone().contiguous() for n, each in tensors.items()}
    save_file(plain, path, {"firsttok_mend": json.dumps(record)})
    monkeypatch.setattr(Model, "running", lambda _: pytest.fail("the model was run"))
    with pytest.raises(BadInputError, match=re.escape(said)):
        MendEditor(network=MendNetwork.load(path)).moments_of(model, 1)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("{", "record has an unusable content"),
        ("[]", "record has an unusable content"),
        ("[" * 100_000, "record has an unusable content"),
        (None, "holds no MEND network that firsttok wrote"),
    ],
)
def test_a_record_that_is_none_is_refused(record: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file({"rates": torch.ones(1)}, path, {} if record is None else {"firsttok_mend": record})
    with pytest.raises(BadInputError, match=said):
        MendNetwork.load(path)


RELEASED: dict[str, tuple[Change, str]] = {
    "no rates": (lambda t, _: t.pop("edit_lrs"), "lacks its tensor edit_lrs"),
    "fewer rates": (_put("edit_lrs", lambda t: t[1:]), "has 3 rates, and 4 matrices are given"),
    "no mean": (
        lambda t, _: t.pop("mend.(40, 24).v_mean"),
        "lacks its tensor mend.(40, 24).v_mean",
    ),
    "no part": (
        lambda t, _: [t.pop(n) for n in list(t) if n != "edit_lrs"],
        "is for matrices []; give one that has a part",
    ),
    "parts of one kind": (
        lambda t, _: t.update(
            {n.replace("(40, 24)", "b"): each for n, each in t.items() if "(40, 24)" in n}
        ),
        "is for matrices [[24, 40], [40, 24], [40, 24]]",
    ),
    "a block less": (
        lambda t, _: t.pop("mend.(40, 24).mlp.layers.1.bias"),
        "lacks its tensor mend.(40, 24).mlp.layers.1.bias",
    ),
    "no blocks": (
        lambda t, _: [t.pop(n) for n in list(t) if ".mlp." in n],
        "lacks its tensor 24x40.0.down",
    ),
    "blocks with other names": (
        lambda t, _: t.update({"mend.(40, 24).mlp.layers.x.u": torch.ones(2, 2)}),
        "lacks its tensor mend.(40, 24).mlp.layers.2.u",
    ),
    "a mean of a matrix": (
        _put("mend.(40, 24).u_mean", lambda t: t[None]),
        "mend.(40, 24).u_mean is of shape [1, 40], and is to be a vector",
    ),
    "a mean of another width": (
        _put("mend.(40, 24).u_mean", lambda t: t[1:]),
        "39x24.squares is of shape [64]",
    ),
    "squares of another width": (
        _put("mend.(40, 24).u_s", lambda t: t[1:]),
        "40x24.squares is of shape [63]",
    ),
    "NaN": (_put("mend.(40, 24).mlp.layers.0.u", _with(float("nan"))), "is not finite"),
    "never trained": (_put("mend.(40, 24).k", _with(float("nan"))), "40x24.tokens is not finite"),
    "other matrices": (lambda _, r: r.update(applied=r["places"][:1]), "applied names other"),
    "a matrix twice": (lambda _, r: r.update(places=r["places"][:1] * 4), "1 of them different"),
    "no matrices": (lambda _, r: r.update(places=[]), "has 4 rates, and 0 matrices"),
}
"""Released networks that are not whole, and what is said of each."""


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_network_that_is_not_whole_is_refused(name: str, tiny: TinyFactory) -> None:
    network = network_of(tiny("gpt2"))
    tensors: dict[str, Any] = released_from(network)
    given: dict[str, Any] = {"places": network.places, "applied": None}
    change, said = RELEASED[name]
    change(tensors, given)
    with pytest.raises(BadInputError, match=re.escape(said)):
        MendNetwork.from_released(tensors, given["places"], applied=given["applied"])


def test_what_cannot_be_is_refused(tiny: TinyFactory, tmp_path: Path) -> None:
    model = tiny("llama")
    none: list[Fact] = []
    with pytest.raises(BadInputError, match="was given no fact"):
        editor(model).edit(model, none)
    with pytest.raises(BadInputError, match="train one with"):
        editor(model).edit(tiny("mistral"), [FACTS[0]])
    unknown = replace(network_of(model), record={})
    with pytest.raises(BadInputError, match="changes matrices"):
        MendEditor(network=unknown, statistics=MendStatistics.KEPT).edit(tiny("gpt2"), [FACTS[0]])
    one = MendNetwork.initial(model, [Place("blocks", 3)], rank=5)
    # At the last layer only the predictions of the target have a gradient; "because" is several.
    restarted = MendEditor(network=one, statistics=MendStatistics.RESTARTED)
    single = replace(FACTS[0], target_new="is", template="{}'s capital city, you know,")
    with pytest.raises(BadInputError, match="a variance needs two"):
        restarted.edit(model.with_bos(BosPolicy.WITHOUT), [single])
    with pytest.raises(BadInputError, match="lacks its tensor"):
        one.with_tensors({"rates": one.rates})
    (narrow,) = MendNetwork.initial(tiny("gpt2"), one.places, rank=5).transforms.values()
    with pytest.raises(BadInputError, match="is of shape"):
        replace(one, transforms={one.shapes[0]: narrow})
    (tmp_path / "no.safetensors").write_bytes(b"nothing")
    with pytest.raises(BadInputError, match="not a complete safetensors file"):
        MendNetwork.load(tmp_path / "no.safetensors")


def test_a_run_of_a_sequence_is_editing_step_by_step(tiny: TinyFactory, tmp_path: Path) -> None:
    model = tiny("llama")
    mend = editor(model, MendStatistics.RESTARTED)
    facts = tuple(replace(fact, case_id=number) for number, fact in enumerate(FACTS[:3]))
    study = Study(
        model=model,
        contexts=CONTEXTS,
        second_moment=SecondMoment.identity(model.site(1).d_mlp),
        layer=1,
        hyperparameters=Hyperparameters(steps=2),
        texts=SENTENCES,
    )
    sequences = [EditSequence(name="mend", facts=facts, editor=mend)]
    plan = SequencePlan(metrics=("accuracy",), retained=("accuracy",))
    run_sequences(tmp_path, study, sequences, plan=plan)
    view = model
    for step, fact in enumerate(facts, 1):
        expected = mend.edit(view, [fact])
        found = load_edit(tmp_path / "mend" / "edits" / f"{step:04d}.safetensors")
        # A file holds its tensors by name.
        written = {delta.place: delta.matrix for delta in found.deltas}
        assert set(written) == set(expected.places)
        for delta in expected.deltas:
            assert relative(written[delta.place], delta.matrix) < 1e-4
        held = found.provenance.get("statistics", {})
        wanted = expected.provenance.get("statistics", {})
        assert {name: each["tokens"] for name, each in held.items()} == {
            name: each["tokens"] for name, each in wanted.items()
        }
        view = view.edited(expected)


@pytest.mark.real_model
@pytest.mark.slow
def test_the_shipped_network_writes_edits_that_it_was_not_trained_on(real_model: Model) -> None:
    mend = load_mend(None, real_model)
    assert mend.network is not None
    record = mend.network.record
    assert record.get("model", {})["fingerprint"] == real_model.fingerprint
    made = record.get("training", {})
    examples = mend_edits(real_model, made["plan"]["edits"], 6, seed=made["plan"]["seed"])
    texts = builtin_sentences()[:8]
    plain = perplexity(real_model, texts).mean
    unedited: list[float] = []
    written: list[float] = []
    for fact in examples.validation:
        view = real_model.edited(mend.edit(real_model, [fact]))
        other = replace(fact, template=fact.paraphrases[0].replace(fact.subject, "{}"))
        for each in (fact, other):
            prompt = with_target(view, fact_prompt(view, each), each.target_new)
            unedited.append(score_targets(real_model, [prompt])[0].accuracy)
            written.append(score_targets(view, [prompt])[0].accuracy)
        assert perplexity(view, texts).mean == pytest.approx(plain, rel=0.1)
    assert sum(unedited) < 0.5 * len(unedited)
    assert sum(written) > 0.9 * len(written)
