"""What if this fact were edited? One call, with everything that is not given found or made."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from firsttok.arguments import taken
from firsttok.console import own_bar
from firsttok.contexts import ContextSet, kept_contexts
from firsttok.data import Fact, builtin_sentences
from firsttok.display import Note, Panel, Shown, Table
from firsttok.editing import (
    METHODS,
    ROME,
    Edit,
    Editor,
    Method,
    find_editors,
    optimisations,
    other_layers,
    shown_components,
)
from firsttok.errors import BadInputError, UnsupportedModelError
from firsttok.evaluation import (
    COLLAPSE_THRESHOLD,
    DAMAGE_RATIO,
    Damage,
    Perplexity,
    continuation,
    damage,
    target_probabilities,
    top_predictions,
)
from firsttok.hyperparameters import Hyperparameters
from firsttok.keys import KeySource
from firsttok.models import BosPolicy, Model
from firsttok.second_moment import SecondMoment, compute_second_moments
from firsttok.storage import cache_folder
from firsttok.study import Study
from firsttok.token_strips import TokenStrip, tokens

__all__ = [
    "Comparison",
    "Observation",
    "WhatIf",
    "compare_methods",
    "observe",
    "prepare_study",
    "state_lines",
    "verdict",
    "what_if",
]


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What a model says to one fact's prompt, and how well it speaks at all."""

    perplexity: Perplexity
    """Perplexity on the study's sentences."""
    target_probability: float | None
    """Probability of the new target after the bare prompt; None if that is no context."""
    target_probability_prefixed: float | None
    """Its mean over the contexts that are not bare; None if there is none."""
    top_predictions: tuple[tuple[str, float], ...]
    """The most probable next tokens of the bare prompt, with their probabilities."""
    continuation: str
    """What follows the bare prompt greedily."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class WhatIf(Shown):
    """One fact edited by one method, with the model before and after; the model is as it was."""

    fact: Fact
    method: Method | Editor
    tokens: TokenStrip
    """Tokens of the bare prompt, the looked-up one marked."""
    edit: Edit
    """The edit; ``with result.edit.applied(model):`` makes it again."""
    before: Observation
    """The model as it is."""
    after: Observation
    """The model with the edit in its weights."""
    origin: dict[str, Any]
    """Model and settings, in short; ``edit.provenance`` has it all."""

    @property
    def report(self) -> dict[str, float]:
        """The components of the update."""
        return self.edit.report

    @property
    def verdict(self) -> str:
        """What the edit did to the model, in a sentence."""
        return verdict(self.method.label, self.before.perplexity, self.after.perplexity)

    @property
    def damage(self) -> Damage | None:
        """What the edit did to the model; None if it had collapsed before."""
        return damage(self.before.perplexity, self.after.perplexity)

    @property
    def collapsed(self) -> bool:
        """Whether the edit destroyed the model, which was not as bad before."""
        return self.damage is Damage.COLLAPSED

    def panel(self) -> Panel:
        """Tokens, components, before and after, and what became of the model."""
        return Panel(
            title=f"what if {self.method.label} wrote: {self.fact.prompt} {self.fact.target_new}",
            parts=[
                *self.tokens.panel().parts,
                _components([self]),
                *_states(self.fact, {"before": self.before, "after": self.after}),
                Note(text=self.verdict),
            ],
            source=self.origin | {"method": self.method.name},
        )


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Comparison(Shown):
    """One fact edited by several methods, each on the unedited model."""

    results: tuple[WhatIf, ...]

    def __getitem__(self, method: Method | Editor | str) -> WhatIf:
        """The result of one method, by itself or its name.

        Raises:
            BadInputError: If it is not among them.
        """
        wanted = method if isinstance(method, str) else method.name
        for result in self.results:
            if result.method.name == wanted:
                return result
        known = ", ".join(result.method.name for result in self.results)
        raise BadInputError(f"{wanted!r} is not among the methods compared; choose from {known}")

    def panel(self) -> Panel:
        """The methods side by side."""
        first = self.results[0]
        states = {result.method.label: result.after for result in self.results}
        return Panel(
            title=f"what if one wrote: {first.fact.prompt} {first.fact.target_new}",
            parts=[
                *first.tokens.panel().parts,
                _components(self.results),
                *_states(first.fact, {"before": first.before, **states}),
                *(Note(text=result.verdict) for result in self.results),
            ],
            source=first.origin,
        )


@taken
def prepare_study(
    model: Model,
    *,
    methods: Iterable[Method | Editor | str] = (),
    layer: int | None = None,
    contexts: ContextSet | None = None,
    second_moment: SecondMoment | None = None,
    hyperparameters: Hyperparameters | None = None,
    texts: Sequence[str] | None = None,
    text_bos: BosPolicy = BosPolicy.WITHOUT,
    work: str | Path | None = None,
    progress: Progress | None = None,
) -> Study:
    """Fix everything that edits of a model share; what is not given is found in the cache or made.

    Prepare a study once to look at many facts: it runs the sentences, measures the unedited model
    and factorises the second moment only once.

    Args:
        model: The model, or a view of it.
        methods: Methods it is for: the second moments of all layers that they edit are computed.
            Those of the ROME family edit ``layer`` alone.
        layer: Layer to edit; None for the model's default.
        contexts: Contexts of Equation 1; None for those of seed 0, sampled on first use.
        second_moment: C; None for that of the default corpus, computed on first use.
        hyperparameters: Settings of the value optimisation; None for the model's own.
        texts: Sentences of the perplexity; None for the built-in ones.
        text_bos: BOS policy of those sentences; the papers put none.
        work: Folder in which ``ft.measure_facts`` keeps finished parts; None for the cache.
        progress: Where to show progress; None for a bar of its own, in a terminal or in Jupyter.

    Raises:
        UnsupportedModelError: If the model cannot be edited.
        LayerOutOfRangeError: If there is no such layer.
    """
    if not model.can_be_edited:
        raise UnsupportedModelError(
            f"{model.name} is not a decoder with a final norm and an unembedding; its keys can be "
            "read with ft.capture_keys, but only decoders can be edited"
        )
    site = model.site(layer)
    with own_bar(progress) as bar:
        others = other_layers(model, site.layer, find_editors(methods))
        wanted = others if second_moment is not None else (site.layer, *others)
        moments = compute_second_moments(model, layers=wanted, progress=bar) if wanted else {}
        if second_moment is None:
            second_moment = moments.pop(site.layer)
        if contexts is None:
            contexts = kept_contexts(model, progress=bar)
    return Study(
        model=model,
        contexts=contexts,
        second_moment=second_moment,
        second_moments=moments,
        layer=site.layer,
        hyperparameters=hyperparameters or model.hyperparameters,
        texts=builtin_sentences() if texts is None else tuple(texts),
        work=cache_folder("explorations") if work is None else Path(work),
        text_bos=text_bos,
    )


@taken
def what_if(
    model: Model | Study,
    fact: Fact,
    *,
    method: Method | Editor | str = ROME,
    layer: int | None = None,
    key_source: KeySource | None = None,
    progress: Progress | None = None,
) -> WhatIf:
    """Compute one edit, and look at the model before and after it; nothing stays changed.

    Args:
        model: The model, or a study of :func:`prepare_study`, which knows contexts and settings.
        fact: The fact to write.
        method: Which key goes into which slot; a method, or the name of one. An editor of your own
            stands here as well.
        layer: Layer to edit; None for the study's, or the model's default. A study's second
            moment belongs to its layer, so another one needs a study of its own.
        key_source: Where the keys come from, as a probe gives one; None for the study's own.
        progress: Where to show progress; None for a bar of its own, in a terminal or in Jupyter.

    Raises:
        FirsttokError: If the model cannot be edited, or the fact has no subject token of its own.
    """
    chosen = find_editors([method])
    if len(chosen) != 1:
        raise BadInputError(f"{method} holds {len(chosen)} methods; give ft.compare_methods those")
    found = compare_methods(
        model, fact, methods=chosen, layer=layer, key_source=key_source, progress=progress
    )
    return found.results[0]


@taken
def compare_methods(
    model: Model | Study,
    fact: Fact,
    *,
    methods: Iterable[Method | Editor | str] = METHODS,
    layer: int | None = None,
    key_source: KeySource | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """As :func:`what_if` for several methods; those that are anchored alike share a value.

    Args:
        model: The model, or a study of it.
        fact: The fact to write.
        methods: The methods, their names as ``--method`` takes them, or editors.
        layer: As for :func:`what_if`.
        key_source: As for :func:`what_if`.
        progress: As for :func:`what_if`.

    Raises:
        BadInputError: If there is no method, or two go by one name.
        FirsttokError: As for :func:`what_if`.
    """
    given = tuple(methods)
    chosen = find_editors(given)
    if not chosen or len(chosen) < len(given):
        names = ", ".join(each if isinstance(each, str) else each.name for each in given)
        raise BadInputError(f"methods need a name each, not {names or 'none at all'}")
    with own_bar(progress) as bar:
        study = _study(model, layer, chosen, bar)
        if key_source is not None:
            study = study.varied(key_source=key_source)
        strip, origin = tokens(study.model, fact), study.origin
        task = bar.add_task("measuring before the edit", total=2)
        # First, so that sentences that cannot be measured are refused before the optimisation.
        unedited = study.original_perplexity
        bar.advance(task)
        before = observe(study.model, fact, unedited, contexts=study.contexts)
        bar.advance(task)
        steps = max(1, optimisations(chosen) * study.hyperparameters.steps)
        task = bar.add_task("optimising the value", total=steps)
        ((_, made),) = study.edits([fact], chosen, on_step=lambda count: bar.advance(task, count))
        # An optimisation may end early, or its value be in the cache.
        bar.update(task, completed=steps)
        edits = [made[method.name] for method in chosen]
        task = bar.add_task("measuring after the edit", total=1 + len(edits))
        measured = study.perplexities(edits)
        bar.advance(task)
        results: list[WhatIf] = []
        for one, edit, found in zip(chosen, edits, measured, strict=True):
            after = observe(study.model.edited(edit), fact, found, contexts=study.contexts)
            bar.advance(task)
            results.append(
                WhatIf(
                    fact=fact,
                    method=one,
                    tokens=strip,
                    edit=edit,
                    before=before,
                    after=after,
                    origin=origin,
                )
            )
    return Comparison(results=tuple(results))


def observe(model: Model, fact: Fact, measured: Perplexity, *, contexts: ContextSet) -> Observation:
    """Look at what a model says, whose perplexity has been measured already."""
    templates = contexts.templates
    found = target_probabilities(model, fact, contexts)
    bare = [p for p, text in zip(found, templates, strict=True) if text == "{}"]
    prefixed = [p for p, text in zip(found, templates, strict=True) if text != "{}"]
    return Observation(
        perplexity=measured,
        target_probability=bare[0] if bare else None,
        target_probability_prefixed=sum(prefixed) / len(prefixed) if prefixed else None,
        top_predictions=tuple(top_predictions(model, fact.prompt)),
        continuation=continuation(model, fact.prompt),
    )


def _study(
    model: Model | Study,
    layer: int | None,
    methods: Sequence[Method | Editor],
    progress: Progress,
) -> Study:
    if not isinstance(model, Study):
        return prepare_study(model, methods=methods, layer=layer, progress=progress)
    if layer not in (None, model.layer):
        raise BadInputError(
            f"the study edits layer {model.layer}, and its second moment is that layer's; "
            f"prepare another one with ft.prepare_study(model, layer={layer})"
        )
    return model


def _components(results: Sequence[WhatIf]) -> Table:
    shown = [dict(shown_components(result.edit)) for result in results]
    labels = dict.fromkeys(label for each in shown for label in each)
    lines = [[label, *(each.get(label) for each in shown)] for label in labels]
    return Table(columns=("update", *(result.method.label for result in results)), lines=lines)


def state_lines(fact: Fact, seen: Collection[Observation]) -> list[list[Any]]:
    """Perplexity and the target's probability in several states, as lines of a table."""
    target = f"P({fact.target_new})"
    return [
        ["perplexity", *(each.perplexity.mean for each in seen)],
        [target, *(each.target_probability for each in seen)],
        [f"{target} behind prefixes", *(each.target_probability_prefixed for each in seen)],
    ]


def _states(fact: Fact, states: dict[str, Observation]) -> tuple[Table, Table]:
    said: list[list[str]] = []
    for name, each in states.items():
        top = ", ".join(f"{token!r} {p:.2f}" for token, p in each.top_predictions[:3])
        said.append([name, top, repr(each.continuation)])
    return (
        Table(columns=("", *states), lines=state_lines(fact, states.values())),
        Table(columns=("", "next tokens", "continues with"), lines=said),
    )


def verdict(name: str, before: Perplexity, after: Perplexity) -> str:
    """Say what an edit of some name did to a model, from perplexities of the same sentences."""
    numbers = f"perplexity {before.mean:.4g} before, {after.mean:.4g} after"
    found = damage(before, after)
    if found is None:
        return (
            f"{name}: the model is above a perplexity of {COLLAPSE_THRESHOLD:g} without the edit, "
            f"so nothing can be said to collapse ({numbers})."
        )
    if found is Damage.COLLAPSED:
        return f"{name} collapsed the model: {numbers} (collapse: above {COLLAPSE_THRESHOLD:g})."
    if found is Damage.DAMAGED:
        return (
            f"{name} damaged the model: {numbers}, {after.mean / before.mean:.1f} times as high "
            f"(damage: {DAMAGE_RATIO:g} times; collapse: above {COLLAPSE_THRESHOLD:g})."
        )
    return f"{name} left the model intact: {numbers}. Other facts were not looked at."
