"""Facts to edit and texts to measure on: the only package that reads data sets."""

from firsttok.data.catalog import DATA_SETS
from firsttok.data.fact_files import (
    SKIP_HINT,
    FactFile,
    LeftOut,
    builtin_facts,
    check_facts,
    load_facts,
    write_facts,
)
from firsttok.data.facts import Fact, spread_evenly
from firsttok.data.joints import JOINS, Join, Straddle, text_joint
from firsttok.data.paper import SLIDES, PaperValue, paper_values
from firsttok.data.pulls import is_pulled_data, pull_data, resolve_data
from firsttok.data.texts import Corpus, builtin_sentences, find_corpus, load_texts, write_corpus

__all__ = [
    "DATA_SETS",
    "JOINS",
    "SKIP_HINT",
    "SLIDES",
    "Corpus",
    "Fact",
    "FactFile",
    "Join",
    "LeftOut",
    "PaperValue",
    "Straddle",
    "builtin_facts",
    "builtin_sentences",
    "check_facts",
    "find_corpus",
    "is_pulled_data",
    "load_facts",
    "load_texts",
    "paper_values",
    "pull_data",
    "resolve_data",
    "spread_evenly",
    "text_joint",
    "write_corpus",
    "write_facts",
]
