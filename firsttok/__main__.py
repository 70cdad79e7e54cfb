"""``python -m firsttok``, the same as the command ``firsttok``."""

from firsttok.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    raise SystemExit(main())
