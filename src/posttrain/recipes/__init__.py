"""Shipped recipes, one per file; `posttrain recipes` lists them."""
