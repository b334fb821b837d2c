"""An ensemble and labelled images come in; out go accuracy and cost of every nested size.

Everything here reads: an ensemble is left in the modes it came in.
"""
