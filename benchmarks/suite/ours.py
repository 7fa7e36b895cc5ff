"""Every call into posttrain that the suite makes.

Threads are used as the stages use them (`posttrain.stages.worker.useful_threads`): a tiny model
computes on one, and the others compute other forward passes beside it; a larger model computes on
all.

Legend: B rows, N flat response tokens, T positions, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from posttrain.backends.sampler import LocalSampler
from posttrain.rl.types import Rollouts
from posttrain.stages.batches import sequences
from posttrain.stages.rollouts import Scored, sample_and_verify
from torch import Tensor

from posttrain.backends.chat import Chat
from posttrain.backends.checkpoint import LanguageModel, load
from posttrain.backends.local import LocalLearner, LocalScorer, response_logprobs
from posttrain.losses.distill import full_vocabulary
from posttrain.stages import distill, dpo, rl, sft
from posttrain.stages.config import build_config
from posttrain.stages.teachers import Reading, Teachers
from posttrain.stages.worker import TINY_BYTES
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


class Cores:
    """The threads of this process as a stage on these weights would use them."""

    def __init__(self, weights: Path) -> None:
        size = (weights / "model.safetensors").stat().st_size
        self.all = torch.get_num_threads()
        self.arithmetic = 1 if size < TINY_BYTES else self.all
        beside = self.all // self.arithmetic
        self.workers = ThreadPoolExecutor(beside) if beside > 1 else None

    def __enter__(self) -> None:
        torch.set_num_threads(self.arithmetic)

    def __exit__(self, *exception: object) -> None:
        torch.set_num_threads(self.all)


class Distillation:
    """Whole steps of the distill stage: sample, score, one update, with one or more teachers."""

    def __init__(self, student: Path, teachers: Mapping[str, Path], *, group: int) -> None:
        self.language_model = load(student)
        self.domains = list(teachers)
        self.cores = Cores(student)
        self.teachers = Teachers(teachers, self.language_model, workers=self.cores.workers)
        self.sampler, self.chat = LocalSampler(self.language_model), Chat(self.language_model)
        self.learner = new_learner(self.language_model, self.cores)
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
        with self.cores:
            return self._sample(problems, None, seed)

    def learn(self, scored: Scored) -> dict[str, float]:
        """Teachers score, the student takes one step."""
        with self.cores:
            return self._learn(scored, self._reading(scored.problems[:: self.group]))

    def step(self, problems: list[dict[str, Any]], seed: int) -> Work:
        """One whole step, in which teachers read answers while others are being sampled."""
        with self.cores:
            reading = self._reading(problems)
            scored = self._sample(problems, reading, seed)
            self._learn(scored, reading)
        return work(scored.rollouts)

    def _reading(self, problems: list[dict[str, Any]]) -> Reading:
        numbers_B = distill.teacher_numbers(self.config, self.teachers, problems)
        return self.teachers.reading(self.config, numbers_B)

    def _sample(self, problems: list[dict[str, Any]], reading: Reading | None, seed: int) -> Scored:
        return sample_and_verify(
            self.sampler,
            self.chat,
            problems,
            None,
            group_size=self.group,
            max_new_tokens=MAX_NEW_TOKENS,
            temperature=1.0,
            seed=seed,
            reader=reading,
        )

    def _learn(self, scored: Scored, reading: Reading) -> dict[str, float]:
        return distill.learn(
            self.config, self.learner, reading, self.domains, scored, lr=LEARNING_RATE, step=0
        )

    def models(self) -> list[Any]:
        """Student and teachers, as transformers models."""
        return [self.language_model.model, *(s.model for s in self.teachers.scorers.values())]


def answers(
    sampler: LocalSampler,
    chat: Chat,
    problems: list[dict[str, Any]],
    group: int,
    seed: int,
    reward: Callable[[str], float],
) -> Scored:
    """Samples with their rewards, as the stages make them; the reward is computed in place."""
    scored = sample_and_verify(
        sampler,
        chat,
        problems,
        None,
        group_size=group,
        max_new_tokens=MAX_NEW_TOKENS,
        temperature=1.0,
        seed=seed,
    )
    texts = [chat.decode(ids) for ids in scored.rollouts.responses()]
    reward_B = torch.tensor([reward(text) for text in texts])
    return replace(scored, texts=texts, reward_B=reward_B)


class Grpo:
    """Whole steps of the rl stage: sample, reward, one update, without a KL penalty."""

    def __init__(self, policy: Path, reward: Callable[[str], float], *, group: int) -> None:
        self.language_model, self.cores = load(policy), Cores(policy)
        self.sampler, self.chat = LocalSampler(self.language_model), Chat(self.language_model)
        self.learner = new_learner(self.language_model, self.cores)
        self.reward, self.group = reward, group
        self.config: Any = build_config(
            "rl",
            "benchmark",
            {
                "steps": 1,
                "lr": LEARNING_RATE,
                "group_size": group,
                "max_new_tokens": MAX_NEW_TOKENS,
                # Both sides learn from every row.
                "drop_zero_variance": False,
            },
        )

    def sample(self, texts: Sequence[str], seed: int) -> Scored:
        """The policy's answers with their rewards."""
        problems = [{"domain": "words", "prompt": text} for text in texts]
        with self.cores:
            return answers(self.sampler, self.chat, problems, self.group, seed, self.reward)

    def learn(self, scored: Scored) -> dict[str, float]:
        """One step on scored answers."""
        with self.cores:
            return rl.learn(self.config, self.learner, None, scored, step=0)

    def step(self, texts: Sequence[str], seed: int) -> Work:
        """One whole step."""
        scored = self.sample(texts, seed)
        self.learn(scored)
        return work(scored.rollouts)


class Supervised:
    """Steps of the sft stage."""

    def __init__(self, start: Path) -> None:
        self.language_model, self.cores = load(start), Cores(start)
        self.learner = new_learner(self.language_model, self.cores)

    def step(self, prompts: list[list[int]], responses: list[list[int]]) -> Work:
        """One step on these rows; counts all their tokens."""
        with self.cores:
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
        self.language_model, self.cores = load(start), Cores(start)
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
            device=torch.device("cpu"),
        )
        self.learner = new_learner(self.language_model, self.cores)
        self.tokens = 2 * sum(map(len, prompts)) + sum(map(len, responses))

    def step(self) -> Work:
        """One step; counts the prompt once per response, as both sides could read it."""
        with self.cores:
            dpo.learn(self.learner, self.update, lr=LEARNING_RATE)
        return Work(tokens=self.tokens)


def new_learner(language_model: LanguageModel, cores: Cores) -> LocalLearner:
    """A learner with the settings that TRL's trainers have by default."""
    return LocalLearner(
        language_model,
        betas=(0.9, 0.999),
        weight_decay=0.0,
        max_grad_norm=1.0,
        workers=cores.workers,
    )


def distillation_loss(
    hidden_ND: Tensor, head_VD: Tensor, teacher_ND: Tensor, teacher_head_VD: Tensor
) -> Tensor:
    """Mean reverse KL over tokens, exact over the vocabulary."""
    weight_N = torch.ones(len(hidden_ND))
    total, _, _ = full_vocabulary(hidden_ND, head_VD, teacher_ND, teacher_head_VD, weight_N)
    return total / len(hidden_ND)
