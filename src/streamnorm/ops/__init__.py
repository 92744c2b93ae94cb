"""One operation, several engines.

``base.py`` says what an engine is, ``choice.py`` which one runs; ``plain.py`` is the reference, and the text to learn
the mathematics from.
"""

from ..core.spec import Call, View
from .base import Plan
from .choice import (
    ENGINES,
    commit,
    engines,
    force,
    function,
    is_active,
    normalize,
    prepare,
    short_way,
    tells_signs,
)
from .native import keep_memory, waiting_memory

__all__ = [
    "ENGINES",
    "Call",
    "Plan",
    "View",
    "commit",
    "engines",
    "force",
    "function",
    "is_active",
    "keep_memory",
    "normalize",
    "prepare",
    "short_way",
    "tells_signs",
    "waiting_memory",
]
