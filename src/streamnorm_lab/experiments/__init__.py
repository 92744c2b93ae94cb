"""The experiments: questions, methods, settings and options."""
