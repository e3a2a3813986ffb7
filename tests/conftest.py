"""Settings that hold for all tests."""

import torch

# Two OpenMP threads that wait for each other on a busy machine are slower than one: 98 s against 22 s measured.
torch.set_num_threads(1)
