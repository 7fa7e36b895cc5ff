"""Composer 2: continued pretraining, then RL with Dr. GRPO; 2.5 teaches itself with hints.

Source: Composer 2, arXiv 2603.24477; Composer 2.5 announcement.
