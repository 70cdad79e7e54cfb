"""Inspect tiny random models of many architectures, and the two real ones; figures/inspect/.

Every tiny model is made from a seed, so that each output can be made again. Their weights are
random: they show that an architecture is supported, and nothing about any trained model.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from random_models import VOCABULARY, Size, random_folder
from tokenizers import processors

from firsttok.console import exit_on_error
from firsttok.models import is_pulled
from firsttok.storage import atomic_path, read_json

OUT = Path("figures/inspect")
MODELS = OUT / ".work"
"""Where the tiny models lie, relative to the checkout as their configurations name them."""
REAL = ("smollm2-135m", "gemma3-270m")
_LAYERS = 4
_WIDE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_GROUPED: dict[str, Any] = _WIDE | {"num_key_value_heads": 2}
_GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_positions": 512,
    "n_embd": 64,
    "n_layer": _LAYERS,
    "n_head": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


_INTRODUCTION = """\
# What `firsttok inspect` says

`make inspect` writes this folder: ten architectures with random weights, each made from a seed, and
the two models of the package index (those that were pulled). One of them again:
`.venv/bin/python benchmarks/onboarding.py --only llama`, or, for any model at all,
`firsttok inspect MODEL --out DIR`. The rules are written out in each JSON file.

""".splitlines()
_READING = """
*Site error* is the largest relative difference between `key @ W + b` and what the MLP put out, over
all layers, on real text. *Replay* is what has to run again to measure an edit: the blocks `above`
it, those `from` it on, or the `whole` model. The anomaly is that of the text's first token, after
BOS where the tokenizer puts one; BOS itself is one token in all texts, so that of it only a massive
residual stream is told. Random weights are no language model: they show that an architecture can be
edited, and a prediction on them means nothing, as the tool says, too.
""".splitlines()


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """A tiny model."""

    config: Callable[[], Any]
    """Its configuration."""
    begins: bool = False
    """Whether its tokenizer puts a BOS before every text."""


TINY = {
    "gpt2": Tiny(config=lambda: transformers.GPT2Config(**_GPT)),
    "gptj": Tiny(config=lambda: transformers.GPTJConfig(**_GPT, rotary_dim=8)),
    "gpt-neox": Tiny(config=lambda: transformers.GPTNeoXConfig(**_WIDE)),
    "opt": Tiny(
        config=lambda: transformers.OPTConfig(
            **{k: v for k, v in _WIDE.items() if k != "intermediate_size"},
            ffn_dim=96,
            word_embed_proj_dim=64,
        ),
        begins=True,
    ),
    "phi": Tiny(config=lambda: transformers.PhiConfig(**_WIDE)),
    "llama": Tiny(config=lambda: transformers.LlamaConfig(**_GROUPED), begins=True),
    "mistral": Tiny(
        config=lambda: transformers.MistralConfig(**_GROUPED, sliding_window=64), begins=True
    ),
    "qwen3": Tiny(config=lambda: transformers.Qwen3Config(**_GROUPED, head_dim=16)),
    "gemma3": Tiny(
        config=lambda: transformers.Gemma3TextConfig(**_GROUPED, head_dim=16, sliding_window=64),
        begins=True,
    ),
    "falcon": Tiny(
        config=lambda: transformers.FalconConfig(
            **{k: v for k, v in _WIDE.items() if k != "intermediate_size"}
        )
    ),
}
REFUSED = {
    "bloom": Tiny(
        config=lambda: transformers.BloomConfig(
            vocab_size=VOCABULARY, hidden_size=64, n_layer=_LAYERS, n_head=4
        )
    ),
    "mixtral": Tiny(config=lambda: transformers.MixtralConfig(**_GROUPED, num_local_experts=4)),
    "mamba": Tiny(
        config=lambda: transformers.MambaConfig(
            vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=_LAYERS
        )
    ),
}
"""Architectures that cannot be edited, for the sentence that says so."""


def folder_of(name: str, tiny: Tiny) -> Path:
    """The folder of a tiny model, written unless it is there."""
    MODELS.mkdir(parents=True, exist_ok=True)
    size = Size(name=f"tiny-{name}", config=tiny.config, layer=_LAYERS // 2)
    is_new = not (MODELS / size.name).is_dir()
    folder = random_folder(size, MODELS)
    if tiny.begins and is_new:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
        tokenizer.save_pretrained(folder)
    return folder


def inspect(model: str, *options: str) -> str:
    """Run the command; its standard error if it refuses the model, else nothing."""
    command = [sys.executable, "-m", "firsttok", "inspect", model, "--out", str(OUT), *options]
    done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
    if done.returncode not in (0, 2):
        raise SystemExit(done.stderr)
    last = done.stderr.strip().splitlines()[-1] if done.returncode else ""
    return last.removeprefix("firsttok: ")


def line_of(path: Path) -> str:
    """A model's line of the table."""
    record: Any = read_json(path, "an inspection")
    shape, found = record["architecture"], record["forecast"]
    own, *others = record["first_tokens"]
    layers = own["anomalous"]
    anomaly = f"{len(layers)} of {shape['layers']} layers" if layers else "none"
    massive = [
        layer for view in others if view["what"] == "BOS itself" for layer in view["massive"]
    ]
    if massive:
        anomaly += f"; BOS massive in {len(massive)}"
    worst = max(site["error"] for site in record["sites"])
    rome = f"{found['predicted']} of {len(found['facts'])} predicted"
    if found["edited"]:
        rome += f", {found['collapsed']} in fact"
    if found["doubt"]:
        rome = f"says nothing: perplexity {found['original_perplexity']:,.0f} unedited"
    bos = " ".join(record["bos"]["by_itself"]) or "none"
    cells = [
        f"[{path.stem}]({path.name})",
        shape["name"],
        shape["layers"],
        f"{worst:.0e}" if worst else "0",
    ]
    cells += [record["replay"], f"`{bos}`" if bos != "none" else bos, anomaly, rome]
    return "| " + " | ".join(str(cell) for cell in [*cells, f"[toml]({path.stem}.toml)"]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these models")
    only = parser.parse_args().only
    known = [*TINY, *REAL, *REFUSED]
    for name in only or ():
        if name not in known:
            parser.error(f"no model {name}; choose from {', '.join(known)}")
    refusals: dict[str, str] = {}
    for name, tiny in TINY.items():
        if not only or name in only:
            refusals[name] = inspect(str(folder_of(name, tiny)))
    for name, tiny in REFUSED.items():
        refusals[name] = inspect(str(folder_of(name, tiny)))
    for name in REAL:
        if (not only or name in only) and is_pulled(name):
            refusals[name] = inspect(name, "--edit")
    write_page({name: text for name, text in refusals.items() if text})


def write_page(refusals: dict[str, str]) -> None:
    """The table of all that was inspected, and what was said to the others."""
    names = [*REAL, *(f"tiny-{name}" for name in TINY)]
    paths = [OUT / f"{name}.json" for name in names]
    lines = [line_of(path) for path in paths if path.is_file()]
    head = ["model", "architecture", "layers", "site error", "replay", "BOS by itself"]
    head += ["first-token anomaly", "ROME on a dozen facts", "configuration"]
    text = [
        *_INTRODUCTION,
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *lines,
        *_READING,
        "",
        "## Refused",
        "",
        *(f"- **{name}**: {text}" for name, text in refusals.items()),
    ]
    with atomic_path(OUT / "README.md") as temporary:
        temporary.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(exit_on_error(main))
