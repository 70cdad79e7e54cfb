"""``firsttok tokens``: show a prompt's tokens, and which one is looked up."""

import argparse

from firsttok.console import show
from firsttok.inputs import fact_from, model_from
from firsttok.token_strips import tokens

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Print the tokens, and how a target is joined to them."""
    letters = (c for c in reversed(args.template.replace("{}", args.subject)) if c.isalpha())
    fact = fact_from(args, target=args.target or next(letters, "a"), true="true")
    strip = tokens(model_from(args), fact)
    show(strip.lines)
    if strip.joint:
        whose = f"The target {fact.target_new!r}" if args.target else "A target in this script"
        show(f"{whose} is joined by {strip.joint}.")
