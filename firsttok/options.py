"""Options that commands and scripts share, and the objects they stand for."""

import argparse
import logging
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from firsttok.contexts import ContextSet, load_contexts, sample_contexts
from firsttok.data import Fact, builtin_facts, builtin_sentences, load_facts, load_texts
from firsttok.errors import BadInputError, FirsttokError, UnsupportedModelError
from firsttok.hyperparameters import Hyperparameters
from firsttok.models import BosPolicy, Model, load
from firsttok.second_moment import SecondMoment, compute_second_moment, load_second_moment
from firsttok.storage import read_json
from firsttok.study import Study

__all__ = [
    "ScriptOptions",
    "add_edit_options",
    "add_model_options",
    "add_script_options",
    "exit_on_error",
    "hyperparameters_from",
    "model_from",
    "model_label",
    "open_study",
    "parse_script",
    "progress_bar",
    "stderr",
]

stderr = Console(stderr=True)


@dataclass(frozen=True, kw_only=True)
class ScriptOptions:
    """What an analysis script was asked for."""

    study: Study
    """The study."""
    facts: tuple[Fact, ...]
    """The facts to choose from."""
    cases: Path
    """List of collapse cases."""
    out: Path
    """Folder the script leaves its files in."""
    collapse: int
    """Most collapse cases."""
    normal: int
    """Number of normal cases."""
    seed: int
    """Seed of contexts and of the draw of normal cases."""
    command: str
    """The command that repeats the run, without machine paths."""

    def halved(self) -> "ScriptOptions":
        """Half as many cases, for a script that optimises each of them several times."""
        return replace(self, collapse=(self.collapse + 1) // 2, normal=(self.normal + 1) // 2)

    def provenance(self) -> dict[str, Any]:
        """What determines the numbers of a script that works on this study."""
        return self.study.provenance() | {
            "seed": self.seed,
            "command": self.command,
            "original_perplexity": self.study.original_perplexity.mean,
            "case_list": _made_on(self.cases),
        }

    def sample_contexts(self, seed: int) -> ContextSet:
        """Contexts of a seed: those beside the list of cases, or else sampled and kept."""
        path = _contexts_path(self.study.model, seed, self.cases.parent, self.out)
        return sample_contexts(self.study.model, seed=seed, path=path)


def progress_bar() -> Progress:
    """A progress bar with an estimate, on standard error."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=stderr,
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose a model."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="smollm2-135m",
        help="name of the catalog (firsttok models list), hub id[@commit] or folder",
    )
    group.add_argument("--layer", type=int, help="layer to edit, from 0 (default: the model's)")
    group.add_argument(
        "--bos",
        choices=["as_tokenizer", "with", "without"],
        default="as_tokenizer",
        help="whether prompts begin with a BOS token (default: %(default)s)",
    )
    group.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16", "float64"], default="float32"
    )
    group.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")


def add_edit_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that make an edit repeatable."""
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
        help="safetensors with a tensor 'second_moment', or 'identity' (default: computed)",
    )
    group.add_argument(
        "--corpus", metavar="FILE", help="text file for the second moment (default: pydoc topics)"
    )
    group.add_argument("--texts", metavar="FILE", help="sentences for perplexity, as in ME-PPL")
    group.add_argument(
        "--text-bos",
        choices=["as_tokenizer", "with", "without"],
        default="without",
        help="whether those sentences begin with BOS (default: %(default)s, as in the papers)",
    )
    for name, kind, what in (
        ("steps", int, "loss evaluations of the value optimisation"),
        ("lr", float, "learning rate of Adam"),
        ("weight-decay", float, "factor of ||delta|| / ||anchor||^2"),
        ("clamp", float, "||delta|| is at most this many times ||anchor||"),
        ("kl", float, "factor of the KL divergence"),
    ):
        group.add_argument(f"--{name}", type=kind, help=f"{what} (default: the model's)")


def add_script_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the scripts in ``analyses/``."""
    add_model_options(parser)
    add_edit_options(parser)
    group = parser.add_argument_group("cases and output")
    group.add_argument("--facts", metavar="FILE", help="facts in COUNTERFACT's schema")
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
    group.add_argument(
        "--out", metavar="DIR", default="figures", help="folder for results (default: figures)"
    )


def model_label(name: str) -> str:
    """Name of a model's folder of results."""
    return Path(name.partition("@")[0]).name or "model"


def model_from(args: argparse.Namespace) -> Model:
    """Load the model the options name."""
    return load(args.model, bos=args.bos, dtype=args.dtype, device=args.device)


def hyperparameters_from(args: argparse.Namespace, model: Model) -> Hyperparameters:
    """Return the model's settings with what the options change."""
    given = {
        "steps": args.steps,
        "learning_rate": args.lr,
        "weight_decay": args.weight_decay,
        "clamp": args.clamp,
        "kl": args.kl,
    }
    changed = {name: value for name, value in given.items() if value is not None}
    return replace(model.hyperparameters, **changed)


def open_study(
    args: argparse.Namespace,
    folder: Path,
    progress: Progress | None,
    *,
    contexts_folder: Path | None = None,
    without_bos: bool = False,
) -> Study:
    """Read every input file first, then load the model, then compute what is missing.

    Args:
        args: Parsed options of :func:`add_model_options` and :func:`add_edit_options`.
        folder: Where contexts and finished parts are kept.
        progress: Where to show progress.
        contexts_folder: Where contexts may lie already; they are not sampled again then.
        without_bos: Take BOS away where the tokenizer puts one by itself and no policy is asked
            for, so that the first token is a word (Appendices A.2 and A.4).

    Raises:
        FirsttokError: If an input is unusable.
    """
    contexts: ContextSet | None = load_contexts(args.contexts) if args.contexts else None
    texts = load_texts(args.texts) if args.texts else builtin_sentences()
    corpus = _corpus(args.corpus)
    moment_given = args.second_moment not in (None, "identity")
    if moment_given and not Path(args.second_moment).is_file():
        raise BadInputError(f"no second moment at {args.second_moment}; check the path")
    model = model_from(args)
    if not model.can_be_edited:
        raise UnsupportedModelError(
            f"{model.name} is not a decoder with a final norm and an unembedding; "
            "its keys can be read, but only decoders can be edited"
        )
    if without_bos and args.bos == BosPolicy.AS_TOKENIZER.value and model.leading_ids:
        model = model.with_bos(BosPolicy.WITHOUT)
    site = model.site(args.layer)
    settings = hyperparameters_from(args, model)
    if args.second_moment == "identity":
        moment = SecondMoment.identity(site.d_mlp)
    elif moment_given:
        moment = load_second_moment(args.second_moment, d_mlp=site.d_mlp)
        made_for = (moment.model_fingerprint, moment.layer)
        if made_for not in ((None, None), (model.fingerprint, site.layer)):
            raise BadInputError(
                f"{args.second_moment} was computed for layer {moment.layer} of another model or "
                f"another layer than {site.layer} of {model.name}; compute it for this one"
            )
    else:
        moment = compute_second_moment(
            model,
            layer=site.layer,
            corpus=corpus,
            corpus_name=Path(args.corpus).name if args.corpus else None,
            progress=progress,
        )
    if contexts is None:
        path = _contexts_path(model, args.seed, contexts_folder or folder, folder)
        contexts = sample_contexts(model, seed=args.seed, path=path)
    return Study(
        model=model,
        contexts=contexts,
        second_moment=moment,
        layer=site.layer,
        hyperparameters=settings,
        texts=tuple(texts),
        work=folder / ".work",
        text_bos=BosPolicy(args.text_bos),
    )


def parse_script(
    parser: argparse.ArgumentParser, progress: Progress, *, without_bos: bool = False
) -> ScriptOptions:
    """Parse a script's options and open its study.

    Args:
        parser: The script's parser, with its own options.
        progress: Where to show progress.
        without_bos: As for :func:`open_study`.
    """
    add_script_options(parser)
    args = parser.parse_args()
    facts = load_facts(args.facts) if args.facts else builtin_facts()
    label = model_label(args.model)
    out = Path(args.out) / label
    cases = Path(args.cases) if args.cases else Path("figures") / label / "collapse_cases.json"
    if not cases.is_file():
        raise BadInputError(f"no list of collapse cases at {cases}; make one with: firsttok scan")
    for name in ("collapse", "normal"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise BadInputError(f"--{name} is {value}; give at least 1")
    count = 8 if args.profile == "quick" else 24
    return ScriptOptions(
        study=open_study(
            args, out, progress, contexts_folder=cases.parent, without_bos=without_bos
        ),
        facts=facts,
        cases=cases,
        out=out,
        collapse=count if args.collapse is None else args.collapse,
        normal=count if args.normal is None else args.normal,
        seed=args.seed,
        command=_command(),
    )


def exit_on_error(main: Callable[[], None]) -> int:
    """Run a command; turn a user's error into one sentence on standard error and exit code 2."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=stderr, show_time=False, show_path=False)],
    )
    logging.getLogger("firsttok").setLevel(logging.INFO)
    try:
        main()
    except FirsttokError as error:
        sys.stderr.write(f"firsttok: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("firsttok: interrupted; run the same command again to go on\n")
        return 130
    except BrokenPipeError:
        return 0
    return 0


def _made_on(cases: Path) -> dict[str, Any]:
    """The model that a list of collapse cases was made on."""
    record = cast(dict[str, Any], read_json(cases, "collapse cases"))
    model = record["provenance"]["model"]
    return {"model": model["name"], "fingerprint": model["fingerprint"]}


def _command() -> str:
    """The command line, with the names of absolute paths only."""
    given = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["python", f"analyses/{Path(sys.argv[0]).name}", *given])


def _contexts_path(model: Model, seed: int, kept: Path, otherwise: Path) -> Path:
    bos = "" if model.bos.value == "as_tokenizer" else f"-bos-{model.bos.value}"
    name = f"contexts-seed{seed}{bos}.json"
    if (kept / name).is_file():
        saved = load_contexts(kept / name)
        wanted = (seed, model.fingerprint, model.leading_ids)
        if (saved.seed, saved.model_fingerprint, saved.leading_ids) == wanted:
            return kept / name
    return otherwise / name


def _corpus(path: str | None) -> tuple[str, ...] | None:
    if path is None:
        return None
    try:
        text = Path(path).read_text("utf-8")
    except OSError as error:
        raise BadInputError(f"{path} cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise BadInputError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    documents = tuple(part for part in text.split("\n\n") if part.strip())
    if not documents:
        raise BadInputError(f"{path} holds no text; give at least one sentence")
    return documents
