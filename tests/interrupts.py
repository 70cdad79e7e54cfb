"""Interrupt `applied` and edits at random moments, and look whether the model is as it was.

``python tests/interrupts.py COUNT [SEED]`` prints one JSON object. It is a program of its own since
the tests check every call of firsttok with code that is not firsttok's.
"""

import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny import BARE_ONLY, FACTS, build, load_tiny, same_weights, weights

from firsttok.editing import ROME, compute_edit
from firsttok.hyperparameters import Hyperparameters
from firsttok.models import Model
from firsttok.second_moment import SecondMoment


def press(*_: object) -> None:
    """What the timer's signal does: as if Ctrl-C were pressed."""
    signal.raise_signal(signal.SIGINT)


def raise_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


class Storm:
    """Interrupts of one action."""

    def __init__(self, model: Model, seed: int) -> None:
        self.model = model
        self.random = random.Random(seed)
        self.before = weights(model)
        self.places = {layer: model.site(layer).weight.data_ptr() for layer in (1, 2)}
        self.left_changed = 0
        signal.signal(signal.SIGALRM, press)
        signal.signal(signal.SIGINT, raise_interrupt)

    def interrupt(self, action: Callable[[], object], count: int, longest: float) -> int:
        """Interrupt an action so many times, and count how often it had ended by itself."""
        done = 0
        for number in range(count):
            done += self._until_interrupted(action, longest)
            if number % 10_000 == 9_999:
                sys.stderr.write(f"{number + 1} of {count}, left changed {self.left_changed}\n")
        self.look(thoroughly=True)
        return done

    def _until_interrupted(self, action: Callable[[], object], longest: float) -> int:
        done = 0
        try:
            # Again each second, since Python drops what is raised inside a `__del__`.
            signal.setitimer(signal.ITIMER_REAL, self.random.uniform(1e-6, longest), 1.0)
            while True:
                action()
                done += 1
        except KeyboardInterrupt:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.look(thoroughly=self.random.random() < 1e-3)
        return done

    def look(self, *, thoroughly: bool) -> None:
        """Whether anything is left: an edit, a changed weight, a hook, a handler."""
        model = self.model
        changed = (
            model.edits != ()
            or any(model.site(n).weight.data_ptr() != self.places[n] for n in self.places)
            or model.disturbance is not None
            or signal.getsignal(signal.SIGINT) is not raise_interrupt
        )
        if thoroughly:
            changed = changed or not same_weights(weights(model), self.before)
            changed = changed or bool(model.weights.changes())
        self.left_changed += changed


def main(count: int, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        build("llama", Path(folder))
        model = load_tiny(Path(folder))

    def edit(steps: int = 2) -> Any:
        return compute_edit(
            model,
            FACTS[0],
            method=ROME,
            contexts=BARE_ONLY,
            second_moment=SecondMoment.identity(48),
            layer=1,
            hyperparameters=Hyperparameters(steps=steps),
        )

    one = edit()
    start = time.perf_counter()
    edit()
    length = time.perf_counter() - start
    storm = Storm(model, seed)
    view = model.edited(one)

    def apply() -> None:
        with one.applied(model), one.applied(model):
            pass

    def run_view() -> None:
        with view.standing(), view.running():
            pass

    return {
        "applied": storm.interrupt(apply, count // 2, 4e-3),
        "view": storm.interrupt(run_view, count // 4, 1e-3),
        "edits": storm.interrupt(edit, count - count // 2 - count // 4, 1.5 * length),
        "interrupts": count,
        "left changed": storm.left_changed,
    }


if __name__ == "__main__":
    given = [int(text) for text in sys.argv[1:]]
    sys.stdout.write(json.dumps(main(given[0], given[1] if len(given) > 1 else 0)) + "\n")
