"""A configuration for a model, each value with the reason for it."""

from dataclasses import dataclass
from html import escape

from firsttok.config import toml_line
from firsttok.display import Panel, Shown
from firsttok.errors import BadInputError
from firsttok.evaluation import Perplexity, perplexity
from firsttok.models import BosPolicy, Model, find_spec
from firsttok.study import Study

__all__ = ["Proposal", "Setting", "TextPerplexities", "propose", "text_perplexities"]

WORSE = 2.0
"""BOS is put before the sentences where the perplexity without is so many times that with it."""


@dataclass(frozen=True, kw_only=True)
class _File:
    """Text that is to be copied as it is."""

    text: str
    """The text."""

    @property
    def html(self) -> str:
        """The same in letters of one width."""
        return f"<pre>{escape(self.text)}</pre>"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One line of a configuration."""

    key: str
    """Name of the option."""
    value: str | int | float
    """Its value."""
    reason: str
    """Why this one."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Proposal(Shown):
    """A configuration that every command takes as ``--config``."""

    settings: tuple[Setting, ...]
    """Its lines."""
    notes: tuple[str, ...]
    """What it leaves to the defaults, and why."""

    @property
    def toml(self) -> str:
        """The configuration as TOML; a reason stands behind the first line it holds for."""
        said = ["", *(each.reason for each in self.settings)]
        lines = [
            toml_line(each.key, each.value, "" if each.reason == before else _plain(each.reason))
            for each, before in zip(self.settings, said, strict=False)
        ]
        notes = [f"# {_plain(note)}" for note in self.notes]
        return "\n".join(["# proposed by firsttok inspect", *lines, *notes]) + "\n"

    def panel(self) -> Panel:
        """The file."""
        return Panel(title="proposed configuration", parts=[_File(text=self.toml.rstrip())])


@dataclass(frozen=True, kw_only=True)
class TextPerplexities:
    """Perplexity of the unedited model on the sentences, without BOS and with it."""

    without_bos: Perplexity
    """As the papers measure it."""
    with_bos: Perplexity | None
    """The same tokens behind a BOS; None if the tokenizer has no such token."""

    @property
    def fitting(self) -> BosPolicy:
        """The papers' policy, without, unless the model is much worse for it."""
        if self.with_bos is None or self.without_bos.mean <= WORSE * self.with_bos.mean:
            return BosPolicy.WITHOUT
        return BosPolicy.WITH

    def under(self, policy: BosPolicy) -> Perplexity | None:
        """The perplexity under a policy, if it was measured under that one."""
        measured = {BosPolicy.WITHOUT: self.without_bos, BosPolicy.WITH: self.with_bos}
        return measured.get(policy)

    @property
    def reason(self) -> str:
        """Both numbers."""
        if self.with_bos is None:
            return f"perplexity {self.without_bos.mean:.4g}; the tokenizer has no BOS"
        return f"perplexity {self.without_bos.mean:.4g} without BOS, {self.with_bos.mean:.4g} with"


def text_perplexities(study: Study) -> TextPerplexities:
    """Measure the study's sentences under both policies."""
    model = study.model
    try:
        has_bos = bool(model.with_bos(BosPolicy.WITH).leading_ids)
    except BadInputError:
        has_bos = False
    found = perplexity(model, study.texts, bos=BosPolicy.WITH) if has_bos else None
    return TextPerplexities(
        without_bos=perplexity(model, study.texts, bos=BosPolicy.WITHOUT), with_bos=found
    )


def propose(study: Study, texts: TextPerplexities, *, second_moment: str | None = None) -> Proposal:
    """Put a configuration together: what the study was opened with, and why.

    Args:
        study: The study; its layer, settings and BOS policies are proposed.
        texts: The perplexities that speak for one policy of the sentences.
        second_moment: ``identity`` or a file, if one was given.
    """
    model = study.model
    spec = find_spec(model.name)
    settings = [
        Setting(key="model", value=model.name, reason=model.source),
        Setting(key="layer", value=study.layer, reason=_layer_reason(model, study.layer)),
        Setting(key="bos", value=model.bos.value, reason=_bos_reason(model)),
        Setting(key="text_bos", value=study.text_bos.value, reason=texts.reason),
        Setting(
            key="dtype", value=str(model.dtype).removeprefix("torch."), reason="as it was inspected"
        ),
    ]
    own = "steps to kl: " + ("of the catalog" if spec else "defaults, the papers' for Llama2")
    why = own if study.hyperparameters == model.hyperparameters else "steps to kl: as given"
    chosen = study.hyperparameters
    for key, value in (
        ("steps", chosen.steps),
        ("lr", chosen.learning_rate),
        ("weight_decay", chosen.weight_decay),
        ("clamp", chosen.clamp),
        ("kl", chosen.kl),
    ):
        settings.append(Setting(key=key, value=value, reason=why))
    notes: list[str] = []
    if second_moment is None:
        notes.append(f"second_moment: left out, so that it is computed; {_moment_reason(study)}")
    else:
        settings.append(Setting(key="second_moment", value=second_moment, reason="as given"))
    return Proposal(settings=tuple(settings), notes=tuple(notes))


def _layer_reason(model: Model, layer: int) -> str:
    if layer != model.default_layer:
        return "as given"
    spec = find_spec(model.name)
    if spec is not None and spec.layer is not None:
        return "of the catalog"
    return "the middle; analyses/extra_causal_tracing.py finds one by causal tracing"


def _bos_reason(model: Model) -> str:
    if model.bos is not BosPolicy.AS_TOKENIZER:
        return "as given"
    ids = model.leading_ids
    return f"the tokenizer begins with {list(ids)}" if ids else "the tokenizer puts none"


def _moment_reason(study: Study) -> str:
    moment = study.second_moment
    text = f"over {moment.tokens} tokens of {moment.corpus}"
    if moment.ridge:
        return (
            f"{text} it is singular, and takes a ridge of {moment.ridge:g} of its mean diagonal: "
            "give a bigger --corpus, if these weights are trained"
        )
    return f"{text} its condition number is {moment.condition_number:.2g}"


def _plain(text: str) -> str:
    """A comment of one line."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
