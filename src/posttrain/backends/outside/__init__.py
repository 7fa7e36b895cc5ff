"""Checkpoints from outside, read without torch: files, headers of weights, positions, and what is
wrong with them."""
