"""One function for each figure: plain values come in, a `Chart` goes out.

Nothing here reads a file or knows what a run is. matplotlib is imported with any of these modules.
"""
