"""A program and images come in; out go answers that get better, by size, deadline or confidence.

Sessions may be advanced and narrowed; what was measured beforehand is only read.
"""
