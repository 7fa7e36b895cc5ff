"""MAI-Thinking-1: three RL climbs from a base without traces, their traces by SFT, a light climb.

Source: MAI-Thinking-1 technical report, post-training.
