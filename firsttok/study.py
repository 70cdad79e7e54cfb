"""A study: everything that is fixed while many facts are edited and measured."""

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.progress import Progress

from firsttok.contexts import ContextSet
from firsttok.data import Fact
from firsttok.display import Panel, Shown, Table, short_hash
from firsttok.editing import Method, RankOneEdit, ValueStore, compute_edits
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
from firsttok.prompts import fact_prompt
from firsttok.provenance import versions
from firsttok.second_moment import SecondMoment
from firsttok.storage import content_hash, read_json, write_json

__all__ = ["CaseRow", "Study", "case_row", "measure_facts"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CaseRow:
    """One fact edited by one method, with the components of the update and what it did."""

    case_id: int
    """Number of the fact in its set."""
    subject: str
    """The fact's subject."""
    prompt: str
    """The fact's prompt."""
    target_new: str
    """The fact's new target."""
    method: str
    """Name of the method."""
    first_token: bool
    """Whether the looked-up token is the very first of the sequence (BOS counts as a token)."""
    one_token: bool
    """Whether the subject is a single token."""
    numerator: float
    """As in :class:`~firsttok.editing.UpdateReport`."""
    denominator: float
    """As in :class:`~firsttok.editing.UpdateReport`, signed."""
    raw_numerator: float
    """Numerator without normalisation."""
    raw_denominator: float
    """Denominator without normalisation."""
    delta_norm: float
    """Frobenius norm of the update."""
    mean_delta: float
    """Frobenius norm over number of elements."""
    key_cosine: float
    """Cosine of k_bar and k^u."""
    key_norm_ratio: float
    """``||k^u|| / ||k_bar||``."""
    steps: int
    """Loss evaluations of the value optimisation."""
    final_loss: float
    """Loss of the last one."""
    perplexity: float
    """Mean perplexity of the edited model."""
    corpus_perplexity: float
    """Corpus-level perplexity of the edited model."""
    collapsed: bool
    """Whether the mean perplexity is above the threshold."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Study(Shown):
    """One model with its contexts, second moment, texts and settings."""

    model: Model
    """The model, unedited."""
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
    work: Path
    """Folder of finished parts, from which an interrupted run goes on."""
    key_source: KeySource = ORDINARY_KEYS
    """Where the keys of every edit come from."""
    judge: Model | None = None
    """The view the perplexity is measured on; None for ``model`` itself."""
    text_bos: BosPolicy = BosPolicy.WITHOUT
    """BOS policy of the sentences; the papers put none, even on Llama."""

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

    @cached_property
    def prepared_texts(self) -> PreparedTexts:
        """The sentences, run up to the edited layer once."""
        return prepare_texts(self.evaluated, self.texts, layer=self.layer, bos=self.text_bos)

    @cached_property
    def original_perplexity(self) -> Perplexity:
        """Perplexity of the unedited model."""
        return perplexity(self.evaluated, self.texts, bos=self.text_bos)

    def keep_original_perplexity(self) -> None:
        """Take :attr:`original_perplexity` from the work folder, or measure it and leave it there.

        To be called before anything is edited: what is kept goes by the weights as loaded.
        """
        view = self.evaluated
        parts = [view.fingerprint, str(view.dtype), repr(view.interventions), list(self.texts)]
        name = content_hash([*parts, self.text_bos.value])[:24]
        path = self.work / "original" / f"{name}.json"
        try:
            record = read_json(path, "a kept perplexity")
            kept = Perplexity(
                mean=float(record["mean"]),
                corpus=float(record["corpus"]),
                per_sentence=tuple(map(float, record["per_sentence"])),
            )
            vars(self)["original_perplexity"] = kept
        except (BadInputError, KeyError, TypeError, ValueError):
            # A model that gives NaN has nothing to keep, and JSON has no such number.
            if not math.isnan(self.original_perplexity.corpus):
                write_json(path, asdict(self.original_perplexity))

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
    def store(self) -> ValueStore:
        """Where optimised values are kept."""
        return ValueStore(self.work / "values")

    def varied(self, **changes: Any) -> "Study":
        """Return the study with some fields changed; what was measured and still holds goes along.

        Args:
            changes: New values of fields, by name.
        """
        study = replace(self, **changes)
        if study._measured_on() == self._measured_on():
            for name in ("prepared_texts", "original_perplexity"):
                if name in vars(self):
                    vars(study)[name] = vars(self)[name]
        return study

    def _measured_on(self) -> list[Any]:
        """What determines a measurement of the unedited model; its own BOS policy does not."""
        view = self.evaluated
        return [view.bridge, view.interventions, self.layer, self.texts, self.text_bos]

    def edits(
        self,
        facts: Sequence[Fact],
        methods: Sequence[Method],
        *,
        on_step: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[Fact, dict[str, RankOneEdit]]]:
        """Compute edits under the study's settings; values that are in its store are read there.

        Args:
            facts: The facts.
            methods: The methods.
            on_step: As for :func:`~firsttok.editing.compute_edits`.

        Yields:
            Each fact with its edits by method name, in order.
        """
        return compute_edits(
            self.model,
            facts,
            methods=methods,
            contexts=self.contexts,
            second_moment=self.second_moment,
            layer=self.layer,
            hyperparameters=self.hyperparameters,
            key_source=self.key_source,
            store=self.store,
            on_step=on_step,
        )

    def provenance(self) -> dict[str, Any]:
        """Everything that determines the numbers of this study."""
        model, moment = self.model, self.second_moment
        return {
            "model": {
                "name": model.label,
                "source": model.source,
                "fingerprint": model.fingerprint,
                "dtype": str(model.dtype).removeprefix("torch."),
                "bos": model.bos.value,
                "bos_token_ids": list(model.leading_ids),
            },
            "layer": self.layer,
            "contexts": {"hash": self.contexts.content_hash, "seed": self.contexts.seed},
            "second_moment": {
                "corpus": moment.corpus,
                "corpus_hash": moment.corpus_hash,
                "tokens": moment.tokens,
                "condition_number": moment.condition_number if moment.tokens else 1.0,
                "ridge": moment.ridge,
            },
            "hyperparameters": self.hyperparameters.as_dict(),
            "texts": {"hash": content_hash(list(self.texts)), "count": len(self.texts)},
            "versions": versions(),
        } | self._stages()

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


def measure_facts(
    study: Study,
    facts: Sequence[Fact],
    methods: Sequence[Method],
    *,
    progress: Progress | None = None,
    label: str = "editing",
) -> list[CaseRow]:
    """Edit every fact by every method and measure the perplexity after each edit.

    Finished rows are kept in the study's work folder, and an interrupted run goes on from there.

    Returns:
        The rows, fact by fact, the methods in order.

    Raises:
        BadInputError: If there are no facts, or two of them have one number.
    """
    if not facts:
        raise BadInputError("there are no facts to edit; give at least one")
    numbered = {fact.case_id: fact for fact in facts}
    for fact in facts:
        if numbered[fact.case_id] != fact:
            raise BadInputError(
                f"two facts have the case_id {fact.case_id}, {fact.prompt!r} and "
                f"{numbered[fact.case_id].prompt!r}; number each once"
            )
    task = None if progress is None else progress.add_task(label, total=len(facts))
    slots = len({method.anchor for method in methods})

    def on_step(count: int) -> None:
        if progress is not None and task is not None:
            progress.advance(task, count / (slots * study.hyperparameters.steps + 3))

    paths = {
        (fact.case_id, method.name): _row_path(study, fact, method)
        for fact in facts
        for method in methods
    }
    known = {key: row for key, path in paths.items() if (row := _read_row(path)) is not None}
    open_facts = [
        fact
        for fact in facts
        if any((fact.case_id, method.name) not in known for method in methods)
    ]
    done = len(facts) - len(open_facts)
    for fact, edits in study.edits(open_facts, methods, on_step=on_step):
        missing = [method for method in methods if (fact.case_id, method.name) not in known]
        measured = study.prepared_texts.measure_edits(
            study.evaluated, [edits[method.name] for method in missing]
        )
        for method, found in zip(missing, measured, strict=True):
            row = CaseRow(**case_row(study, fact, method, edits[method.name], found))
            if math.isfinite(row.perplexity) and math.isfinite(row.corpus_perplexity):
                # JSON has no other numbers; such a row is measured again in the next run.
                write_json(paths[fact.case_id, method.name], asdict(row))
            known[fact.case_id, method.name] = row
        done += 1
        if progress is not None and task is not None:
            progress.update(task, completed=done)
    if progress is not None and task is not None:
        progress.update(task, completed=len(facts))
    return [known[fact.case_id, method.name] for fact in facts for method in methods]


def case_row(
    study: Study,
    fact: Fact,
    method: Method,
    edit: RankOneEdit,
    measured: Perplexity | None,
) -> dict[str, Any]:
    """The columns of :class:`CaseRow`, those of the perplexity only if it was measured.

    Args:
        study: The study.
        fact: The fact.
        method: The method.
        edit: The method's edit.
        measured: Perplexity under the edit.
    """
    prompt = fact_prompt(study.model, fact)
    columns = {
        "case_id": fact.case_id,
        "subject": fact.subject,
        "prompt": fact.prompt,
        "target_new": fact.target_new,
        "method": method.name,
        "first_token": prompt.subject_position == 0,
        "one_token": prompt.subject_length == 1,
        "steps": len(edit.losses),
        "final_loss": edit.losses[-1],
        **edit.report.as_dict(),
    }
    if measured is None:
        return columns
    return columns | {
        "perplexity": measured.mean,
        "corpus_perplexity": measured.corpus,
        "collapsed": measured.collapsed,
    }


def _row_path(study: Study, fact: Fact, method: Method) -> Path:
    settings = {key: value for key, value in study.provenance().items() if key != "versions"}
    # Its condition number is computed anew in every run, and its last digits hang on the machine.
    settings["second_moment"] = study.second_moment.content_hash
    if study.model.dtype is not study.model.wide_dtype:
        settings["precision"] = "keys, deltas and changes in float32"
    if "stages" in settings:
        # By their fields, not by their names, which a user gives.
        views = (study.model.interventions, study.evaluated.interventions)
        settings["stages"] = [repr(study.key_source), study.text_bos.value, *map(repr, views)]
    slots = [method.direction, method.residual, method.denominator, method.anchor]
    key = [settings, fact.as_record(), [slot.value for slot in slots]]
    return study.work / "rows" / f"{content_hash(key)[:24]}.json"


def _read_row(path: Path) -> CaseRow | None:
    try:
        record = read_json(path, "a finished row")
        return CaseRow(**{field.name: record[field.name] for field in fields(CaseRow)})
    except (BadInputError, KeyError, TypeError, json.JSONDecodeError):
        return None
