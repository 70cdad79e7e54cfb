"""Made-up script results, from which a claim's rule comes to a known verdict."""

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

from firsttok.paper.claims import Claim, Status
from firsttok.paper.registry import SCRIPTS

CLAIMS_OF: dict[str, tuple[Claim, ...]] = {
    name: import_module(f"analyses.{name}").CLAIMS for name in SCRIPTS
}
"""The claims that each script's rows decide."""
CLAIMS = tuple(claim for claims in CLAIMS_OF.values() for claim in claims)
SCRIPT_OF = {claim.id: name for name, claims in CLAIMS_OF.items() for claim in claims}

Rows = list[dict[str, Any]]
Given = tuple[Rows, dict[str, Any]]
YES, PARTLY, NO, NOT_JUDGED = Status.REPRODUCED, Status.PARTLY, Status.NOT, Status.NOT_JUDGED


def edits(column: str, values: Iterable[float], cases: str, method: str) -> Rows:
    """One row per value, in columns that every edit has."""
    usual = {"first_token": cases == "collapse", "one_token": True}
    return [usual | {"cases": cases, "method": method, column: value} for value in values]


def components(column: str, collapse: list[float], normal: list[float]) -> Rows:
    return edits(column, collapse, "collapse", "ROME") + edits(column, normal, "normal", "ROME")


def table2(
    collapse: list[float], normal: list[float], spared: float = 70.5, first: int = 4
) -> tuple[Rows, dict[str, Any]]:
    rows = components("perplexity", collapse, normal)
    for row in rows[first : len(collapse)]:
        row["first_token"] = False
    for method in ("C-ROME", "p-ROME", "FC-ROME"):
        for cases in ("collapse", "normal"):
            rows += edits("perplexity", [70.0, 70.2, spared], cases, method)
    return rows, {"original_perplexity": 70.0}


def transfer(factors: Mapping[str, float], own: float = 5000.0) -> tuple[Rows, dict[str, Any]]:
    rows: Rows = []
    for model, factor in ({"here": own / 70} | dict(factors)).items():
        rows += [
            {
                "model": model,
                "source": model == "here",
                "bos": False,
                "perplexity": 70 * factor,
                "original_perplexity": 70.0,
                "collapsed": 70 * factor > 1000,
            }
            for _ in range(3)
        ]
    return rows, {"missing": ["gpt2-xl"]}


def accuracy(method: str, cases: str, efficacy: float, general: float | None = 0.1) -> Rows:
    row = {"method": method, "cases": cases, "efficacy": efficacy, "generalization": general}
    row |= {"locality": 1.0}
    return [dict(row) for _ in range(4)]


def local(collapse: float, normal: float) -> Rows:
    return [
        {"method": "C-ROME", "cases": cases, "locality": value}
        for cases, value in (("collapse", collapse), ("normal", normal))
        for _ in range(4)
    ]


def stages(none: list[float], swapped: list[float], change: float = 0.0) -> Rows:
    return [
        {"case_id": case, "stage": stage, "perplexity": value, "first_key_change": change}
        for stage in ("none", "keys", "editing", "everything")
        for case, value in enumerate(none if stage == "none" else swapped)
    ]


def pairs(*groups: tuple[dict[str, str], float, float]) -> Rows:
    return [
        match | {"probe_accuracy": probe, "silhouette": silhouette, "n": 40}
        for match, probe, silhouette in groups
    ]


def collapse_and_normal(panel: str, collapse: float, normal: float) -> Rows:
    """Silhouettes; the probe is always right, as it is in many dimensions."""
    return pairs(
        ({"panel": panel, "cases": "collapse"}, 1.0, collapse),
        ({"panel": panel, "cases": "normal"}, 1.0, normal),
    )


def figure3(panel: str, joined: tuple[float, float], left: tuple[float, float]) -> Rows:
    """Cosine of the means and silhouette, to the group that is joined and to the one left."""
    kinds = ("collapse", "normal") if panel == "a" else ("normal", "collapse")
    one = "first token of normal" if panel == "a" else "k^u of prefixed collapse"
    return [
        {
            "panel": panel,
            "pair": f"{one} / k^u of {kind}",
            "cosine_of_means": cosine,
            "silhouette": silhouette,
            "probe_accuracy": 0.8,
            "n": 20,
        }
        for kind, (cosine, silhouette) in zip(kinds, (joined, left), strict=True)
    ]


def layers(ratios: list[float], width: float = 0.1, **extra: Any) -> Rows:
    """D(F) by layer where D(S) is 1; intervals reach ``width`` to each side, relatively."""
    return [
        {
            "layer": layer,
            "distinct_first": 40.0,
            "d_first": ratio,
            "d_first_low": ratio * (1 - width),
            "d_first_high": ratio * (1 + width),
            "d_subsequent": 1.0,
            "d_subsequent_low": 1 - width,
            "d_subsequent_high": 1 + width,
        }
        | extra
        for layer, ratio in enumerate(ratios)
    ]


def contrast(
    encoder: list[float],
    decoder: list[float],
    silhouette: float = 0.1,
    behind: list[float] | None = None,
    shifted: list[float] | None = None,
) -> Rows:
    shared: dict[str, Any] = {"bos": "without", "probe_accuracy": 1.0}
    rows = layers(encoder, **shared, kind="encoder", silhouette=silhouette)
    rows += layers(decoder, **shared, kind="decoder", silhouette=0.9)
    if behind is not None:
        shared["bos"] = "with"
        rows += layers(behind, **shared, kind="encoder", silhouette=0.1)
    if shifted is not None:
        shared["bos"] = "without, positions from 1"
        rows += layers(shifted, **shared, kind="encoder", silhouette=0.1)
    return rows


def bos(without: list[float], with_bos: list[float], same: float | None = None) -> Rows:
    return [
        {
            "cases": "collapse",
            "bos": policy,
            "perplexity": value,
            "perplexity_same_bos": value if same is None or policy == "without" else same,
            "original_perplexity": 70.0,
            "original_perplexity_same_bos": 70.0,
        }
        for policy, values in (("without", without), ("with", with_bos))
        for value in values
    ]


def masked(
    first: float, opened: float, other: float, closed: Iterable[float], spread: float = 1e4
) -> Rows:
    """Tokens whose keys are the closer together, the longer their residual stream.

    ``spread`` is D of the keys of a later token that sees itself only, times its norm.
    """
    norms = {("none", 0): first, ("first sees all", 0): opened}
    for place, norm in enumerate(closed, start=1):
        norms |= {("none", place): other, ("later sees itself only", place): norm}
    return [
        {
            "part": "state",
            "intervention": name,
            "place": place,
            "residual_norm": norm,
            "concentration": (spread if name.startswith("later") else 1e4) / norm,
        }
        for (name, place), norm in norms.items()
    ]


def keyed(field: str, values: Mapping[Any, list[float]], **extra: Any) -> Rows:
    return [
        extra | {field: name, "perplexity": value}
        for name, found in values.items()
        for value in found
    ]


def acting(
    first: float, later: float, ratio_first: float = 0.001, ratio_later: float = 2.0
) -> Rows:
    """Three cases; the last one alone has the given numbers."""
    usual = {"original_perplexity": 70.0, "perplexity_first": 70.1, "rise_later": 1.0}
    usual |= {"ratio_first": 0.0005, "ratio_later": 3.0, "perplexity_all": 5000.0}
    odd = {"perplexity_first": first, "rise_later": later}
    odd |= {"ratio_first": ratio_first, "ratio_later": ratio_later}
    # One that does not collapse the model is passed over.
    idle = {"perplexity_all": 80.0, "ratio_first": 0.9, "ratio_later": 0.1}
    rows = (usual, usual, usual | odd)
    return [{"part": "where"} | row for row in (*rows, usual | idle)]


def identity(cells: list[list[float]]) -> Rows:
    names = [(place, space) for place in ("first", "later") for space in ("without", "with")]
    return [
        {"position": place, "space": space, "perplexity": value}
        for (place, space), values in zip(names, cells, strict=True)
        for value in values
    ]


def anchored(
    ours: list[float], theirs: list[float], perplexity: float = 71.0
) -> tuple[Rows, dict[str, Any]]:
    rows = [
        {"seed": seed, "method": method, "held_out_prefixes": value, "perplexity": perplexity}
        for method, values in (("FC-ROME", ours), ("C-ROME", theirs))
        for seed, value in enumerate(values)
        for _ in range(3)
    ]
    return rows, {"original_perplexity": 70.0}


HIGH, LOW, MIXED = [5000.0, 2000.0, 1001.0], [70.0, 71.0, 72.0], [5000.0, 2000.0, 71.0]
ROTARY, LEARNED = {"embedding": "rotary"}, {"embedding": "learned"}
SOURCES = ("first token", "later token sees itself only", "first token sees all", "later token")
KEYS = dict(zip(SOURCES, (HIGH, HIGH, LOW, LOW), strict=True))
SYNTHETIC: dict[str, list[tuple[Status, Given]]] = {
    "table1-denominator": [
        (YES, (components("denominator", [0.01] * 3, [1.01] * 3), {})),
        (PARTLY, (components("denominator", [0.01] * 3, [0.99] * 3), {})),
        (PARTLY, (components("denominator", [0.01] * 3, [0.101] * 3), {})),
        # One huge normal denominator lifts the mean and not the median.
        (NO, (components("denominator", [1.0] * 3, [2.0, 2.0, 2000.0]), {})),
        (NO, (components("denominator", [1.0] * 3, [9.9] * 3), {})),
    ],
    "table1-numerator": [
        (YES, (components("numerator", [2.95] * 3, [1.0] * 3), {})),
        (YES, (components("numerator", [1.0] * 3, [2.95] * 3), {})),
        (PARTLY, (components("numerator", [1.0] * 3, [3.05] * 3), {})),
        (PARTLY, (components("numerator", [1.0] * 3, [9.9] * 3), {})),
        (NO, (components("numerator", [1.0] * 3, [10.1] * 3), {})),
        (NO, (components("numerator", [10.1] * 3, [1.0] * 3), {})),
    ],
    "table2-rome": [
        (YES, table2([1001.0, 5000, 9000], [70.0, 71.0, 83.9])),
        (PARTLY, table2([1001.0, 5000, 9000], [70.0, 71.0, 84.1])),
        (PARTLY, table2([999.0, 5000, 9000], [70.0, 71.0, 72.0])),
        (NO, table2([1001.0, 5000, 9000], [70.0, 71.0, 1001.0])),
        (NO, table2([70.0, 71.0, 9000], [70.0, 71.0, 72.0])),
    ],
    "table2-c-rome": [
        (YES, table2(HIGH, LOW, spared=76.9)),
        (PARTLY, table2(HIGH, LOW, spared=77.1)),
        (PARTLY, table2(HIGH, LOW, spared=139.9)),
        (NO, table2(HIGH, LOW, spared=140.1)),
        (NOT_JUDGED, table2(LOW, LOW, spared=70.0)),
    ],
    "own-consistent-variants": [
        (YES, table2(HIGH, LOW, spared=76.9)),
        (PARTLY, table2(HIGH, LOW, spared=77.1)),
        (PARTLY, table2(HIGH, LOW, spared=139.9)),
        (NO, table2(HIGH, LOW, spared=140.1)),
    ],
    "section3-first-token": [
        (YES, table2([5000.0] * 20, LOW, first=18)),
        (PARTLY, table2([5000.0] * 20, LOW, first=17)),
        (PARTLY, table2([5000.0] * 20, LOW, first=10)),
        (NO, table2([5000.0] * 20, LOW, first=9)),
        # Cases of another model's list that leave this one alone are no collapse cases here.
        (PARTLY, table2([70.0] * 18 + [5000.0] * 20, LOW, first=30)),
        (NOT_JUDGED, table2([70.0] * 18 + [5000.0] * 2, LOW, first=20)),
    ],
    "table3-transfer": [
        (YES, transfer({"other": 1.09})),
        (PARTLY, transfer({"other": 1.09, "third": 30.0})),
        (PARTLY, transfer({"other": 1.11})),
        (PARTLY, transfer({"other": 1.99})),
        (NO, transfer({"other": 2.01})),
        (NOT_JUDGED, transfer({})),
        (NOT_JUDGED, transfer({"other": 1.0}, own=70.0)),
    ],
    "table4-efficacy": [
        (YES, (accuracy("C-ROME", "collapse", 0.49), {})),
        (PARTLY, (accuracy("C-ROME", "collapse", 0.5), {})),
        (NO, (accuracy("C-ROME", "collapse", 0.9), {})),
    ],
    "table4-generalization": [
        (YES, (accuracy("C-ROME", "collapse", 1.0, 0.49), {})),
        (PARTLY, (accuracy("C-ROME", "collapse", 0.0, 0.5), {})),
        (NO, (accuracy("C-ROME", "collapse", 0.0, 0.9), {})),
        (NOT_JUDGED, (accuracy("C-ROME", "collapse", 0.0, None), {})),
    ],
    "table5-efficacy": [
        (YES, (accuracy("C-ROME", "collapse", 0.9), {})),
        (PARTLY, (accuracy("C-ROME", "collapse", 0.89), {})),
        (NO, (accuracy("C-ROME", "collapse", 0.49) + accuracy("FC-ROME", "collapse", 1.0), {})),
    ],
    "table5-normal": [
        (YES, (accuracy("C-ROME", "normal", 0.9), {})),
        (PARTLY, (accuracy("C-ROME", "normal", 0.89), {})),
        (NO, (accuracy("C-ROME", "normal", 0.49) + accuracy("C-ROME", "collapse", 1.0), {})),
    ],
    "table5-generalization": [
        (YES, (accuracy("C-ROME", "collapse", 1.0, 0.5), {})),
        (PARTLY, (accuracy("C-ROME", "collapse", 1.0, 0.9), {})),
        (NO, (accuracy("C-ROME", "collapse", 0.9, 0.9), {})),
        (NOT_JUDGED, (accuracy("C-ROME", "collapse", 0.4, 0.1), {})),
    ],
    "table5-locality": [
        (YES, (local(0.8, 0.9), {})),
        (PARTLY, (local(1.0, 0.44), {})),
        (PARTLY, (local(0.7, 1.0), {})),
        (NO, (local(0.7, 0.8), {})),
    ],
    "own-prefixed-efficacy": [
        (YES, (accuracy("FC-ROME", "collapse", 0.9), {})),
        (PARTLY, (accuracy("FC-ROME", "collapse", 0.5), {})),
        (NO, (accuracy("FC-ROME", "collapse", 0.4) + accuracy("C-ROME", "collapse", 1.0), {})),
    ],
    "own-value-anchor": [
        (YES, anchored([0.9, 0.5], [0.1, 0.49])),
        (PARTLY, anchored([0.9, 0.49], [0.1, 0.2])),
        (PARTLY, anchored([0.9, 0.9], [0.1, 0.6])),
        (YES, anchored([0.9, 0.9], [0.1, 0.1], perplexity=76.9)),
        (PARTLY, anchored([0.9, 0.9], [0.1, 0.1], perplexity=77.1)),
        (NO, anchored([0.9, 0.1], [0.1, 0.2])),
    ],
    "table6-second2first": [
        (YES, (stages(HIGH, HIGH), ROTARY)),
        (PARTLY, (stages(HIGH, [5000.0, 2000.0, 70.0, 71.0]), ROTARY)),
        (NO, (stages(HIGH, [5000.0, 70.0, 70.0, 71.0]), ROTARY)),
        (NO, (stages(HIGH, LOW), ROTARY)),
        (YES, (stages([9000.0] * 3, [1500.0, 1400.0, 900.0]), LEARNED)),
        (PARTLY, (stages([9000.0] * 3, [9000.0] * 3), LEARNED)),
        (PARTLY, (stages([9000.0] * 3, [1500.0, 70.0, 70.0]), LEARNED)),
        (NO, (stages(HIGH, LOW), LEARNED)),
        (NOT_JUDGED, (stages(HIGH, HIGH), {})),
        (NOT_JUDGED, (stages(LOW, LOW), ROTARY)),
    ],
    "own-second2first-key": [
        (YES, (stages(HIGH, HIGH, 0.0), ROTARY)),
        (NO, (stages(HIGH, HIGH, 1e-9), ROTARY)),
        (YES, (stages(HIGH, HIGH, 0.5), LEARNED)),
        (NO, (stages(HIGH, HIGH, 0.0), LEARNED)),
    ],
    "table7-first2second": [
        (YES, (stages(LOW, LOW), ROTARY)),
        (YES, (stages(LOW, [70.0, 71.0, 2000.0, 5000.0]), ROTARY)),
        (PARTLY, (stages(LOW, MIXED), ROTARY)),
        (NO, (stages(LOW, HIGH), ROTARY)),
        (YES, (stages(LOW, MIXED), LEARNED)),
        (PARTLY, (stages(LOW, LOW), LEARNED)),
        (NO, (stages(LOW, HIGH), LEARNED)),
        (NOT_JUDGED, (stages(LOW, LOW), {"embedding": "none"})),
    ],
    "figure2-denominator": [
        (YES, (collapse_and_normal("a", 0.3, 0.29), {})),
        (PARTLY, (collapse_and_normal("a", 0.6, 0.3), {})),
        (NO, (collapse_and_normal("a", 0.29, 0.0), {})),
    ],
    "figure2-keys": [
        (YES, (collapse_and_normal("b", 0.3, 0.29), {})),
        (PARTLY, (collapse_and_normal("b", 0.6, 0.3), {})),
        (NO, (collapse_and_normal("b", 0.29, 0.0), {})),
        (
            YES,
            (
                pairs(
                    ({"panel": "b", "cases": "collapse"}, 0.91, 0.9),
                    ({"panel": "b", "cases": "normal"}, 0.89, 0.9),
                ),
                {},
            ),
        ),
        (
            NO,
            (
                pairs(
                    ({"panel": "b", "cases": "collapse"}, 0.89, 0.9),
                    ({"panel": "b", "cases": "normal"}, 0.5, 0.0),
                ),
                {},
            ),
        ),
    ],
    "figure3-first-tokens": [
        (YES, (figure3("a", (0.76, 0.2), (0.5, 0.31)), {})),
        # Two tight clouds side by side, far away from all others.
        (YES, (figure3("a", (0.999, 0.5), (0.1, 0.6)), {})),
        (PARTLY, (figure3("a", (0.74, 0.2), (0.5, 0.31)), {})),
        (PARTLY, (figure3("a", (0.9, 0.2), (0.5, 0.29)), {})),
        (PARTLY, (figure3("a", (0.9, 0.5), (0.5, 0.4)), {})),
        (NO, (figure3("a", (0.5, 0.2), (0.9, 0.6)), {})),
    ],
    "figure3-prefixed": [
        (YES, (figure3("b", (0.76, 0.2), (0.5, 0.31)), {})),
        (PARTLY, (figure3("b", (0.74, 0.2), (0.5, 0.31)), {})),
        (NO, (figure3("b", (0.5, 0.2), (0.9, 0.6)), {})),
        # Rows of the other panel say nothing.
        (NOT_JUDGED, (figure3("a", (0.76, 0.2), (0.5, 0.31)), {})),
    ],
    "figure6-encoder": [
        (YES, (contrast([0.51, 1.0, 1.99], [0.9, 0.1, 0.01]), {})),
        # Equally wide clouds in two places are no "no difference".
        (NO, (contrast([1.0, 1.0, 1.0], [0.9, 0.1, 0.01], silhouette=0.5), {})),
        (YES, (contrast([1.0] * 3, [0.9, 0.1, 0.01], behind=[1.0] * 3), {})),
        (PARTLY, (contrast([1.0] * 3, [0.9, 0.1, 0.01], behind=[0.01] * 3), {})),
        (PARTLY, (contrast([0.01] * 3, [0.9, 0.1, 0.01], behind=[1.0] * 3), {})),
        (NO, (contrast([0.01] * 3, [0.9, 0.1, 0.01], behind=[0.01] * 3), {})),
        (PARTLY, (contrast([1.0, 1.0, 1.0], [0.9, 0.8, 0.7]), {})),
        (PARTLY, (contrast([1.0, 1.0, 0.3, 0.3], [0.9, 0.1, 0.01]), {})),
        (NO, (contrast([1.0, 0.3, 0.3, 0.3], [0.9, 0.1, 0.01]), {})),
    ],
    "own-encoder-place": [
        (YES, (contrast([0.9, 0.1, 0.02], [1.0], shifted=[0.51, 0.7, 0.9]), {})),
        (PARTLY, (contrast([0.9, 0.1, 0.02], [1.0], shifted=[0.21, 0.7, 0.9]), {})),
        (NO, (contrast([0.9, 0.1, 0.02], [1.0], shifted=[0.19, 0.7, 0.9]), {})),
        (NOT_JUDGED, (contrast([0.9, 0.8, 0.51], [1.0], shifted=[0.9, 0.7, 0.9]), {})),
        (NOT_JUDGED, (contrast([0.9, 0.1, 0.02], [1.0]), {})),
    ],
    "figure7-bos": [
        (YES, (bos(HIGH, LOW), {})),
        (PARTLY, (bos([5000.0, 2000.0, 70.0, 71.0], LOW), {})),
        (NO, (bos([5000.0, 70.0, 70.0, 71.0], LOW), {})),
        (NO, (bos(HIGH, HIGH), {})),
        (NO, (bos(LOW, LOW), {})),
        # Whole on texts without BOS only: not spared.
        (NO, (bos(HIGH, LOW, same=5000.0), {})),
    ],
    "own-bos-reverse": [
        (YES, (bos(HIGH, [70.0, 71.0, 76.9]), {})),
        (PARTLY, (bos(HIGH, [70.0, 71.0, 77.1]), {})),
        (PARTLY, (bos(HIGH, LOW, same=90.0), {})),
        (NO, (bos(HIGH, MIXED), {})),
        (NOT_JUDGED, (bos(LOW, LOW), {})),
    ],
    "equation4": [
        (YES, (layers([1.0, 0.1]), {"edited_layer": 1})),
        (PARTLY, (layers([1.0, 0.11]), {"edited_layer": 1})),
        (NO, (layers([0.01, 1.0]), {"edited_layer": 1})),
        # Far lower, but the intervals say that this may be chance.
        (NO, (layers([1.0, 0.1], width=0.95), {"edited_layer": 1})),
        (NOT_JUDGED, (layers([0.1, 0.1]), {"edited_layer": 9})),
    ],
    "figure8-shrinks": [
        (YES, (layers([1.0, 0.5, 0.1, 1.0]), {"edited_layer": 2})),
        (PARTLY, (layers([0.5, 0.5, 0.1]), {"edited_layer": 2})),
        # What comes before counts, too: apart at first, or the other way round.
        (PARTLY, (layers([1.0, 0.1, 1.0, 0.1]), {"edited_layer": 3})),
        (PARTLY, (layers([1.0, 2.1, 0.1]), {"edited_layer": 2})),
        # Equal tokens lie together by construction.
        (NOT_JUDGED, (layers([1.0, 0.5, 0.1], distinct_first=1.0), {"edited_layer": 2})),
        (NO, (layers([1.0, 0.1, 0.51]), {"edited_layer": 2})),
        (NO, (layers([1.0, 0.5, 0.5], width=0.9), {"edited_layer": 2})),
        (NOT_JUDGED, (layers([1.0, 0.1]), {"edited_layer": 1})),
    ],
    "figure8-llama": [
        (YES, (layers([1.0, 0.51]), {"edited_layer": 1, "model": {"name": "llama2-7b"}})),
        (PARTLY, (layers([1.0, 0.5]), {"edited_layer": 1, "model": {"name": "llama2-7b"}})),
        (NO, (layers([1.0, 0.1]), {"edited_layer": 1, "model": {"name": "smollm2-135m"}})),
        (NOT_JUDGED, (layers([1.0, 0.1]), {"edited_layer": 1, "model": {"name": "gpt2-xl"}})),
    ],
    "own-mask-state": [
        (YES, (masked(1000.0, 100.0, 100.0, [1000.0, 2000.0, 1000.0]), {})),
        (PARTLY, (masked(1000.0, 101.0, 100.0, [1000.0, 1000.0]), {})),
        # One place at which it does not come, and one at which alone it comes.
        (PARTLY, (masked(1000.0, 100.0, 100.0, [1000.0, 999.0]), {})),
        (PARTLY, (masked(1000.0, 101.0, 100.0, [999.0, 1000.0]), {})),
        (PARTLY, (masked(1000.0, 100.0, 100.0, [999.0, 999.0]), {})),
        (NO, (masked(1000.0, 101.0, 100.0, [999.0, 999.0]), {})),
        # The spike without the keys' concentration.
        (NO, (masked(1000.0, 101.0, 100.0, [1000.0, 1000.0], spread=1.1e4), {})),
        # No anomaly in the first place.
        (NO, (masked(999.0, 9.0, 100.0, [5000.0]), {})),
    ],
    "own-collapse-later": [
        (YES, (acting(76.9, 0.91), {})),
        (PARTLY, (acting(77.1, 1.0), {})),
        (PARTLY, (acting(70.0, 0.89), {})),
        (NO, (acting(5e3, 0.1)[2:3] * 3, {})),
    ],
    "own-collapse-gain": [
        (YES, (acting(70.0, 1.0, 0.009, 0.51), {})),
        (PARTLY, (acting(70.0, 1.0, 0.011, 0.51), {})),
        (PARTLY, (acting(70.0, 1.0, 0.009, 0.49), {})),
        (NO, (acting(70.0, 1.0, 0.5, 0.4)[2:3] * 3, {})),
    ],
    "own-mask-edit": [
        (YES, (keyed("key_from", KEYS, part="edit"), {})),
        (PARTLY, (keyed("key_from", KEYS | {SOURCES[1]: [*HIGH, *LOW]}, part="edit"), {})),
        (NO, (keyed("key_from", KEYS | {SOURCES[1]: LOW}, part="edit"), {})),
        (NO, (keyed("key_from", KEYS | {SOURCES[2]: [*HIGH, *LOW]}, part="edit"), {})),
    ],
    "own-token-identity": [
        (YES, (identity([HIGH, HIGH, LOW, LOW]), {})),
        (PARTLY, (identity([HIGH, MIXED, LOW, LOW]), {})),
        (NO, (identity([HIGH, LOW, LOW, LOW]), {})),
        (NO, (identity([HIGH, HIGH, HIGH, LOW]), {})),
    ],
}


def _both(one: Rows, other: Rows) -> Rows:
    return [first | second for first, second in zip(one, other, strict=True)]


_LLAMA: dict[str, Any] = {"edited_layer": 2}
BY_SCRIPT: dict[str, Given] = {
    "table1_update_components": (
        _both(
            components("denominator", [0.01] * 3, [2.0] * 3),
            components("numerator", [1.0] * 3, [2.0] * 3),
        ),
        {},
    ),
    "table2_perplexity": table2(HIGH, LOW),
    "table3_transfer": transfer({"gemma3-270m": 1.05}),
    "table4_efficacy": (accuracy("C-ROME", "collapse", 0.1, 0.2), {}),
    "table5_prefixed_efficacy": (
        accuracy("C-ROME", "collapse", 0.95, 0.2)
        + accuracy("C-ROME", "normal", 0.95)
        + accuracy("FC-ROME", "collapse", 1.0),
        {},
    ),
    "table6_second2first": (stages(HIGH, HIGH), ROTARY),
    "table7_first2second": (stages(LOW, LOW), ROTARY),
    "figure2_keys": (collapse_and_normal("a", 0.6, 0.1) + collapse_and_normal("b", 0.6, 0.1), {}),
    "figure3_first_tokens": (
        figure3("a", (0.9, 0.1), (0.1, 0.6)) + figure3("b", (0.9, 0.1), (0.1, 0.6)),
        {},
    ),
    "figure6_encoder_contrast": (contrast([1.0, 1.1, 0.9], [1.0, 0.1, 0.01]), {}),
    "figure7_without_bos": (bos(HIGH, LOW), {}),
    "figure8_concentration": (layers([1.0, 0.5, 0.01]), _LLAMA),
    "extra_attention_mask": (
        masked(1000.0, 10.0, 10.0, [1000.0] * 10) + keyed("key_from", KEYS, part="edit"),
        {},
    ),
    "extra_token_identity": (identity([HIGH, HIGH, LOW, LOW]), {}),
    "extra_value_anchor": anchored([0.9, 0.9], [0.1, 0.1]),
    "extra_where_it_acts": (acting(70.2, 0.99), {}),
}
"""One result of every script, on which all of its claims hold; but see ``figure8-llama``."""
