"""GLM-4.5: a reasoning, an agent and a general expert, joined by SFT of the base; then general RL.

Source: GLM-4.5, arXiv 2508.06471, section 3.
