"""Probes of one fact by name, each one call; and the same for probes of your own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from firsttok.arguments import taken
from firsttok.contexts import ContextSet
from firsttok.data import Fact
from firsttok.display import Note, Panel, Part, Shown, Table
from firsttok.errors import BadInputError
from firsttok.exploration import prepare_study
from firsttok.keys import (
    ORDINARY_KEYS,
    FactKeys,
    IntervenedKeys,
    KeySource,
    capture_keys,
    fact_keys,
)
from firsttok.models import BosPolicy, Model, capture
from firsttok.probes import (
    FIRST2SECOND,
    IDENTITY_CELLS,
    SECOND2FIRST,
    MaskedKeys,
    concentration,
    corruption_for,
    trace_fact,
)
from firsttok.prompts import fact_prompt, pad, text_prompt
from firsttok.study import Study
from firsttok.svg import Plot
from firsttok.tensors import Intervention
from firsttok.token_strips import tokens

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "PROBES",
    "BosKeys",
    "ConcentrationProbe",
    "KeyProbe",
    "Probe",
    "ProbeResult",
    "TracingProbe",
    "probe",
]

_SENTENCES = 20


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ProbeResult(Shown):
    """What a probe found on one fact."""

    name: str
    question: str
    rows: tuple[Mapping[str, Any], ...]
    """What it measured, one record per line; the first column names the line."""
    plots: tuple[Plot, ...] = ()
    origin: Mapping[str, Any]
    """Fact, model and settings, in short."""

    def frame(self) -> "pd.DataFrame":
        """The rows as a data frame."""
        import pandas as pd

        return pd.DataFrame([dict(row) for row in self.rows])

    def panel(self) -> Panel:
        """Question, table and pictures; pictures alone where a table would be long."""
        columns = list(self.rows[0]) if self.rows else []
        table = Table(columns=columns, lines=[[row[name] for name in columns] for row in self.rows])
        parts: list[Part] = [Note(text=self.question)]
        if len(self.rows) <= _SENTENCES or not self.plots:
            parts.append(table)
        return Panel(title=f"probe: {self.name}", parts=[*parts, *self.plots], source=self.origin)


@runtime_checkable
class Probe(Protocol):
    """A question about one fact; give one of your own to :func:`probe`."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    @property
    def question(self) -> str:
        """What it asks, in a sentence."""
        ...

    def measure(self, study: Study, fact: Fact) -> ProbeResult:
        """Answer it; the model is left as it is."""
        ...


@dataclass(frozen=True, kw_only=True)
class BosKeys:
    """Both keys read after a BOS token, or without the one that the tokenizer puts."""

    policy: BosPolicy

    @property
    def name(self) -> str:
        """Name in tables and provenance."""
        return f"BOS: {self.policy.value}"

    def keys(self, model: Model, fact: Fact, contexts: ContextSet, *, layer: int) -> FactKeys:
        """Return the keys under the policy."""
        return fact_keys(model.with_bos(self.policy), fact, contexts, layer=layer)


@dataclass(frozen=True, kw_only=True)
class KeyProbe:
    """Compares ROME's denominator, and the keys in it, between sources of the two keys.

    No value is optimised: the denominator ``u . k^u``, with u along ``C^-1 k_bar``, is there
    without any edit, and where it nearly vanishes the update explodes (Section 3.1).
    """

    name: str
    question: str
    sources: tuple[KeySource, ...]
    """Where the keys come from, line by line; each can be given to ``ft.what_if``, too."""

    def measure(self, study: Study, fact: Fact) -> ProbeResult:
        """Read the keys of every source.

        Raises:
            FirsttokError: If a source does not suit the fact or the model.
        """
        usual = capture_keys(study.model, fact, layers=[study.layer]).at(study.layer)[0]
        rows: list[dict[str, Any]] = []
        for source in self.sources:
            keys = source.keys(study.model, fact, study.contexts, layer=study.layer)
            left = study.second_moment.solve(keys.prefixed_mean)
            cosine = torch.nn.functional.cosine_similarity(
                keys.unprefixed.double(), usual.double(), dim=0
            )
            idle = isinstance(source, IntervenedKeys) and source.is_idle(
                study.model, fact, study.contexts
            )
            rows.append(
                {
                    "k^u from": f"{source.name} (changes nothing here)" if idle else source.name,
                    "norm of k^u": float(keys.unprefixed.double().norm()),
                    "cosine with the usual k^u": float(cosine),
                    "cosine with k_bar": keys.cosine,
                    "denominator": float((left / left.norm()) @ keys.unprefixed),
                }
            )
        return ProbeResult(
            name=self.name, question=self.question, rows=tuple(rows), origin=_origin(study, fact)
        )


@dataclass(frozen=True, kw_only=True)
class ConcentrationProbe:
    """Equation 4 by layer on the study's sentences, with the fact's looked-up token beside it."""

    sentences: int = _SENTENCES
    """How many of the study's sentences are read."""
    name: str = "concentration"
    question: str = (
        "How tightly do the keys of first tokens lie together, layer by layer, and does the "
        "looked-up token carry their residual stream?"
    )

    def measure(self, study: Study, fact: Fact) -> ProbeResult:
        """Read all layers in one pass."""
        model = study.model
        prompts = [text_prompt(model, text) for text in study.texts[: self.sentences]]
        found = concentration(model, prompts)
        own = _residual_norms(model, fact)
        rows = [
            {
                "layer": row.layer,
                "D(F)": row.d_first,
                "D(S)": row.d_subsequent,
                "residual norm, first tokens": row.residual_first,
                "residual norm, others": row.residual_subsequent,
                "residual norm, looked-up token": own[row.layer],
            }
            for row in found
        ]
        layers = [row.layer for row in found]

        def plot(title: str, *names: str) -> Plot:
            series = {name: [float(row[name]) for row in rows] for name in names}
            return Plot(title=title, series=series, x=layers, x_label="layer", y_label="", log=True)

        return ProbeResult(
            name=self.name,
            question=self.question,
            rows=tuple(rows),
            plots=(
                plot("mean distance of keys to their centroid", "D(F)", "D(S)"),
                plot("norm of the residual stream", *list(rows[0])[3:]),
            ),
            origin=_origin(study, fact) | {"first tokens of": f"{len(prompts)} sentences"},
        )


@dataclass(frozen=True, kw_only=True)
class TracingProbe:
    """Causal tracing of the fact at its subject's last token (Meng et al. 2022, Section 2)."""

    samples: int = 3
    """Draws of the noise; ten in the paper."""
    name: str = "tracing"
    question: str = (
        "Which states at the subject's last token bring the answer back once noise has taken it?"
    )

    def measure(self, study: Study, fact: Fact) -> ProbeResult:
        """Restore every state in turn; this takes a minute or more."""
        model = study.model
        corruption = corruption_for(model, [fact], samples=self.samples)
        trace = trace_fact(model, fact, corruption)
        place = trace.positions.index(fact_prompt(model, fact).subject_position or 0)
        effects = {k: trace.indirect_effects(k)[:, place].tolist() for k in trace.restored}
        rows = [
            {"layer": layer, **{kind: values[layer] for kind, values in effects.items()}}
            for layer in range(model.n_layers)
        ]
        plot = Plot(
            title=f"indirect effect (of {trace.total_effect:.3f} that noise takes)",
            series=effects,
            x_label="layer",
            y_label="probability",
        )
        return ProbeResult(
            name=self.name,
            question=self.question,
            rows=tuple(rows),
            plots=(plot,),
            origin=_origin(study, fact) | {"noise": f"{corruption.scale:g}, {self.samples} draws"},
        )


def _keys_under(change: Intervention) -> IntervenedKeys:
    return IntervenedKeys(name=change.name, interventions=(change,))


PROBES: tuple[Probe, ...] = (
    KeyProbe(
        name="attention",
        question="What if the looked-up token saw all others, or a later one itself only?",
        sources=tuple(
            MaskedKeys(later=later, changed=changed)
            for later in (False, True)
            for changed in (False, True)
        ),
    ),
    KeyProbe(
        name="positions",
        question="What if the first token had the second one's position, or the other way round?",
        sources=(ORDINARY_KEYS, _keys_under(SECOND2FIRST), _keys_under(FIRST2SECOND)),
    ),
    KeyProbe(
        name="bos",
        question="What if a BOS token stood before every prompt?",
        sources=(BosKeys(policy=BosPolicy.WITHOUT), BosKeys(policy=BosPolicy.WITH)),
    ),
    KeyProbe(
        name="identity",
        question="Is it the place that counts, or the token with or without its leading space?",
        sources=IDENTITY_CELLS,
    ),
    ConcentrationProbe(),
    TracingProbe(),
)
"""The probes that :func:`probe` knows by name."""


@taken
def probe(
    model: Model | Study, fact: Fact, which: str | Probe | KeySource | Intervention
) -> ProbeResult:
    """Ask one question about a fact; nothing is edited.

    Args:
        model: The model, or a study of :func:`~firsttok.exploration.prepare_study`.
        fact: The fact.
        which: The name of one of :data:`PROBES`; or a probe, a key source or an intervention of
            your own. The latter two are compared with the ordinary keys.

    Raises:
        BadInputError: If no probe goes by that name.
        FirsttokError: If the probe does not suit the fact or the model.
    """
    chosen = _find(which)
    return chosen.measure(model if isinstance(model, Study) else prepare_study(model), fact)


def _find(which: str | Probe | KeySource | Intervention) -> Probe:
    if isinstance(which, str):
        known = {each.name: each for each in PROBES}
        if which not in known:
            raise BadInputError(f"no probe is called {which!r}; choose from {', '.join(known)}")
        return known[which]
    if isinstance(which, Probe):
        return which
    source = which if isinstance(which, KeySource) else _keys_under(which)
    return KeyProbe(
        name=source.name,
        question=f"What becomes of the keys under this change: {source.name}?",
        sources=(ORDINARY_KEYS, source),
    )


def _residual_norms(model: Model, fact: Fact) -> list[float]:
    """Norm of the residual stream after every layer, at the fact's looked-up token."""
    prompt = fact_prompt(model, fact)
    hooks = [model.site(layer).residual_hook for layer in range(model.n_layers)]
    seen = capture(model, pad(model, [prompt]), hooks, stop_at_layer=None)
    return [float(seen[hook][0, prompt.subject_position].double().norm()) for hook in hooks]


def _origin(study: Study, fact: Fact) -> dict[str, Any]:
    found = tokens(study.model, fact)
    place = f"{fact.prompt} (looked up: {found.pieces[found.looked_up or 0]!r})"
    return {"fact": place, **study.origin}
