"""Everything heavy that stages import, so that the fork server imports it once for all of them."""

import reasoning_gym  # noqa: F401
import torch  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
from transformers.models.qwen3 import modeling_qwen3  # noqa: F401

from posttrain.stages import (  # noqa: F401
    best,
    comparisons,
    dedup,
    distill,
    dpo,
    evaluate,
    filter,
    merge,
    mix,
    pairs,
    pretrain,
    profile,
    reward_model,
    rl,
    sample,
    score,
    select,
    sft,
)
