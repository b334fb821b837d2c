"""An ensemble comes in; out go files that answer without PyTorch, and the runtime that reads them.

The ensemble is only read; what is exported appears whole or not at all.
"""
