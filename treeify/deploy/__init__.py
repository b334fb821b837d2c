"""An ensemble -> files that answer without PyTorch, one for each step from size to size.

`runtime` runs them and imports nothing of treeify's; all else may use any room but the command line.
"""
