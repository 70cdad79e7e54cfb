"""``firsttok data``: list the published data sets, pull one, make up facts or a corpus."""

import argparse
from itertools import islice
from pathlib import Path

from firsttok.console import print_table, progress_bar, show
from firsttok.data import DATA_SETS, is_pulled_data, pull_data, write_corpus, write_facts
from firsttok.errors import BadInputError

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """List the data sets, pull the named one, write synthetic facts or a model's own text."""
    actions = {"list": _list, "pull": _pull, "sample": _sample, "synthesize": _synthesize}
    actions[args.action](args)


def _list(_: argparse.Namespace) -> None:
    rows = [
        [
            each.name,
            each.kind,
            each.records,
            each.megabytes,
            "no address" if each.url is None else "SHA-256" if each.sha256 else "at first pull",
            "yes" if is_pulled_data(each.name) else "no",
        ]
        for each in DATA_SETS
    ]
    print_table("Data sets", ["name", "holds", "records", "MB", "pinned", "in the cache"], rows)
    for each in DATA_SETS:
        show(f"{each.name}: {each.note}")


def _pull(args: argparse.Namespace) -> None:
    with progress_bar() as progress:
        path = pull_data(
            args.name, url=args.url, sha256=args.sha256, out=args.out, progress=progress
        )
    show(str(path))


def _synthesize(args: argparse.Namespace) -> None:
    out = Path(args.out)
    if args.exclude and args.kind == "mixed":
        raise BadInputError("--exclude is for --kind hard or normal; leave it out, or add that")
    from firsttok.inputs import excluded_subjects
    from firsttok.models import load
    from firsttok.synthetic import known_facts, synthetic_facts

    excluded = excluded_subjects(args)
    model = load(args.model)
    if args.kind == "mixed":
        facts = synthetic_facts(model, args.count, seed=args.seed)
    else:
        known = known_facts(model, args.kind, seed=args.seed, exclude=excluded)
        facts = tuple(islice(known, args.count))
        if len(facts) < args.count:
            raise BadInputError(
                f"{len(facts)} {args.kind} facts can be made for {model.name}, not {args.count}; "
                "ask for fewer"
            )
    with progress_bar() as progress:
        write_facts(out, progress.track(facts, total=args.count, description="facts"))
    show(f"{args.count} facts: {out}")


def _sample(args: argparse.Namespace) -> None:
    from firsttok.evaluation import distinct_ngrams, sample_corpus
    from firsttok.models import load

    out = Path(args.out)
    model = load(args.model, device=args.device)
    with progress_bar() as progress:
        documents = sample_corpus(
            model,
            args.tokens,
            seed=args.seed,
            temperature=args.temperature,
            top_p=args.top_p,
            progress=progress,
        )
    write_corpus(out, documents)
    share = distinct_ngrams(documents, size=4)
    show(f"{len(documents)} documents, {share:.1%} of their 4-grams distinct: {out}")
