"""C: streamed, cached, resumed, solved with, refused."""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import DECODERS, SENTENCES, TRAINING, TinyFactory, relative

from firsttok.cli import main
from firsttok.errors import BadInputError, NonFiniteError
from firsttok.models import BosPolicy, Model
from firsttok.second_moment import (
    SecondMoment,
    compute_second_moment,
    compute_second_moments,
    default_corpus,
    load_second_moment,
)

MODULE = import_module("firsttok.second_moment")
CORPUS = tuple(f"{a} {b}" for a in TRAINING for b in SENTENCES)
LONG = (" ".join(TRAINING * 3), "  ", "Rome")


def compute(model: Model, **options: Any) -> SecondMoment:
    """C at layer 1 over the small corpus."""
    settings: dict[str, Any] = {"layer": 1, "corpus": CORPUS, **options}
    return compute_second_moment(model, **settings)


def moment_of(matrix: torch.Tensor) -> SecondMoment:
    """A second moment around any matrix."""
    return SecondMoment(
        matrix=matrix,
        tokens=5,
        corpus="text",
        corpus_hash="hash",
        layer=1,
        model_fingerprint="model",
    )


def positive(size: int, *, columns: int | None = None) -> torch.Tensor:
    """A random Gram matrix; singular with fewer columns than rows."""
    generator = torch.Generator().manual_seed(1)
    factor = torch.randn(size, columns or 2 * size, generator=generator, dtype=torch.float64)
    return factor @ factor.T


def naive_moment(
    model: Model, texts: tuple[str, ...], *, layer: int, first_tokens: bool = True
) -> tuple[torch.Tensor, int]:
    """C, window by window and token by token."""
    tokenizer: Any = model.tokenizer
    bridge: Any = model.bridge
    leading = list(model.leading_ids)
    room = 128 - len(leading)
    site = model.site(layer)
    total = torch.zeros(site.d_mlp, site.d_mlp, dtype=torch.float64)
    count = 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text.strip() else []
        for start in range(0, len(ids), room):
            tokens = torch.tensor([leading + ids[start : start + room]])
            with torch.no_grad():
                _, cache = bridge.run_with_cache(
                    tokens, attention_mask=torch.ones_like(tokens), names_filter=[site.key_hook]
                )
            for key in cache[site.key_hook][0][0 if first_tokens else 1 :].double():
                total += torch.outer(key, key)
                count += 1
    return total / count, count


def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run one window at a time."""
    monkeypatch.setattr(MODULE, "batches", lambda prompts: [[i] for i in range(len(prompts))])


def interrupt_after(monkeypatch: pytest.MonkeyPatch, count: int) -> list[int]:
    """Make the capture fail as if by Ctrl-C after some batches; returns what was run."""
    original: Callable[..., Any] = MODULE.capture
    ran: list[int] = []

    def capture(*args: Any, **kwargs: Any) -> Any:
        if len(ran) == count:
            raise KeyboardInterrupt
        ran.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(MODULE, "capture", capture)
    return ran


@pytest.mark.parametrize("bos", [BosPolicy.WITH, BosPolicy.WITHOUT])
@pytest.mark.parametrize("arch", DECODERS)
@pytest.mark.usefixtures("own_cache")
def test_streaming_equals_a_loop_over_tokens(tiny: TinyFactory, arch: str, bos: BosPolicy) -> None:
    model = tiny(arch, "float64").with_bos(bos)
    for corpus in (SENTENCES, LONG):
        moment = compute(model, corpus=corpus, layer=2)
        expected, count = naive_moment(model, corpus, layer=2)
        assert moment.tokens == count
        assert relative(moment.matrix, expected) < 1e-6
        assert moment.matrix.dtype is torch.float64
        assert (moment.layer, moment.model_fingerprint) == (2, model.fingerprint)


@pytest.mark.parametrize("bos", [BosPolicy.WITH, BosPolicy.WITHOUT])
@pytest.mark.usefixtures("own_cache")
def test_first_tokens_are_left_out_where_asked(tiny: TinyFactory, bos: BosPolicy) -> None:
    model = tiny("llama", "float64").with_bos(bos)
    corpus = ("Rome", *LONG)
    some = compute(model, corpus=corpus, first_tokens=False)
    expected, count = naive_moment(model, corpus, layer=1, first_tokens=False)
    assert some.tokens == count
    assert relative(some.matrix, expected) < 1e-6
    # It is kept apart from that with them.
    whole = compute(model, corpus=corpus)
    assert relative(whole.matrix, naive_moment(model, corpus, layer=1)[0]) < 1e-6
    assert whole.corpus_hash != some.corpus_hash


def test_several_layers_are_as_each_alone(
    tiny: TinyFactory, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("gpt2")
    small_groups(monkeypatch)
    alone = compute(model, layer=1)
    with monkeypatch.context() as patched:
        ran = interrupt_after(patched, 12)
        with pytest.raises(KeyboardInterrupt):
            compute_second_moments(model, layers=(2, 1, 0), corpus=CORPUS)
    assert len(ran) == 12
    # What is there is not run again, and the rest resumes after the tenth batch.
    ran = interrupt_after(monkeypatch, -1)
    found = compute_second_moments(model, layers=(2, 1, 0), corpus=CORPUS)
    assert len(ran) == len(CORPUS) - 10
    assert list(found) == [2, 1, 0]
    assert torch.equal(found[1].matrix, alone.matrix)
    for layer, moment in found.items():
        expected, count = naive_moment(model, CORPUS, layer=layer)
        assert (moment.layer, moment.tokens) == (layer, count)
        assert relative(moment.matrix, expected) < 1e-5
        assert torch.equal(compute(model, layer=layer).matrix, moment.matrix)
    assert len(ran) == len(CORPUS) - 10
    assert not list(own_cache.rglob("*.partial"))
    with pytest.raises(BadInputError, match="no layer"):
        compute_second_moments(model, layers=())


@pytest.mark.parametrize("arch", ["t5", "bert"])
@pytest.mark.usefixtures("own_cache")
def test_streaming_works_on_encoders(tiny: TinyFactory, arch: str) -> None:
    model = tiny(arch, "float64")
    for layer in (0, model.n_layers - 1):
        moment = compute(model, corpus=SENTENCES, layer=layer)
        expected, count = naive_moment(model, SENTENCES, layer=layer)
        assert moment.tokens == count
        assert relative(moment.matrix, expected) < 1e-6


@pytest.mark.usefixtures("own_cache")
def test_reading_stops_after_the_asked_number_of_tokens(tiny: TinyFactory) -> None:
    model = tiny("gpt2")
    tokenizer: Any = model.tokenizer
    lengths = [len(tokenizer(text)["input_ids"]) for text in CORPUS]
    moment = compute(model, max_tokens=sum(lengths[:3]) + 1)
    assert moment.tokens == sum(lengths[:4])


def test_a_cached_one_is_used_again(
    tiny: TinyFactory, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    first = compute(model, corpus_name="mine")
    files = sorted((own_cache / "second_moments").glob("*.safetensors"))
    assert len(files) == 1
    assert not list(own_cache.rglob("*.partial"))
    interrupt_after(monkeypatch, 0)
    again = compute(model, corpus_name="mine")
    assert torch.equal(again.matrix, first.matrix)
    assert (again.tokens, again.corpus, again.corpus_hash) == (
        first.tokens,
        "mine",
        first.corpus_hash,
    )
    assert (again.layer, again.model_fingerprint) == (1, model.fingerprint)
    assert again.content_hash == first.content_hash


@pytest.mark.parametrize(
    "change",
    [
        lambda tiny: compute(tiny("llama"), layer=2),
        lambda tiny: compute(tiny("llama"), max_tokens=50),
        lambda tiny: compute(tiny("llama"), corpus=CORPUS[1:]),
        lambda tiny: compute(tiny("llama").with_bos(BosPolicy.WITHOUT)),
        lambda tiny: compute(tiny("llama", "float64")),
        lambda tiny: compute(tiny("mistral")),
    ],
)
@pytest.mark.usefixtures("own_cache")
def test_a_cached_one_of_something_else_is_not_used(
    tiny: TinyFactory,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[TinyFactory], SecondMoment],
) -> None:
    first = compute(tiny("llama"))
    with monkeypatch.context() as patched:
        interrupt_after(patched, 0)
        with pytest.raises(KeyboardInterrupt):
            change(tiny)
    assert change(tiny).content_hash != first.content_hash


@pytest.mark.parametrize("batches_before", [3, 10, 17])
def test_an_interrupted_run_goes_on_where_it_stopped(
    tiny: TinyFactory,
    own_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batches_before: int,
) -> None:
    model = tiny("gpt2")
    small_groups(monkeypatch)
    undisturbed = compute(model)
    monkeypatch.setenv("FIRSTTOK_CACHE", str(tmp_path / "second"))
    with monkeypatch.context() as patched:
        interrupt_after(patched, batches_before)
        with pytest.raises(KeyboardInterrupt):
            compute(model)
    saved = list((tmp_path / "second").rglob("*.partial"))
    assert len(saved) == (batches_before >= 10)
    assert not list((tmp_path / "second").rglob("*.safetensors"))
    ran = interrupt_after(monkeypatch, -1)
    resumed = compute(model)
    assert len(ran) == len(CORPUS) - batches_before // 10 * 10
    assert torch.equal(resumed.matrix, undisturbed.matrix)
    assert resumed.tokens == undisturbed.tokens
    assert not list((tmp_path / "second").rglob("*.partial"))


@pytest.mark.parametrize(
    "damage", ["truncated", "empty", "text", "key", "shape", "metadata", "nan"]
)
def test_a_damaged_checkpoint_is_started_again(
    tiny: TinyFactory,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: str,
) -> None:
    model = tiny("gpt2")
    expected = naive_moment(model, CORPUS, layer=1)[0]
    small_groups(monkeypatch)
    with monkeypatch.context() as patched:
        interrupt_after(patched, 12)
        with pytest.raises(KeyboardInterrupt):
            compute(model)
    (partial,) = own_cache.rglob("*.partial")
    spoil(partial, damage, "sum")
    moment = compute(model)
    assert relative(moment.matrix, expected) < 1e-5


def test_a_checkpoint_of_other_batches_is_started_again(
    tiny: TinyFactory, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("gpt2")
    expected, count = naive_moment(model, CORPUS, layer=1)
    with monkeypatch.context() as patched:
        small_groups(patched)
        interrupt_after(patched, 12)
        with pytest.raises(KeyboardInterrupt):
            compute(model)
    assert list(own_cache.rglob("*.partial"))
    pairs = [list(range(len(CORPUS)))[start : start + 2] for start in range(0, len(CORPUS), 2)]
    monkeypatch.setattr(MODULE, "batches", lambda _prompts: pairs)
    moment = compute(model)
    assert moment.tokens == count
    assert relative(moment.matrix, expected) < 1e-5


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "key", "shape", "nan"])
def test_a_damaged_cached_one_is_computed_again(
    tiny: TinyFactory, own_cache: Path, damage: str
) -> None:
    model = tiny("gpt2")
    first = compute(model)
    (path,) = own_cache.rglob("*.safetensors")
    spoil(path, damage, "second_moment")
    again = compute(model)
    assert torch.equal(again.matrix, first.matrix)
    assert torch.equal(load_second_moment(path, d_mlp=40).matrix, first.matrix)


def spoil(path: Path, damage: str, name: str) -> None:
    """Damage a safetensors file in one way."""
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("no safetensors at all")
    else:
        tensors = load_file(path)
        matrix = tensors.pop(name)
        metadata = {"tokens": "3", "done": "2"}
        if damage == "key":
            tensors["other"] = matrix
        elif damage == "shape":
            tensors[name] = matrix[:3, :3].contiguous()
        elif damage == "nan":
            tensors[name] = torch.full_like(matrix, torch.nan)
        else:
            tensors[name] = matrix
            metadata = {}
        save_file(tensors, path, metadata)


def test_a_saved_one_comes_back(tmp_path: Path) -> None:
    moment = moment_of(positive(6))
    path = tmp_path / "folder" / "c.safetensors"
    moment.save(path)
    loaded = load_second_moment(path, d_mlp=6)
    assert torch.equal(loaded.matrix, moment.matrix)
    assert loaded.content_hash == moment.content_hash
    for field in ("tokens", "corpus", "corpus_hash", "layer", "model_fingerprint"):
        assert getattr(loaded, field) == getattr(moment, field)


def test_a_bare_float32_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_file({"second_moment": positive(4).float()}, path)
    loaded = load_second_moment(path, d_mlp=4)
    assert loaded.matrix.dtype is torch.float64
    assert (loaded.layer, loaded.model_fingerprint, loaded.corpus) == (None, None, "c.safetensors")


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    with pytest.raises(BadInputError, match="no file of a second moment"):
        load_second_moment(path, d_mlp=4)
    save_file({"second_moment": positive(4)}, path)
    with pytest.raises(BadInputError, match=r"shape \[4, 4\]; this layer's keys need \[5, 5\]"):
        load_second_moment(path, d_mlp=5)
    save_file({"other": positive(4)}, path)
    with pytest.raises(BadInputError, match="no tensor 'second_moment'"):
        load_second_moment(path, d_mlp=4)


ROME_FILE = "transformer.h.2.mlp.c_proj_float32_mom2_100000.npz"


def statistics(path: Path, **changes: Any) -> Path:
    """Sums of ``k k^T`` in the keys, types and boxed nulls of ROME's ``save_cached_state``."""
    null = np.array(np.uint64(0xFFF8000000000002)).view(np.float64)
    content: dict[str, Any] = {
        "mom2.constructor": "util.runningstats.SecondMoment()",
        "mom2.count": 7,
        "mom2.mom2": (7 * positive(4)).float().numpy(),
        "sample_size": null,
    } | changes
    np.savez(path, **{name: value for name, value in content.items() if value is not None})
    return path


def test_the_published_sum_is_divided_by_its_count(tmp_path: Path) -> None:
    moment = load_second_moment(statistics(tmp_path / ROME_FILE), d_mlp=4)
    torch.testing.assert_close(moment.matrix, positive(4), rtol=1e-6, atol=1e-6)
    assert (moment.tokens, moment.layer, moment.model_fingerprint) == (7, 2, None)
    assert moment.corpus == ROME_FILE
    other = statistics(tmp_path / "model.layers.11.mlp.down_proj_float32_mom2_100000.npz")
    assert load_second_moment(other, d_mlp=4).layer == 11
    assert load_second_moment(statistics(tmp_path / "c.npz"), d_mlp=4).layer is None


def test_the_command_takes_them_for_their_own_layer(
    tiny: TinyFactory,
    tmp_path: Path,
    own_cache: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny("gpt2")
    monkeypatch.setattr("firsttok.inputs.load", lambda *_, **__: model)
    matrix = positive(model.site(2).d_mlp)
    path = statistics(tmp_path / ROME_FILE, **{"mom2.mom2": 7 * matrix.numpy()})
    (tmp_path / "contexts.json").write_text('["{}", "It rained. {}"]', "utf-8")
    words = ["edit", "--subject", "Rome", "--template", "{} is", "--target", "it", "--json"]
    words += ["--contexts", str(tmp_path / "contexts.json"), "--steps", "1"]
    (tmp_path / "texts.json").write_text('["It rained."]', "utf-8")
    words += ["--second-moment", str(path), "--texts", str(tmp_path / "texts.json")]
    assert main([*words, "--layer", "2"]) == 0
    record = json.loads(capsys.readouterr().out)["provenance"]["second_moment"]
    assert (record["corpus"], record["tokens"]) == (ROME_FILE, 7)
    assert main([*words, "--layer", "1"]) == 2
    assert "was computed for layer 2" in capsys.readouterr().err


STATISTICS: dict[str, tuple[dict[str, Any], str]] = {
    "no sum": ({"mom2.mom2": None}, "mom2.mom2"),
    "no count": ({"mom2.count": None}, "mom2.count"),
    "count of nothing": ({"mom2.count": 0}, "taken over 0 keys"),
    "count of several": ({"mom2.count": np.arange(3)}, "plain arrays"),
    "another width": ({"mom2.mom2": np.eye(3)}, r"of shape \[3, 3\]"),
    "objects": ({"mom2.mom2": np.array([object()])}, "plain arrays"),
    "texts": ({"mom2.mom2": np.array(["a", "b"])}, "plain arrays"),
    "not symmetric": ({"mom2.mom2": np.triu(np.ones((4, 4)))}, "not a symmetric"),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_that_are_none_are_refused(name: str, tmp_path: Path) -> None:
    changes, message = STATISTICS[name]
    with pytest.raises(BadInputError, match=message):
        load_second_moment(statistics(tmp_path / ROME_FILE, **changes), d_mlp=4)


def test_damaged_statistics_are_refused(tmp_path: Path) -> None:
    path = tmp_path / ROME_FILE
    with pytest.raises(BadInputError, match="no file of a second moment"):
        load_second_moment(path, d_mlp=4)
    whole = statistics(path).read_bytes()
    for content in (b"", b"not a zip", whole[: len(whole) // 2], whole[:-5], b"PK" + whole[:50]):
        path.write_bytes(content)
        with pytest.raises(BadInputError, match=r"no complete \.npz"):
            load_second_moment(path, d_mlp=4)
    bad = np.full((4, 4), np.nan)
    with pytest.raises(NonFiniteError):
        load_second_moment(statistics(path, **{"mom2.mom2": bad}), d_mlp=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_solve_equals_the_direct_solution(dtype: torch.dtype) -> None:
    moment = moment_of(positive(20))
    key = torch.randn(20, generator=torch.Generator().manual_seed(2)).to(dtype)
    solved = moment.solve(key)
    assert solved.dtype is dtype
    expected = torch.linalg.solve(moment.matrix, key.double())
    assert relative(solved, expected) < (1e-9 if dtype is torch.float64 else 1e-6)
    assert moment.ridge == 0
    expected_condition = float(torch.linalg.cond(moment.matrix))
    assert moment.condition_number == pytest.approx(expected_condition, rel=1e-6)


def test_a_singular_one_gets_a_reported_ridge(caplog: pytest.LogCaptureFixture) -> None:
    matrix = positive(20, columns=5)
    moment = moment_of(matrix)
    key = torch.randn(20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with caplog.at_level("WARNING", logger="firsttok"):
        solved = moment.solve(key)
    assert 0 < moment.ridge <= 1e-2
    assert f"a ridge of {moment.ridge:g} was added" in caplog.text
    shifted = matrix + moment.ridge * matrix.diagonal().mean() * torch.eye(20, dtype=torch.float64)
    assert relative(solved, torch.linalg.solve(shifted, key)) < 1e-4
    assert moment.condition_number > 1e10


def test_the_ridge_is_said_in_the_file(tmp_path: Path) -> None:
    from safetensors import safe_open

    moment = moment_of(positive(20, columns=5))
    moment.save(tmp_path / "c.safetensors")
    with safe_open(tmp_path / "c.safetensors", framework="pt") as file:
        metadata: dict[str, str] = file.metadata()
    assert metadata["ridge"] == f"{moment.ridge:g}"


def test_one_that_no_ridge_can_save_is_refused() -> None:
    moment = moment_of(-positive(5))
    with pytest.raises(NonFiniteError, match="not positive definite"):
        moment.solve(torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_one_that_is_not_finite_is_refused(bad: float) -> None:
    matrix = positive(5)
    matrix[2, 2] = bad
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        moment_of(matrix)


def test_one_that_is_not_symmetric_is_refused() -> None:
    matrix = positive(5)
    matrix[0, 4] += 1
    with pytest.raises(BadInputError, match="not a symmetric square matrix"):
        moment_of(matrix)


def test_the_identity_changes_nothing() -> None:
    identity = SecondMoment.identity(7)
    key = torch.arange(7.0)
    assert torch.equal(identity.solve(key), key)
    assert (identity.tokens, identity.layer, identity.condition_number) == (0, None, 1.0)


def test_hashes_tell_matrices_apart() -> None:
    matrix = positive(5)
    assert moment_of(matrix).content_hash == moment_of(matrix.clone()).content_hash
    assert moment_of(matrix).content_hash != moment_of(2 * matrix).content_hash
    swapped = matrix[[1, 0, 2, 3, 4]][:, [1, 0, 2, 3, 4]]
    assert moment_of(matrix).content_hash != moment_of(swapped).content_hash


@pytest.mark.usefixtures("own_cache")
def test_a_corpus_without_text_is_refused(tiny: TinyFactory) -> None:
    with pytest.raises(BadInputError, match="the corpus holds no text"):
        compute(tiny("gpt2"), corpus=["", "  \n"])


def test_the_default_corpus_is_plenty_of_text() -> None:
    corpus = default_corpus()
    assert sum(len(text.split()) for text in corpus) > 20_000
    assert all(text.strip() for text in corpus)


def test_the_condition_number_is_kept_and_damaged_metadata_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eigenvalues = torch.tensor([0.5, 2.0, 10.0], dtype=torch.float64)
    moment = SecondMoment(
        matrix=torch.diag(eigenvalues),
        tokens=7,
        corpus="text",
        corpus_hash="hash",
        layer=0,
        model_fingerprint=None,
    )
    path = tmp_path / "c.safetensors"
    moment.save(path)

    def not_again(_: torch.Tensor) -> torch.Tensor:
        raise AssertionError("computed again")

    monkeypatch.setattr(torch.linalg, "eigvalsh", not_again)
    loaded = load_second_moment(path, d_mlp=3)
    assert loaded.condition_number == moment.condition_number == pytest.approx(20)
    assert (loaded.layer, loaded.tokens) == (0, 7)
    for key in ("tokens", "layer", "condition_number"):
        save_file({"second_moment": moment.matrix}, path, {key: "seven"})
        with pytest.raises(BadInputError, match="are damaged"):
            load_second_moment(path, d_mlp=3)
