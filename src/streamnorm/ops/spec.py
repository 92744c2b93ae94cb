"""Names that pickles of layers from version 0.1 look for here; they live in :mod:`streamnorm.core.spec`."""

from ..core.spec import Formula, State, View

__all__ = ["Formula", "State", "View"]
