"""Modules that segments call: each runs one operation for a span of branches.

Rules make them from a call; they decide nothing but what depends on the inputs' sizes.
"""
