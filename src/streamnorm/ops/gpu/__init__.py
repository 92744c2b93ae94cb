"""The Triton engine, on NVIDIA GPUs; ``engine.py`` explains it."""

from .engine import ENGINE

__all__ = ["ENGINE"]
