"""CoordConv for PyTorch."""
from coordconv.backends.torch.layers import *
