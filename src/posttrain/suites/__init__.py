"""Suites: named sets of domains, built in or a user's own; splits are disjoint by problem."""
