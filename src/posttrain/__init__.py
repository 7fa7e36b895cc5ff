"""posttrain: a whole LLM post-training recipe as one short file."""
