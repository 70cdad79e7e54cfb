"""Fixtures; beartype checks firsttok's annotations, of shapes in the first calls of each test."""

import os
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import is_dataclass
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any, get_args, get_type_hints

import jaxtyping
import pytest
import torch
from beartype import BeartypeConf, beartype

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
_jaxtyped: Any = jaxtyping.jaxtyped
# A TypeError, as jaxtyping's own and as Python's where nothing is checked.
_beartyped = beartype(conf=BeartypeConf(violation_type=TypeError))
CHECKED = 16
"""Calls of a function whose shapes are checked in each test. To check all calls takes as long as a
third of the tests of tiny models."""
_calls: Counter[Callable[..., Any]] = Counter()


def _is_shape(hint: Any) -> bool:
    """Whether a shape is anywhere in an annotation."""
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    parts = hint if isinstance(hint, list) else get_args(hint)
    return any(map(_is_shape, parts))


def checked(thing: Any = None, *, typechecker: Any) -> Any:
    """What checks a function or a dataclass: shapes by jaxtyping, all else by beartype alone.

    jaxtyping binds the arguments of every call to their names, and makes its checks of an inner
    function at each call of the outer one. For functions without a shape that was a third of the
    time that tests of tiny models took. Of those, inner ones are left to basedpyright.
    """
    if thing is None:
        return partial(checked, typechecker=typechecker)
    function = thing.__init__ if isinstance(thing, type) else thing
    try:
        hints = get_type_hints(function).values()
    except (NameError, TypeError):
        # Imported for type checkers only: jaxtyping leaves these out, and checks the others.
        hints = [jaxtyping.AbstractArray]
    if any(map(_is_shape, hints)):
        with_shapes = _jaxtyped(thing, typechecker=typechecker)
        return with_shapes if isinstance(thing, type) else _at_first(thing, with_shapes)
    if "<locals>" in thing.__qualname__:
        return thing
    if not isinstance(thing, type):
        return _beartyped(thing)
    if is_dataclass(thing):
        setattr(thing, "__init__", _beartyped(function))  # noqa: B010
    return thing


def _at_first(function: Callable[..., Any], with_shapes: Callable[..., Any]) -> Any:
    """The function, whose first calls of a test are checked."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _calls[function] >= CHECKED:
            return function(*args, **kwargs)
        _calls[function] += 1
        return with_shapes(*args, **kwargs)

    return call


jaxtyping.jaxtyped = checked
jaxtyping.install_import_hook("firsttok", "beartype.beartype")

import firsttok.data.fact_files  # noqa: E402
import firsttok.evaluation  # noqa: E402

# The same facts each time, and a second to read under type checks: every module gets this one.
firsttok.data.fact_files.builtin_facts = cache(firsttok.data.builtin_facts)
firsttok.data.builtin_facts = firsttok.data.fact_files.builtin_facts

from tiny import TinyFactory, build, load_tiny  # noqa: E402
from transformers.models.gptj import modeling_gptj  # noqa: E402

from firsttok.models import Model, load  # noqa: E402

LONGEST = (
    *("test_golden", "test_notebooks", "test_docs_code", "test_scripts", "test_identity"),
    *("test_golden_editors", "test_sequences", "test_naive", "test_tasks", "test_layers"),
    *("test_sweep", "test_screening", "test_tracing", "test_inspection", "test_cli"),
    *("test_user_types", "test_hub", "test_fuzz", "test_results", "test_packaging"),
    *("test_evaluation", "test_value", "test_keys", "test_docs", "test_trials"),
    *("test_kept_files", "test_cluster"),
)
"""Files that take longest. They are begun first, so that nobody waits for one at the end."""
_THREADS = torch.get_num_threads()
_SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(autouse=True)
def one_thread_for_tiny_models(request: pytest.FixtureRequest) -> None:
    real = request.node.get_closest_marker("real_model") is not None
    torch.set_num_threads(_THREADS if real else 1)


@pytest.fixture(autouse=True)
def shapes_are_checked_anew() -> None:
    _calls.clear()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyFactory:
    folders: dict[str, Path] = {}
    models: dict[tuple[str, str], Model] = {}

    def get(arch: str, dtype: str = "float32") -> Model:
        if arch not in folders:
            folders[arch] = tmp_path_factory.mktemp(arch)
            build(arch, folders[arch])
        if (arch, dtype) not in models:
            models[arch, dtype] = load_tiny(folders[arch], dtype)
        return models[arch, dtype]

    return get


@pytest.fixture(scope="session")
def real_model() -> Model:
    return load()


@pytest.fixture(scope="session")
def shared() -> Path:
    if not _SHARED.is_dir():
        pytest.skip(f"needs the reference data in {_SHARED}, which is not there")
    return _SHARED


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FIRSTTOK_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def short_continuations() -> Generator[None, None, None]:
    """Models go on with two tokens: no test of a file that asks for this one reads which."""
    shorter = partial(firsttok.evaluation.continuation, tokens=2)
    match = partial(firsttok.evaluation.generated_match, tokens=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("firsttok.exploration.continuation", shorter)
        patch.setattr("firsttok.metrics.generated_match", match)
        yield


@pytest.fixture(params=[False, True], ids=["fast", "plain"])
def plain(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether every fast path is off; a test of numbers that asks for it runs on both settings."""
    if request.param:
        monkeypatch.setenv("FIRSTTOK_PLAIN", "1")
    else:
        monkeypatch.delenv("FIRSTTOK_PLAIN", raising=False)
    return bool(request.param)


@pytest.fixture
def softmax_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention of a float64 model in float64, where transformers asks for float32.

    Its rounding depends on padding, and Adam blows it up; without it the two paths agree a thousand
    times more closely than the tests ask. While products are made otherwise, PyTorch calls what
    stands in its own place with a level of the stack.
    """
    plain = torch.nn.functional.softmax

    def softmax(
        scores: torch.Tensor,
        dim: int | None = None,
        _stacklevel: int = 3,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        wanted = None if scores.dtype is torch.float64 else dtype
        return plain(scores, dim=dim, dtype=wanted)

    monkeypatch.setattr(torch.nn.functional, "softmax", softmax)
    # GPT-J's scores are of float32, too, and its module asks for them by that name.
    monkeypatch.setattr(modeling_gptj, "torch", _Wide())


class _Wide:
    """PyTorch, whose float32 is float64."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name == "float32" else getattr(torch, name)
