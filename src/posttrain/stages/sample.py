"""Draw K scored responses per prompt from one model, or from each domain's own model."""

from __future__ import annotations

import torch

from posttrain.backends.chat import Chat
from posttrain.backends.checkpoint import load
from posttrain.backends.sampler import LocalSampler
from posttrain.modes import in_modes
from posttrain.stages.batches import kept
from posttrain.stages.context import Context
from posttrain.stages.rollouts import sample_and_verify, step_seed, verifiers, write_jsonl
from posttrain.stages.settings.data import Sample

PROMPTS_PER_CALL = 64


def run(config: Sample, ctx: Context) -> dict[str, float]:
    """Write rollouts.jsonl: problem, its mode if it has one, response, reward, finished, model,
    temperature."""
    judges, dtype = verifiers(ctx), getattr(torch, config.precision)
    rows, rewards = [], []
    total = len(ctx.domains)
    for number, name in enumerate(ctx.domains):
        edge = config.routes[name]
        language_model = load(ctx.inputs[edge], dtype=dtype, device=ctx.device)
        chat, sampler = Chat(language_model), LocalSampler(language_model)
        problems = in_modes(ctx.problems(name, "train")[: config.num_prompts], config.modes)
        tokens = 0
        for start in range(0, len(problems), PROMPTS_PER_CALL):
            scored = sample_and_verify(
                sampler,
                chat,
                problems[start : start + PROMPTS_PER_CALL],
                judges,
                group_size=config.k,
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                seed=step_seed(config.seed, (number << 20) + start),
            )
            tokens += scored.rollouts.num_tokens
            rewards += scored.reward_B.tolist()
            rows += [
                kept(problem, "id", "domain", "prompt", "answer", "mode")
                | {"response": text, "reward": reward, "finished": finished}
                | {"model": edge, "temperature": config.temperature}
                for problem, text, reward, finished in zip(
                    scored.problems,
                    scored.texts,
                    scored.reward_B.tolist(),
                    scored.rollouts.finished_B.tolist(),
                    strict=True,
                )
            ]
        ctx.log(number + 1, total, tokens=tokens, reward=sum(rewards) / len(rewards))
    write_jsonl(ctx.out / "rollouts.jsonl", rows)
    return {"rows": len(rows), "reward": sum(rewards) / len(rewards)}
