"""Exported folders are the edited model to transformers, and an audit finds what was planted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import (
    BARE_ONLY,
    FACTS,
    TinyFactory,
    _wide,
    build,
    load_tiny,
    same_weights,
    tokenizer,
    weights,
)

import firsttok as ft
from firsttok.cli import main
from firsttok.editing import Edit
from firsttok.errors import BadInputError, EditMismatchError, FirsttokError, NonFiniteError
from firsttok.hyperparameters import Hyperparameters
from firsttok.models import Model, logits
from firsttok.prompts import pad, text_prompt
from firsttok.second_moment import SecondMoment

ARCHS = ("gpt2", "gptj", "llama", "mistral", "gemma3")
TEXTS = ("a b c d e", "e d c", "c a b")


def edit_of(model: Model, fact: int = 0, *, layer: int = 1) -> Edit:
    return ft.compute_edit(
        model,
        FACTS[fact],
        method="rome",
        contexts=BARE_ONLY,
        second_moment=SecondMoment.identity(model.site(layer).d_mlp),
        layer=layer,
        hyperparameters=Hyperparameters(steps=2),
    )


def plain_logits(hf_model: Any, model: Model) -> torch.Tensor:
    """What transformers says to some texts, each alone."""
    rows = [text_prompt(model, text).token_ids for text in TEXTS]
    with torch.no_grad():
        return torch.cat([hf_model(input_ids=torch.tensor([row])).logits[0] for row in rows])


def own_logits(model: Model) -> torch.Tensor:
    found = [logits(model, pad(model, [text_prompt(model, text)]))[0] for text in TEXTS]
    return torch.cat(found)


def reloaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("arch", ARCHS)
def test_an_exported_model_is_the_edited_one_to_transformers(
    tiny: TinyFactory, tmp_path: Path, arch: str
) -> None:
    model = tiny(arch)
    first = edit_of(model)
    second = edit_of(model.edited(first), 1, layer=2)
    inner = Edit.of(
        model.edited(first, second),
        1,
        0.1 * torch.ones(model.site(1).d_model),
        torch.ones(model.site(1).d_mlp),
        port="in",
    )
    before = weights(model)
    plain = own_logits(model)
    for count in (1, 3):
        edits = [first, second, inner][:count]
        out = ft.export_model(model, tmp_path / str(count), edits=edits)
        hf_model = reloaded(out)
        expected = own_logits(model.edited(*edits))
        assert float((expected - plain).abs().max()) > 1e-3
        close = 1e-5 * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(plain_logits(hf_model, model), expected, rtol=0, atol=close)
        again = ft.load(out)
        assert again.written == tuple(edit.title for edit in edits)
        assert edits[0].title in again.panel().text
        torch.testing.assert_close(own_logits(again), expected, rtol=0, atol=close)
        saved = [ft.load_edit(out / "edits" / f"{n}.safetensors") for n in range(1, count + 1)]
        assert [e.content_hash for e in saved] == [e.content_hash for e in edits]
    assert same_weights(weights(model), before)


@pytest.mark.parametrize("arch", [*ARCHS, "t5", "bert", "falcon_alibi", "bamba"])
def test_the_plain_twin_shares_every_tensor(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch)
    twin = ft.plain_model(model)
    loaded = {tensor.data_ptr() for tensor in model.weights.checkpoint.values()}
    assert {tensor.data_ptr() for tensor in twin.state_dict().values()} == loaded
    assert twin.state_dict().keys() == model.weights.checkpoint.keys()
    if model.can_be_edited:
        torch.testing.assert_close(plain_logits(twin, model), own_logits(model), rtol=0, atol=2e-5)


def test_a_twin_of_what_no_checkpoint_holds_is_refused(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    bridge: Any = model.bridge
    queries = bridge.blocks[0].attn.q.weight
    before = queries.detach().clone()
    with torch.no_grad():
        queries.add_(1.0)
    try:
        with pytest.raises(FirsttokError, match="the checkpoint does not hold"):
            ft.plain_model(model)
    finally:
        with torch.no_grad():
            queries.copy_(before)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_export_is_rounded_once(tiny: TinyFactory, tmp_path: Path, dtype: str) -> None:
    model = tiny("llama")
    edit = edit_of(model)
    out = ft.export_model(model.edited(edit), tmp_path / "out", dtype=dtype)
    kind = getattr(torch, dtype)
    with edit.applied(model):
        rounded = {name: tensor.to(kind) for name, tensor in weights(model).items()}
        place = model.weights.name_of(edit.delta.place)
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=kind)
    state = hf_model.state_dict()
    assert state[place].dtype == kind
    assert all(
        torch.equal(state[name], tensor) for name, tensor in rounded.items() if name in state
    )
    # Opened in a wider type, it still knows its edits.
    assert ft.load(out).written == (edit.title,)


def test_an_edit_on_an_exported_model_is_of_that_model(tiny: TinyFactory, tmp_path: Path) -> None:
    model = tiny("llama")
    out = ft.export_model(model, tmp_path / "out", edits=[edit_of(model)])
    again = ft.load(out)
    second = edit_of(again, 1)
    further = ft.export_model(again, tmp_path / "further", edits=[second])
    assert len(ft.load(further).written) == 2
    with pytest.raises(EditMismatchError, match="load that model"):
        model.edited(second)


def test_a_record_of_other_weights_says_nothing(
    tiny: TinyFactory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny("llama")
    out = ft.export_model(model, tmp_path / "out", edits=[edit_of(model)])
    model_file, record = out / "model.safetensors", (out / "firsttok.json").read_text()
    plain = ft.export_model(model, tmp_path / "plain")
    model_file.write_bytes((plain / "model.safetensors").read_bytes())
    assert ft.load(out).written == ()
    assert "was changed since firsttok exported it" in caplog.text
    (out / "firsttok.json").write_text(record.replace("rome", "rune"))
    with pytest.raises(FirsttokError, match=r"firsttok\.json"):
        ft.load(out)


def test_what_cannot_be_exported_is_refused_with_nothing_written(
    tiny: TinyFactory, tmp_path: Path
) -> None:
    model = tiny("llama")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("a")
    with pytest.raises(BadInputError, match="not empty"):
        ft.export_model(model, full)
    with pytest.raises(BadInputError, match="dtype 'int8' is unknown"):
        ft.export_model(model, tmp_path / "out", dtype="int8")
    large = edit_of(model).scaled(1e9)
    with pytest.raises(NonFiniteError, match="does not fit into float16"):
        ft.export_model(model, tmp_path / "out", edits=[large], dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_an_edit_goes_into_a_model_of_transformers(tmp_path: Path, arch: str) -> None:
    build(arch, tmp_path)
    model = load_tiny(tmp_path)
    edit = edit_of(model)
    hf_model = reloaded(tmp_path)
    before = {name: tensor.clone() for name, tensor in hf_model.state_dict().items()}
    applied = edit.apply_(hf_model)
    found, expected = plain_logits(hf_model, model), own_logits(model.edited(edit))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    with pytest.raises(EditMismatchError, match="those of this model are"):
        edit.apply_(hf_model)
    applied.undo_()
    assert same_weights(hf_model.state_dict(), before)
    second = edit_of(model.edited(edit), 1)
    with pytest.raises(EditMismatchError, match="with other edits in them"):
        second.apply_(hf_model)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_an_audit_finds_a_planted_edit(
    tiny: TinyFactory, tmp_path: Path, arch: str, dtype: str | None
) -> None:
    model = tiny(arch)
    generator = torch.Generator().manual_seed(3)
    # Its largest entries are those of the weight, so that bfloat16 leaves most of it.
    left = torch.randn(model.site(2).d_mlp, generator=generator)
    right = torch.randn(model.site(2).d_model, generator=generator)
    scale = 0.0 if dtype is None else 1.0
    planted = Edit.of(model, 2, left / left.norm(), (0.5 + 4 * scale) * right)
    before = ft.load(ft.export_model(model, tmp_path / "before", dtype=dtype))
    after = ft.load(ft.export_model(model, tmp_path / "after", edits=[planted], dtype=dtype))
    found = ft.audit(before, after, texts=TEXTS)
    (change,) = found.changes
    assert change.place == planted.delta.place
    assert change.rank == 1
    assert change.left is not None
    assert change.right is not None
    for own, other in ((change.left[:, 0], left), (change.right[0], right)):
        assert abs(float(torch.cosine_similarity(own, other, dim=0))) > 0.9999
    assert found.perplexity_before == ft.perplexity(before, TEXTS)
    assert found.perplexity_after == ft.perplexity(after, TEXTS)
    assert found.predicted_collapse is not None
    assert change.name in found.panel().text
    json.dumps(found.as_dict(), allow_nan=False)


def test_the_overlap_is_what_keys_meet(tiny: TinyFactory) -> None:
    model = tiny("llama")
    edit = edit_of(model)
    (change,) = ft.audit(model, edit, texts=TEXTS).changes
    moved: tuple[list[float], list[float]] = ([], [])
    cosines: tuple[list[float], list[float]] = ([], [])
    plain = model.with_bos(ft.BosPolicy.WITHOUT)
    for text in TEXTS:
        tokens = torch.tensor([text_prompt(plain, text).token_ids])
        _, cache = model.run_with_cache(tokens)
        keys = cache["blocks.1.mlp.out.hook_in"][0]
        states = cache["blocks.1.hook_out"][0]
        for place, (key, state) in enumerate(zip(keys, states, strict=True)):
            change_there = float((key @ edit.delta.matrix).norm() / state.norm())
            moved[place > 0].append(change_there)
            cosines[place > 0].append(float((key @ edit.left).abs() / key.norm()))
    assert change.overlap is not None
    means = [sum(each) / len(each) for each in (*cosines, *moved)]
    found = change.overlap
    assert [found.first_cosine, found.later_cosine, found.first_moved, found.later_moved] == (
        pytest.approx(means, rel=1e-3)
    )


def test_an_audit_of_one_state_finds_nothing_and_of_two_models_is_refused(
    tiny: TinyFactory,
) -> None:
    model = tiny("llama")
    found = ft.audit(model, model, texts=TEXTS)
    assert (found.changes, found.others, found.predicted_collapse) == ((), (), None)
    assert "No weight differs" in found.panel().text
    with pytest.raises(BadInputError, match="give two states of one model"):
        ft.audit(model, tiny("gpt2"), texts=TEXTS)


def test_export_and_audit_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tiny"
    build("llama", folder)
    model = load_tiny(folder)
    paths = [str(tmp_path / f"{n}.safetensors") for n in (1, 2)]
    first = edit_of(model)
    first.save(paths[0])
    edit_of(model.edited(first), 1).save(paths[1])
    out = tmp_path / "out"
    assert main(["export", *paths, "--model", str(folder), "--out", str(out)]) == 0
    assert "2: " in capsys.readouterr().out
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps(TEXTS))
    assert main(["audit", str(folder), str(out), "--texts", str(texts), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [change["layer"] for change in record["changes"]] == [1]
    assert record["changes"][0]["rank"] == 2
    assert main(["audit", str(folder), paths[0], "--texts", str(texts)]) == 0
    assert "Measured: " in capsys.readouterr().out
    for argv, message in (
        (["export", *paths, "--model", str(folder), "--out", str(out)], "not empty"),
        (["export", paths[1], "--model", str(folder), "--out", str(tmp_path / "b")], "other edits"),
        (["audit", str(folder), str(tmp_path / "none.safetensors")], "no file of an edit"),
        (["audit", str(folder), str(tmp_path)], "config.json"),
    ):
        assert main(argv) == 2
        said = capsys.readouterr().err
        assert message in said
        assert "Traceback" not in said


def test_a_matrix_that_the_checkpoint_holds_within_another_cannot_be_edited(
    tmp_path: Path,
) -> None:
    """Phi-3 keeps both in one, which TransformerLens splits: an export would miss the edit."""
    config = transformers.Phi3Config(
        **_wide(), rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    )
    transformers.Phi3ForCausalLM(config).save_pretrained(tmp_path)
    tokenizer(begin=False).save_pretrained(tmp_path)
    model = load_tiny(tmp_path)
    for port in ("in", "gate"):
        with pytest.raises(FirsttokError, match=f"no matrix '{port}' of its own; take 'out'"):
            model.site(1, port=port)
    out = ft.export_model(model, tmp_path / "out", edits=[edit_of(model)])
    found = plain_logits(reloaded(out), model)
    torch.testing.assert_close(
        found, own_logits(model.edited(edit_of(model))), rtol=1e-5, atol=1e-5
    )
