"""How the time of an edit grows with the number of facts, their length, and the model."""

from dataclasses import replace

from edit_cases import edit_sides, fast_edits, fixed_steps, warm
from measuring import Extras, Plan, Side, Table
from random_models import GROWTH
from setting import Setting

__all__ = ["growth_in_facts", "growth_in_length", "growth_in_size"]

LENGTHS = (0, 16, 48)
"""Words put before a prompt to make it longer."""
FILLER = "It was a long day, and they had talked about many other things before this one came up. "


def growth_in_facts(setting: Setting) -> Plan:
    """Time of the fast side against the number of facts, the steps being fixed."""
    setting.prepare()
    settings = fixed_steps(setting)
    most = max(setting.amounts.growth_facts)
    facts = replace(setting, amounts=replace(setting.amounts, facts=most)).facts
    return Plan(
        sides=tuple(
            Side(
                label=f"facts: {count}",
                run=lambda count=count: fast_edits(setting, facts[:count], settings),
                items=count,
                unit="fact",
            )
            for count in setting.amounts.growth_facts
        ),
        warm=lambda: warm(setting),
    )


def growth_in_length(setting: Setting) -> Plan:
    """Time of both sides, on the same facts, against the length of the prompt up to the subject."""
    setting.prepare()
    settings = fixed_steps(setting)
    sides: list[Side] = []
    pairs: list[tuple[str, str, str]] = []
    words = (FILLER * 8).split()
    for length in LENGTHS:
        filler = "".join(f"{word} " for word in words[:length])
        some = setting.facts[: setting.amounts.growth_pairs]
        facts = [replace(fact, template=filler + fact.template) for fact in some]
        name = f"{length} more words"
        sides += edit_sides(setting, facts, facts, settings, suffix=f", {name}")
        pairs.append((name, f"fast, {name}", f"naive, {name}"))
    return Plan(sides=tuple(sides), pairs=tuple(pairs), warm=lambda: warm(setting))


def growth_in_size(setting: Setting) -> Plan:
    """Time of both sides, on the same facts, against the size of random models."""
    sides: list[Side] = []
    pairs: list[tuple[str, str, str]] = []
    sized = [setting.of_size(size.name) for size in GROWTH[: setting.amounts.sizes]]
    rows: list[tuple[str | float | int, ...]] = []
    for one in sized:
        one.prepare()
        few = one.facts[: setting.amounts.growth_pairs]
        sides += edit_sides(one, few, few, fixed_steps(one), suffix=f", {one.label}")
        pairs.append((one.label, f"fast, {one.label}", f"naive, {one.label}"))
        site = one.model.site(one.layer)
        parameters = sum(p.numel() for p in one.naive.network.parameters())
        rows.append(
            (one.label, f"{parameters / 1e6:.1f} M", one.model.n_layers, site.d_model, site.d_mlp)
        )
    table = Table(
        title="The models",
        columns=("model", "parameters", "layers", "d_model", "d_mlp"),
        rows=tuple(rows),
    )

    def warm_all() -> None:
        for one in sized:
            warm(one)

    return Plan(
        sides=tuple(sides),
        pairs=tuple(pairs),
        warm=warm_all,
        model="random models",
        check=lambda _results, _seconds: Extras(tables=(table,)),
    )
