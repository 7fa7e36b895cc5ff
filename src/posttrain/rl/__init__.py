"""Reinforcement learning without a backend: samples, advantages, corrections, rollouts."""
