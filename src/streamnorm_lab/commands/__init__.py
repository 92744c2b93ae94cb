"""The commands of ``streamnorm``."""
