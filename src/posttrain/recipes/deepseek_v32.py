"""DeepSeek-V3.2: specialists, one SFT on their samples, one mixed GRPO with its stabilisers.

Source: DeepSeek-V3.2, arXiv 2512.02556, section 3; DeepSeek-V3.2-Exp, section 3.
