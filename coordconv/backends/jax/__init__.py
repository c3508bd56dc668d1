"""What the backends of Flax, NNX and Linen, stand on."""
