"""Settings of all tests."""

import torch

# The networks here are tiny: a second thread costs more than it saves, and rounds sums differently.
torch.set_num_threads(1)
