"""Kimi K2: one SFT, then joint RL on verifiable rewards and on the policy's own critique.

Source: Kimi K2, arXiv 2507.20534, section 3.
