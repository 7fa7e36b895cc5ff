"""Losses as pure functions: tensors and keyword floats in, `(loss_sum, metrics)` out.

Every loss returns the SUM over tokens of `weight * per-token loss`; the caller divides by the count
of the whole step, so splitting a batch into parts changes nothing. Every metric is a detached
scalar sum over the tokens whose weight is not zero, so metrics add up over parts too. Preference
losses are sums over pairs in the same way.

| file | what |
|---|---|
| `ops.py` | token log-probabilities, cross-entropy, aggregation weights, KL |
| `policy.py` | PPO-clip, GRPO, Dr.GRPO, RLOO, GSPO; CISPO, GMPO, Kimi's squared loss |
| `value.py` | the critic's clipped regression, explained variance |
| `reward.py` | Bradley-Terry with margin, centring and K-wise weights; pointwise |
| `distill.py` | on-policy distillation: sampled token, teacher top-k, full vocabulary |
| `divergence.py` | the last two, and their gradients, chunk by chunk |
| `projection.py` | hidden states to logits and back: chunks, blocks, gradients of the head |
| `preference.py` | DPO, length-normalised DPO, SimPO, IPO, KTO, cross-entropy on the chosen |
"""
