"""Values and formulas: what engines and layers are told, without a module or an engine."""
