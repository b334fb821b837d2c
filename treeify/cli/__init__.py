"""Arguments come in; out go tables, JSON and exit codes: parse, call one library function, print.

Nothing is computed here, and nothing is written but what a command says it writes.
"""
