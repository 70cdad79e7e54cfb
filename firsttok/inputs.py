"""What options name, read and opened: a model, its settings, contexts, a study."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.progress import Progress

from firsttok.contexts import kept_contexts, load_contexts
from firsttok.data import (
    Corpus,
    Fact,
    FactFile,
    builtin_sentences,
    check_facts,
    find_corpus,
    load_texts,
    resolve_data,
)
from firsttok.editing import (
    AlphaEditRule,
    Editor,
    FineTuningEditor,
    MemitEditor,
    MemitRule,
    MendEditor,
    MendNetwork,
    Method,
    find_editors,
    other_layers,
)
from firsttok.errors import BadInputError, UnsupportedModelError
from firsttok.evaluation import Perplexity
from firsttok.models import BosPolicy, EditSite, Model, load
from firsttok.option_values import HYPERPARAMETERS
from firsttok.options import DEFAULT_CORPUS
from firsttok.second_moment import SecondMoment, compute_second_moments, load_second_moment
from firsttok.sieve import usable_facts
from firsttok.study import Study, kept_perplexity

__all__ = [
    "excluded_subjects",
    "fact_file",
    "fact_from",
    "methods_from",
    "model_from",
    "open_study",
    "open_study_of",
    "texts_from",
    "unedited_perplexity",
]


def model_from(args: argparse.Namespace) -> Model:
    """Load the model the options name."""
    return load(args.model, bos=args.bos, dtype=args.dtype, device=args.device)


def texts_from(args: argparse.Namespace) -> tuple[str, ...]:
    """The sentences of ``--texts``, or the built-in ones."""
    return load_texts(resolve_data(args.texts, "texts")) if args.texts else builtin_sentences()


def fact_from(args: argparse.Namespace, *, target: str, true: str) -> Fact:
    """The fact of ``--subject`` and ``--template``."""
    return Fact(
        subject=args.subject,
        template=args.template,
        target_new=target,
        target_true=true,
        source="command line",
        join=args.join or "auto",
        straddle=args.straddle or "refuse",
    )


def methods_from(args: argparse.Namespace) -> tuple[Method | Editor, ...]:
    """The methods of ``--method``, with the settings that other options give them.

    Raises:
        BadInputError: If a method is unknown, or an option is for none of them.
    """
    methods = find_editors(args.method)
    spread = [each for each in methods if isinstance(each, MemitEditor)]
    tuned = any(isinstance(each, FineTuningEditor) for each in methods)
    valued = any(not isinstance(each, FineTuningEditor | MendEditor) for each in methods)
    takers = {
        "layers": bool(spread),
        "mom2_weight": any(isinstance(each.rule, MemitRule) for each in spread),
        "nullspace_threshold": any(isinstance(each.rule, AlphaEditRule) for each in spread),
        "l2": any(isinstance(each.rule, AlphaEditRule) for each in spread),
        "eps": any(map(_is_bounded, methods)),
        **dict.fromkeys(("ft_steps", "ft_lr"), tuned),
        **dict.fromkeys(HYPERPARAMETERS, valued),
        "network": any(isinstance(each, MendEditor) for each in methods),
    }
    for name, taken in takers.items():
        if getattr(args, name) is not None and not taken:
            option = f"--{name.replace('_', '-')}"
            raise BadInputError(
                f"{option} is for none of the methods {', '.join(m.name for m in methods)}; leave "
                "it out, or add the method that it is for (see --help)"
            )
    return tuple(_set(each, args) for each in methods)


def _is_bounded(method: Method | Editor) -> bool:
    return isinstance(method, FineTuningEditor) and method.eps is not None


def _set(editor: Method | Editor, args: argparse.Namespace) -> Method | Editor:
    if isinstance(editor, FineTuningEditor):
        eps = args.eps if _is_bounded(editor) and args.eps is not None else editor.eps
        steps, rate = args.ft_steps or editor.steps, args.ft_lr or editor.learning_rate
        return replace(editor, eps=eps, steps=steps, learning_rate=rate)
    if isinstance(editor, MendEditor) and args.network is not None:
        return replace(editor, network=MendNetwork.load(args.network))
    if not isinstance(editor, MemitEditor):
        return editor
    rule = editor.rule
    if isinstance(rule, MemitRule):
        rule = replace(rule, weight=args.mom2_weight)
    if isinstance(rule, AlphaEditRule):
        rule = replace(rule, threshold=args.nullspace_threshold, ridge=args.l2)
    return replace(editor, rule=rule, layers=args.layers and tuple(args.layers))


def excluded_subjects(args: argparse.Namespace) -> frozenset[str]:
    """The subjects of ``--exclude``, in one case; none without it.

    Raises:
        BadInputError: If the file is unusable.
    """
    if args.exclude is None:
        return frozenset()
    facts = check_facts(resolve_data(args.exclude, "facts"), skip_bad=True)
    return frozenset(fact.subject.casefold() for fact in facts)


def fact_file(args: argparse.Namespace) -> FactFile:
    """Check the facts of ``--facts``, or take the built-in ones; no more than ``--limit`` if given.

    Raises:
        BadInputError: If the file is unusable.
    """
    return check_facts(
        resolve_data(args.facts, "facts") if args.facts else None,
        limit=getattr(args, "limit", None),
        skip_bad=args.skip_bad,
        join=args.join,
        straddle=args.straddle,
    )


def open_study(
    args: argparse.Namespace,
    folder: Path,
    progress: Progress | None,
    *,
    methods: Sequence[Method | Editor] = (),
    contexts_folder: Path | None = None,
    leave_in: Path | None = None,
    without_bos: bool = False,
    on_model: Callable[[Model], None] | None = None,
) -> Study:
    """Read every input file first, then load the model, then compute what is missing.

    Args:
        args: Parsed options of a model and of an edit.
        folder: Where finished parts are kept.
        progress: Where to show progress.
        methods: What edits: the second moments of all its layers are needed.
        contexts_folder: Where contexts may be already, besides the cache.
        leave_in: Where to put contexts that were not there.
        without_bos: Take BOS away where the tokenizer puts one by itself and no policy is asked
            for, so that the first token is a word (Appendices A.2 and A.4).
        on_model: Called with the model before anything is computed on it, to refuse what does not
            go with it.

    Raises:
        FirsttokError: If an input is unusable.
    """
    contexts = load_contexts(args.contexts) if args.contexts else None
    texts = texts_from(args)
    corpus = find_corpus(args.corpus or DEFAULT_CORPUS)
    moment = args.second_moment
    if moment not in (None, "identity") and not Path(moment).is_file():
        raise BadInputError(f"no second moment at {moment}; check the path")
    model = model_from(args)
    if not model.can_be_edited:
        raise UnsupportedModelError(
            f"{model.name} is not a decoder with a final norm and an unembedding; "
            "its keys can be read, but only decoders can be edited"
        )
    if without_bos and args.bos == BosPolicy.AS_TOKENIZER.value and model.leading_ids:
        model = model.with_bos(BosPolicy.WITHOUT)
    site = model.site(args.layer)
    given = {field: getattr(args, option) for option, field in HYPERPARAMETERS.items()}
    changed = {name: value for name, value in given.items() if value is not None}
    if on_model is not None:
        on_model(model)
    others = other_layers(model, site.layer, methods)
    moments = _second_moments(args, model, site, others, corpus, progress)
    if contexts is None:
        look_in = [contexts_folder] if contexts_folder else []
        contexts = kept_contexts(
            model, args.seed, look_in=look_in, leave_in=leave_in, progress=progress
        )
    return Study(
        model=model,
        contexts=contexts,
        second_moment=moments.pop(site.layer),
        second_moments=moments,
        layer=site.layer,
        hyperparameters=replace(model.hyperparameters, **changed),
        given=changed,
        texts=texts,
        work=folder / ".work",
        text_bos=BosPolicy(args.text_bos),
    )


def unedited_perplexity(args: argparse.Namespace, folder: Path, model: Model) -> Perplexity:
    """The perplexity that a study of the model will have, kept in the folder for it.

    Raises:
        FirsttokError: If the sentences are unusable.
    """
    texts, bos = texts_from(args), BosPolicy(args.text_bos)
    return kept_perplexity(model, texts, bos=bos, work=folder / ".work")


def open_study_of(
    args: argparse.Namespace,
    facts: FactFile,
    folder: Path,
    progress: Progress | None,
    *,
    methods: Sequence[Method | Editor] = (),
    on_model: Callable[[Model], None] | None = None,
) -> tuple[Study, FactFile]:
    """As :func:`open_study`, with the tokens of all facts looked at before anything is computed.

    Args:
        args: As for :func:`open_study`.
        facts: The facts.
        folder: Where finished parts are kept, and contexts are left.
        progress: As for :func:`open_study`.
        methods: As for :func:`open_study`.
        on_model: As for :func:`open_study`; called when the facts have been looked at.

    Returns:
        The study, and the facts that can be edited: all of them unless ``--skip-bad`` is given.

    Raises:
        FirsttokError: If an input is unusable, a fact without ``--skip-bad`` among them.
    """
    usable: list[FactFile] = []

    def look(model: Model) -> None:
        usable.append(usable_facts(model, facts, skip_bad=args.skip_bad, progress=progress))
        if on_model is not None:
            on_model(model)

    study = open_study(args, folder, progress, methods=methods, leave_in=folder, on_model=look)
    return study, usable[0]


def _second_moments(
    args: argparse.Namespace,
    model: Model,
    site: EditSite,
    others: Sequence[int],
    corpus: Corpus,
    progress: Progress | None,
) -> dict[int, SecondMoment]:
    """C of the edited layer and of the others, by layer."""
    layers = (site.layer, *others)
    if args.second_moment == "identity":
        return {layer: SecondMoment.identity(model.site(layer).d_mlp) for layer in layers}
    if args.second_moment is None:
        return compute_second_moments(
            model,
            layers=layers,
            corpus=corpus.documents,
            corpus_name=corpus.name,
            progress=progress,
        )
    if others:
        raise BadInputError(
            f"--second-moment {args.second_moment} is of one layer, and the methods edit layers "
            f"{', '.join(map(str, sorted(layers)))}; leave it out, give 'identity' or --corpus"
        )
    moment = load_second_moment(args.second_moment, d_mlp=site.d_mlp)
    try:
        moment.check(model, site.layer)
    except BadInputError as error:
        raise BadInputError(f"{args.second_moment}: {error}") from None
    return {site.layer: moment}
