"""A folder is one model, all of it and nothing left out, or it is refused and the reason named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import build

from firsttok.errors import FirsttokError, UnknownModelError
from firsttok.models import load
from firsttok.models.libraries import quiet_libraries

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Change = Callable[[Path], Any]
Tensors = dict[str, torch.Tensor]
NORM = "model.norm.weight"
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {arch: tmp_path_factory.mktemp(arch) for arch in ("llama", "gptj", "gpt2", "bert")}
    for arch, folder in folders.items():
        build(arch, folder)
    return folders


def weights(change: Callable[[Tensors], Any]) -> Change:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file({k: v.clone() for k, v in tensors.items()}, folder / WEIGHTS, {"format": "pt"})

    return apply


def config(**changes: Any) -> Change:
    def apply(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text("utf-8"))
        (folder / "config.json").write_text(json.dumps(content | changes), "utf-8")

    return apply


def sharded(change: Change = lambda _: None) -> Change:
    def apply(folder: Path) -> None:
        with quiet_libraries():
            model: Any = transformers.LlamaForCausalLM.from_pretrained(folder)
            (folder / WEIGHTS).unlink()
            model.save_pretrained(folder, max_shard_size="30KB")
        change(folder)

    return apply


def index(**changes: Any) -> Change:
    def apply(folder: Path) -> None:
        content = json.loads((folder / INDEX).read_text("utf-8"))
        (folder / INDEX).write_text(json.dumps(content | changes), "utf-8")

    return apply


def write(name: str, content: str = "{}") -> Change:
    return lambda folder: (folder / name).write_text(content, "utf-8")


def remove(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def only(name: str) -> Change:
    def apply(folder: Path) -> None:
        for path in folder.iterdir():
            path.unlink()
        (folder / name).write_text("{}", "utf-8")

    return apply


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def rename_weight(tensors: Tensors) -> None:
    tensors[UP.replace("up_proj", "up_projx")] = tensors.pop(UP)


REFUSED: dict[str, tuple[Change, str]] = {
    "a weight lacking": (weights(lambda t: t.pop(NORM)), f"lacks the weight {NORM}, which would"),
    "a layer lacking": (
        weights(lambda t: [t.pop(name) for name in list(t) if "layers.3" in name]),
        "lacks the weight model.layers.3.input_layernorm.weight and 8 more",
    ),
    "one letter of a name": (weights(rename_weight), f"lacks the weight {UP}"),
    "the head lacking": (config(tie_word_embeddings=False), "lacks the weight lm_head.weight"),
    "a layer more than the configuration has": (
        config(num_hidden_layers=3),
        "holds the weight model.layers.3.input_layernorm.weight and 8 more",
    ),
    "a bias that the model has not": (
        weights(lambda t: t.update({"model.layers.0.mlp.up_proj.bias": t[NORM]})),
        "holds the weight model.layers.0.mlp.up_proj.bias",
    ),
    "another shape": (
        weights(lambda t: t.update({NORM: t[NORM][:8]})),
        f"another shape at the weight {NORM} ([8] where the configuration wants [32])",
    ),
    "another architecture": (config(model_type="gpt2"), "lacks the weight"),
    "no weights": (remove(WEIGHTS), f"holds no weights ({WEIGHTS})"),
    "cut weights": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-50]),
        "not a complete safetensors file",
    ),
    "a shard lacking": (
        sharded(remove("model-00001-of-00006.safetensors")),
        f"lacks the file model-00001-of-00006.safetensors that {INDEX} names",
    ),
    "shards without an index": (sharded(remove(INDEX)), "holds no weights"),
    "an index that names one file": (
        sharded(index(weight_map={NORM: "model-00006-of-00006.safetensors"})),
        "lacks the weight",
    ),
    "an index that names another folder's": (
        sharded(index(weight_map={NORM: f"../{WEIGHTS}"})),
        "is not an index of the weights in its folder",
    ),
    "a weight in two shards": (
        sharded(
            lambda folder: save_file(
                load_file(folder / "model-00006-of-00006.safetensors")
                | {NORM: torch.zeros(32), UP: torch.zeros(48, 32)},
                folder / "model-00006-of-00006.safetensors",
                {"format": "pt"},
            )
        ),
        f"holds the weight {UP} twice, in model-0000",
    ),
    "a shard that is none": (
        sharded(write("model-00002-of-00006.safetensors")),
        "not a complete safetensors file",
    ),
    "an empty index": (sharded(index(weight_map={})), "is not an index of the weights"),
    "an odd index": (sharded(write(INDEX, "[]")), "is not an index of the weights"),
    "an index that is no JSON": (sharded(write(INDEX, "{")), "is not valid JSON"),
    "weights twice": (
        lambda folder: (
            shutil.copy(folder / WEIGHTS, folder / "copy"),
            sharded()(folder),
            (folder / "copy").rename(folder / WEIGHTS),
        ),
        "holds its weights twice",
    ),
    "an adapter's configuration": (write("adapter_config.json"), "holds an adapter"),
    "an adapter's weights": (write("adapter_model.safetensors"), "holds an adapter"),
    "nothing but an adapter": (only("adapter_config.json"), "holds an adapter"),
    "pickled weights": (
        lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"),
        "holds pickled weights (pytorch_model.bin)",
    ),
    "GGUF alone": (only("q4.gguf"), "holds GGUF weights (q4.gguf)"),
    "GGUF with a configuration": (
        both(remove(WEIGHTS), write("q4.gguf")),
        "holds GGUF weights (q4.gguf)",
    ),
    "quantised": (
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "are quantised (gptq)",
    ),
    "quantised, without a method": (
        config(quantization_config={"load_in_8bit": True}),
        "are quantised (unknown method)",
    ),
    "quantised, oddly": (config(quantization_config="x"), "cannot be loaded as a model"),
    "no tokenizer": (
        remove("tokenizer.json"),
        "(the folder holds no tokenizer.json); save it there again, with save_pretrained",
    ),
    "odd tokenizer": (write("tokenizer.json"), "cannot be loaded (no entry 'added_tokens')"),
    "half a tokenizer": (write("tokenizer.json", "{"), "the tokenizer of"),
    "odd tokenizer configuration": (write("tokenizer_config.json", "[]"), "the tokenizer of"),
    "no configuration": (remove("config.json"), "holds no config.json"),
    "half a configuration": (write("config.json", "{"), "is not a valid JSON file"),
    "empty configuration": (write("config.json"), "Should have a `model_type` key"),
    "deep configuration": (write("config.json", "[" * 100_000), "cannot be loaded as a model"),
    "a text for a number": (config(hidden_size="x"), "expected int, got str"),
    "no heads": (config(num_attention_heads=0), "cannot be loaded as a model"),
    "odd numbers": (config(num_attention_heads=3), "is not a multiple of the number"),
    "odd generation": (write("generation_config.json", "[1]"), "cannot be loaded as a model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_one_whole_model_is_refused_and_named(
    name: str, whole: dict[str, Path], tmp_path: Path
) -> None:
    change, sentence = REFUSED[name]
    folder = tmp_path / "model"
    shutil.copytree(whole["llama"], folder)
    change(folder)
    with pytest.raises(FirsttokError) as raised:
        load(str(folder))
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)
    assert str(raised.value).rstrip().count("; ") >= 1


def old_masks(tensors: Tensors) -> None:
    for layer in range(4):
        tensors[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
        tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e9)


def old_names(tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("transformer.")] = tensors.pop(name)
    old = {f"h.{layer}.attn.bias": torch.ones(1, 1, 8, 8).tril() for layer in range(4)}
    tensors.update(old)


def pretraining_heads(tensors: Tensors) -> None:
    tensors["bert.pooler.dense.weight"] = torch.ones(24, 24)
    tensors["cls.seq_relationship.bias"] = torch.ones(2)
    tensors["bert.embeddings.position_ids"] = torch.arange(160)[None]


TAKEN: dict[str, tuple[str, Change]] = {
    "tied head": ("llama", lambda _: None),
    "tied head, written out": (
        "llama",
        weights(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]})),
    ),
    "shards": ("llama", sharded()),
    "rotary frequencies of old": (
        "llama",
        weights(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": t[NORM][:4]})),
    ),
    "a reward's head": ("llama", weights(lambda t: t.update({"score.weight": t[NORM][None]}))),
    "masks of old": ("gptj", weights(old_masks)),
    "names of old": ("gpt2", weights(old_names)),
    "heads of pretraining": ("bert", weights(pretraining_heads)),
    "no architecture": ("llama", config(architectures=None)),
    "another class of the same model": ("llama", config(architectures=["LlamaModel"])),
    "another model's class": ("llama", config(architectures=["GPT2LMHeadModel"])),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_changes_no_number_is_taken(name: str, whole: dict[str, Path], tmp_path: Path) -> None:
    arch, change = TAKEN[name]
    folder = tmp_path / "model"
    shutil.copytree(whole[arch], folder)
    change(folder)
    tokens = torch.tensor([[5, 6, 7, 8]])
    models: list[Any] = [load(str(path)).bridge for path in (whole[arch], folder)]
    with torch.no_grad():
        expected, found = (
            model(tokens, attention_mask=torch.ones_like(tokens)) for model in models
        )
    assert torch.equal(found, expected)


def test_a_folder_named_like_the_hub_s_model_is_not_taken_for_it(
    whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    commit = "0" * 40
    for hub_id, names in (
        ("openai-community/gpt2-xl", ("gpt2-xl", f"openai-community/gpt2-xl@{commit}")),
        ("lab/tiny", (f"lab/tiny@{commit}",)),
    ):
        shutil.copytree(whole["llama"], tmp_path / hub_id)
        for name in names:
            with pytest.raises(UnknownModelError, match=f"give ./{hub_id} to load the folder"):
                load(name)
        assert load(f"./{hub_id}").source == Path(hub_id).name
