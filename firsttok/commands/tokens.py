"""``firsttok tokens``: show a prompt's tokens, and which one is looked up."""

import argparse

from firsttok.console import show
from firsttok.data import Fact
from firsttok.inputs import model_from
from firsttok.token_strips import show_tokens

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Print the tokens.

    Raises:
        FirsttokError: If an input is unusable.
    """
    fact = Fact(subject=args.subject, template=args.template, target_new="new", target_true="true")
    show(show_tokens(model_from(args), fact))
