"""Studies of what coordinates do for a network, one a module; `paper.py` runs and reports them."""
