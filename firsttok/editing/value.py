"""v*, the value that makes the model answer the new target (Meng et al. 2022, Section 3.1).

What does not depend on delta runs once: the blocks up to the edited one, and the tokens before the
subject's last one. Only the rest is run in every step, for several facts side by side.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from firsttok.contexts import ContextSet
from firsttok.data import Fact
from firsttok.editing.methods import Slot
from firsttok.engine.batching import BATCH_COST, cheapest_split
from firsttok.engine.tail import Replay, Tail
from firsttok.errors import BadInputError, NonFiniteError, UnsupportedModelError
from firsttok.hyperparameters import Hyperparameters
from firsttok.models import Model, capture_tail
from firsttok.prompts import Prompt, fact_prompt, pad, positions, subject_prompt, with_target
from firsttok.tensors import TokenBatch, ValueMatrix, ValueVector

__all__ = ["Value", "memory_budget", "optimise_values"]

CPU_BUDGET = 3 * 2**27
"""Bytes of activations of one batch for each thread on a CPU; on a GPU it is half of what is free.

More is somewhat faster, the more so the more threads there are; but scripts of ``firsttok
reproduce``, of one thread each, hold it at the same time.
"""
_MOST_THREADS = 4
"""Threads that the budget grows with."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Value:
    """An optimised value with its trace."""

    target: ValueVector
    """v* = anchor + delta."""
    anchor: ValueVector
    """What delta is added to: the MLP's output, or for MEMIT the residual stream."""
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


@dataclass(frozen=True, kw_only=True)
class _FactRows:
    """The rows of one fact: every context with the target, then the KL prompt."""

    prompts: tuple[Prompt, ...]
    """The last target token is predicted but never read, so it is not among the tokens."""
    targets: tuple[tuple[int, ...], ...]
    """Tokens to be predicted after each row; none after the KL prompt."""

    @property
    def prefix(self) -> int:
        """Columns before the subject's last token, in the row that has most."""
        return max(row.subject_position or 0 for row in self.prompts)

    @property
    def width(self) -> int:
        """Columns from the subject's last token to the end of the longest row."""
        return max(len(row.token_ids) - (row.subject_position or 0) for row in self.prompts)

    @property
    def tokens(self) -> int:
        """Tokens from the subject's last one on, all rows together."""
        return sum(len(row.token_ids) - (row.subject_position or 0) for row in self.prompts)

    @property
    def places(self) -> int:
        """Places whose logits enter the loss."""
        return sum(max(len(target), 1) for target in self.targets)


def optimise_values(
    model: Model,
    facts: Sequence[Fact],
    anchors: Float[Tensor, "fact d_model"],
    *,
    contexts: ContextSet,
    slot: Slot,
    layer: int,
    hyperparameters: Hyperparameters,
    views: Sequence[Model] | None = None,
    stream: bool = False,
    on_step: Callable[[int], None] | None = None,
    on_value: Callable[[int, Value], None] | None = None,
    on_failure: Callable[[int, NonFiniteError], None] | None = None,
) -> list[Value]:
    """Optimise v* for some facts; each has its own delta, clamp, Adam state and early stop.

    The loss is the mean over contexts of the target's mean token NLL, plus ``kl`` times the
    divergence KL(after || before) at the subject's last token of ``"{subject} is a"``, plus
    ``weight_decay * ||delta|| / ||anchor||^2``. The direction of the divergence is the released
    code's: it calls ``kl_div(before, after)``, whose expectation runs over *after*.

    Facts whose rows are about as wide share a batch, as many as the memory budget holds. Delta, its
    optimiser and the losses are in float32 at least, whatever the type of the weights.

    Args:
        model: The model, unedited.
        facts: The facts.
        anchors: MLP output each delta is added to, one row per fact.
        contexts: Contexts of the rewriting prompts.
        slot: What the anchors are, for the record.
        layer: Layer to edit.
        hyperparameters: Settings.
        views: For each fact the view of the model that it is optimised on, where they are several;
            they may differ from the model, and from each other, in the MLP's output weight at the
            layer alone, so that they share what is above it.
        stream: Add delta to the residual stream after the layer, as MEMIT does, and not to the
            MLP's output; the anchors are states of that stream.
        on_step: Called with the number of loss evaluations just made.
        on_value: Called with the index of a fact and its value when its batch is done.
        on_failure: Called with the index of a fact whose loss is NaN or infinite, and the error; it
            has no value then, and the others go on. None to raise the error.

    Returns:
        The values, in the order of the facts; with ``on_failure``, of those that have one.

    Raises:
        NonFiniteError: If a loss is NaN or infinite, without ``on_failure``.
        BadInputError: If facts and anchors differ in number.
        UnsupportedModelError: If the model runs whole, and delta is to be added to the stream.
    """
    if stream and model.replay is Replay.WHOLE:
        raise UnsupportedModelError(
            f"{model.name} is no plain stack of blocks, so that nothing can be added to its "
            "residual stream alone; take an editor of the ROME family"
        )
    if len(facts) != len(anchors):
        raise BadInputError(f"{len(facts)} facts need as many anchors, not {len(anchors)}")
    anchors = anchors.to(torch.promote_types(anchors.dtype, model.wide_dtype))
    rows = [_fact_rows(model, fact, contexts) for fact in facts]
    own = [model] * len(facts) if views is None else views
    values: dict[int, Value] = {}
    for group in _groups(model, rows, layer, views):

        def fail(place: int, error: NonFiniteError, group: Sequence[int] = group) -> None:
            if on_failure is None:
                raise error
            on_failure(group[place], error)

        # Where the edited block itself runs again, all of a group are of one view.
        shared = own[group[0]] if views is None or model.replay is not Replay.ABOVE else model
        with shared.standing():
            computed = _optimise(
                shared,
                _problem(
                    shared,
                    [rows[i] for i in group],
                    layer,
                    [own[i] for i in group],
                    replay=Replay.ABOVE if stream else shared.replay,
                ),
                anchors[group],
                [facts[i].prompt for i in group],
                slot=slot,
                hyperparameters=hyperparameters,
                on_step=on_step,
                fail=fail,
            )
        for place, value in computed.items():
            values[group[place]] = value
            if on_value is not None:
                on_value(group[place], value)
    return [values[index] for index in sorted(values)]


def _fact_rows(model: Model, fact: Fact, contexts: ContextSet) -> _FactRows:
    prompts: list[Prompt] = []
    targets: list[tuple[int, ...]] = []
    for template in contexts.templates:
        bare = fact_prompt(model, fact, template)
        full = with_target(model, bare, fact.target_new, join=fact.join)
        prompts.append(
            Prompt(
                text=full.text,
                token_ids=full.token_ids[:-1],
                subject_position=full.subject_position,
            )
        )
        targets.append(full.target_ids)
    span = (0, len(fact.subject))
    kl_prompt = subject_prompt(model, f"{fact.subject} is a", span, straddle=fact.straddle)
    if kl_prompt.subject_position is not None and not model.sees_later:
        # What follows the subject's last token is never read, and cannot be seen from there.
        read = kl_prompt.token_ids[: kl_prompt.subject_position + 1]
        kl_prompt = replace(kl_prompt, token_ids=read)
    return _FactRows(prompts=(*prompts, kl_prompt), targets=(*targets, ()))


def _groups(
    model: Model,
    rows: Sequence[_FactRows],
    layer: int,
    views: Sequence[Model] | None = None,
) -> list[list[int]]:
    """Facts that share a batch: the split with the fewest tokens, padding and batches counted."""
    if views is not None and model.replay is not Replay.ABOVE:
        # By object: equal views at two addresses only cost a batch.
        parts: dict[int, list[int]] = {}
        for index, view in enumerate(views):
            parts.setdefault(id(view), []).append(index)
        return [
            [part[i] for i in group]
            for part in parts.values()
            for group in _split(model, [rows[i] for i in part], layer)
        ]
    return _split(model, rows, layer)


def _split(model: Model, rows: Sequence[_FactRows], layer: int) -> list[list[int]]:
    order = sorted(range(len(rows)), key=lambda i: (rows[i].width, rows[i].prefix))
    budget = memory_budget(model)

    def batch(start: int, end: int) -> list[_FactRows]:
        return [rows[i] for i in order[start:end]]

    packed = model.runs_packed

    def tokens(start: int, end: int) -> int:
        if packed:
            return sum(fact.tokens for fact in batch(start, end))
        return sum(len(fact.prompts) for fact in batch(start, end)) * rows[order[end - 1]].width

    split = cheapest_split(
        len(order),
        tokens,
        lambda start, end: _bytes_of(model, batch(start, end), layer, packed=packed) <= budget,
        batch_cost=BATCH_COST["cuda" if model.device.type == "cuda" else "cpu"],
    )
    return [[order[place] for place in places] for places in split]


def memory_budget(model: Model) -> int:
    """Bytes that one batch of an optimisation may hold.

    Args:
        model: The model that is optimised on.
    """
    if model.device.type != "cuda":
        return CPU_BUDGET * min(torch.get_num_threads(), _MOST_THREADS)
    free = torch.cuda.mem_get_info(model.device)[0]
    # What the allocator holds in reserve is free as well.
    held = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    return (free + held) // 2


def _bytes_of(model: Model, batch: Sequence[_FactRows], layer: int, *, packed: bool) -> int:
    """What autograd keeps of the rows of some facts, roughly.

    For each block, about a dozen vectors of the residual stream's width and four of the MLP's for
    each token that runs, and six for each that is only attended to; eight, four and two where no
    padding runs. And the logits with their softmax and gradients.
    """
    config = model.weights.bridge.cfg
    size = torch.finfo(model.dtype).bits // 8
    blocks, width = model.n_layers - layer, int(config.d_model)
    rows = sum(len(fact.prompts) for fact in batch)
    run = rows * max(fact.width for fact in batch)
    kept = rows * max(fact.prefix for fact in batch)
    places = sum(fact.places for fact in batch)
    for_run, for_kept = 12, 6
    if not _cuts(model):
        run, kept = run + kept, 0
    elif packed:
        run, for_run, for_kept = sum(fact.tokens for fact in batch), 8, 2
    if model.replay is Replay.WHOLE:
        blocks, places = model.n_layers, run
    held = for_kept * width * kept + (for_run * width + 4 * model.site(layer).d_mlp) * run
    return size * blocks * held + 4 * max(size, 4) * int(config.d_vocab) * places


def _cuts(model: Model) -> bool:
    """Whether the tokens before the subject's last one need not run again."""
    # Where a token may see later ones, no column is out of delta's reach.
    return model.replay is not Replay.WHOLE and not model.sees_later


def _problem(
    model: Model,
    facts: Sequence[_FactRows],
    layer: int,
    views: Sequence[Model],
    *,
    replay: Replay,
) -> _Problem:
    rows = [row for fact in facts for row in fact.prompts]
    targets = [target for fact in facts for target in fact.targets]
    owners = [owner for owner, fact in enumerate(facts) for _ in fact.prompts]
    contexts = [sum(map(bool, fact.targets)) for fact in facts]
    batch = pad(model, rows, side="subject")
    column = int(positions(rows).max())
    cut = column if _cuts(model) else 0
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
            weights += [1 / (len(target) * contexts[owner])] * len(target)
        else:
            where[row, column - cut] = True
            labels.append(-1)
            weights.append(0.0)
        place_owner += [owner] * max(len(target), 1)
    device = model.device
    return _Problem(
        tail=_tail(batch, layer, cut, [views[owner] for owner in owners], replay),
        subject=column - cut,
        where=where.to(device),
        labels=torch.tensor(labels, device=device),
        weights=torch.tensor(weights, device=device, dtype=torch.float64),
        row_owner=torch.tensor(owners, device=device),
        place_owner=torch.tensor(place_owner, device=device),
    )


def _tail(batch: TokenBatch, layer: int, cut: int, views: Sequence[Model], replay: Replay) -> Tail:
    """The tail of a batch, each row of it as its own view runs it."""
    parts: dict[int, list[int]] = {}
    for row, view in enumerate(views):
        parts.setdefault(id(view), []).append(row)
    if len(parts) == 1:
        return capture_tail(views[0], batch, layer=layer, cut=cut, replay=replay)
    tails = [
        capture_tail(
            views[part[0]],
            batch.rows(torch.tensor(part, device=batch.device)),
            layer=layer,
            cut=cut,
            replay=replay,
        )
        for part in parts.values()
    ]
    order = torch.tensor([row for part in parts.values() for row in part], device=batch.device)
    return Tail.joined(tails).rows(order.argsort())


def _optimise(
    model: Model,
    problem: _Problem,
    anchors: ValueMatrix,
    texts: Sequence[str],
    *,
    slot: Slot,
    hyperparameters: Hyperparameters,
    on_step: Callable[[int], None] | None,
    fail: Callable[[int, NonFiniteError], None],
) -> dict[int, Value]:
    """The values by the place of their fact; ``fail`` is told of each fact without one."""
    delta = torch.zeros_like(anchors, requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=hyperparameters.learning_rate)
    anchor_norms = anchors.norm(dim=1)
    traces: list[list[float]] = [[] for _ in texts]
    finished: dict[int, Tensor] = {}
    before: Tensor | None = None
    active = list(range(len(texts)))
    for step in range(hyperparameters.steps):
        with torch.enable_grad():
            optimiser.zero_grad()
            log_probs = _log_probs(model, problem, delta)
            is_kl = problem.labels < 0
            kl_owner = problem.place_owner[is_kl]
            if before is None:
                before = torch.empty(len(texts), log_probs.shape[1]).to(log_probs)
                before[kl_owner] = log_probs[is_kl].detach()
            nll = -log_probs.gather(1, problem.labels.clamp_min(0)[:, None])[:, 0]
            loss = torch.zeros_like(anchor_norms).index_add(
                0, problem.place_owner, nll * problem.weights.to(nll)
            )
            after = log_probs[is_kl]
            divergence = (after.exp() * (after - before[kl_owner])).sum(1)
            loss = loss.index_add(0, kl_owner, hyperparameters.kl * divergence)
            decay = hyperparameters.weight_decay * delta.norm(dim=1) / anchor_norms**2
            loss = loss + decay
        ended: list[int] = []
        for i in active:
            current = float(loss[i].detach())
            if not torch.isfinite(loss[i]):
                told = f"the loss of {texts[i]!r} became {current} at step {step}; "
                fail(i, NonFiniteError(told + "lower the learning rate or use float32"))
                # Rows of a batch do not touch each other.
                ended.append(i)
                continue
            traces[i].append(current)
            if current < hyperparameters.stop_below or step == hyperparameters.steps - 1:
                finished[i] = (anchors[i] + delta[i]).detach().clone()
                ended.append(i)
        if on_step is not None:
            on_step(len(active))
        active = [i for i in active if i not in ended]
        if not active:
            break
        with torch.enable_grad():
            loss[active].sum().backward()
        optimiser.step()
        with torch.no_grad():
            most = hyperparameters.clamp * anchor_norms
            norms = delta.norm(dim=1)
            delta.mul_(torch.where(norms > most, most / norms, 1.0)[:, None])
        if ended:
            problem = problem.only(active)
    return {
        i: Value(target=target, anchor=anchors[i], slot=slot, losses=tuple(traces[i]))
        for i, target in finished.items()
    }


def _log_probs(model: Model, problem: _Problem, delta: ValueMatrix) -> Float[Tensor, "place vocab"]:
    behind = problem.where.shape[1] - problem.subject - 1
    # Zero everywhere but at the subjects' column.
    change = torch.nn.functional.pad(
        delta[problem.row_owner][:, None], (0, 0, problem.subject, behind)
    )
    with model.running() as bridge:
        logits = problem.tail.logits(bridge, problem.where, change)
    return logits.to(delta.dtype).log_softmax(-1)
