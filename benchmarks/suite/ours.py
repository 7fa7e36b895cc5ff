"""Every call into posttrain that the suite makes.

Threads are used as the stages use them (`posttrain.stages.worker.useful_threads`): a tiny model
computes on one, and the others compute other forward passes beside it; a larger model computes on
all.

Legend: B rows, N sampled tokens, T positions, V vocabulary, D hidden size.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.backends.base import HeadLoss, TokenLoss
from posttrain.backends.local import LocalBackend
from posttrain.losses.distill import full_vocabulary
from posttrain.losses.divergence import TeacherStates
from posttrain.rl.advantage import advantages
from posttrain.rl.batch import Batch
from posttrain.stages import distill, dpo, rl
from posttrain.stages.aux_losses import token_cross_entropy
from posttrain.stages.config import build_config
from posttrain.stages.context import Context
from posttrain.stages.rollout import rollout
from posttrain.stages.teachers import Teachers, TeacherScoring
from posttrain.stages.worker import TINY_BYTES
from suite.measure import Work, sampled
from suite.models import END_ID, MAX_NEW_TOKENS

LEARNING_RATE = 1e-6
"""Small: weights that hardly move keep the response lengths as they are."""
PROMPT = 32
"""Tokens of prompt in packed rows."""
OPTIMIZER = {"beta2": 0.999}
"""As TRL's trainers have it by default."""


class Sampling:
    """Responses of one model."""

    def __init__(self, path: Path, *, max_rows: int = 256) -> None:
        self.sampler = LocalBackend().sampler(path)
        self.sampler.max_rows = max_rows

    def __call__(self, prompts: Sequence[Sequence[int]], group: int, seed: int) -> Work:
        """Sample `group` responses to each prompt."""
        batch = self.sampler.sample(
            prompts,
            group_size=group,
            max_new_tokens=MAX_NEW_TOKENS,
            temperature=1.0,
            seed=seed,
        )
        return work(batch)


def work(batch: Batch) -> Work:
    """What a batch of responses counts."""
    return sampled(batch.sampled_len_B.tolist())


class Cores:
    """The threads of this process as a stage on these weights would use them."""

    def __init__(self, weights: Path, device: str = "cpu") -> None:
        self.device = device
        size = (weights / "model.safetensors").stat().st_size
        self.all = torch.get_num_threads()
        self.arithmetic = 1 if size < TINY_BYTES else self.all
        beside = self.all // self.arithmetic if device == "cpu" else 1
        self.workers = ThreadPoolExecutor(beside) if beside > 1 else None

    def __enter__(self) -> None:
        torch.set_num_threads(self.arithmetic)

    def __exit__(self, *exception: object) -> None:
        torch.set_num_threads(self.all)

    def context(self, inputs: Mapping[str, Path]) -> Context:
        """What a stage with these models, by edge, would have."""
        return Context(
            name="benchmark",
            work=Path(tempfile.mkdtemp(prefix="posttrain-bench-")),
            inputs={edge: str(path) for edge, path in inputs.items()},
            threads=self.all,
            backend=LocalBackend(device=self.device, workers=self.workers),
            workers=self.workers,
        )


class Distillation:
    """Whole steps of the distill stage: sample, score, one update, with one or more teachers."""

    def __init__(
        self,
        student: Path,
        teachers: Mapping[str, Path],
        *,
        group: int,
        device: str = "cpu",
        **settings: Any,
    ) -> None:
        """`settings` are those of the stage, over what the suite has."""
        self.domains, self.group, self.cores = tuple(teachers), group, Cores(student, device)
        self.settings: Any = build_config(
            "distill",
            "benchmark",
            {
                "steps": 1,
                "samples_per_prompt": group,
                "max_new_tokens": MAX_NEW_TOKENS,
                "aggregation": "token",
                "optimizer": OPTIMIZER,
                "routes": {domain: domain for domain in self.domains},
                **settings,
            },
        )
        edges = {f"teachers.{name}": path for name, path in teachers.items()}
        ctx = self.cores.context({"start": student, **edges})
        self.policy: Any = ctx.learner(self.settings)
        self.sampler = ctx.sampler(self.policy)
        self.teachers = Teachers(self.settings, ctx, self.policy)

    def problems(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """Prompts shared out over the teachers in turn."""
        return [
            {"domain": self.domains[i % len(self.domains)], "prompt": text}
            for i, text in enumerate(texts)
        ]

    def sample(self, problems: list[dict[str, Any]], seed: int) -> Batch:
        """The student's answers."""
        with self.cores:
            return self._sample(problems, None, seed)

    def learn(self, batch: Batch) -> dict[str, float]:
        """Teachers score, the student takes one step."""
        said = [name for name in batch.columns if name.startswith("teacher")]
        with self.cores:
            scoring = self.teachers.scoring(self.settings, batch.problems[:: self.group])
            return self._learn(batch.without(*said), scoring)

    def step(self, problems: list[dict[str, Any]], seed: int) -> Work:
        """One whole step, in which teachers read answers while others are being sampled."""
        with self.cores:
            scoring = self.teachers.scoring(self.settings, problems)
            batch = self._sample(problems, scoring, seed)
            self._learn(batch, scoring)
        return work(batch)

    def phases(
        self, problems: list[dict[str, Any]], seed: int, wait: Callable[[], None]
    ) -> dict[str, float]:
        """Seconds of `sampling`, `scoring` and `update`, one after the other; `wait` returns when
        the device has done what it was given."""
        with self.cores:
            times = [time.perf_counter()]
            batch = self._sample(problems, None, seed)
            wait()
            times.append(time.perf_counter())
            scoring = self.teachers.scoring(self.settings, problems)
            scoring.add_columns(batch)
            wait()
            times.append(time.perf_counter())
            self._update(batch)
            wait()
            times.append(time.perf_counter())
        names = ("sampling", "scoring", "update")
        return {name: b - a for name, a, b in zip(names, times[:-1], times[1:], strict=True)}

    def _sample(
        self, problems: list[dict[str, Any]], scoring: TeacherScoring | None, seed: int
    ) -> Batch:
        return rollout(
            self.sampler,
            problems,
            None,
            group_size=self.group,
            max_new_tokens=self.settings.max_new_tokens,
            temperature=1.0,
            seed=seed,
            reader=scoring,
        )

    def _learn(self, batch: Batch, scoring: TeacherScoring) -> dict[str, float]:
        """The second half of the loop of `posttrain.stages.distill.run`."""
        scoring.add_columns(batch)
        return self._update(batch)

    def _update(self, batch: Batch) -> dict[str, float]:
        s, domains = self.settings, self.domains
        batch["domain_B"] = torch.tensor([domains.index(p["domain"]) for p in batch.problems])
        batch["loss_weight_B"] = distill.loss_weights(s, domains, batch)
        batch["advantage_B"] = advantages(batch["reward_B"], batch["group_B"], mode="group_mean")
        settings = distill.LossSettings(step=s, domains=domains, heads=self.teachers.heads)
        loss = HeadLoss(distill.distill_loss, settings)
        sums: dict[str, float] = self.policy.update(
            batch, loss, count=float(batch.num_tokens), lr=LEARNING_RATE
        )
        return sums

    def models(self) -> list[Any]:
        """Student and teachers, as transformers models."""
        scorers: list[Any] = self.teachers.scorers
        return [self.policy.model, *(scorer.model for scorer in scorers)]


class Grpo:
    """Whole steps of the rl stage: sample, reward, one update, without a KL penalty."""

    def __init__(
        self, policy: Path, reward: Callable[[str], float], *, group: int, **settings: Any
    ) -> None:
        """`settings` are those of the stage, over what the suite has."""
        self.reward, self.group, self.cores = reward, group, Cores(policy)
        self.settings: Any = build_config(
            "rl",
            "benchmark",
            {
                "steps": 1,
                "group_size": group,
                "max_new_tokens": MAX_NEW_TOKENS,
                "optimizer": OPTIMIZER,
                # Both sides learn from every row.
                "drop_zero_variance": False,
                **settings,
            },
        )
        ctx = self.cores.context({"start": policy})
        self.policy: Any = ctx.learner(self.settings)
        self.sampler = ctx.sampler(self.policy)

    def sample(self, texts: Sequence[str], seed: int) -> Batch:
        """The policy's answers with their rewards, which are computed in place."""
        problems = [{"domain": "words", "prompt": text} for text in texts]
        with self.cores:
            batch = rollout(
                self.sampler,
                problems,
                None,
                group_size=self.group,
                max_new_tokens=MAX_NEW_TOKENS,
                temperature=1.0,
                seed=seed,
            )
            chat = self.policy.chat
            rewards = [self.reward(chat.decode(ids)) for ids in batch.responses()]
            batch["reward_B"] = torch.tensor(rewards)
            return batch

    def learn(self, batch: Batch) -> dict[str, float]:
        """One step on rewarded answers: the second half of the loop of `posttrain.stages.rl`."""
        with self.cores:
            rl.add_advantages(self.settings, batch, None)
            loss = TokenLoss(rl.policy_loss, self.settings)
            sums: dict[str, float] = self.policy.update(
                batch, loss, count=float(batch.num_tokens), lr=LEARNING_RATE
            )
            return sums

    def step(self, texts: Sequence[str], seed: int) -> Work:
        """One whole step."""
        batch = self.sample(texts, seed)
        self.learn(batch)
        return work(batch)

    def models(self) -> list[Any]:
        """The policy, as a transformers model."""
        return [self.policy.model]


class Supervised:
    """Steps of the sft stage."""

    def __init__(self, start: Path) -> None:
        self.cores = Cores(start)
        settings: Any = build_config("sft", "benchmark", {"steps": 1, "optimizer": OPTIMIZER})
        self.policy = self.cores.context({"start": start}).learner(settings)

    def step(self, prompts: list[list[int]], responses: list[list[int]]) -> Work:
        """One step on these rows; counts all their tokens."""
        with self.cores:
            batch = Batch.from_tokens(prompts, responses, pad_id=self.policy.chat.pad_id)
            loss = TokenLoss(token_cross_entropy, 1.0)
            self.policy.update(batch, loss, count=float(batch.num_tokens), lr=LEARNING_RATE)
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
        self.cores = Cores(start)
        self.settings: Any = build_config(
            "dpo", "benchmark", {"steps": 1, "optimizer": OPTIMIZER, "loss": "dpo"}
        )
        self.policy = self.cores.context({"start": start}).learner(self.settings)
        chat = self.policy.chat
        counted_V = dpo.counted_tokens(chat, mask_formatting=False)
        self.batch = Batch.from_tokens(
            [prompt for prompt in prompts for _ in range(2)],
            [row for pair in zip(chosen, rejected, strict=True) for row in pair],
            pad_id=chat.pad_id,
        )
        logp_N = self.policy.logprobs(self.batch)
        self.batch["counted_N"] = counted_V[self.batch.targets_N]
        self.batch["ref_logp_B"] = dpo.counted_sums(self.batch, logp_N, counted_V)
        self.tokens = int(self.batch.length_B.sum())

    def step(self) -> Work:
        """One step; counts the prompt once per response, as both sides could read it."""
        with self.cores:
            loss = TokenLoss(dpo.preference_loss, self.settings.loss)
            count = len(self.batch) / 2
            self.policy.update(self.batch, loss, count=count, lr=LEARNING_RATE, group_rows=2)
        return Work(tokens=self.tokens)


class Packed:
    """Steps of `sft` or `rl` on rows of one length, in bfloat16."""

    def __init__(self, path: Path, kind: str, tokens_BT: Tensor, *, device: str) -> None:
        settings: Any = build_config(
            kind, "benchmark", {"steps": 1, "optimizer": OPTIMIZER, "precision": "bfloat16"}
        )
        self.cores = Cores(path, device)
        self.policy = self.cores.context({"start": path}).learner(settings)
        rows = tokens_BT.tolist()
        prompts, responses = [row[:PROMPT] for row in rows], [row[PROMPT:] for row in rows]
        self.batch = Batch.from_tokens(prompts, responses, pad_id=self.policy.chat.pad_id)
        self.loss = TokenLoss(token_cross_entropy, 1.0)
        if kind == "rl":
            self.loss = TokenLoss(rl.policy_loss, settings)
            logp_N = self.policy.logprobs(self.batch)
            self.batch["sampler_logp_N"] = logp_N
            self.batch["old_logp_N"] = logp_N
            self.batch["advantage_N"] = torch.ones_like(logp_N)

    def step(self) -> None:
        """One update."""
        count = float(self.batch.num_tokens)
        self.policy.update(self.batch, self.loss, count=count, lr=LEARNING_RATE)


class Reading:
    """Log-probabilities of a frozen model in bfloat16."""

    def __init__(self, path: Path, tokens_BT: Tensor, *, device: str) -> None:
        self.cores = Cores(path, device)
        self.scorer = self.cores.context({"model": path}).scorer("model", precision="bfloat16")
        rows = tokens_BT.tolist()
        self.batch = Batch.from_tokens(
            [row[:1] for row in rows], [row[1:] for row in rows], pad_id=self.scorer.chat.pad_id
        )
        self.positions = self.batch.num_tokens

    def step(self) -> None:
        """Read all rows."""
        self.scorer.logprobs(self.batch)


class Drawing:
    """Responses of our sampler in bfloat16."""

    def __init__(
        self, path: Path, prompts: list[list[int]], *, group: int, max_new_tokens: int, device: str
    ) -> None:
        self.cores = Cores(path, device)
        self.sampler = self.cores.context({"model": path}).sampler("model", precision="bfloat16")
        self.prompts, self.group, self.most, self.seed = prompts, group, max_new_tokens, 0

    def step(self) -> int:
        """Sample once; how many tokens."""
        self.seed += 1
        batch = self.sampler.sample(
            self.prompts,
            group_size=self.group,
            max_new_tokens=self.most,
            temperature=1.0,
            seed=self.seed,
        )
        return batch.num_tokens


class Generating:
    """Responses of transformers' `generate` in bfloat16; only tokens up to the end count."""

    def __init__(
        self, path: Path, prompts: list[list[int]], *, group: int, max_new_tokens: int, device: str
    ) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        self.model.to(device).eval()
        self.tokens_BT = torch.tensor(prompts, device=device).repeat_interleave(group, 0)
        self.most = max_new_tokens

    @torch.no_grad()
    def step(self) -> int:
        """Sample once; how many tokens."""
        found_BT = self.model.generate(
            self.tokens_BT,
            attention_mask=torch.ones_like(self.tokens_BT),
            max_new_tokens=self.most,
            do_sample=True,
            temperature=1.0,
            top_k=0,
        )[:, self.tokens_BT.shape[1] :]
        ended_BT = (found_BT == END_ID).cumsum(1)
        # Up to the first end, which counts as well.
        return int(((ended_BT == 0) | ((ended_BT == 1) & (found_BT == END_ID))).sum())


def distillation_loss(
    hidden_ND: Tensor, head_VD: Tensor, teacher_ND: Tensor, teacher_head_VD: Tensor
) -> Tensor:
    """Mean reverse KL over tokens, exact over the vocabulary."""
    weight_N = torch.ones(len(hidden_ND))
    teacher = TeacherStates(hidden_NE=teacher_ND, head_VE=teacher_head_VD)
    total, _, _ = full_vocabulary(hidden_ND, head_VD, [teacher], weight_N)
    return total / len(hidden_ND)
