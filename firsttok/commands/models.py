"""``firsttok models``: list the known models, or pull one into the cache."""

import argparse

from firsttok.console import note, print_table, show
from firsttok.errors import BadInputError
from firsttok.models import CATALOG, find_spec, load, pull
from firsttok.models.location import check_hub_copy

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """List the models, or pull the named one."""
    if args.action == "list":
        _list()
        return
    spec = find_spec(args.name)
    if spec is None:
        raise BadInputError(
            f"no model is called {args.name!r}; see the names with: firsttok models list"
        )
    if spec.hub_id is None:
        where = pull(spec.name, accept_terms=args.accept_terms)
        note(f"{spec.name} is in {where}")
    else:
        model = load(spec.name)
        check_hub_copy(spec.hub_id, spec.revision)
        note(f"{spec.name} is in the hub's cache ({model.source})")


def _list() -> None:
    rows = [
        [
            spec.name,
            spec.hub_id or "package index",
            spec.layer,
            spec.hyperparameters.steps,
            f"{spec.hyperparameters.weight_decay:g}",
        ]
        for spec in CATALOG
    ]
    print_table("Models", ["name", "from", "layer", "steps", "weight decay"], rows)
    for spec in CATALOG:
        show(f"{spec.name}: {spec.note}")
