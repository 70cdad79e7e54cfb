"""A study: everything that is fixed while many facts are edited and measured."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from firsttok.arguments import take_fields, taken
from firsttok.contexts import ContextSet
from firsttok.data import Fact
from firsttok.display import Panel, Shown, Table, short_hash
from firsttok.editing import (
    ROME,
    Edit,
    Editor,
    Method,
    OpenEditor,
    RomeEditor,
    ValueStore,
    edit_each,
    find_editors,
)
from firsttok.errors import BadInputError
from firsttok.evaluation import (
    COLLAPSE_THRESHOLD,
    Perplexity,
    PreparedTexts,
    perplexity,
    prepare_texts,
)
from firsttok.hyperparameters import Hyperparameters
from firsttok.keys import ORDINARY_KEYS, KeySource
from firsttok.models import BosPolicy, Model
from firsttok.provenance import versions
from firsttok.second_moment import SecondMoment
from firsttok.storage import content_hash, read_record, write_record

__all__ = ["Study", "kept_perplexity"]

logger = logging.getLogger(__name__)

_Measured = TypeVar("_Measured")
_MEMORIES = 12
"""Measurements of the unedited model that are kept in memory."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Study(Shown):
    """One model with its contexts, second moment, texts and settings.

    Raises:
        BadInputError: If the second moment is of another layer or model.
    """

    model: Model
    """The model, or a view of it, before the edits that are measured."""
    contexts: ContextSet
    """Contexts of Equation 1."""
    second_moment: SecondMoment
    """C."""
    layer: int
    """Layer to edit."""
    hyperparameters: Hyperparameters
    """Settings of the value optimisation."""
    texts: tuple[str, ...]
    """Sentences of the perplexity."""
    second_moments: Mapping[int, SecondMoment] = field(default_factory=dict[int, SecondMoment])
    """C of other layers, for editors of several ones."""
    given: Mapping[str, int | float] | None = None
    """Hyperparameters that were given, whatever the model's are; None for those that differ."""
    work: Path | None = None
    """Folder of finished parts, from which an interrupted run goes on; None to keep none."""
    key_source: KeySource = ORDINARY_KEYS
    """Where the keys of every edit come from."""
    judge: Model | None = None
    """The view the perplexity is measured on; None for ``model`` itself."""
    text_bos: BosPolicy = BosPolicy.WITHOUT
    """BOS policy of the sentences; the papers put none, even on Llama."""
    memo: dict[tuple[str, str], Any] = field(default_factory=dict[tuple[str, str], Any])
    """What was measured of the unedited model, by all that decides it; varied studies share it."""

    def __post_init__(self) -> None:
        """Check the settings, and that the second moment is of this model and layer."""
        take_fields(self)
        self.second_moment.check(self.model, self.layer)
        for layer, moment in self.second_moments.items():
            moment.check(self.model, layer)

    @property
    def asked(self) -> Mapping[str, int | float]:
        """Hyperparameters that take the place of the model's own, in editors with others, too."""
        if self.given is not None:
            return self.given
        usual, own = self.model.hyperparameters.as_dict(), self.hyperparameters.as_dict()
        return {name: value for name, value in own.items() if value != usual[name]}

    def moment(self, layer: int) -> SecondMoment:
        """Return C of a layer.

        Raises:
            BadInputError: If the study has none.
        """
        if layer == self.layer:
            return self.second_moment
        if layer not in self.second_moments:
            raise BadInputError(
                f"the study has no second moment of layer {layer}; prepare it for the method with "
                "ft.prepare_study(model, methods=[...]), or give second_moments"
            )
        return self.second_moments[layer]

    @property
    def origin(self) -> dict[str, Any]:
        """What its results were made with, in short; ``provenance()`` has it all."""
        usual = self.key_source is ORDINARY_KEYS
        return self.model.origin | {
            "layer": self.layer,
            "keys": None if usual else self.key_source.name,
            "contexts": short_hash(self.contexts.content_hash),
            "second moment": f"{self.second_moment.corpus}, {self.second_moment.tokens} tokens",
            "sentences": len(self.texts),
            "firsttok": versions()["firsttok"],
        }

    def panel(self) -> Panel:
        """The settings of every edit."""
        lines: list[list[Any]] = [
            ["contexts", len(self.contexts.templates)],
            *(
                [name.replace("_", " "), value]
                for name, value in self.hyperparameters.as_dict().items()
            ),
        ]
        return Panel(
            title=f"study of {self.model.label}, layer {self.layer}",
            parts=[Table(columns=("setting", "value"), lines=lines)],
            source=self.origin,
        )

    @property
    def evaluated(self) -> Model:
        """The view the perplexity is measured on."""
        return self.model if self.judge is None else self.judge

    @property
    def prepared_texts(self) -> PreparedTexts:
        """The sentences, run up to the edited layer once for each state of the model."""
        return self._texts_up_to(self.layer)

    def _texts_up_to(self, layer: int) -> PreparedTexts:
        return self._measured(
            "texts",
            [layer],
            lambda: prepare_texts(self.evaluated, self.texts, layer=layer, bos=self.text_bos),
        )

    def perplexities(self, edits: Sequence[Edit]) -> list[Perplexity]:
        """Measure the perplexity under each edit alone, whatever weights it changes.

        Raises:
            EditMismatchError: If an edit was made for another model.
        """
        fast = [edit for edit in edits if edit.output_layer == self.layer]
        measured = iter(self.prepared_texts.measure_edits(self.evaluated, fast) if fast else ())
        return [
            next(measured) if edit.output_layer == self.layer else self._perplexity_under(edit)
            for edit in edits
        ]

    def _perplexity_under(self, edit: Edit) -> Perplexity:
        """In the weights; the layers below the edit run once for all that begin there."""
        view = self.evaluated.edited(edit)
        # What decides keys, and so a pass, has the MLP's first matrices of the layer above in it.
        below = min(place.layer - 1 - (place.port != "out") for place in edit.places)
        plain = {place.stack for place in edit.places} == {"blocks"}
        if below < 0 or not plain or self.evaluated.disturbance is not None:
            return perplexity(view, self.texts, bos=self.text_bos)
        return self._texts_up_to(below).measure(view)

    @property
    def original_perplexity(self) -> Perplexity:
        """Perplexity of the model as it is, measured once for each state of it."""
        return self._measured(
            "perplexity", [], lambda: perplexity(self.evaluated, self.texts, bos=self.text_bos)
        )

    def keep_original_perplexity(self) -> None:
        """Take :attr:`original_perplexity` from the work folder, or measure it and leave it there.

        It is kept by the identity of the view it is measured on. While something disturbs the model
        (``Model.disturbance``) nothing is read or left.
        """
        if self.work is None or self.evaluated.disturbance is not None:
            return
        key = ("perplexity", self._measured_on([]))
        if key not in self.memo:
            found = kept_perplexity(self.evaluated, self.texts, bos=self.text_bos, work=self.work)
            if self._measured_on([]) == key[1]:
                self.memo[key] = found

    def warn_if_collapsed(self) -> None:
        """Say so if the unedited model is as bad on the sentences as a destroyed one."""
        original = self.original_perplexity
        if original.collapsed:
            logger.warning(
                "the unedited model has a perplexity of %.0f on these sentences, above %g itself, "
                "so nothing can be said to collapse; try --text-bos with",
                original.mean,
                COLLAPSE_THRESHOLD,
            )

    @property
    def store(self) -> ValueStore | None:
        """Where optimised values are kept."""
        return None if self.work is None else ValueStore(self.work / "values")

    def varied(self, **changes: Any) -> "Study":
        """Return the study with other fields; what was measured and still holds goes along."""
        return replace(self, **changes)

    def _measured(
        self, what: str, settings: list[Any], measure: Callable[[], _Measured]
    ) -> _Measured:
        """What was measured of the model as it is now, or else is now."""
        if self.evaluated.disturbance is not None:
            return measure()
        key = (what, self._measured_on(settings))
        if key not in self.memo:
            found = measure()
            if self._measured_on(settings) != key[1]:
                return found
            # The oldest goes; no more than a few views of a model take turns.
            while len(self.memo) >= _MEMORIES:
                del self.memo[next(iter(self.memo))]
            self.memo[key] = found
        return self.memo[key]

    def _measured_on(self, settings: list[Any]) -> str:
        """What decides a measurement of the model as it is; its own BOS policy does not."""
        return _measured_on(self.evaluated, self.texts, self.text_bos, settings)

    @taken
    def edits(
        self,
        facts: Sequence[Fact],
        methods: Sequence[Method | str | Editor],
        *,
        on_step: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[Fact, dict[str, Edit]]]:
        """Compute edits under the study's settings; values that are in its store are read there.

        Args:
            facts: The facts.
            methods: The methods, or their names; or editors, which have settings of their own.
            on_step: As for :func:`~firsttok.editing.edit_each`.

        Yields:
            Each fact with its edits by the name of method or editor, in order.
        """
        return edit_each(self.model, facts, self.editors(methods), on_step=on_step)

    def editors(self, methods: Sequence[Method | str | Editor]) -> tuple[Editor, ...]:
        """Return an editor with the study's settings for each method.

        An editor stays as it is, but for what it leaves open.

        Raises:
            BadInputError: If no method goes by a name, or an editor needs a second moment that the
                study does not have.
        """
        rome = RomeEditor(
            method=ROME,
            contexts=self.contexts,
            second_moment=self.second_moment,
            layer=self.layer,
            hyperparameters=self.hyperparameters,
            key_source=self.key_source,
            store=self.store,
        )

        def bound(each: Method | Editor) -> Editor:
            if isinstance(each, Method):
                return replace(rome, method=each)
            if not isinstance(each, OpenEditor):
                return each
            if self.key_source is not ORDINARY_KEYS:
                raise BadInputError(
                    f"{each.label} takes its keys from the model alone, and the study takes them "
                    f"from {self.key_source.name!r}; leave the key source out, or the method"
                )
            return each.completed(self)

        return tuple(map(bound, find_editors(methods)))

    def provenance(self) -> dict[str, Any]:
        """Everything that determines the numbers of this study."""
        model, moment = self.model, self.second_moment
        condition = moment.condition_number if moment.tokens else 1.0
        return {
            "model": model.record(),
            "layer": self.layer,
            "contexts": {"hash": self.contexts.content_hash, "seed": self.contexts.seed},
            "second_moment": {
                "corpus": moment.corpus,
                "corpus_hash": moment.corpus_hash,
                "hash": moment.content_hash,
                "tokens": moment.tokens,
                # Of a singular matrix it is infinite, which JSON cannot say.
                "condition_number": condition if math.isfinite(condition) else None,
                "ridge": moment.ridge,
            },
            "hyperparameters": self.hyperparameters.as_dict(),
            "texts": {"hash": content_hash(list(self.texts)), "count": len(self.texts)},
            "versions": versions(),
        } | (self._others() | self._stages())

    def _others(self) -> dict[str, Any]:
        """Second moments of other layers; empty where there are none."""
        hashes = {str(layer): each.content_hash for layer, each in self.second_moments.items()}
        return {"second_moments": hashes} if hashes else {}

    def _stages(self) -> dict[str, Any]:
        """What is not as usual, stage by stage; empty for an ordinary study."""
        stages: dict[str, Any] = {
            "key_source": self.key_source.name,
            "value_interventions": [change.name for change in self.model.interventions],
            "evaluation_interventions": [change.name for change in self.evaluated.interventions],
            "text_bos": self.text_bos.value,
        }
        usual = [ORDINARY_KEYS.name, [], [], BosPolicy.WITHOUT.value]
        return {} if list(stages.values()) == usual else {"stages": stages}


def kept_perplexity(
    model: Model, texts: Sequence[str], *, bos: BosPolicy, work: Path
) -> Perplexity:
    """Read the perplexity of a model as it is from a folder, or measure it and leave it there.

    While something disturbs the model (``Model.disturbance``) nothing is read or left.

    Args:
        model: The model, or a view of it.
        texts: The sentences.
        bos: Their BOS policy.
        work: Folder of finished parts.
    """
    if model.disturbance is not None:
        return perplexity(model, texts, bos=bos)
    key = _measured_on(model, texts, bos, [])
    path = work / "original" / f"{key[:24]}.json"
    try:
        record = read_record(path, "a kept perplexity")
        return Perplexity(
            mean=float(record["mean"]),
            corpus=float(record["corpus"]),
            per_sentence=tuple(map(float, record["per_sentence"])),
        )
    except (BadInputError, KeyError, TypeError, ValueError):
        found = perplexity(model, texts, bos=bos)
        # A model that gives NaN has nothing to keep, and JSON has no such number.
        if not math.isnan(found.corpus) and _measured_on(model, texts, bos, []) == key:
            write_record(path, asdict(found))
        return found


def _measured_on(
    model: Model, texts: Sequence[str], bos: BosPolicy, settings: Sequence[Any]
) -> str:
    return content_hash([model.with_bos(bos).identity(), list(texts), *settings])
