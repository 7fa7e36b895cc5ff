"""Nemotron 3 Nano: SFT, RL on all environments at once with a curriculum, RLHF, a small DPO.

Source: Nemotron 3 Nano, arXiv 2512.20848, section 3.
