"""Measurements: `python -m bench`. Nobody imports this; it may look at every floor."""
