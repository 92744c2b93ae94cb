"""Numbers and verdicts computed from logs."""
