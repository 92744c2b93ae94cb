"""From logs to numbers and verdicts."""
