"""GRPO as one plain loop: sample groups, score them, compute advantages, take a step. No framework.

    python examples/grpo_loop.py                    a tiny model from nothing, ten seconds
    python examples/grpo_loop.py --model ./my-model any checkpoint that transformers reads

It uses the pieces that the stage `rl` is made of (a batch, a learner, a sampler, a verifier), and
none of recipes, stages, settings or the store. Everything that happens in a step stands in `main`.

Shape suffixes: P prompts, G responses to each, B = P * G rows, T positions of a row, N sampled
tokens of all rows, one after another.
"""

import argparse
import random
from pathlib import Path

import torch

from posttrain.backends.base import LearnerSettings, TokenLoss
from posttrain.backends.checkpoint import load
from posttrain.backends.local import LocalLearner, LocalSampler
from posttrain.backends.tiny import character_tokenizer, new_model
from posttrain.rewards.verifiers import ExactVerifier
from posttrain.rl.advantage import advantages
from posttrain.rl.batch import Batch
from posttrain.rl.seeds import step_seed

# Additions up to 9+9, each a row as the suites have them.
PROBLEMS = [
    {"id": f"{a}+{b}", "prompt": f"{a}+{b}", "answer": str(a + b)}
    for a in range(10)
    for b in range(10)
]
P, G = 32, 8  # prompts of a step, and responses to each prompt


def grpo_loss(clip, logp_N, entropy_N, batch):
    """The clipped surrogate of PPO and GRPO, summed over tokens; the learner divides by the count.

    `logp_N` are the log-probs of the sampled tokens under the model as it is now, with a gradient;
    `sampler_logp_N` those under the model that sampled them. On the first minibatch of a step the
    two are the same, and the gradient is that of `-advantage * logp`.
    """
    ratio_N = (logp_N - batch["sampler_logp_N"]).exp()
    advantage_N = batch["advantage_N"]
    clipped_N = ratio_N.clamp(1 - clip, 1 + clip)
    loss_N = -torch.minimum(ratio_N * advantage_N, clipped_N * advantage_N)
    return loss_N.sum(), {"entropy": entropy_N.sum()}


def sft_loss(_, logp_N, entropy_N, batch):
    """Cross-entropy of the tokens of a demonstration, summed."""
    return -logp_N.sum(), {"loss": -logp_N.detach().sum()}


def tiny_model(seed):
    """0.1 million parameters of noise, with one token per character and a chat template."""
    return new_model(
        character_tokenizer([]),
        hidden_size=64,
        num_layers=2,
        num_heads=2,
        head_dim=32,
        intermediate_size=128,
        max_positions=32,
        seed=seed,
    )


def warm_up(learner, *, steps, seed):
    """A few steps on demonstrations, so that some samples are right and rewards can differ."""
    chat = learner.chat
    for step in range(steps):
        drawn = random.Random(step_seed(seed, step)).sample(PROBLEMS, 32)
        batch = Batch.from_tokens(
            [chat.prompt(problem["prompt"]) for problem in drawn],
            [chat.response(problem["prompt"], problem["answer"]) for problem in drawn],
            pad_id=chat.pad_id,
        )
        learner.update(batch, TokenLoss(sft_loss), count=batch.num_tokens, lr=3e-3)


def main(model=None, *, steps=100, warmup=200, lr=1e-3, seed=0):
    """Trains, and returns the mean reward of every step."""
    language_model = tiny_model(seed) if model is None else load(Path(model))
    settings = LearnerSettings(betas=(0.9, 0.98), weight_decay=0.0, max_grad_norm=1.0)
    learner = LocalLearner(language_model, settings)  # AdamW on the model
    sampler = LocalSampler(learner)  # of the learner's own weights, without a copy
    verifier = ExactVerifier()
    chat = learner.chat  # text <-> tokens, by the model's chat template
    if model is None:
        warm_up(learner, steps=warmup, seed=seed)

    rewards = []
    for step in range(steps):
        # Everything random of a step follows from (seed, step), so any step can be done again.
        drawn = random.Random(step_seed(seed, step)).sample(PROBLEMS, P)

        # 1. Roll out: G responses to each prompt, the P groups one after another -> B rows.
        sampler.sync(learner)
        batch = sampler.sample(
            [chat.prompt(problem["prompt"]) for problem in drawn],
            group_size=G,
            max_new_tokens=4,
            temperature=1.0,
            seed=step_seed(seed, step),
        )  # tokens_BT, sampled_BT (which tokens are responses), and the column sampler_logp_N

        # 2. Judge: is the text the answer? A response that was cut has not given one.
        texts = [chat.decode(ids) for ids in batch.responses()]
        scores = [verifier.score(text, drawn[row // G]) for row, text in enumerate(texts)]
        reward_B = torch.tensor(scores) * batch["finished_B"]

        # 3. Credit: (reward - mean of the group) / deviation of the group, for all of its tokens.
        group_B = torch.arange(P).repeat_interleave(G)  # 0 0 0 ... 1 1 1 ...
        advantage_B = advantages(reward_B, group_B, mode="group_zscore")
        batch["advantage_N"] = advantage_B[batch.row_N]  # [B] -> [N]; row_N is the row of a token

        # 4. Update: two optimiser steps, each on half of the rows. Columns go along with the rows.
        for minibatch in batch.minibatches(2, seed=seed, step=step):
            sums = learner.update(
                minibatch, TokenLoss(grpo_loss, 0.2), count=minibatch.num_tokens, lr=lr
            )  # loss / count is descended, whatever the split into forward passes

        rewards.append(float(reward_B.mean()))
        if step % 10 == 0 or step == steps - 1:
            entropy = sums["entropy"] / minibatch.num_tokens  # nats per token
            recent = sum(rewards[-10:]) / len(rewards[-10:])
            print(f"step {step:3d}  reward of ten steps {recent:.2f}  entropy {entropy:.2f}")
    return rewards


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a checkpoint directory; without it a tiny model is made")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
