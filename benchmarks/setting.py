"""What every benchmark works on: the model, its plain twin, facts, contexts, second moment."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from naive import NaiveModel, naive_inverse, naive_model
from random_models import SIZES, random_folder

from firsttok.contexts import ContextSet, load_contexts
from firsttok.data import Fact, builtin_facts, spread_evenly
from firsttok.hyperparameters import Hyperparameters
from firsttok.models import BosPolicy, Model, find_spec, load
from firsttok.prompts import fact_prompt, with_target
from firsttok.second_moment import SecondMoment

__all__ = ["REPOSITORY", "Amounts", "Setting"]

REPOSITORY = Path(__file__).resolve().parent.parent
_CONTEXTS = REPOSITORY / "figures" / "smollm2-135m" / "contexts-seed0.json"
"""Committed, so that every run and every model has the same."""


@dataclass(frozen=True, kw_only=True)
class Amounts:
    """How much work the benchmarks do."""

    repeats: int = 2
    """Times every side is run."""
    facts: int = 24
    """Facts of the fast side."""
    naive_facts: int = 4
    """Facts of the naive side, spread over the same list."""
    spread_facts: int = 2
    """Facts of the naive sides of MEMIT, EMMET and AlphaEdit."""
    edits: int = 8
    """Edits whose perplexity the fast side measures."""
    naive_edits: int = 2
    """Edits whose perplexity the naive side measures."""
    moment_tokens: int = 16384
    """Tokens of the second moment."""
    growth_steps: int = 3
    """Losses of each fact while the growth is measured."""
    growth_facts: tuple[int, ...] = (4, 8, 16)
    """Numbers of facts between which the time grows."""
    growth_pairs: int = 2
    """Facts that both sides edit while the growth in length and in size is measured."""
    sentences: int = 50
    """Sentences of the perplexity."""
    precision_cases: int = 6
    """Collapse cases, and as many normal ones, that are edited in both types."""
    sizes: int = 3
    """Random models between which the time grows."""
    memory_sides: int = 3
    """Sides of each benchmark whose peak memory is measured."""
    sequence_steps: int = 3
    """Steps of each sequence."""
    items: int = 16
    """Items of each downstream task."""
    task_edits: int = 20
    """Edits under which the fast side runs the tasks."""
    steps: int | None = None
    """Most losses of each fact; None for the model's own settings."""

    @staticmethod
    def quick() -> "Amounts":
        """Just enough to see that everything runs."""
        return Amounts(
            repeats=1,
            facts=4,
            naive_facts=1,
            spread_facts=1,
            edits=2,
            naive_edits=1,
            moment_tokens=1024,
            growth_steps=2,
            growth_facts=(1, 2),
            growth_pairs=1,
            sentences=8,
            precision_cases=1,
            sizes=2,
            memory_sides=1,
            sequence_steps=1,
            items=2,
            task_edits=2,
            steps=3,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Setting:
    """A model and what it is edited with; all of it is loaded when it is first asked for."""

    amounts: Amounts
    """How much work is done."""
    folder: Path
    """Temporary folder that the benchmarks of one run share."""
    name: str = "smollm2-135m"
    """The model's name, hub id or folder."""
    size: str | None = None
    """A randomly initialised model of this size instead."""
    device: str = "cpu"
    """Where the model runs."""
    dtype: str = "float32"
    """Type of its weights."""
    for_memory: bool = False
    """Whether a side runs once for its peak memory: the naive one then takes the longest fact."""

    @property
    def label(self) -> str:
        """The model's name as results show it."""
        return f"random {self.size}" if self.size else Path(self.name).name

    @property
    def source(self) -> str:
        """What the model is loaded by; a random one is made first, if it is not there."""
        return str(random_folder(SIZES[self.size], self.folder)) if self.size else self.name

    @cached_property
    def model(self) -> Model:
        """The model, without BOS."""
        return load(self.source, bos=BosPolicy.WITHOUT, dtype=self.dtype, device=self.device)

    @property
    def layer(self) -> int:
        """The edited layer."""
        return SIZES[self.size].layer if self.size else self.model.default_layer

    @cached_property
    def naive(self) -> NaiveModel:
        """The plain model on the same weights."""
        return naive_model(self.model, self.layer)

    @cached_property
    def facts(self) -> list[Fact]:
        """Facts spread over the built-in ones."""
        return spread_evenly(builtin_facts(), self.amounts.facts)

    @cached_property
    def naive_facts(self) -> list[Fact]:
        """Those of them that the naive side does, one after another."""
        if self.for_memory:
            return [max(self.facts, key=self._length)]
        return spread_evenly(self.facts, self.amounts.naive_facts)

    @cached_property
    def contexts(self) -> ContextSet:
        """The 21 contexts of the committed figures."""
        return load_contexts(_CONTEXTS)

    @cached_property
    def moment(self) -> SecondMoment:
        """C = I, as in the paper's released configurations; the solves are made all the same."""
        return SecondMoment.identity(self.model.site(self.layer).d_mlp)

    @cached_property
    def naive_inverse(self) -> torch.Tensor:
        """Its inverse for the naive side, where the model is."""
        return naive_inverse(self.moment.matrix.to(self.model.device))

    @cached_property
    def hyperparameters(self) -> Hyperparameters:
        """The model's settings; a random model, which learns nothing, is given all its steps."""
        spec = find_spec(self.size or "")
        own = spec.hyperparameters if spec else self.model.hyperparameters
        settings = replace(own, stop_below=0.0) if self.size else own
        return replace(settings, steps=self.amounts.steps or settings.steps)

    def prepare(self) -> None:
        """Load what every side needs, so that neither time nor peak memory counts it."""
        _ = self.naive, self.contexts, self.naive_inverse, self.facts
        # As the inverse, the factor is made once for all edits.
        self.moment.solve(torch.ones(self.moment.matrix.shape[0]))

    def of_size(self, size: str) -> "Setting":
        """The same amounts on a randomly initialised model."""
        return replace(self, size=size)

    def _length(self, fact: Fact) -> int:
        prompt = fact_prompt(self.model, fact)
        prompt = with_target(self.model, prompt, fact.target_new, join=fact.join)
        return len(prompt.token_ids)
