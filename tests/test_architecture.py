"""Every module says what it exports; who may tokenise, and what nobody does."""

import ast
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "firsttok"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_exports_are_explicit_and_exist(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    exported: list[str] | None = None
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            exported = ast.literal_eval(node.value)
    if exported is None:
        assert not [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        return
    source = path.read_text("utf-8")
    assert all(name in source.replace(f'"{name}"', "", 1) for name in exported)


def test_only_prompts_tokenises_and_only_models_and_engine_know_architectures() -> None:
    for path in MODULES:
        source = path.read_text("utf-8")
        if part(path) not in {"prompts", "models"}:
            assert "add_special_tokens" not in source
            assert ".apply_chat_template" not in source
        if part(path) not in {"models", "engine"}:
            assert "original_component" not in source
        if part(path) != "models":
            assert "from_pretrained" not in source


def test_nothing_is_pickled_and_no_remote_code_runs() -> None:
    for path in [*MODULES, *(ROOT / "analyses").glob("*.py")]:
        source = path.read_text("utf-8")
        assert "import pickle" not in source
        assert "torch.load(" not in source
        assert "trust_remote_code=True" not in source
        assert '"trust_remote_code": True' not in source


def test_public_names_resolve() -> None:
    import firsttok

    for name in firsttok.__all__:
        assert getattr(firsttok, name) is not None
    homes: Any = vars(firsttok)["_homes"]
    assert sorted(firsttok.__all__) == sorted(homes())
