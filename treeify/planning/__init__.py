"""A budget in, trees out: where to split a model, and into how many branches, before training.

Costs add up over the levels of a tree. What lies behind every split point is counted once, and an
exact search over points and fanouts gives the trees that no other beats.
"""
