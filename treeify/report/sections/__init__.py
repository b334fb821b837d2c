"""The parts of a report, each from everything that was read: charts, facts, and what is missing.

One function a section; `contents` has them in order.
"""
