"""v*, the value that makes the model answer the new target (Meng et al. 2022, Section 3.1).

What does not depend on delta runs once: the blocks below the edited layer, and the tokens before
the subject's last one. Only the rest is run in every step, for several facts side by side.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from firsttok.contexts import ContextSet
from firsttok.data import Fact
from firsttok.editing.methods import Slot
from firsttok.errors import BadInputError, NonFiniteError
from firsttok.hyperparameters import Hyperparameters
from firsttok.models import Model, Tail, capture_tail
from firsttok.prompts import Prompt, fact_prompt, pad, positions, subject_prompt, with_target
from firsttok.tensors import ValueMatrix, ValueVector

__all__ = ["Value", "optimise_values"]

FACTS_PER_BATCH = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class Value:
    """An optimised value with its trace."""

    target: ValueVector
    """v* = anchor + delta."""
    anchor: ValueVector
    """The MLP's output that delta is added to."""
    slot: Slot
    """Which key's output the anchor is."""
    losses: tuple[float, ...]
    """Loss of every iteration, before its update."""

    @property
    def steps(self) -> int:
        """Number of loss evaluations; the updates are one fewer."""
        return len(self.losses)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Problem:
    """The rows of several facts in one batch: every context with the target, then the KL prompt."""

    tail: Tail
    subject: int
    """Column of the replayed ones that holds every subject's last token."""
    where: Tensor
    """[row, suffix]: places whose logits enter the loss."""
    labels: Int[Tensor, "place"]
    """Token to be predicted at each place; -1 at the KL places."""
    weights: Float[Tensor, "place"]
    """Weight of each place in its fact's NLL; 0 at the KL places."""
    row_owner: Int[Tensor, "row"]
    """Fact of each row."""
    place_owner: Int[Tensor, "place"]
    """Fact of each place."""

    def only(self, facts: Sequence[int]) -> "_Problem":
        """Drop the rows of all other facts."""
        keep = torch.tensor(list(facts), device=self.row_owner.device)
        rows = torch.isin(self.row_owner, keep).nonzero()[:, 0]
        places = torch.isin(self.place_owner, keep)
        return _Problem(
            tail=self.tail.rows(rows),
            subject=self.subject,
            where=self.where[rows],
            labels=self.labels[places],
            weights=self.weights[places],
            row_owner=self.row_owner[rows],
            place_owner=self.place_owner[places],
        )


def optimise_values(
    model: Model,
    facts: Sequence[Fact],
    anchors: Float[Tensor, "fact d_model"],
    *,
    contexts: ContextSet,
    slot: Slot,
    layer: int,
    hyperparameters: Hyperparameters,
    on_step: Callable[[int], None] | None = None,
) -> list[Value]:
    """Optimise v* for some facts; each has its own delta, clamp, Adam state and early stop.

    The loss is the mean over contexts of the target's mean token NLL, plus ``kl`` times the
    divergence KL(after || before) at the subject's last token of ``"{subject} is a"``, plus
    ``weight_decay * ||delta|| / ||anchor||^2``. The direction of the divergence is the released
    code's: it calls ``kl_div(before, after)``, whose expectation runs over *after*.

    Args:
        model: The model, unedited.
        facts: The facts.
        anchors: MLP output each delta is added to, one row per fact.
        contexts: Contexts of the rewriting prompts.
        slot: What the anchors are, for the record.
        layer: Layer to edit.
        hyperparameters: Settings.
        on_step: Called with the number of loss evaluations just made.

    Raises:
        NonFiniteError: If a loss is NaN or infinite.
        BadInputError: If facts and anchors differ in number.
    """
    if len(facts) != len(anchors):
        raise BadInputError(f"{len(facts)} facts need as many anchors, not {len(anchors)}")
    values: list[Value] = []
    for start in range(0, len(facts), FACTS_PER_BATCH):
        chunk = facts[start : start + FACTS_PER_BATCH]
        values += _optimise(
            model,
            _problem(model, chunk, contexts, layer),
            anchors[start : start + FACTS_PER_BATCH],
            [fact.prompt for fact in chunk],
            slot=slot,
            hyperparameters=hyperparameters,
            on_step=on_step,
        )
    return values


def _problem(model: Model, facts: Sequence[Fact], contexts: ContextSet, layer: int) -> _Problem:
    rows: list[Prompt] = []
    targets: list[tuple[int, ...]] = []
    owners: list[int] = []
    for owner, fact in enumerate(facts):
        for template in contexts.templates:
            prompt = fact_prompt(model, fact, template)
            full = with_target(model, prompt, fact.target_new)
            # The last target token is predicted but never read.
            rows.append(
                Prompt(
                    text=full.text,
                    token_ids=full.token_ids[:-1],
                    subject_position=full.subject_position,
                )
            )
            targets.append(full.target_ids)
            owners.append(owner)
        rows.append(subject_prompt(model, f"{fact.subject} is a", (0, len(fact.subject))))
        targets.append(())
        owners.append(owner)
    batch = pad(model, rows, side="subject")
    column = int(positions(rows).max())
    # Where a token may see later ones, no column is out of delta's reach.
    cut = column if batch.visible is None else 0
    where = torch.zeros(len(rows), batch.tokens.shape[1] - cut, dtype=torch.bool)
    labels: list[int] = []
    weights: list[float] = []
    place_owner: list[int] = []
    for row, (prompt, target, owner) in enumerate(zip(rows, targets, owners, strict=True)):
        start = int(batch.starts[row])
        if target:
            end = start + len(prompt.token_ids) - cut
            where[row, end - len(target) : end] = True
            labels += target
            weights += [1 / (len(target) * len(contexts.templates))] * len(target)
        else:
            where[row, column - cut] = True
            labels.append(-1)
            weights.append(0.0)
        place_owner += [owner] * max(len(target), 1)
    device = model.device
    return _Problem(
        tail=capture_tail(model, batch, layer=layer, cut=cut),
        subject=column - cut,
        where=where.to(device),
        labels=torch.tensor(labels, device=device),
        weights=torch.tensor(weights, device=device, dtype=model.dtype),
        row_owner=torch.tensor(owners, device=device),
        place_owner=torch.tensor(place_owner, device=device),
    )


def _optimise(
    model: Model,
    problem: _Problem,
    anchors: ValueMatrix,
    texts: Sequence[str],
    *,
    slot: Slot,
    hyperparameters: Hyperparameters,
    on_step: Callable[[int], None] | None,
) -> list[Value]:
    site = model.site(problem.tail.layer)
    delta = torch.zeros_like(anchors, requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=hyperparameters.learning_rate)
    anchor_norms = anchors.norm(dim=1)
    traces: list[list[float]] = [[] for _ in texts]
    finished: dict[int, Tensor] = {}
    before: Tensor | None = None
    for step in range(hyperparameters.steps):
        with torch.enable_grad():
            optimiser.zero_grad()
            log_probs = _log_probs(model, problem, site.value_hook, delta)
            is_kl = problem.labels < 0
            kl_owner = problem.place_owner[is_kl]
            if before is None:
                before = torch.empty(len(texts), log_probs.shape[1]).to(log_probs)
                before[kl_owner] = log_probs[is_kl].detach()
            nll = -log_probs.gather(1, problem.labels.clamp_min(0)[:, None])[:, 0]
            loss = torch.zeros_like(anchor_norms).index_add(
                0, problem.place_owner, nll * problem.weights
            )
            after = log_probs[is_kl]
            divergence = (after.exp() * (after - before[kl_owner])).sum(1)
            loss = loss.index_add(0, kl_owner, hyperparameters.kl * divergence)
            decay = hyperparameters.weight_decay * delta.norm(dim=1) / anchor_norms**2
            loss = loss + decay
        active = [i for i in range(len(texts)) if i not in finished]
        ended: list[int] = []
        for i in active:
            current = float(loss[i].detach())
            if not torch.isfinite(loss[i]):
                raise NonFiniteError(
                    f"the loss of {texts[i]!r} became {current} at step {step}; "
                    "lower the learning rate or use float32"
                )
            traces[i].append(current)
            if current < hyperparameters.stop_below or step == hyperparameters.steps - 1:
                finished[i] = (anchors[i] + delta[i]).detach().clone()
                ended.append(i)
        if on_step is not None:
            on_step(len(active))
        remaining = [i for i in active if i not in ended]
        if not remaining:
            break
        with torch.enable_grad():
            loss[remaining].sum().backward()
        optimiser.step()
        with torch.no_grad():
            most = hyperparameters.clamp * anchor_norms
            norms = delta.norm(dim=1)
            delta.mul_(torch.where(norms > most, most / norms, 1.0)[:, None])
        if ended:
            problem = problem.only(remaining)
    return [
        Value(target=finished[i], anchor=anchors[i], slot=slot, losses=tuple(traces[i]))
        for i in range(len(texts))
    ]


def _log_probs(
    model: Model, problem: _Problem, hook_name: str, delta: ValueMatrix
) -> Float[Tensor, "place vocab"]:
    def add_delta(output: Tensor, hook: object) -> Tensor:  # noqa: ARG001
        before, chosen, after = output.split(
            [problem.subject, 1, output.shape[1] - problem.subject - 1], dim=1
        )
        return torch.cat([before, chosen + delta[problem.row_owner][:, None], after], dim=1)

    logits = problem.tail.run(model, problem.where, [(hook_name, add_delta)])
    return logits.log_softmax(-1)
