"""The editors written down plainly: the oracle of the fast path, and the other side of every ratio.

This is how the released code edits, one fact after another: every pass runs the whole model over
every token of every prompt and makes logits everywhere, in each step of the optimisation too; C is
inverted once for all facts. The second moment is no copy of the released code, which stops at the
edited layer: here it is taken from full forward passes. All of it runs on a Hugging Face model that
TransformerLens never touched, on the same weights. Only data classes and prompts come from
firsttok; keys, value, closed form, perplexity and second moment are written here once more.
"""

import contextlib
import copy
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import transformers
from torch import Tensor

from firsttok.contexts import ContextSet
from firsttok.data import Fact
from firsttok.editing import (
    EmmetRule,
    FineTuningEditor,
    FineTuningLoss,
    MemitEditor,
    MemitRule,
    Method,
    Slot,
    SpreadRule,
)
from firsttok.hyperparameters import Hyperparameters
from firsttok.models import BosPolicy, Model
from firsttok.prompts import (
    Prompt,
    batches,
    fact_prompt,
    pad,
    positions,
    subject_prompt,
    text_prompt,
    with_target,
)
from firsttok.tensors import TokenBatch

__all__ = [
    "MAX_TOKENS",
    "NaiveEdit",
    "NaiveFineTuning",
    "NaiveKeys",
    "NaiveModel",
    "NaiveValue",
    "naive_edit",
    "naive_fact_keys",
    "naive_fine_tuning",
    "naive_inverse",
    "naive_keys",
    "naive_model",
    "naive_perplexities",
    "naive_projector",
    "naive_second_moment",
    "naive_spread",
    "naive_value",
]

WINDOW = 128
MAX_TOKENS = 4096
MAX_SENTENCE_TOKENS = 1024


@dataclass(frozen=True, kw_only=True, eq=False)
class NaiveModel:
    """A plain Hugging Face model on the weights of a loaded one, and the layer that is edited."""

    model: Model
    """The loaded model, for prompts and padding."""
    network: Any
    """The Hugging Face model; it holds the very parameters of ``model``."""
    blocks: torch.nn.ModuleList
    """Its blocks, each weight in them once."""
    mlp: torch.nn.Module
    """The MLP of the edited layer."""
    projection: torch.nn.Module
    """The MLP's second matrix: a key goes in, a value comes out."""

    def logits(self, batch: TokenBatch) -> Tensor:
        """Run the whole model; logits ``[prompt, pos, vocab]``, in float32 at least."""
        output = self.network(
            input_ids=batch.tokens,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        )
        logits: Tensor = output.logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @contextlib.contextmanager
    def edited(self, left: Tensor, right: Tensor) -> Generator[None, None, None]:
        """Write ``W + outer(left, right)`` into the weight, and the old weight back at the end."""
        weight = self.projection.get_parameter("weight")
        before = weight.detach().clone()
        outer = torch.outer(left, right)
        try:
            with torch.no_grad():
                # A linear layer keeps its matrix transposed; GPT-2's layers do not.
                weight += outer.T if isinstance(self.projection, torch.nn.Linear) else outer
            yield
        finally:
            with torch.no_grad():
                weight.copy_(before)


@dataclass(frozen=True, kw_only=True, eq=False)
class NaiveKeys:
    """Keys and MLP outputs of one fact's prompts at the subject's last token."""

    keys: dict[Slot, Tensor]
    """k_bar and k^u."""
    values: dict[Slot, Tensor]
    """``W k + b`` of both, as the MLP puts it out."""


@dataclass(frozen=True, kw_only=True, eq=False)
class NaiveValue:
    """v* and the loss of every step."""

    target: Tensor
    """v*."""
    losses: tuple[float, ...]
    """The losses, each before its update."""


@dataclass(frozen=True, kw_only=True, eq=False)
class NaiveEdit:
    """One edit ``W + outer(left, right)`` with what it was made of."""

    left: Tensor
    """Unit left vector."""
    right: Tensor
    """Right vector."""
    value: NaiveValue
    """v* and its losses."""
    numerator: float
    """``||v* - W k||``."""
    denominator: float
    """``u . k``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class NaiveFineTuning:
    """What fine-tuning made of the weight."""

    change: Tensor
    """The weight after it less the weight before, ``[d_in, d_out]``."""
    losses: tuple[float, ...]
    """The loss of every step, before its update."""


def naive_model(model: Model, layer: int) -> NaiveModel:
    """Build the plain Hugging Face model of a decoder on the same weights."""
    wrapped: Any = model.bridge.original_model
    tensors: dict[str, Tensor] = {}
    for part in (wrapped.named_parameters, wrapped.named_buffers):
        for name, tensor in part(remove_duplicate=False):
            tensors[name.replace("._original_component", "")] = tensor
    with torch.device("meta"):
        network: Any = transformers.AutoModelForCausalLM.from_config(
            copy.deepcopy(wrapped.config), attn_implementation="eager", dtype=model.dtype
        )
    network.load_state_dict({name: tensors[name] for name in network.state_dict()}, assign=True)
    for name, _ in list(network.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        network.get_submodule(owner).register_buffer(leaf, tensors[name], persistent=False)
    address = model.site(layer).weight.data_ptr()
    (path,) = [
        name.removesuffix(".weight")
        for name, parameter in network.named_parameters()
        if parameter.data_ptr() == address
    ]
    # As in transformer.h.17.mlp.c_proj.
    stack, _, _ = path.partition(f".{layer}.")
    return NaiveModel(
        model=model,
        network=network.eval().requires_grad_(False),
        blocks=cast("torch.nn.ModuleList", network.get_submodule(stack)),
        mlp=network.get_submodule(path.rpartition(".")[0]),
        projection=network.get_submodule(path),
    )


@torch.no_grad()
def naive_keys(
    naive: NaiveModel, prompts: Sequence[Prompt], at: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Keys ``[prompt, d_mlp]`` and values ``[prompt, d_model]`` at one token of each prompt."""
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((args[0], output))

    keys: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {}
    with _hook(naive.projection, keep):
        for group in batches(prompts, max_tokens=MAX_TOKENS):
            naive.logits(pad(naive.model, [prompts[index] for index in group]))
            into, out_of = seen.pop()
            for row, index in enumerate(group):
                keys[index], values[index] = into[row, at[index]], out_of[row, at[index]]
    order = range(len(prompts))
    return torch.stack([keys[i] for i in order]), torch.stack([values[i] for i in order])


def naive_fact_keys(naive: NaiveModel, fact: Fact, contexts: ContextSet) -> NaiveKeys:
    """k_bar and k^u of one fact, and the MLP's outputs that go with them."""
    templates = (*contexts.templates, "{}")
    prompts = [fact_prompt(naive.model, fact, template) for template in templates]
    keys, values = naive_keys(naive, prompts, positions(prompts).tolist())
    return NaiveKeys(
        keys={Slot.PREFIXED_MEAN: keys[:-1].mean(0), Slot.UNPREFIXED: keys[-1]},
        values={Slot.PREFIXED_MEAN: values[:-1].mean(0), Slot.UNPREFIXED: values[-1]},
    )


def naive_value(
    naive: NaiveModel,
    fact: Fact,
    anchor: Tensor,
    *,
    contexts: ContextSet,
    hyperparameters: Hyperparameters,
    at: torch.nn.Module | None = None,
) -> NaiveValue:
    """Optimise v* from one anchor, with a whole pass over all prompts in every step.

    Delta is added to what ``at`` puts out: the MLP (None), or for MEMIT's z the whole block.
    """
    settings = hyperparameters
    batch, columns, labels = _rewriting(naive.model, fact, contexts)
    anchor = anchor.to(torch.promote_types(anchor.dtype, torch.float32))
    rows = torch.arange(len(columns), device=anchor.device)
    wanted = labels >= 0
    delta = torch.zeros_like(anchor, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=settings.learning_rate)

    def shift(_module: Any, _args: Any, output: Any) -> Any:
        first: Tensor = output[0] if isinstance(output, tuple) else output
        shifted = first.clone()
        shifted[rows, columns] += delta.to(first.dtype)
        return (shifted, *output[1:]) if isinstance(output, tuple) else shifted

    before: Tensor | None = None
    losses: list[float] = []
    for step in range(settings.steps):
        adam.zero_grad()
        with torch.enable_grad():
            with _hook(naive.mlp if at is None else at, shift):
                log_probs = naive.logits(batch).log_softmax(-1)
            after = log_probs[-1, columns[-1]]
            if before is None:
                before = after.detach().clone()
            # The released code's direction: what kl_div takes second is what the mean runs over.
            divergence = torch.nn.functional.kl_div(before, after, log_target=True, reduction="sum")
            chosen = log_probs.gather(2, labels.clamp_min(0)[..., None])[..., 0]
            each = (chosen * wanted).sum(1)[:-1] / wanted.sum(1)[:-1]
            loss = settings.kl * divergence - each.mean()
            loss = loss + settings.weight_decay * delta.norm() / anchor.norm() ** 2
        losses.append(float(loss.detach()))
        if losses[-1] < settings.stop_below or step == settings.steps - 1:
            break
        loss.backward()
        adam.step()
        with torch.no_grad():
            most = settings.clamp * anchor.norm()
            if delta.norm() > most:
                delta *= most / delta.norm()
    return NaiveValue(target=(anchor + delta).detach(), losses=tuple(losses))


def naive_inverse(second_moment: Tensor) -> Tensor:
    """Invert C ``[d_mlp, d_mlp]``, once for all facts."""
    return torch.linalg.inv(second_moment)


def naive_edit(
    naive: NaiveModel,
    fact: Fact,
    method: Method,
    *,
    contexts: ContextSet,
    inverse: Tensor,
    hyperparameters: Hyperparameters,
) -> NaiveEdit:
    """Compute one edit from C^-1 ``[d_mlp, d_mlp]``, each slot of the closed form by the method."""
    found = naive_fact_keys(naive, fact, contexts)
    value = naive_value(
        naive,
        fact,
        found.values[method.anchor],
        contexts=contexts,
        hyperparameters=hyperparameters,
    )
    key = found.keys[method.direction]
    left = (inverse @ key.to(inverse)).to(key)
    left = left / left.norm()
    numerator = value.target - found.values[method.residual]
    denominator = left @ found.keys[method.denominator]
    return NaiveEdit(
        left=left,
        right=numerator / denominator,
        value=value,
        numerator=float(numerator.norm()),
        denominator=float(denominator),
    )


@torch.no_grad()
def naive_states(naive: NaiveModel, prompts: Sequence[Prompt], layer: int) -> Tensor:
    """What leaves a block at each subject's last token, by whole passes."""
    seen: list[Tensor] = []

    def keep(_module: Any, _args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    with _hook(naive.blocks[layer], keep):
        naive.logits(pad(naive.model, prompts))
    rows = torch.arange(len(prompts), device=naive.model.device)
    return seen[0][rows, positions(prompts).to(rows.device)]


def naive_left(
    rule: SpreadRule, keys: Tensor, second_moment: Tensor, projector: Tensor | None = None
) -> Tensor:
    """The closed forms, solved in float64 as the released code solves them.

    Args:
        rule: MEMIT's, EMMET's or AlphaEdit's.
        keys: K, a column a fact.
        second_moment: C.
        projector: AlphaEdit's P, which the released code makes once for all edits.
    """
    c, numbers = second_moment, cast(Any, rule)
    if isinstance(rule, MemitRule):
        return torch.linalg.solve(numbers.weight * c + keys @ keys.T, keys)
    if isinstance(rule, EmmetRule):
        inverse = torch.linalg.inv(c)
        return inverse @ keys @ torch.linalg.inv(keys.T @ inverse @ keys)
    p = naive_projector(numbers.threshold, c) if projector is None else projector
    return torch.linalg.solve(p @ keys @ keys.T + numbers.ridge * torch.eye(len(c)).to(c), p @ keys)


def naive_projector(threshold: float, second_moment: Tensor) -> Tensor:
    """P onto what C hardly holds, by a singular value decomposition."""
    vectors, values, _ = torch.linalg.svd(second_moment)
    null = vectors[:, values < threshold]
    return null @ null.T


def naive_spread(
    naives: Mapping[int, NaiveModel],
    facts: Sequence[Fact],
    editor: MemitEditor,
    *,
    projectors: Mapping[int, Tensor] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """MEMIT, EMMET or AlphaEdit as released: z by whole passes, then layer after layer.

    Args:
        naives: The model by its edited layer.
        facts: The facts of one edit.
        editor: The editor, with released slots and nothing left open.
        projectors: AlphaEdit's P of each layer.

    Returns:
        The factors of each layer, ``W + left @ right``.
    """
    contexts, settings = cast(Any, editor.contexts), cast(Any, editor.hyperparameters)
    layers = sorted(naives)
    last = layers[-1]
    model, end = naives[last].model, naives[last]
    bare = [fact_prompt(model, fact) for fact in facts]
    states = naive_states(end, bare, last)
    z = torch.stack(
        [
            naive_value(
                end,
                fact,
                anchor,
                contexts=contexts,
                hyperparameters=settings,
                at=end.blocks[last],
            ).target
            for fact, anchor in zip(facts, states, strict=True)
        ]
    )
    prefixed = [text for text in contexts.templates if text != "{}"]
    found: list[tuple[Tensor, Tensor]] = []
    with contextlib.ExitStack() as standing:
        for number, layer in enumerate(layers):
            right = (z - naive_states(end, bare, last)) / (len(layers) - number)
            columns: list[Tensor] = []
            for fact in facts:
                prompts = [fact_prompt(model, fact, text) for text in ("{}", *prefixed)]
                keys, _ = naive_keys(naives[layer], prompts, positions(prompts).tolist())
                columns.append((keys[0] + keys[1:].mean(0)) / 2)
            moment = editor.second_moments[layer].matrix
            own = torch.stack(columns, dim=1).double().to(moment.device)
            left = naive_left(editor.rule, own, moment, (projectors or {}).get(layer)).to(right)
            found.append((left, right))
            for column, row in zip(left.T, right, strict=True):
                standing.enter_context(naives[layer].edited(column, row))
    return found


def naive_fine_tuning(
    naive: NaiveModel, facts: Sequence[Fact], editor: FineTuningEditor
) -> NaiveFineTuning:
    """Fine-tune the weight itself on a batch of facts, a whole pass in every step.

    As in the released code, only that weight asks for a gradient. The model is left as it is.
    """
    model, forced = naive.model, editor.loss is FineTuningLoss.TEACHER_FORCED
    tokenizer: Any = model.tokenizer
    rows: list[Prompt] = []
    targets: list[Sequence[int]] = []
    for fact in facts:
        bare = text_prompt(model, fact.prompt)
        if forced:
            full = with_target(model, bare, fact.target_new, join=fact.join)
            rows.append(replace(full, token_ids=full.token_ids[:-1]))
            targets.append(full.target_ids)
        else:
            own = tokenizer.encode(f" {fact.target_new}", add_special_tokens=False)
            rows.append(bare)
            targets.append([*model.leading_ids, *own])
    batch = pad(model, rows)
    ends = [len(row.token_ids) for row in rows]
    before = naive.projection.get_parameter("weight")
    start = before.detach().clone()
    weight = torch.nn.Parameter(start.clone())
    adam = torch.optim.Adam([weight], lr=editor.learning_rate)
    losses: list[float] = []
    vars(naive.projection)["_parameters"]["weight"] = weight
    try:
        for _ in range(editor.steps):
            adam.zero_grad()
            with torch.enable_grad():
                logits, each = naive.logits(batch), list[Tensor]()
                for row, (target, end) in enumerate(zip(targets, ends, strict=True)):
                    reads = range(end - len(target), end) if forced else [end - 1] * len(target)
                    log_probs = logits[row, list(reads)].log_softmax(-1)
                    each.append(-log_probs[range(len(target)), list(target)].mean())
                loss = torch.stack(each).mean()
            losses.append(float(loss.detach()))
            if losses[-1] < editor.stop_at:
                break
            loss.backward()
            adam.step()
            if editor.eps is not None:
                with torch.no_grad():
                    weight.copy_(weight.clamp(start - editor.eps, start + editor.eps))
    finally:
        vars(naive.projection)["_parameters"]["weight"] = before
    change = weight.detach() - start
    if isinstance(naive.projection, torch.nn.Linear):
        change = change.T
    return NaiveFineTuning(change=change, losses=tuple(losses))


@torch.no_grad()
def naive_perplexities(
    naive: NaiveModel, texts: Sequence[str], *, one_by_one: bool = False
) -> list[float]:
    """Perplexity of each sentence, without BOS and without its first token.

    Args:
        naive: The model, possibly inside ``edited``.
        texts: The sentences; the papers' ME-PPL is the mean over them.
        one_by_one: One pass for each sentence, as the released code; else padded batches.
    """
    model = naive.model.with_bos(BosPolicy.WITHOUT)
    prompts = [text_prompt(model, text) for text in texts]
    found = [0.0] * len(prompts)
    most = 1 if one_by_one else MAX_SENTENCE_TOKENS
    for group in batches(prompts, max_tokens=most):
        batch = pad(model, [prompts[index] for index in group])
        log_probs = naive.logits(batch)[:, :-1].log_softmax(-1)
        chosen = log_probs.gather(2, batch.tokens[:, 1:, None])[..., 0]
        scored = batch.attention_mask[:, 1:]
        nlls = -(chosen * scored).sum(1, dtype=torch.float64) / scored.sum(1)
        for index, nll in zip(group, nlls.tolist(), strict=True):
            found[index] = float(torch.tensor(nll, dtype=torch.float64).exp())
    return found


@torch.no_grad()
def naive_second_moment(
    naive: NaiveModel, documents: Sequence[str], *, max_tokens: int
) -> tuple[Tensor, int]:
    """C in float64 over windows of 128 tokens, and the number of tokens, by full forward passes.

    All layers run and logits are made, which C does not need: the released code stops at the layer.
    """
    windows = _windows(naive.model, documents, max_tokens)
    seen: list[Tensor] = []

    def keep(_module: Any, args: tuple[Tensor, ...], _output: Tensor) -> None:
        seen.append(args[0])

    total, tokens = torch.zeros((), dtype=torch.float64), 0
    with _hook(naive.projection, keep):
        for group in batches(windows, max_tokens=MAX_TOKENS):
            batch = pad(naive.model, [windows[index] for index in group])
            naive.logits(batch)
            keys = seen.pop()[batch.attention_mask.bool()].double()
            total = total + (keys.T @ keys).cpu()
            tokens += len(keys)
    return total / tokens, tokens


def _rewriting(model: Model, fact: Fact, contexts: ContextSet) -> tuple[TokenBatch, Tensor, Tensor]:
    """All rewriting prompts and the KL prompt; subject columns; labels, -1 where none is."""
    rows: list[Prompt] = []
    targets: list[tuple[int, ...]] = []
    for template in contexts.templates:
        bare = fact_prompt(model, fact, template)
        full = with_target(model, bare, fact.target_new, join=fact.join)
        # All of the target but its last token stands in the prompt.
        rows.append(replace(full, token_ids=full.token_ids[:-1]))
        targets.append(full.target_ids)
    span = (0, len(fact.subject))
    rows.append(subject_prompt(model, f"{fact.subject} is a", span, straddle=fact.straddle))
    batch = pad(model, rows)
    labels = torch.full_like(batch.tokens, -1)
    for row, target in enumerate(targets):
        end = len(rows[row].token_ids)
        labels[row, end - len(target) : end] = torch.tensor(target)
    return batch, positions(rows).to(model.device), labels


def _windows(model: Model, documents: Sequence[str], max_tokens: int) -> list[Prompt]:
    windows: list[Prompt] = []
    tokens = 0
    room = WINDOW - len(model.leading_ids)
    for text in documents:
        if text.strip():
            ids = text_prompt(model, text).token_ids[len(model.leading_ids) :]
            for start in range(0, len(ids), room):
                window = (*model.leading_ids, *ids[start : start + room])
                windows.append(Prompt(text="", token_ids=window))
                tokens += len(window)
                if tokens >= max_tokens:
                    return windows
    return windows


@contextlib.contextmanager
def _hook(module: torch.nn.Module, function: Callable[..., Any]) -> Generator[None, None, None]:
    handle = module.register_forward_hook(function)
    try:
        yield
    finally:
        handle.remove()
