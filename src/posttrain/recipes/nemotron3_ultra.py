"""Nemotron 3 Ultra: RLVR, a warm-up SFT, and two rounds of MOPD with refreshed and kept teachers.

Source: Nemotron 3 Ultra technical report, post-training, as summarised in NVIDIA-NeMo/Nemotron.
