"""The parts of `bench.py`: one module per path, and what they share."""
