"""The report on a model: what the paper says, what was measured, and what follows."""
