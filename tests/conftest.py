"""One thread per worker: the workers share the cores, and threads of one wait for each other."""

import torch

torch.set_num_threads(1)
