"""Rewards: what turns a response into a number. `verifiers` holds the ones that need no model."""
