"""A model comes in; out go functional fx graphs of both modes, every node annotated with its facts.

Call `trace`; its graphs and facts may be read by all that follows, and are changed by nothing.
"""
