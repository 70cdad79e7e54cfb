"""Figure 7: perplexity after ROME without the prepended BOS token, and with it.

The paper's claim: without BOS, Llama2-7b, Mistral-7b and Llama3-8b collapse on the collapse cases
of GPT-2-XL and GPT-J; with it they do not (Appendix A.2). On a model whose tokenizer puts no BOS,
the reverse: putting one there prevents the collapse.
"""

import argparse
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.progress import Progress

from firsttok.cases import choose_cases, collapse_cases
from firsttok.console import exit_on_error, progress_bar
from firsttok.editing import ROME
from firsttok.evaluation import COLLAPSE_THRESHOLD
from firsttok.measuring import measure_facts
from firsttok.models import BosPolicy
from firsttok.output import pick, publish
from firsttok.plots import PALETTE, figure, save_figure
from firsttok.probes import bos_study, token_states
from firsttok.prompts import fact_prompt, positions
from firsttok.script_options import ScriptOptions, parse_script

POLICIES = (BosPolicy.WITHOUT, BosPolicy.WITH)


def measure(options: ScriptOptions, progress: Progress) -> list[dict[str, Any]]:
    groups = {
        "collapse": collapse_cases(options.halved(), progress=progress),
        "normal": choose_cases(options.halved()).normal,
    }
    cases = {fact.case_id: name for name, facts in groups.items() for fact in facts}
    facts = [fact for chosen in groups.values() for fact in chosen]
    rows: list[dict[str, Any]] = []
    for policy in POLICIES:
        label = f"{policy.value} BOS"
        plain = bos_study(options.study, policy)
        same = bos_study(options.study, policy, text_bos=policy)
        measured = measure_facts(plain, facts, [ROME], progress=progress, label=label)
        again = measure_facts(same, facts, [ROME], progress=progress, label=f"{label}, texts too")
        prompts = [fact_prompt(plain.model, fact) for fact in facts]
        places = positions(prompts).tolist()
        norms = token_states(plain.model, prompts, places, layer=plain.layer).residual_norms
        rows += [
            {
                "case_id": row.case_id,
                "subject": row.subject,
                "cases": cases[row.case_id],
                "bos": policy.value,
                "first_token": row.first_token,
                "residual_norm": float(norms[index]),
                "denominator": row.denominator,
                "perplexity": row.perplexity,
                "original_perplexity": plain.original_perplexity.mean,
                "collapsed": row.collapsed,
                "perplexity_same_bos": other.perplexity,
                "original_perplexity_same_bos": same.original_perplexity.mean,
            }
            for index, (row, other) in enumerate(zip(measured, again, strict=True))
        ]
    return rows


def main() -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    with progress_bar() as progress:
        options = parse_script(parser, progress, without_bos=True)
        rows = measure(options, progress)
    lines: list[list[object]] = []
    for policy in POLICIES:
        for cases in ("collapse", "normal"):
            match = {"bos": policy.value, "cases": cases}
            values = pick(rows, "perplexity", **match)
            denominators = [abs(value) for value in pick(rows, "denominator", **match)]
            lines.append(
                [
                    f"{policy.value} BOS, {cases} (n={len(values)})",
                    median(pick(rows, "residual_norm", **match)),
                    max(pick(rows, "residual_norm", **match)),
                    mean(denominators),
                    pick(rows, "original_perplexity", **match)[0],
                    max(values),
                    pick(rows, "original_perplexity_same_bos", **match)[0],
                    max(pick(rows, "perplexity_same_bos", **match)),
                    int(sum(pick(rows, "collapsed", **match))),
                ]
            )
    stem = options.out / Path(__file__).stem
    publish(
        stem,
        title=f"Figure 7. ROME on {options.study.model.label} without and with BOS",
        columns=[
            "prompts",
            "median norm",
            "max norm",
            "mean |denominator|",
            "original",
            "max",
            "original, same BOS",
            "max, same BOS",
            "collapsed",
        ],
        lines=lines,
        rows=rows,
        provenance=options.provenance() | {"seconds": round(time.perf_counter() - start, 1)},
    )
    drawn, axes = figure(2)
    for axis, policy in zip(axes, POLICIES, strict=True):
        for cases, colour in PALETTE.items():
            chosen = {"bos": policy.value, "cases": cases}
            axis.scatter(
                pick(rows, "case_id", **chosen),
                pick(rows, "perplexity", **chosen),
                s=18,
                color=colour,
                label=cases,
            )
        axis.axhline(COLLAPSE_THRESHOLD, color="black", linewidth=1, linestyle=":")
        axis.set_yscale("log")
        axis.set_title(f"{policy.value} BOS")
        axis.set_xlabel("case id")
    axes[0].set_ylabel("perplexity after one edit")
    axes[1].sharey(axes[0])
    axes[0].legend()
    save_figure(stem, drawn)


if __name__ == "__main__":
    raise SystemExit(exit_on_error(main))
