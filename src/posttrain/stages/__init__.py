"""One file per kind of stage: the loop that does its work, readable from top to bottom."""
