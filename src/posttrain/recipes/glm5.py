"""GLM-5: reasoning, agentic and general RL one after another, then cross-stage distillation.

Source: GLM-5, arXiv 2602.15763, section 3.
