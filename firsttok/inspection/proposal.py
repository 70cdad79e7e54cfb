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

    @property
    def html(self) -> str:
        """The same in letters of one width."""
        return f"<pre>{escape(self.text)}</pre>"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One line of a configuration."""

    key: str
    value: str | int | float
    reason: str


@dataclass(frozen=True, kw_only=True, repr=False)
class Proposal(Shown):
    """A configuration that every command takes as ``--config``."""

    settings: tuple[Setting, ...]
    notes: tuple[str, ...]
    """What it leaves to the defaults, and why."""

    @property
    def toml(self) -> str:
        """The configuration as TOML; a reason stands after the first line it holds for."""
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
    """The same tokens after a BOS; None if the tokenizer has no such token."""

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
    model, texts = study.model, study.texts
    found = perplexity(model, texts, bos=BosPolicy.WITH) if bos_ids(model) else None
    without = perplexity(model, texts, bos=BosPolicy.WITHOUT)
    return TextPerplexities(without_bos=without, with_bos=found)


def bos_ids(model: Model) -> tuple[int, ...]:
    """The token that the policy ``with`` puts; none if the tokenizer has no such token."""
    try:
        return model.with_bos(BosPolicy.WITH).leading_ids
    except BadInputError:
        return ()


def propose(
    study: Study,
    texts: TextPerplexities,
    *,
    second_moment: str | None = None,
    below: int | None = None,
) -> Proposal:
    """Put a configuration together: what the study was opened with, and why.

    Args:
        study: The study; its layer, settings and BOS policies are proposed.
        texts: The perplexities that speak for one policy of the sentences.
        second_moment: ``identity`` or a file, if one was given.
        below: The layer that :class:`~firsttok.circuits.Brief` proposes.
    """
    model, chosen = study.model, study.hyperparameters
    usual = "of the catalog" if find_spec(model.name) else "defaults, the papers' for Llama2"
    why = f"steps to kl: {usual if chosen == model.hyperparameters else 'as given'}"
    lines: list[tuple[str, str | int | float, str]] = [
        ("model", model.name, model.source),
        ("layer", study.layer, _layer_reason(model, study.layer)),
        ("bos", model.bos.value, _bos_reason(model)),
        ("text_bos", study.text_bos.value, texts.reason),
        ("dtype", str(model.dtype).removeprefix("torch."), "as it was inspected"),
        ("steps", chosen.steps, why),
        ("lr", chosen.learning_rate, why),
        ("weight_decay", chosen.weight_decay, why),
        ("clamp", chosen.clamp, why),
        ("kl", chosen.kl, why),
    ]
    notes: list[str] = []
    if second_moment is None:
        notes.append(f"second_moment: left out, so that it is computed; {_moment_reason(study)}")
    else:
        lines.append(("second_moment", second_moment, "as given"))
    if below not in (None, study.layer):
        notes.append(
            f"layer: facts about a text's first token meet no small denominator at layer {below}, "
            "below the last layer that writes its massive state"
        )
    settings = [Setting(key=key, value=value, reason=reason) for key, value, reason in lines]
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
