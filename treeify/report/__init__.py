"""What runs, grids, ensembles and exports reached, as figures and as one page of HTML.

Directories are read into plain values, a function for each figure draws them with matplotlib, and
the page gathers figures, tables and what is missing. Needs the extra `treeify[report]`.
"""
