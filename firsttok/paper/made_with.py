"""What results were made with, in words; and whether all of them were made with the same."""

from collections.abc import Mapping, Sequence
from typing import Any

from firsttok.paper.claims import ScriptResult

__all__ = ["common_facts", "script_facts"]

SAME = ("model", "weights", "layer", "second moment", "sentences", "versions")
"""What should be the same for all scripts of one folder."""


def script_facts(result: ScriptResult) -> tuple[tuple[str, str], ...]:
    """A script's provenance by label; what it did not record is left out."""
    given = result.provenance
    model = _part(given, "model")
    contexts, moment = _part(given, "contexts"), _part(given, "second_moment")
    texts = _part(given, "texts")
    facts = {
        "model": _join(model.get("name"), model.get("source")),
        "weights": model.get("fingerprint"),
        "dtype": model.get("dtype"),
        "BOS": _bos(model),
        "layer": given.get("layer"),
        "seed": given.get("seed"),
        "contexts": _join(_named("seed", contexts.get("seed")), _short(contexts.get("hash"))),
        "second moment": _join(
            moment.get("corpus"),
            _named("tokens", moment.get("tokens")),
            _short(moment.get("corpus_hash")),
            _named("ridge", moment.get("ridge")),
        ),
        "sentences": _join(texts.get("count"), _short(texts.get("hash"))),
        "hyperparameters": _pairs(_part(given, "hyperparameters")),
        "versions": _pairs(_part(given, "versions")),
        "seconds": given.get("seconds"),
        "command": given.get("command"),
    }
    return tuple((label, str(value)) for label, value in facts.items() if value not in (None, ""))


def common_facts(
    results: Sequence[ScriptResult],
) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """Provenance that all results share, and labels on which they should agree and do not."""
    listed = [script_facts(result) for result in results]
    shared = tuple(fact for fact in listed[0] if all(fact in facts for facts in listed))
    mixed = tuple(label for label in SAME if _differs([dict(facts) for facts in listed], label))
    # A duration is no setting, though two may be equal by chance.
    return tuple(fact for fact in shared if fact[0] not in ("seconds", "command")), mixed


def _differs(listed: Sequence[Mapping[str, str]], label: str) -> bool:
    # A second moment counts BOS as a token, and some scripts take BOS away on purpose.
    groups: dict[str | None, set[str | None]] = {}
    for facts in listed:
        group = facts.get("BOS") if label == "second moment" else None
        groups.setdefault(group, set()).add(facts.get(label))
    return any(len(found) > 1 for found in groups.values())


def _part(given: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = given.get(name)
    return part if isinstance(part, Mapping) else {}


def _bos(model: Mapping[str, Any]) -> str | None:
    if "bos" not in model:
        return None
    ids = model.get("bos_token_ids") or "none"
    return f"{str(model['bos']).replace('_', ' ')} (token ids before a prompt: {ids})"


def _short(digest: Any) -> str | None:
    return f"SHA-256 {str(digest)[:12]}" if digest else None


def _named(name: str, value: Any) -> str | None:
    return (
        None
        if value is None
        else f"{name} {value:,}"
        if isinstance(value, int)
        else f"{name} {value}"
    )


def _pairs(part: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in part.items())


def _join(*parts: Any) -> str:
    return ", ".join(str(part) for part in parts if part not in (None, ""))
