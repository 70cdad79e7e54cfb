"""How a sweep grows with the workers of a Ray cluster: ``python benchmarks/scaling.py``.

One worker, then two, each with one CPU and one thread, do the same chunks. A rate counts from when
every worker has finished its first chunk, so that loading the model is no part of it. What a case
costs beside its own work is the time between two chunks of the one worker that it did not spend on
the second.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from setting import Amounts, Setting

from firsttok.console import exit_on_error, print_table, progress_bar
from firsttok.data import builtin_sentences
from firsttok.editing import ROME
from firsttok.measuring import Plan
from firsttok.storage import write_json
from firsttok.study import Study
from firsttok.sweep.cluster import RayEngine, Recipe, connected
from firsttok.sweep.runner import chunks_of

PLAN = Plan(methods=(ROME,), metrics=("perplexity",))


@dataclass(frozen=True, kw_only=True)
class Rate:
    """What some workers did."""

    workers: int
    """Their number."""
    chunks: int
    """Chunks that were counted."""
    seconds: float
    """Time they took."""
    facts_per_minute: float
    """Throughput."""
    overhead: float | None
    """Share of the time that went into no chunk; only of one worker."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--facts", type=int, default=48, help="default: 48")
    parser.add_argument("--chunk", type=int, default=4, help="facts in a chunk (default: 4)")
    parser.add_argument("--repeats", type=int, default=2, help="of each number of workers")
    parser.add_argument("--out", metavar="FILE", help="JSON of the rates")
    args = parser.parse_args()
    setting = Setting(amounts=Amounts(facts=args.facts), folder=Path())
    study = Study(
        model=setting.model,
        contexts=setting.contexts,
        second_moment=setting.moment,
        layer=setting.layer,
        hyperparameters=setting.hyperparameters,
        texts=builtin_sentences(),
        work=Path(),
    )
    rates: list[Rate] = []
    with connected(None) as ray, progress_bar() as progress:
        recipe = Recipe.of(study, source=setting.name, device="cpu")
        task = progress.add_task("facts", total=args.facts * 2 * args.repeats)
        for workers in (1, 2) * args.repeats:
            engine = RayEngine(
                ray=ray, recipe=recipe, plan=PLAN, label=study.model.label, actors=workers
            )
            chunks = list(chunks_of(setting.facts, args.chunk))
            moments: list[tuple[float, int, float]] = []
            for done in engine.run(chunks, on_facts=lambda count: progress.advance(task, count)):
                moments.append((time.perf_counter(), len(done.rows), done.seconds))
            rates.append(_rate(workers, moments))
    lines = [list(asdict(rate).values()) for rate in rates]
    print_table("Workers of one thread each", list(asdict(rates[0])), lines)
    per = {
        workers: [rate.facts_per_minute for rate in rates if rate.workers == workers]
        for workers in (1, 2)
    }
    ratios = [two / one for one, two in zip(per[1], per[2], strict=True)]
    sys.stdout.write(f"two workers over one: {', '.join(f'{ratio:.2f}' for ratio in ratios)}\n")
    if args.out:
        record: dict[str, Any] = {"rates": [asdict(rate) for rate in rates], "ratios": ratios}
        write_json(Path(args.out), record)


def _rate(workers: int, moments: Sequence[tuple[float, int, float]]) -> Rate:
    """The rate from when every worker, about, has done its first chunk."""
    counted = moments[workers - 1 :]
    seconds = counted[-1][0] - counted[0][0]
    facts = sum(rows for _, rows, _ in counted[1:])
    idle = sum(late[0] - early[0] - late[2] for early, late in pairwise(counted))
    return Rate(
        workers=workers,
        chunks=len(counted) - 1,
        seconds=seconds,
        facts_per_minute=60 * facts / seconds,
        overhead=idle / seconds if workers == 1 else None,
    )


if __name__ == "__main__":
    raise SystemExit(exit_on_error(main))
