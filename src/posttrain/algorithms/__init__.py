"""Algorithms as values: what a recipe passes where a stage has a choice.

    r.rl(..., surrogate=Cispo(clip_high=4), advantage=Gae(lam=0.95), kl=KL(0.02, estimator="k1",
         where="reward"), correction=IcePop(0.5, 5), draw=Gaussian(target=0.6))
    r.distill(..., estimator=TopK(64), balance=TokenShare())

Each is a frozen value with the settings that it reads and no others. Its name alone will do where
the defaults are wanted (`advantage="leave_one_out"`), numbers marked with `changing` may be given
as schedules, and `--set STAGE.surrogate.clip_high=0.28` reaches into it. `FUNCTION` names the code
that puts it into practice, which takes the settings by name; `custom("loss.py:sapo")` puts a
function of your own in its place.
"""

# ruff: noqa: F403
# All that these files name is public here: a new value needs no line of its own.
from posttrain.algorithms.custom import *
from posttrain.algorithms.distillation import *
from posttrain.algorithms.operators import *
from posttrain.algorithms.preferences import *
from posttrain.algorithms.rl import *
from posttrain.algorithms.training import *
