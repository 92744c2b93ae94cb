"""Common parts of the laboratory: errors, files, settings, statistics."""
