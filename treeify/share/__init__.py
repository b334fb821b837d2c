"""A directory becomes a repository of the Hugging Face hub: its files, and a card of what is known.

In come runs, ensembles and, for their pictures, what `treeify.report` reads; out goes one commit.
"""
