"""Graphs and splits come in; out goes an ensemble, with a report of what runs how and why.

Call `hierarchicalize`, `pack`, `save` and `load`; the given model is never changed.
"""
