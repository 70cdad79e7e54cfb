"""Options that commands and scripts share. They are light: ``--help`` loads no library."""

import argparse
import hashlib
import re
import unicodedata
from pathlib import Path
from typing import Any

__all__ = [
    "DEFAULT_CORPUS",
    "DEFAULT_MODEL",
    "PASSED_ON",
    "add_config_option",
    "add_edit_options",
    "add_facts_options",
    "add_method_options",
    "add_model_options",
    "add_prompt_options",
    "add_script_options",
    "add_shared",
    "folder_name",
    "model_label",
]

DEFAULT_CORPUS = "pydoc"
"""What the second moment is taken over; with another one, all committed figures change."""
DEFAULT_MODEL = "smollm2-135m"
PASSED_ON = ("bos", "dtype", "device", "facts", "cases", "texts", "text-bos", "join", "straddle")
"""Options of ``firsttok reproduce`` that go to every script."""
_BOS = ["as_tokenizer", "with", "without"]
_SHARED: dict[str, dict[str, Any]] = {
    "edit": {"nargs": "+", "metavar": "EDIT", "help": "a file of firsttok edit --save"},
    "--bos": {
        "choices": _BOS,
        "default": "as_tokenizer",
        "help": "whether prompts begin with a BOS token (default: %(default)s)",
    },
    "--device": {"default": "cpu", "help": "cpu, cuda or cuda:N (default: %(default)s)"},
    "--dtype": {
        "choices": ["float32", "bfloat16", "float16", "float64"],
        "default": "float32",
        "help": "type of the weights (default: %(default)s)",
    },
    "--json": {"action": "store_true", "help": "print one JSON object and nothing else"},
    "--out": {"metavar": "DIR", "default": "figures", "help": "for results (default: figures)"},
    "--text-bos": {
        "choices": _BOS,
        "default": "without",
        "help": "whether those sentences begin with BOS (default: without, as in the papers; for "
        "firsttok inspect what fits the model)",
    },
    "--texts": {
        "metavar": "FILE",
        "help": "sentences for perplexity (audit: for keys, too), as in ME-PPL (JSON, JSON Lines, "
        "Parquet, .gz), or the name of a pulled set",
    },
}
_USUAL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]*(/[A-Za-z0-9_][A-Za-z0-9_.@+-]*)?")
_ODD = re.compile(r"^[^A-Za-z0-9]|[^A-Za-z0-9_.@+-]+")
_LONGEST = 120
"""Bytes of a folder name; file systems take 255, less where they encrypt."""


def add_shared(parser: argparse._ActionsContainer, *names: str) -> None:
    """Add arguments that mean the same in every command that takes them, such as ``--json``."""
    for name in names:
        parser.add_argument(name, **_SHARED[name])


def add_config_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--config``, whose values become the defaults of this parser's other options.

    The parser itself is left in the parsed options as ``configurable``, for
    :func:`firsttok.config.configured`.
    """
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="TOML file with values for these options, such as firsttok inspect proposes; an "
        "option that is given wins",
    )
    parser.set_defaults(configurable=parser)


def add_model_options(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Add the options that choose a model, or several with a layer each, and ``--config``."""
    add_config_option(parser)
    group = parser.add_argument_group("model")
    nargs, more = ("+", "; several are swept one after another") if several else (None, "")
    group.add_argument(
        "--model",
        nargs=nargs,
        default=[DEFAULT_MODEL] if several else DEFAULT_MODEL,
        help=f"name of the catalog (firsttok models list), hub id[@commit] or folder{more}",
    )
    group.add_argument(
        "--layer",
        nargs=nargs,
        type=int,
        help=f"layer to edit, from 0 (default: the model's){more}",
    )
    add_shared(group, "--bos", "--dtype", "--device")


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how a fact's prompt and target are put together.

    They are None unless given: a record of facts may say it, too, and an option wins.
    """
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--join",
        choices=["auto", "space", "none"],
        help="what stands between a prompt and its target: one space, nothing, or (auto) a space "
        "except after a line end, an opening quote or bracket, or in a script without spaces "
        "(default: what the facts say, else auto)",
    )
    group.add_argument(
        "--straddle",
        choices=["refuse", "token"],
        help="where one token holds the subject's end and a mark after it, as in F.C.'s: refuse "
        "the fact, or look that token up, as the released code does (default: what the facts say, "
        "else refuse)",
    )


def add_edit_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that make an edit repeatable."""
    add_prompt_options(parser)
    group = parser.add_argument_group("edit")
    group.add_argument("--seed", type=int, default=0, help="seed of the contexts (default: 0)")
    group.add_argument(
        "--contexts",
        metavar="FILE",
        help="JSON list of templates with one '{}' each, or a saved set (default: sampled)",
    )
    group.add_argument(
        "--second-moment",
        metavar="FILE",
        help="safetensors with a tensor 'second_moment', ROME's statistics as .npz, or 'identity' "
        "(default: computed)",
    )
    group.add_argument(
        "--corpus",
        metavar="FILE",
        help="what the second moment is taken over: a text file, pydoc (the documentation inside "
        f"Python) or sampled (text that SmolLM2-135M wrote) (default: {DEFAULT_CORPUS})",
    )
    add_shared(group, "--texts", "--text-bos")
    for name, kind, what in (
        ("steps", int, "loss evaluations of the value optimisation"),
        ("lr", float, "learning rate of Adam"),
        ("weight-decay", float, "factor of ||delta|| / ||anchor||^2"),
        ("clamp", float, "||delta|| is at most this many times ||anchor||"),
        ("kl", float, "factor of the KL divergence"),
    ):
        group.add_argument(f"--{name}", type=kind, help=f"{what} (default: the model's)")


def add_method_options(parser: argparse._ActionsContainer, *default: str) -> None:
    """Add ``--method``, and what methods other than ROME's take.

    Args:
        parser: The parser, or a group of it.
        default: The methods that are taken where none is given.
    """
    parser.add_argument(
        "--method",
        nargs="+",
        default=list(default),
        help="rome, c-rome (= r-rome), p-rome, fc-rome; memit, memit-seq, emmet, alphaedit, each "
        "but memit-seq with c-, fc- or p- before it as well; ft, ft-unbound, ft-m; mend, "
        "mend-released; one of your own "
        "as NAME=direction:KEY,residual:KEY,denominator:KEY,anchor:KEY with KEY prefixed or bare; "
        f"or a TOML file of them (default: {' '.join(default)})",
    )
    parser.add_argument(
        "--layers",
        nargs="+",
        type=int,
        help="memit, emmet, alphaedit: layers to edit, from the lowest on (default: the model's; "
        "they move with --layer)",
    )
    for name, what in (
        ("mom2-weight", "memit: lambda, how many tokens C stands for"),
        ("nullspace-threshold", "alphaedit: eigenvalue of C below which a direction may change"),
        ("l2", "alphaedit: what is added to the diagonal"),
    ):
        parser.add_argument(f"--{name}", type=float, help=f"{what} (default: the model's)")
    parser.add_argument(
        "--network", metavar="FILE", help="mend: of firsttok train-mend (default: the shipped one)"
    )
    parser.add_argument(
        "--eps",
        type=float,
        help="ft, ft-m: how far an entry of the weight may move (default: 5e-4)",
    )
    parser.add_argument("--ft-steps", type=int, help="ft: losses, at most (default: 25)")
    parser.add_argument("--ft-lr", type=float, help="ft: learning rate of Adam (default: 5e-4)")


def add_facts_options(parser: argparse.ArgumentParser, *, limit: bool = True) -> None:
    """Add the options that choose the facts, ``--limit`` among them unless there is to be none."""
    group = parser.add_argument_group("facts")
    group.add_argument(
        "--facts",
        metavar="FILE",
        help="facts as published (COUNTERFACT, ZsRE, KnowEdit, MQuAKE, ...; JSON, JSON Lines, "
        "Parquet, .gz), or the name of a pulled data set (default: built-in ones; for firsttok "
        "inspect a dozen of them)",
    )
    group.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out facts that cannot be read or edited, and say how many and why",
    )
    if limit:
        group.add_argument("--limit", type=int, help="only the first so many facts")


def add_script_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the scripts in ``analyses/``."""
    add_model_options(parser)
    add_edit_options(parser)
    add_facts_options(parser, limit=False)
    group = parser.add_argument_group("cases and output")
    group.add_argument("--cases", metavar="FILE", help="list of collapse cases of firsttok scan")
    group.add_argument(
        "--profile",
        choices=["quick", "full"],
        default="quick",
        help="quick: 8 + 8 cases; full: up to 24 + 24; half as many where "
        "each is optimised several times (default: %(default)s)",
    )
    group.add_argument("--collapse", type=int, help="most collapse cases")
    group.add_argument("--normal", type=int, help="number of normal cases")
    add_shared(group, "--out")


def model_label(name: str) -> str:
    """What tables and records call a model: its name; of a folder, the folder's own name."""
    plain = name.rstrip("/") or name
    if not (plain.startswith((".", "/", "~")) or plain.count("/") > 1):
        return plain or "model"
    path = Path(plain)
    if path.name in ("", "..", "~"):
        path = path.expanduser().resolve()
    return path.name or "model"


def folder_name(name: str) -> str:
    """The folder of a model's results or rows: one folder name for each label of a model.

    A hub id's slash becomes two hyphens. A label whose folder could be that of another one, or none
    at all, gets a part of its SHA-256: one that holds two hyphens or characters that not every file
    system takes, or is very long.
    """
    label = model_label(name)
    folder = label.replace("/", "--")
    usual = _USUAL.fullmatch(label) and "--" not in label and len(folder.encode()) <= _LONGEST
    if usual and unicodedata.is_normalized("NFC", label):
        return folder
    digest = hashlib.sha256(label.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{_ODD.sub('_', folder)[: _LONGEST // 2]}-{digest}"
