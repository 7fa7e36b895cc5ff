"""Nemotron-Cascade 2: one domain after another by RL, with MOPD from its own earlier checkpoints.

Source: Nemotron-Cascade 2, arXiv 2603.19220, sections 3 and 4.
