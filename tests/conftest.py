"""Settings every test runs under."""

import torch
from hypothesis import settings

import treeify

# Two xdist workers share two cores: more threads each would only make them wait for one another.
torch.set_num_threads(1)
# Giving memory back after every tensor takes a tenth of the time.
treeify.tune_allocator()

# How long an example takes says more about what else the machine does than about the code.
settings.register_profile("treeify", deadline=None)
settings.load_profile("treeify")
