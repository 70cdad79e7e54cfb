"""Whether a model has the first-token anomaly, in which layers, and after which BOS."""

from collections.abc import Sequence
from dataclasses import dataclass

from firsttok.data import builtin_facts, builtin_sentences
from firsttok.display import Note, Panel, Part, Shown
from firsttok.errors import BadInputError, UnsupportedModelError
from firsttok.models import BosPolicy, Model
from firsttok.probes import LayerConcentration, concentration
from firsttok.prompts import Prompt, text_prompt
from firsttok.svg import Plot

__all__ = [
    "CONCENTRATED",
    "MASSIVE",
    "RULE",
    "FirstTokens",
    "first_token_prompts",
    "is_anomalous",
    "is_massive",
    "measure_first_tokens",
    "ranges",
]

CONCENTRATED = 0.5
"""First tokens are an anomaly where D(F) is below this share of D(S)."""
MASSIVE = 10.0
"""A residual stream is massive where it is at least so many times as long as that of others."""
RULE = (
    f"a layer has the anomaly where the 95 % interval of D(F) lies wholly below {CONCENTRATED:g} "
    f"times that of D(S); its residual stream is massive where the first tokens' mean norm is at "
    f"least {MASSIVE:g} times the others'"
)
PROMPTS = 64
"""Most prompts that are read; no two begin with the same token."""


@dataclass(frozen=True, kw_only=True, repr=False)
class FirstTokens(Shown):
    """First tokens against later ones under one BOS policy, layer by layer."""

    what: str
    """Which token is meant, in a few words."""
    bos: str
    """The BOS policy of the prompts."""
    place: int
    layers: tuple[LayerConcentration, ...]
    """The measurements, from layer 0 up; empty if they could not be made."""
    reason: str | None = None
    """Why they could not be made."""

    @property
    def anomalous(self) -> tuple[int, ...]:
        """Layers with the anomaly."""
        return tuple(row.layer for row in self.layers if is_anomalous(row))

    @property
    def massive(self) -> tuple[int, ...]:
        """Layers after which the residual stream of the first token is massive."""
        return tuple(row.layer for row in self.layers if is_massive(row))

    @property
    def is_one_token(self) -> bool:
        """Whether it is the same token in all prompts (BOS), so that D(F) is 0 by itself."""
        return any(row.distinct_first == 1 for row in self.layers)

    def verdict(self, layer: int) -> str:
        """A sentence on where the anomaly is, and on one layer in numbers."""
        head = self.what[0].upper() + self.what[1:]
        if self.reason is not None:
            return f"{head}: not measured, {self.reason}"
        row = self.layers[layer]
        times = row.residual_first / max(row.residual_subsequent, 1e-300)
        massive = (
            f"massive behind layers {ranges(self.massive)}" if self.massive else "nowhere massive"
        )
        norms = f"residual stream {times:.3g} times the others' at layer {layer}, {massive}"
        if self.is_one_token:
            return f"{head}: one token, so that D(F) says nothing; {norms}"
        where = (
            f"the anomaly at layers {ranges(self.anomalous)}" if self.anomalous else "no anomaly"
        )
        return (
            f"{head}: {where}; at layer {layer} D(F) is {row.d_first:.3g} and D(S) "
            f"{row.d_subsequent:.3g}, {norms}"
        )

    def panel(self) -> Panel:
        """Both quantities by layer."""
        parts: list[Part] = [Note(text=self.reason)] if self.reason else []
        for title, column in (("D of Equation 4, keys", "d"), ("residual stream", "residual")):
            series = {
                name: [getattr(row, f"{column}_{field}") for row in self.layers]
                for name, field in (("first tokens", "first"), ("later tokens", "subsequent"))
            }
            if self.layers:
                parts.append(
                    Plot(title=title, series=series, x_label="layer", y_label=title, log=True)
                )
        return Panel(title=self.what, parts=parts, source={"BOS": self.bos, "position": self.place})


def is_anomalous(row: LayerConcentration) -> bool:
    """Whether first tokens' keys are concentrated: the paper's anomaly (Equation 4, Figure 8).

    One and the same token everywhere is concentrated without being an anomaly.
    """
    return row.distinct_first > 1 and row.d_first_high < CONCENTRATED * row.d_subsequent_low


def is_massive(row: LayerConcentration) -> bool:
    """Whether the first tokens' residual stream is many times as long as that of later ones."""
    return row.residual_first >= MASSIVE * row.residual_subsequent


def measure_first_tokens(model: Model, *, seed: int = 0) -> tuple[FirstTokens, ...]:
    """Measure the first token under the model's BOS policy, the BOS itself, and a text without.

    Returns:
        The first token of the text under the model's policy, always first; if that puts a BOS
        before it, then the BOS, and the first token of a text without one.
    """
    leading = len(model.leading_ids)
    if not leading:
        return (_measure(model, 0, "the very first token", seed),)
    return (
        _measure(model, leading, "the first token behind BOS", seed),
        _measure(model, 0, "BOS itself", seed),
        _measure(model.with_bos(BosPolicy.WITHOUT), 0, "the very first token, without BOS", seed),
    )


def first_token_prompts(model: Model, *, most: int = PROMPTS) -> tuple[Prompt, ...]:
    """Prompts of the built-in facts and sentences, no two of which begin with the same token.

    A repeated first token has the same key each time, which would pass for concentration.
    """
    chosen: dict[int, Prompt] = {}
    place = len(model.leading_ids)
    for text in (*(fact.prompt for fact in builtin_facts()), *builtin_sentences()):
        prompt = text_prompt(model, text)
        # One token must follow, and no text may be too long for the model.
        if place + 1 < len(prompt.token_ids) <= model.max_tokens:
            chosen.setdefault(prompt.token_ids[place], prompt)
        if len(chosen) == most:
            break
    return tuple(chosen.values())


def ranges(layers: Sequence[int]) -> str:
    """``4-6, 9`` for 4, 5, 6 and 9."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _measure(model: Model, place: int, what: str, seed: int) -> FirstTokens:
    layers: tuple[LayerConcentration, ...] = ()
    reason: str | None = None
    try:
        layers = concentration(model, first_token_prompts(model), place=place, seed=seed)
    except (BadInputError, UnsupportedModelError) as error:
        # Some models show no attention pattern; the rest of them can be looked at.
        reason = str(error)
    return FirstTokens(what=what, bos=model.bos.value, place=place, layers=layers, reason=reason)
