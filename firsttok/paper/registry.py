"""The experiments of ``analyses/``, paper by paper; our own come last."""

import re
from dataclasses import dataclass

__all__ = ["EXPERIMENTS", "PAPERS", "SCRIPTS", "Experiment", "in_lanes"]

PAPERS = {
    "fall": "The Fall of ROME",
    "rebuilding": "Rebuilding ROME",
    "butterfly": "The Butterfly Effect",
}
"""Papers by the name that ``firsttok reproduce --paper`` takes."""
_BEYOND = "Beyond the paper"


@dataclass(frozen=True)
class Experiment:
    """One file of ``analyses/``."""

    name: str
    """The file's name, without suffix."""
    heading: str
    """Heading of its section in the report."""
    seconds: int = 0
    """About how long it takes on a CPU with the embedded model; only the order of them counts."""
    after: tuple[str, ...] = ()
    """Those that leave values which this one reads: side by side, both would compute them."""
    alone: bool = False
    """Whether it takes as long as all others together, and is run by itself."""
    paper: str = "fall"
    """The paper with which it is run, one of :data:`PAPERS`."""

    @property
    def table(self) -> str | None:
        """The table or equation of the paper that the heading names; the report shows it, too."""
        if self.paper != "fall":
            # Its own table has the paper's lines in it.
            return None
        found = re.search(r"(Table|Equation) \d+", self.heading)
        return found and found[0]

    @property
    def part(self) -> str:
        """The part of the report that it is in."""
        return _BEYOND if self.heading.startswith(_BEYOND) else PAPERS[self.paper]


_TABLE1, _TABLE2 = "table1_update_components", "table2_perplexity"
EXPERIMENTS = (
    Experiment(_TABLE1, "Table 1: numerator and denominator of the update", 390),
    Experiment(_TABLE2, "Table 2: perplexity after one edit", 340, (_TABLE1,)),
    Experiment("table3_transfer", "Table 3: the same cases on other models", 230, (_TABLE1,)),
    Experiment("table4_efficacy", "Table 4: does the new target come out?", 9, (_TABLE2,)),
    Experiment("table5_prefixed_efficacy", "Table 5: and behind a prefix?", 14, (_TABLE2,)),
    Experiment(
        "table6_second2first",
        "Table 6: the first token at the second one's position",
        120,
        (_TABLE1,),
    ),
    Experiment("table7_first2second", "Table 7: the second token at the first one's position", 320),
    Experiment("figure2_keys", "Figures 2, 4 and 5: where the keys lie", 10),
    Experiment("figure3_first_tokens", "Figure 3: first tokens, and prefixed subjects", 3),
    Experiment(
        "figure6_encoder_contrast", "Figure 6: an encoder, whose first token sees the others", 25
    ),
    Experiment("figure7_without_bos", "Figure 7: with and without BOS", 190, (_TABLE1,)),
    Experiment(
        "figure8_concentration", "Figure 8 and Equation 4: how concentrated first tokens are", 7
    ),
    Experiment(
        "rebuilding_single_edits",
        "Single edits: Tables 1 and 4, Figures 1, 2 and 5",
        300,
        paper="rebuilding",
    ),
    Experiment(
        "rebuilding_sequences",
        "Edit after edit: Table 2, Figures 3, 4 and 6 to 9",
        400,
        paper="rebuilding",
    ),
    Experiment(
        "butterfly_single_edits", "Single edits of every editor: Section 4", 500, paper="butterfly"
    ),
    Experiment(
        "butterfly_surrogate", "Perplexity as a surrogate: Section 3", 200, paper="butterfly"
    ),
    Experiment(
        "butterfly_sequences",
        "Edit after edit by every editor: Sections 4 and 5",
        500,
        paper="butterfly",
    ),
    Experiment("extra_attention_mask", "Beyond the paper: the attention mask", 270, (_TABLE1,)),
    Experiment(
        "extra_token_identity", "Beyond the paper: the place or the token?", 250, (_TABLE1,)
    ),
    Experiment("extra_value_anchor", "Beyond the paper: the anchor of the value", 430, (_TABLE2,)),
    Experiment("extra_where_it_acts", "Beyond the paper: where a collapse acts", 120, (_TABLE1,)),
    Experiment(
        "extra_collapse_map", "Beyond the paper: what an edit of each layer does", 7200, alone=True
    ),
    Experiment(
        "extra_below_the_writer", "Beyond the paper: below and above the writer", 4000, alone=True
    ),
    Experiment(
        "extra_spread_settings",
        "Beyond the paper: settings of MEMIT and AlphaEdit",
        500,
        alone=True,
    ),
    Experiment("extra_corpus", "Beyond the paper: the text behind C", 1200, alone=True),
    Experiment(
        "extra_causal_tracing", "Beyond the paper: which layer carries a fact?", 1420, alone=True
    ),
)
"""All of them; a new one is a file and a line here."""
SCRIPTS = tuple(each.name for each in EXPERIMENTS if not each.alone and each.paper == "fall")
"""Names of those that ``firsttok reproduce`` runs for "The Fall of ROME", in order."""


def in_lanes(paper: str = "fall") -> tuple[Experiment, ...]:
    """Those that are run for a paper, as several lanes take them up.

    What others wait for comes first, and then what takes longest.
    """
    together = [each for each in EXPERIMENTS if not each.alone and each.paper == paper]
    awaited = {name for each in together for name in each.after}
    return tuple(sorted(together, key=lambda each: (each.name not in awaited, -each.seconds)))
