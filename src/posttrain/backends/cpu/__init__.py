"""Faster ways to compute what `backends/local.py` computes, for models whose layers allow them."""
