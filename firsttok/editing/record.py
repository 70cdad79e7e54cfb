"""The record of an edit: what its file says besides the tensors."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from firsttok.data import Fact
from firsttok.errors import BadInputError
from firsttok.provenance import versions

__all__ = [
    "EditRecord",
    "FactRecord",
    "ModelRecord",
    "SavedEdit",
    "StandingRecord",
    "checked_record",
    "edit_record",
]

_open = with_config(ConfigDict(extra="allow", strict=True))
"""Later versions, and editors of a user's own, say more."""


@_open
class _Target(TypedDict, total=False):
    str: str


# Names with a space cannot be those of a class's fields.
_Scaled = TypedDict("_Scaled", {"scaled by": float}, total=False)
_Disturbed = TypedDict("_Disturbed", {"disturbed by": str}, total=False)


@_open
class _Rewrite(TypedDict, total=False):
    prompt: str
    subject: str
    target_new: _Target


@_open
class FactRecord(TypedDict, total=False):
    """A fact in COUNTERFACT's schema, and the file it is from."""

    case_id: int
    requested_rewrite: _Rewrite
    source: str


@_open
class StandingRecord(TypedDict):
    """An edit that stood in the model."""

    hash: str
    title: str


@_open
class ModelRecord(_Disturbed, total=False):
    """The model, or the view of it, that an edit was computed on; see ``Model.record``."""

    name: str
    source: str
    fingerprint: str
    config: str
    tokenizer: str
    dtype: str
    bos: str
    bos_token_ids: list[int]
    interventions: list[str]
    edits: list[StandingRecord]
    changed: dict[str, str]


@_open
class EditRecord(_Scaled, total=False):
    """What an edit was made for, by whom and with what; an editor of one's own may leave gaps."""

    model: ModelRecord
    facts: list[FactRecord]
    layer: int
    method: dict[str, str]
    """Name of a method of the ROME family, and the key in each of its slots."""
    editor: dict[str, Any]
    """Name of any other editor, and its settings."""
    contexts: dict[str, Any]
    second_moment: dict[str, Any]
    hyperparameters: dict[str, Any]
    statistics: dict[str, Any]
    """What the next edit of a sequence goes on from, where an editor counts over edits (MEND)."""
    keys: str
    parameters: dict[str, str]
    """Name of each changed weight in the checkpoint, by its edit site."""
    parts: "list[EditRecord]"
    """The records of the edits that a sum is of."""
    versions: dict[str, str]


@_open
class SavedEdit(TypedDict):
    """The metadata of a file of an edit."""

    components: dict[str, float]
    losses: list[float]
    provenance: EditRecord


def edit_record(model: Mapping[str, Any], facts: Sequence[Fact], **more: Any) -> EditRecord:
    """Put a record together, with the versions of what computed the edit.

    Args:
        model: What ``Model.record`` says.
        facts: What the edit writes.
        more: Other fields.
    """
    written = [fact.as_record() | {"source": fact.source} for fact in facts]
    record = {"model": dict(model), "facts": written, **more, "versions": versions()}
    return cast("EditRecord", record)


@cache
def _saved_edit() -> Any:
    # Made on first use: it takes longer than all checks of a session.
    return TypeAdapter(SavedEdit)


def checked_record(record: object) -> SavedEdit:
    """Return what the metadata of an edit's file hold, or are to hold.

    Raises:
        BadInputError: If a field is missing or of another type; names it.
    """
    try:
        return _saved_edit().validate_python(record)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise BadInputError(
            f"the edit's record has an unusable {place or 'content'} ({first['msg']}); correct it"
        ) from None
