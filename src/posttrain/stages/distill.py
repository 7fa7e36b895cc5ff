"""Multi-teacher on-policy distillation (MOPD): the student samples, its domain's teacher corrects.

Per step: draw prompts of all domains, let the student answer, let each teacher read the answers of
its own domains, and lower a divergence, usually the reverse KL, from student to teacher on the
student's own tokens (MOPD, arXiv 2606.30406; MiMo-V2-Flash, arXiv 2601.02780, section 4; estimators
and what each of them optimises: `losses/distill.py`). Routing is strict: a domain has one named
teacher.

Legend: B rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.backends.chat import Chat
from posttrain.backends.checkpoint import load, save
from posttrain.backends.local import LocalLearner
from posttrain.backends.sampler import LocalSampler
from posttrain.rl.advantage import advantages
from posttrain.schedules import learning_rate
from posttrain.stages.auxiliary import Auxiliary, take_metrics
from posttrain.stages.batches import Pool, Problem
from posttrain.stages.context import Context
from posttrain.stages.distill_update import DistillUpdate
from posttrain.stages.learner import new_learner
from posttrain.stages.rollouts import (
    Scored,
    equal_parts,
    sample_and_verify,
    step_seed,
    verifiers,
)
from posttrain.stages.settings.distill import Distill
from posttrain.stages.teachers import Reading, Teachers, hinted_prompts
