"""The normalizations that experiments compare."""
