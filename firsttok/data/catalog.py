"""Published data sets: where their makers put them, and what their bytes must be."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["DATA_SETS", "DataSet"]

_ROME = "https://rome.baulab.info/data/dsets"
_COLLAPSE = (
    "https://raw.githubusercontent.com/WanliYoung/Collapse-in-Model-Editing/"
    "ba8122e46ce31d3518a44e942540179cc7531f15/data/ME-PPL"
)


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """One published data set."""

    name: str
    """Its name on the command line."""
    kind: Literal["facts", "texts"]
    """What it holds: facts to edit, or sentences to measure perplexity on."""
    note: str
    """Where it comes from, in one sentence."""
    url: str | None = None
    """Its official address; None where there is none that can be pinned."""
    sha256: str | None = None
    """SHA-256 of its bytes; None where it is recorded at the first pull."""
    records: int | None = None
    """How many facts or sentences it holds."""
    megabytes: float | None = None

    @property
    def file_name(self) -> str:
        """Name of its file, which is that at its address."""
        return f"{self.name}.json" if self.url is None else self.url.rpartition("/")[2]


DATA_SETS = (
    DataSet(
        name="counterfact",
        kind="facts",
        url=f"{_ROME}/counterfact.json",
        sha256="d017056125178a13728594e66a801357a8db9ed7973a7425554bb4271de9fc6f",
        records=21_919,
        megabytes=45.1,
        note="COUNTERFACT of Meng et al. (2022), from the authors' site.",
    ),
    DataSet(
        name="zsre",
        kind="facts",
        url=f"{_ROME}/zsre_mend_eval.json",
        records=19_086,
        megabytes=8.1,
        note="ZsRE's questions as MEND and ROME evaluate them, from the authors' site.",
    ),
    DataSet(
        name="me-ppl-50",
        kind="texts",
        url=f"{_COLLAPSE}/ME-PPL_50.json",
        sha256="55f3b951d2c4287b90d9e511f256efb9d47461f0da408a17dac5ffcef685c4e4",
        records=50,
        megabytes=0.01,
        note="ME-PPL's 50 sentences, from the Butterfly Effect's repository at one commit.",
    ),
    DataSet(
        name="me-ppl-1k",
        kind="texts",
        url=f"{_COLLAPSE}/ME-PPL_1k.json",
        sha256="71e29fc5daf443b35ec16c8a9e91e1f4398b5b84ca7c25393639c066b65b5afb",
        records=1000,
        megabytes=0.2,
        note="ME-PPL's 1000 sentences, from the same commit.",
    ),
    DataSet(
        name="hardcf",
        kind="facts",
        note="HardCF is on a shared drive, whose address cannot be pinned; a copy is read by its "
        "path, or pulled with --url. Such a list for your model is made with: firsttok hard "
        "--facts counterfact --out FILE",
    ),
    DataSet(
        name="hardedit",
        kind="facts",
        note="HardEdit is on the same shared drive; a copy is read by its path, or pulled with "
        "--url. Such a list for your model is made with: firsttok hard --generate --out FILE",
    ),
)
"""The data sets, in the order they are listed in."""
