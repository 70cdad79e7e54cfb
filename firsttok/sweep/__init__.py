"""Many cases: planned, done in chunks, kept as they are done, resumed after any stop."""
