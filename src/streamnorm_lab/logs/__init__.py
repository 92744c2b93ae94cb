"""Logs of runs: their form, writing, reading, packing."""
