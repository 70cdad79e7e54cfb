"""firsttok."""
