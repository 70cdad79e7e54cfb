"""firsttok: find out why a single rank-one edit can destroy a language model, and show it.

Everything public is here; a module is imported when one of its names is first used.
"""

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from firsttok.auditing import Audit, audit
    from firsttok.circuits import Circuit, circuit
    from firsttok.contexts import ContextSet, load_contexts, sample_contexts
    from firsttok.data import Fact, builtin_facts, builtin_sentences, load_facts, load_texts
    from firsttok.editing import (
        ALPHAEDIT,
        C_ROME,
        EMMET,
        FC_ROME,
        FT,
        FT_M,
        MEMIT,
        MEND,
        P_ROME,
        ROME,
        Delta,
        Edit,
        Editor,
        Method,
        RomeEditor,
        Slot,
        compute_edit,
        edit_each,
        export_model,
        load_edit,
        load_methods,
    )
    from firsttok.evaluation import (
        Perplexity,
        continuation,
        counterfact_scores,
        edit_accuracy,
        generated_match,
        perplexity,
        target_probabilities,
        top_predictions,
    )
    from firsttok.exploration import Comparison, WhatIf, compare_methods, prepare_study, what_if
    from firsttok.hard_lists import FactSearch, Verdict, find_hard_facts, find_normal_facts
    from firsttok.hyperparameters import Hyperparameters
    from firsttok.inspection import Inspection, inspect_model
    from firsttok.keys import IntervenedKeys, Keys, capture_keys, fact_keys, keys_at
    from firsttok.measuring import measure_facts
    from firsttok.metrics import Metric
    from firsttok.models import BosPolicy, EditSite, Model, load, plain_model
    from firsttok.probing import PROBES, Probe, ProbeResult, probe
    from firsttok.prompts import fact_prompt, text_prompt
    from firsttok.rows import Row
    from firsttok.screening import screen
    from firsttok.second_moment import (
        SecondMoment,
        compute_second_moment,
        compute_second_moments,
        load_second_moment,
    )
    from firsttok.sequences import (
        EditSequence,
        Guard,
        SequencePlan,
        SequenceRun,
        order_facts,
        run_sequences,
    )
    from firsttok.study import Study
    from firsttok.sweep.local_run import sweep_facts
    from firsttok.sweep.results import read_run
    from firsttok.synthetic import known_facts, synthetic_facts
    from firsttok.token_strips import TokenStrip, show_tokens, tokens

    __version__: str

__all__ = [
    "ALPHAEDIT",
    "C_ROME",
    "EMMET",
    "FC_ROME",
    "FT",
    "FT_M",
    "MEMIT",
    "MEND",
    "PROBES",
    "P_ROME",
    "ROME",
    "Audit",
    "BosPolicy",
    "Circuit",
    "Comparison",
    "ContextSet",
    "Delta",
    "Edit",
    "EditSequence",
    "EditSite",
    "Editor",
    "Fact",
    "FactSearch",
    "Guard",
    "Hyperparameters",
    "Inspection",
    "IntervenedKeys",
    "Keys",
    "Method",
    "Metric",
    "Model",
    "Perplexity",
    "Probe",
    "ProbeResult",
    "RomeEditor",
    "Row",
    "SecondMoment",
    "SequencePlan",
    "SequenceRun",
    "Slot",
    "Study",
    "TokenStrip",
    "Verdict",
    "WhatIf",
    "audit",
    "builtin_facts",
    "builtin_sentences",
    "capture_keys",
    "circuit",
    "compare_methods",
    "compute_edit",
    "compute_second_moment",
    "compute_second_moments",
    "continuation",
    "counterfact_scores",
    "edit_accuracy",
    "edit_each",
    "export_model",
    "fact_keys",
    "fact_prompt",
    "find_hard_facts",
    "find_normal_facts",
    "generated_match",
    "inspect_model",
    "keys_at",
    "known_facts",
    "load",
    "load_contexts",
    "load_edit",
    "load_facts",
    "load_methods",
    "load_second_moment",
    "load_texts",
    "measure_facts",
    "order_facts",
    "perplexity",
    "plain_model",
    "prepare_study",
    "probe",
    "read_run",
    "run_sequences",
    "sample_contexts",
    "screen",
    "show_tokens",
    "sweep_facts",
    "synthetic_facts",
    "target_probabilities",
    "text_prompt",
    "tokens",
    "top_predictions",
    "what_if",
]


# A type checker that saw it would take every misspelt name for one that is there.
if not TYPE_CHECKING:

    @cache
    def _homes() -> dict[str, str]:
        """The module that holds each public name, as the imports above say.

        They are read as text, so that they stand once; a package without its source has none.
        """
        import ast
        from pathlib import Path

        found: dict[str, str] = {}
        for node in ast.walk(ast.parse(Path(__file__).read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("firsttok."):
                found |= dict.fromkeys((alias.name for alias in node.names), node.module)
        return found

    def __getattr__(name: str) -> Any:
        """Import the module that holds a public name."""
        if name == "__version__":
            return import_module("importlib.metadata").version("firsttok")
        if name not in __all__:
            raise AttributeError(f"module 'firsttok' has no attribute {name!r}")
        return getattr(import_module(_homes()[name]), name)


def __dir__() -> list[str]:
    """The public names."""
    return __all__
