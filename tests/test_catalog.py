"""Layers and settings of the papers' models, against the reference notes and the paper."""

import ast
import re
from pathlib import Path

import pytest

from firsttok.hyperparameters import Hyperparameters
from firsttok.models import CATALOG, find_spec

ANALYSES = Path(__file__).parent.parent / "analyses"
PAPER = {
    "gpt2-xl": (17, 20, 0.5),
    "gpt-j-6b": (5, 20, 0.5),
    "llama2-7b": (5, 25, 1e-3),
    "mistral-7b": (5, 25, 1e-3),
}
"""Layer, iterations and weight decay (note 9)."""
NAMES = {"GPT-2-XL": "gpt2-xl", "GPT-J": "gpt-j-6b", "Llama2-7b and Mistral-7b": "llama2-7b"}


@pytest.mark.parametrize("name", PAPER)
def test_settings_of_the_released_configurations(name: str) -> None:
    spec = find_spec(name)
    assert spec is not None
    layer, steps, decay = PAPER[name]
    assert spec.layer == layer
    assert spec.hyperparameters == Hyperparameters(
        steps=steps,
        weight_decay=decay,
        learning_rate=0.5,
        clamp=4.0,
        kl=0.0625,
        stop_below=5e-2,
    )


def test_settings_are_those_of_the_notes(shared: Path) -> None:
    notes = (shared / "reference-notes.md").read_text("utf-8")
    (line,) = re.findall(r"^9\. (.+)$", notes, re.MULTILINE)
    found = re.findall(
        r"([A-Z][\w\- ]+?): layer (\d+), (\d+)(?: iterations)?,(?: weight decay)? ([\de.\-]+\d)",
        line,
    )
    assert {name for name, *_ in found} == set(NAMES)
    for name, layer, steps, decay in found:
        assert PAPER[NAMES[name]] == (int(layer), int(steps), float(decay))
    (seventh,) = re.findall(r"^7\. (.+)$", notes, re.MULTILINE)
    (eighth,) = re.findall(r"^8\. (.+)$", notes, re.MULTILINE)
    usual = Hyperparameters()
    assert f"{usual.kl} * KL" in seventh
    assert f"lr {usual.learning_rate}" in eighth
    assert "below 5e-2 stops" in eighth
    assert usual.stop_below == 5e-2
    assert f"<= {usual.clamp:g} ||target_init||" in eighth


def test_the_paper_names_the_edited_layer_of_gpt2_xl(shared: Path) -> None:
    (paper,) = (shared / "seeds").glob("000_*.txt")
    (layer,) = re.findall(r"edited layer \(layer (\d+)\) in GPT-2-XL", paper.read_text("utf-8"))
    assert int(layer) == PAPER["gpt2-xl"][0]


def test_every_model_of_the_paper_can_be_named() -> None:
    assert {"gpt2-xl", "gpt-j-6b", "llama2-7b", "llama3-8b", "mistral-7b", "t5-3b"} <= {
        spec.name for spec in CATALOG
    }


@pytest.mark.parametrize("path", sorted(ANALYSES.glob("*.py")), ids=lambda path: path.stem)
def test_no_script_has_settings_of_its_own(path: Path) -> None:
    # So --model NAME is all it takes: layer and settings come from the catalog.
    tree = ast.parse(path.read_text("utf-8"))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert "Hyperparameters" not in names
    keywords = {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword)}
    assert not keywords & {"steps", "weight_decay", "learning_rate", "clamp", "stop_below"}
