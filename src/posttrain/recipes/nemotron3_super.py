"""Nemotron 3 Super: three RLVR blends, pivot RL, end-to-end RL, RLHF with a GenRM, MTP healing.

Source: Nemotron 3 Super technical report, post-training, as summarised in NVIDIA-NeMo/Nemotron.
