"""``firsttok reproduce``: run every analysis script, then write the report."""

from firsttok.paper.reproduce import run

__all__ = ["run"]
