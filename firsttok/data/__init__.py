"""Facts to edit and texts to measure on: the only package that reads data sets."""

from firsttok.data.facts import Fact, builtin_facts, load_facts
from firsttok.data.paper import FALL_OF_ROME, SLIDES, PaperValue, paper_values
from firsttok.data.texts import builtin_sentences, load_texts

__all__ = [
    "FALL_OF_ROME",
    "SLIDES",
    "Fact",
    "PaperValue",
    "builtin_facts",
    "builtin_sentences",
    "load_facts",
    "load_texts",
    "paper_values",
]
