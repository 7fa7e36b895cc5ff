"""Every call into posttrain that the suite makes.

Legend: B rows, N flat response tokens, T positions, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.backends.chat import Chat
from posttrain.backends.checkpoint import LanguageModel, load
from posttrain.backends.local import LocalLearner, LocalScorer, response_logprobs
from posttrain.backends.sampler import LocalSampler
from posttrain.losses.distill import full_vocabulary
from posttrain.rl.types import Rollouts
from posttrain.stages import distill, dpo, rl, sft
from posttrain.stages.batches import sequences
from posttrain.stages.config import build_config
from posttrain.stages.rollouts import Scored
from posttrain.stages.teachers import Teachers
from suite.measure import Work, sampled
from suite.models import MAX_NEW_TOKENS

LEARNING_RATE = 1e-6
"""Small: weights that hardly move keep the response lengths as they are."""


class Sampling:
    """Responses of one model."""

    def __init__(self, path: Path, *, max_rows: int = 256) -> None:
        self.sampler = LocalSampler(load(path), max_rows=max_rows)

    def __call__(self, prompts: Sequence[Sequence[int]], group: int, seed: int) -> Work:
        """Sample `group` responses to each prompt."""
        rollouts = self.sampler.sample(
            prompts,
            group_size=group,
            max_new_tokens=MAX_NEW_TOKENS,
            temperature=1.0,
            seed=seed,
        )
        return work(rollouts)


def work(rollouts: Rollouts) -> Work:
    """What a batch of rollouts counts."""
    return sampled(rollouts.response_len_B.tolist())


class Distillation:
    """Whole steps of the distill stage: sample, score, one update, with one or more teachers."""

    def __init__(self, student: Path, teachers: Mapping[str, Path], *, group: int) -> None:
        self.language_model = load(student)
        self.domains = list(teachers)
        self.teachers = Teachers(teachers, self.language_model)
        self.sampler, self.chat = LocalSampler(self.language_model), Chat(self.language_model)
        self.learner = new_learner(self.language_model)
        self.group = group
        self.config: Any = build_config(
            "distill",
            "benchmark",
            {
                "steps": 1,
                "samples_per_prompt": group,
                "max_new_tokens": MAX_NEW_TOKENS,
                "aggregation": "token",
                "routes": {domain: domain for domain in self.domains},
            },
        )

    def problems(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """Prompts shared out over the teachers in turn."""
        return [
            {"domain": self.domains[i % len(self.domains)], "prompt": text}
            for i, text in enumerate(texts)
        ]

    def sample(self, problems: list[dict[str, Any]], seed: int) -> Scored:
        """The student's answers."""
        return answers(self.sampler, self.chat, problems, self.group, seed)

    def learn(self, scored: Scored) -> dict[str, float]:
        """Teachers score, the student takes one step."""
        problems = scored.problems[:: self.group]
        numbers_B = distill.teacher_numbers(self.config, self.teachers, problems)
        return distill.learn(
            self.config,
            self.learner,
            self.teachers.reading(self.config, numbers_B),
            self.domains,
            scored,
            lr=LEARNING_RATE,
            step=0,
        )

    def step(self, problems: list[dict[str, Any]], seed: int) -> Work:
        """One whole step."""
        scored = self.sample(problems, seed)
        self.learn(scored)
        return work(scored.rollouts)

    def models(self) -> list[Any]:
        """Student and teachers, as transformers models."""
        return [self.language_model.model, *(s.model for s in self.teachers.scorers.values())]


def answers(
    sampler: LocalSampler,
    chat: Chat,
    problems: list[dict[str, Any]],
    group: int,
    seed: int,
    reward: Callable[[str], float] | None = None,
) -> Scored:
    """Samples with their rewards, as the stages make them; the reward is computed in place."""
    rollouts = sampler.sample(
        [chat.prompt(problem["prompt"]) for problem in problems],
        group_size=group,
        max_new_tokens=MAX_NEW_TOKENS,
        temperature=1.0,
        seed=seed,
    )
    texts, reward_B = [], torch.zeros(len(rollouts))
    if reward is not None:
        texts = [chat.decode(ids) for ids in rollouts.responses()]
        reward_B = torch.tensor([reward(text) for text in texts])
    return Scored(
        rollouts=rollouts,
        problems=[problem for problem in problems for _ in range(group)],
        group_B=torch.arange(len(problems)).repeat_interleave(group),
        texts=texts,
        reward_B=reward_B,
    )


class Grpo:
    """Whole steps of the rl stage: sample, reward, one update, without a KL penalty."""

    def __init__(self, policy: Path, reward: Callable[[str], float], *, group: int) -> None:
        self.language_model = load(policy)
        self.sampler, self.chat = LocalSampler(self.language_model), Chat(self.language_model)
        self.learner = new_learner(self.language_model)
        self.reward, self.group = reward, group
        self.config: Any = build_config(
            "rl",
            "benchmark",
            {
                "steps": 1,
                "group_size": group,
                "max_new_tokens": MAX_NEW_TOKENS,
                # Both sides learn from every row.
                "drop_zero_variance": False,
            },
        )

    def sample(self, texts: Sequence[str], seed: int) -> Scored:
        """The policy's answers with their rewards."""
        problems = [{"domain": "words", "prompt": text} for text in texts]
        return answers(self.sampler, self.chat, problems, self.group, seed, self.reward)

    def learn(self, scored: Scored) -> dict[str, float]:
        """One step on scored answers."""
        return rl.learn(self.config, self.learner, None, scored, lr=LEARNING_RATE, step=0)

    def step(self, texts: Sequence[str], seed: int) -> Work:
        """One whole step."""
        scored = self.sample(texts, seed)
        self.learn(scored)
        return work(scored.rollouts)


class Supervised:
    """Steps of the sft stage."""

    def __init__(self, start: Path) -> None:
        self.language_model = load(start)
        self.learner = new_learner(self.language_model)

    def step(self, prompts: list[list[int]], responses: list[list[int]]) -> Work:
        """One step on these rows; counts all their tokens."""
        batch = sequences(prompts, responses, self.language_model.pad_id)
        sft.imitate(self.learner, batch, lr=LEARNING_RATE)
        return Work(tokens=sum(map(len, prompts)) + sum(map(len, responses)))


class Preference:
    """Steps of the dpo stage on one batch of pairs; the reference was read before, as it does."""

    def __init__(
        self,
        start: Path,
        prompts: list[list[int]],
        chosen: list[list[int]],
        rejected: list[list[int]],
    ) -> None:
        self.language_model = load(start)
        responses = [row for pair in zip(chosen, rejected, strict=True) for row in pair]
        rows = sequences(
            [prompt for prompt in prompts for _ in range(2)],
            responses,
            self.language_model.pad_id,
        )
        config: Any = build_config("dpo", "benchmark", {"steps": 1, "beta": 0.1})
        counted_V = dpo.counted_tokens(config, self.language_model)
        scorer = LocalScorer(self.language_model)
        logp_N = response_logprobs(scorer.hidden(rows), scorer.head, rows, temperature=1.0)
        self.update = dpo.PairUpdate(
            config,
            rows=rows,
            counted_V=counted_V,
            reference_B=dpo.counted_sums(rows, logp_N, counted_V),
            baseline=None,
        )
        self.learner = new_learner(self.language_model)
        self.tokens = 2 * sum(map(len, prompts)) + sum(map(len, responses))

    def step(self) -> Work:
        """One step; counts the prompt once per response, as both sides could read it."""
        dpo.learn(self.learner, self.update, lr=LEARNING_RATE)
        return Work(tokens=self.tokens)


def new_learner(language_model: LanguageModel) -> LocalLearner:
    """A learner with the settings that TRL's trainers have by default."""
    return LocalLearner(language_model, betas=(0.9, 0.999), weight_decay=0.0, max_grad_norm=1.0)


def distillation_loss(
    hidden_ND: Tensor, head_VD: Tensor, teacher_ND: Tensor, teacher_head_VD: Tensor
) -> Tensor:
    """Mean reverse KL over tokens, exact over the vocabulary."""
    weight_N = torch.ones(len(hidden_ND))
    total, _, _ = full_vocabulary(hidden_ND, head_VD, teacher_ND, teacher_head_VD, weight_N)
    return total / len(hidden_ND)
