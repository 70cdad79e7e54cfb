"""Onboarding: everything that a look at a model finds out, in one object."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from rich.progress import Progress

from firsttok.arguments import taken
from firsttok.circuits import Brief, brief
from firsttok.console import own_bar
from firsttok.data import Fact
from firsttok.display import Note, Panel, Part, Shown, Table
from firsttok.errors import BadInputError, NonFiniteError, UnsupportedModelError
from firsttok.escapes import finite
from firsttok.exploration import prepare_study
from firsttok.inspection.anomaly import (
    RULE,
    FirstTokens,
    first_token_prompts,
    is_anomalous,
    measure_first_tokens,
)
from firsttok.inspection.checks import SiteCheck, check_sites, named_checks
from firsttok.inspection.forecast import CALIBRATED, Forecast, forecast
from firsttok.inspection.proposal import (
    Proposal,
    TextPerplexities,
    bos_ids,
    propose,
    text_perplexities,
)
from firsttok.models import BosPolicy, Model
from firsttok.screening import RATIO
from firsttok.study import Study
from firsttok.svg import Plot

__all__ = ["Architecture", "Bos", "Inspection", "inspect_model"]

CHECKED_PROMPTS = 4
_REPLAY = {
    "above": "the blocks above the edited one",
    "from": "the edited block and those above",
    "whole": "the whole model, which is slow",
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What kind of model it is, and how big."""

    name: str
    """Its class, as TransformerLens calls it."""
    layers: int
    heads: int
    d_model: int
    d_mlp: int
    vocabulary: int
    max_tokens: int
    """Most tokens of one prompt."""
    parameters: int
    """Number of weights; tied ones count once."""
    positions: str
    """``learned``, ``rotary`` or another name of TransformerLens's configuration."""
    attention_window: int | None
    """How far back a token sees in some layers; None without limit."""


@dataclass(frozen=True, kw_only=True)
class Bos:
    """What a tokenizer puts before a text."""

    by_itself: tuple[str, ...]
    """The tokens it puts before every text without being asked."""
    by_itself_ids: tuple[int, ...]
    token: str | None
    """The token that ``--bos with`` puts; None if it has none."""
    policy: str


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Inspection(Shown):
    """What was found out about a model."""

    study: Study
    """The study it was found out in, ready to edit."""
    architecture: Architecture
    bos: Bos
    sites: tuple[SiteCheck, ...]
    replay: str
    """What runs again after a change at one layer: blocks ``above``, ``from`` it, or ``whole``."""
    first_tokens: tuple[FirstTokens, ...]
    """First tokens against later ones; those of the model's own BOS policy first."""
    texts: TextPerplexities
    circuit: Brief | None
    """Who writes the first token's state; None where the model does not show its attention, or
    fewer than two texts have five tokens."""
    forecast: Forecast
    """What ROME would do to it, or did."""
    proposal: Proposal

    def panel(self) -> Panel:
        """Everything in plain words and numbers."""
        view, layer = self.first_tokens[0], self.study.layer
        return Panel(
            title=f"{self.study.model.label}: {self.architecture.name}",
            parts=[
                *(Note(text=text) for text in self._facts()),
                self._layers(),
                *(part for part in view.panel().parts if isinstance(part, Plot)),
                Note(text=f"The rule: {RULE}."),
                *(Note(text=each.verdict(layer)) for each in self.first_tokens),
                *(Note(text=text) for text in (self.circuit.sentences if self.circuit else ())),
                *_titled(self.forecast.panel()),
                *_titled(self.proposal.panel()),
            ],
            source=self.study.origin,
        )

    def _facts(self) -> list[str]:
        """What kind of model it is, a sentence each."""
        shape, bos = self.architecture, self.bos
        window = f", a window of {shape.attention_window}" if shape.attention_window else ""
        itself = " ".join(bos.by_itself) or "nothing"
        return [
            f"{shape.layers} layers of width {shape.d_model}, keys of width {shape.d_mlp}, "
            f"{shape.heads} heads, {shape.vocabulary:,} tokens, "
            f"{shape.parameters / 1e6:,.2f} M weights",
            f"Positions: {shape.positions}, at most {shape.max_tokens}{window}",
            f"BOS: by itself the tokenizer puts {itself} before a text; asked to, "
            f"{bos.token or 'nothing, it has none'}; inspected {bos.policy}",
            f"An edit is measured by running {_REPLAY[self.replay]} again",
        ]

    def _layers(self) -> Table:
        measured = {row.layer: row for row in self.first_tokens[0].layers}
        lines: list[list[object]] = []
        for site in self.sites:
            row = measured.get(site.layer)
            layout = "[d_mlp, d_model]" if site.in_out else "[d_model, d_mlp]"
            error = f"{site.error:.0e}" if site.error else "0"
            seen: list[object] = [None] * 6
            if row is not None:
                seen = [row.d_first, row.d_subsequent, row.d_first / row.d_subsequent]
                seen += [row.residual_first, row.residual_subsequent, is_anomalous(row)]
            lines.append([site.layer, site.key_hook, layout, error, *seen])
        columns = ("layer", "key", "weight", "error", "D(F)", "D(S)", "D(F)/D(S)")
        return Table(columns=(*columns, "norm, first", "norm, later", "anomaly"), lines=lines)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data for JSON; what is not finite is None."""
        with_bos = self.texts.with_bos
        record = {
            "architecture": asdict(self.architecture),
            "bos": asdict(self.bos),
            "sites": [asdict(site) for site in self.sites],
            "replay": self.replay,
            "anomaly_rule": RULE,
            "first_tokens": [
                asdict(view) | {"anomalous": list(view.anomalous), "massive": list(view.massive)}
                for view in self.first_tokens
            ],
            "perplexity": {
                "without_bos": self.texts.without_bos.mean,
                "with_bos": None if with_bos is None else with_bos.mean,
            },
            "circuit": None if self.circuit is None else self.circuit.as_dict(),
            "forecast": asdict(self.forecast)
            | {
                "rule": f"collapse is predicted where ROME's denominator is below {RATIO:g} times "
                f"C-ROME's; {CALIBRATED}",
                "edited": self.forecast.edited,
                "predicted": self.forecast.predicted,
                "collapsed": self.forecast.collapsed,
                "facts": [
                    asdict(fact.keys)
                    | {
                        "ratio": fact.keys.ratio,
                        "predicted": fact.predicted,
                        "perplexity": fact.perplexity,
                        "collapsed": fact.collapsed,
                    }
                    for fact in self.forecast.facts
                ],
            },
            "proposal": asdict(self.proposal) | {"toml": self.proposal.toml},
            "provenance": self.study.provenance(),
        }
        return cast(dict[str, Any], finite(record))


@taken
def inspect_model(
    model: Model | Study,
    *,
    facts: Sequence[Fact] | None = None,
    edit: bool = False,
    text_bos: BosPolicy | None = None,
    second_moment: str | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Look at a model: sites, BOS, first tokens, what ROME does to it, and a configuration.

    Args:
        model: A decoder, or a study of it, whose layer, contexts and settings are taken.
        facts: The facts ROME is tried on; None for a dozen built-in ones.
        edit: Whether to make ROME's edits, too, and not only to predict what they would do.
        text_bos: BOS policy of the sentences; None for the one that fits the model.
        second_moment: How the study's second moment was given, if it was, for the configuration.
        progress: Where to show progress.

    Raises:
        UnsupportedModelError: If the model fails a check; the message names the check.
        BadInputError: If no fact can be used with this model's tokenizer.
    """
    whose = model.model if isinstance(model, Study) else model
    with named_checks(whose.label):
        study = model if isinstance(model, Study) else prepare_study(model, progress=progress)
        sites = check_sites(whose, first_token_prompts(whose, most=CHECKED_PROMPTS))
        first_tokens = measure_first_tokens(whose)
        texts = text_perplexities(study)
        study = study.varied(text_bos=texts.fitting if text_bos is None else text_bos)
        original = texts.under(study.text_bos)
        found = forecast(
            study,
            facts,
            original=None if original is None else original.mean,
            edit=edit,
            progress=progress,
        )
        writers = _writers(study, facts, progress)
        return Inspection(
            study=study,
            architecture=_architecture(whose),
            bos=_bos(whose),
            sites=sites,
            replay=whose.replay.value,
            first_tokens=first_tokens,
            texts=texts,
            circuit=writers,
            forecast=found,
            proposal=propose(
                study,
                texts,
                second_moment=second_moment,
                below=None if writers is None else writers.proposed_layer,
            ),
        )


def _writers(study: Study, facts: Sequence[Fact] | None, progress: Progress | None) -> Brief | None:
    with own_bar(progress) as bar:
        try:
            return brief(
                study.model,
                texts=study.texts,
                facts=facts,
                contexts=study.contexts,
                progress=bar,
            )
        except (BadInputError, NonFiniteError, UnsupportedModelError):
            # All else is told without it.
            return None


def _titled(panel: Panel) -> list[Part]:
    return [Note(text=f"\n{panel.title}"), *panel.parts]


def _architecture(model: Model) -> Architecture:
    config: Any = model.weights.bridge.cfg
    site = model.site()
    original: Any = model.weights.bridge.original_model
    with torch.device("meta"):
        # The bridge puts copies of parts into the model, which are no weights of its own.
        plain: Any = type(original)(original.config)
    return Architecture(
        name=str(config.architecture),
        layers=model.n_layers,
        heads=int(config.n_heads),
        d_model=site.d_model,
        d_mlp=site.d_mlp,
        vocabulary=int(config.d_vocab),
        max_tokens=model.max_tokens,
        parameters=sum(int(weight.numel()) for weight in plain.parameters()),
        positions=model.position_embedding,
        attention_window=model.attention_window,
    )


def _bos(model: Model) -> Bos:
    tokenizer: Any = model.tokenizer
    ids = model.with_bos(BosPolicy.AS_TOKENIZER).leading_ids
    own = bos_ids(model)
    return Bos(
        by_itself=tuple(tokenizer.convert_ids_to_tokens(list(ids))),
        by_itself_ids=ids,
        token=tokenizer.convert_ids_to_tokens(list(own))[0] if own else None,
        policy=model.bos.value,
    )
