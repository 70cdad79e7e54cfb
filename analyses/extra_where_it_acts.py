"""Where a collapse acts: at the first token, whose key ROME aims at, or at the others? (No paper.)

The update of a collapse case is added at the first token of every sentence alone, or at all later
tokens alone. What it adds there is told beside the residual stream. On a few cases the sublayers
above are given back what they put out without the edit, one by one, which tells who carries the
damage to the output.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import mean, median
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.progress import Progress

from firsttok.circuits.anatomy import SINK, circuit_prompts, read, read_heads
from firsttok.editing import ROME, Edit
from firsttok.evaluation import COLLAPSE_THRESHOLD
from firsttok.evaluation.targets import score_targets
from firsttok.models import Model, capture, logits
from firsttok.paper.cases import all_listed_cases, choose_cases
from firsttok.paper.claims import Claim, Result, Verdict, fixed, grade
from firsttok.paper.experiment import ScriptOptions, run
from firsttok.paper.figures import PALETTE, figure
from firsttok.paper.tables import Found, pick
from firsttok.prompts import batches, fact_prompt, pad, text_prompt, with_target
from firsttok.study import Study
from firsttok.tensors import TokenBatch

WORDS = {"first": "update at first tokens", "later": "at later tokens", "all": "at all tokens"}
PLACES = tuple(WORDS)
CARRIED = 3
SENTENCES = 8
KINDS = ("attention", "mlp")
WHOLE_KINDS = ("none", "all attention", "all MLPs", "all")
UNHARMED, WHOLE = 1.1, 0.9
SLIGHT, STRONG = 0.01, 0.5


def measure_places(study: Study, edits: Sequence[Edit]) -> Iterator[dict[str, Any]]:
    """Perplexity with the update at some tokens alone, and what it adds to them."""
    perplexities = {
        at: study.prepared_texts.measure_edits(study.evaluated, edits, at=at) for at in PLACES
    }
    before = math.log(study.original_perplexity.mean)
    keys, norms = _keys_and_norms(study)
    prompts = circuit_prompts(study.evaluated, study.texts)
    sinks = _sinks(study.evaluated, prompts, study.layer)
    for number, edit in enumerate(edits):
        found = {at: perplexities[at][number].mean for at in PLACES}
        rises = {at: math.log(value) - before for at, value in found.items()}
        gains = {at: edit.delta.change(keys[at]).double().norm(dim=1) for at in keys}
        yield {
            "part": "where",
            "case_id": edit.facts[0].case_id,
            "subject": edit.facts[0].subject,
            "original_perplexity": study.original_perplexity.mean,
            **{f"perplexity_{at}": value for at, value in found.items()},
            # Where nothing rises, there is nothing to share out.
            **{
                f"rise_{at}": rises[at] / rises["all"]
                if found["all"] > COLLAPSE_THRESHOLD
                else None
                for at in ("first", "later")
            },
            **{f"gain_{at}": float(gains[at].mean()) for at in gains},
            **{f"residual_{at}": float(norms[at].mean()) for at in gains},
            **{f"ratio_{at}": float((gains[at] / norms[at]).mean()) for at in gains},
            "sinks_before": len(sinks),
            "sinks_after": len(sinks & _sinks(study.evaluated.edited(edit), prompts, study.layer)),
            **_target_by_place(study, edit),
        }


def _keys_and_norms(study: Study) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Keys at the edited layer and norms of the residual stream after it, on the sentences."""
    model, site = study.evaluated.with_bos(study.text_bos), study.evaluated.site(study.layer)
    prompts = [text_prompt(model, text) for text in study.texts]
    keys: dict[str, list[torch.Tensor]] = {"first": [], "later": []}
    norms: dict[str, list[torch.Tensor]] = {"first": [], "later": []}
    for group in batches(prompts):
        batch = pad(model, [prompts[i] for i in group])
        names = [site.key_hook, site.residual_hook]
        seen = capture(model, batch, names, stop_at_layer=site.layer + 1)
        later = batch.attention_mask.bool()
        later[:, 0] = False
        for at, which in (("first", (slice(None), 0)), ("later", later)):
            keys[at].append(seen[site.key_hook][which])
            norms[at].append(seen[site.residual_hook][which].double().norm(dim=-1))
    joined = ({at: torch.cat(parts) for at, parts in found.items()} for found in (keys, norms))
    return next(joined), next(joined)


def _sinks(model: Model, prompts: Any, layer: int) -> set[tuple[int, int]]:
    """Heads above the edited layer that are sinks."""
    heads = read_heads(read(model, prompts))
    return {(head.layer, head.head) for head in heads if head.layer > layer and head.alpha > SINK}


def _target_by_place(study: Study, edit: Edit) -> dict[str, float]:
    """Probability of the new target at the bare prompt, with the update at some tokens alone."""
    model, fact = study.model, edit.facts[0]
    prompt = with_target(model, fact_prompt(model, fact), fact.target_new, join=fact.join)
    # The target's last token is never run.
    run_over = range(len(prompt.token_ids) - 1)
    places = {
        "all": run_over,
        "subject": [prompt.subject_position or 0],
        "elsewhere": [i for i in run_over if i != prompt.subject_position],
    }
    found: dict[str, float] = {}
    for name, which in places.items():
        with model.hooks(adding(model, edit, which)):
            found[f"target_{name}"] = score_targets(model, [prompt])[0].probability
    return found


def adding(model: Model, edit: Edit, places: Sequence[int]) -> list[tuple[str, Callable[..., Any]]]:
    """Hooks that add an update at some columns of a batch."""
    site, kept = model.site(edit.layer), dict[str, torch.Tensor]()

    def keep(keys: torch.Tensor, **_: Any) -> None:
        kept["keys"] = keys

    def add(values: torch.Tensor, **_: Any) -> torch.Tensor:
        changed = values.clone()
        chosen = [*places]
        changed[:, chosen] += edit.delta.change(kept["keys"][:, chosen]).to(values)
        return changed

    return [(site.key_hook, keep), (site.value_hook, add)]


def measure_carriers(study: Study, edits: Sequence[Edit]) -> Iterator[dict[str, Any]]:
    """Log-perplexity that stays when sublayers above put out what they do without the edit."""
    model = study.evaluated.with_bos(study.text_bos)
    prompts = [text_prompt(model, text) for text in study.texts[:SENTENCES]]
    batch = pad(model, prompts)
    above = range(study.layer + 1, model.n_layers)
    names = {(layer, kind): _output(model, layer, kind) for layer in above for kind in KINDS}
    clean = capture(model, batch, [*names.values()], stop_at_layer=None)
    attention, mlps = ([place for place in names if place[1] == kind] for kind in KINDS)
    whole = dict(zip(WHOLE_KINDS, ([], attention, mlps, [*names]), strict=True))
    single = {f"{kind} {layer}": [(layer, kind)] for layer, kind in names}
    before = _nll(model, batch)
    for edit in edits:
        adds = adding(model, edit, range(batch.tokens.shape[1]))
        for restored, places in {**whole, **single}.items():
            hooks = [(names[place], _give(clean[names[place]])) for place in places]
            with model.hooks([*adds, *hooks]):
                nll = _nll(model, batch)
            yield {
                "part": "carry",
                "case_id": edit.facts[0].case_id,
                "subject": edit.facts[0].subject,
                "restored": restored,
                "layer": places[0][0] if len(places) == 1 else None,
                "kind": places[0][1] if len(places) == 1 else None,
                "rise": nll - before,
            }


def _output(model: Model, layer: int, kind: str) -> str:
    site = model.site(layer)
    return f"blocks.{layer}.attn.hook_out" if kind == "attention" else site.value_hook


def _give(value: torch.Tensor) -> Callable[..., torch.Tensor]:
    def give(_output: Any, **_: Any) -> torch.Tensor:
        return value

    return give


def _nll(model: Model, batch: TokenBatch) -> float:
    """Mean NLL of a batch's tokens but the first, in nats."""
    output = logits(model, batch)[:, :-1].double()
    losses = torch.nn.functional.cross_entropy(
        output.flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none"
    )
    real = batch.attention_mask[:, 1:].flatten().bool()
    return float(losses[real].mean())


def measure(options: ScriptOptions, progress: Progress) -> Found:
    study = options.study
    # The claim is about every case; a quick look takes some.
    every = options.args.profile == "full" and options.args.collapse is None
    chosen = (all_listed_cases if every else choose_cases)(options).collapse
    task = progress.add_task("edits", total=len(chosen))
    edits: list[Edit] = []
    for _, found in study.edits(chosen, [ROME]):
        edits += found.values()
        progress.advance(task)
    rows: list[dict[str, Any]] = []
    some, above = edits[:CARRIED], study.model.n_layers - study.layer - 1
    task = progress.add_task("places", total=len(edits))
    for row in measure_places(study, edits):
        rows.append(row)
        progress.advance(task)
    passes = len(some) * (len(WHOLE_KINDS) + len(KINDS) * above)
    task = progress.add_task("sublayers", total=passes)
    for row in measure_carriers(study, some):
        rows.append(row)
        progress.advance(task)
    where = [row for row in rows if row["part"] == "where"]
    lines: list[list[object]] = [
        [
            WORDS[at],
            median(pick(where, f"perplexity_{at}")),
            max(pick(where, f"perplexity_{at}")),
            None if at == "all" else _mean_share(where, at),
            None if at == "all" else median(pick(where, f"gain_{at}")),
            None if at == "all" else median(pick(where, f"residual_{at}")),
        ]
        for at in PLACES
    ]
    columns = ("", "median perplexity", "max", "share of the rise", "norm added", "residual norm")
    return Found(
        title=f"Where ROME's update acts, {len(edits)} listed collapse cases",
        columns=columns,
        lines=lines,
        rows=rows,
        notes=_notes(where),
        draw=partial(plot, rows),
    )


def _mean_share(rows: Sequence[Mapping[str, Any]], at: str) -> float | None:
    """Mean share of the rise over the edits that collapse the model; None without any."""
    shares = [row[f"rise_{at}"] for row in rows if row[f"rise_{at}"] is not None]
    return mean(shares) if shares else None


def _notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    before, after = (sum(pick(rows, f"sinks_{when}")) for when in ("before", "after"))
    targets = {at: mean(pick(rows, f"target_{at}")) for at in ("all", "subject", "elsewhere")}
    return [
        f"Of {before:g} sinks above the layer (all cases), {after:g} are sinks after the edit.",
        "Mean probability of the new target at the bare prompt, with the update at "
        + ", ".join(f"{at}: {value:.4f}" for at, value in targets.items()),
    ]


def plot(rows: Sequence[Mapping[str, Any]]) -> Figure:
    drawn, axes = figure(3, height=3.8)
    where = sorted(
        (row for row in rows if row["part"] == "where"), key=lambda row: row["perplexity_all"]
    )
    x = range(len(where))
    colours = {"first": PALETTE["normal"], "later": PALETTE["collapse"], "all": "black"}
    for at, colour in colours.items():
        values = [row[f"perplexity_{at}"] for row in where]
        hollow: dict[str, Any] = (
            {"markerfacecolor": "none", "markersize": 7} if at == "all" else {"markersize": 4}
        )
        axes[0].plot(x, values, "o", color=colour, label=f"update at {at}", **hollow)
    axes[0].axhline(COLLAPSE_THRESHOLD, color="black", linewidth=1, linestyle=":")
    axes[0].set_yscale("log")
    axes[0].set_xlabel("collapse cases, by perplexity")
    axes[0].set_title("perplexity")
    axes[0].legend(fontsize=8)
    for at in ("first", "later"):
        axes[1].plot(
            [row[f"residual_{at}"] for row in where],
            [row[f"gain_{at}"] for row in where],
            ".",
            color=colours[at],
            label=f"{at} tokens",
        )
    ends = axes[1].get_xlim()
    axes[1].plot(ends, ends, color="black", linewidth=1, linestyle=":", label="as long as it")
    axes[1].set_xscale("log")
    axes[1].set_yscale("log")
    axes[1].set_xlabel("norm of the residual stream")
    axes[1].set_ylabel("norm that the update adds")
    axes[1].legend(fontsize=8)
    carry = [row for row in rows if row["part"] == "carry"]
    for kind, colour in zip(KINDS, ("#009e73", "#cc79a7"), strict=True):
        single = [row for row in carry if row["kind"] == kind]
        layers = sorted({row["layer"] for row in single})
        means = [mean(row["rise"] for row in single if row["layer"] == layer) for layer in layers]
        axes[2].plot(layers, means, marker="o", markersize=3, color=colour, label=kind)
    for restored, style in zip(WHOLE_KINDS, ("-", "--", "-.", ":"), strict=True):
        rises = [row["rise"] for row in carry if row["restored"] == restored]
        if rises:
            line: dict[str, Any] = {"color": "black", "linewidth": 1, "linestyle": style}
            axes[2].axhline(mean(rises), label=f"{restored} restored", **line)
    axes[2].set_xlabel("layer whose sublayer is restored")
    axes[2].set_title("rise of the NLL that stays")
    axes[2].legend(fontsize=7)
    return drawn


def _collapsed(result: Result) -> Result:
    """The result without cases that do not collapse the model, or not on this machine."""
    # A hole in the column is a gap, and not a case that does not collapse.
    result.values("perplexity_all", part="where")
    where = result.chosen(part="where")
    kept = [row for row in where if row["perplexity_all"] > COLLAPSE_THRESHOLD]
    return replace(result, rows=tuple(kept))


def acts_at_later_tokens(result: Result) -> Verdict:
    found = _collapsed(result)
    first = found.values("perplexity_first")
    original = found.values("original_perplexity")
    later = found.values("rise_later")
    unharmed = [after <= UNHARMED * before for after, before in zip(first, original, strict=True)]
    whole = [rise >= WHOLE for rise in later]
    return grade(
        all(unharmed) and all(whole),
        mean(unharmed) >= 0.5 and mean(whole) >= 0.5,
        f"At the first token alone the perplexity is at most {fixed(max(first))} (before "
        f"{fixed(max(original))}); at later tokens alone the log-perplexity rises by at least "
        f"{min(later):.1%} of the whole rise, {len(later)} cases.",
    )


def misses_the_first_token(result: Result) -> Verdict:
    found = _collapsed(result)
    ratios = {at: found.values(f"ratio_{at}") for at in ("first", "later")}
    held = [max(ratios["first"]) <= SLIGHT, min(ratios["later"]) >= STRONG]
    return grade(
        all(held),
        median(ratios["first"]) <= SLIGHT and median(ratios["later"]) >= STRONG,
        f"What the update adds, as a share of the residual stream: at first tokens at most "
        f"{fixed(max(ratios['first']))}, at later ones at least {fixed(min(ratios['later']))}, "
        f"medians {fixed(median(ratios['first']))} and {fixed(median(ratios['later']))}.",
    )


CLAIMS = (
    Claim(
        id="own-collapse-later",
        place="in no paper found",
        sentence="A collapse acts at the later tokens: at the first token alone the update leaves "
        "the perplexity where it was, at all others alone it is the whole collapse.",
        rule=f"On every listed case that collapses here: with the update at first tokens alone the "
        f"perplexity is at most {UNHARMED:g} times the original; at later tokens alone the "
        f"log-perplexity rises by at least {WHOLE:.0%} of the whole rise. Partly: each on half.",
        decide=acts_at_later_tokens,
        own=True,
    ),
    Claim(
        id="own-collapse-gain",
        place="in no paper found",
        sentence="ROME's update aims at the first token's key and misses it: there it adds next "
        "to nothing to a massive residual stream, and to every other token a vector as long as its "
        "own.",
        rule=f"On every case the mean norm added is at most {SLIGHT:.0%} of the residual stream's "
        f"at first tokens, and at least {STRONG:.0%} at later ones. Partly: so in the median.",
        decide=misses_the_first_token,
        own=True,
    ),
)


if __name__ == "__main__":
    raise SystemExit(run(__file__, __doc__, measure, claims=CLAIMS, without_bos=True))
