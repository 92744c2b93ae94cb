"""The normalization layers."""
