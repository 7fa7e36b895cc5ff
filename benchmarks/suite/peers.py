"""The other side: transformers and TRL, each with the settings that were fastest on a CPU.

All trainers: float32 (TRL's default bf16 is several times slower without hardware for it), no
gradient checkpointing, no logging, evaluation or saving, AdamW as they make it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback

from suite.measure import Work, sampled
from suite.models import END_ID, MAX_NEW_TOKENS, PAD_ID, text_of

LEARNING_RATE = 1e-6
ENDLESS = 1_000_000
"""Steps that a trainer believes it will take; it is stopped when there is nothing to compare."""

Asked = str | list[dict[str, str]]
"""A prompt as text, or as a conversation for the chat template."""


def load(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A model with torch's fused attention."""
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="sdpa"
    ).eval()


class Generate:
    """transformers' `generate` on the whole batch, as TRL's trainers call it."""

    def __init__(self, path: Path) -> None:
        self.model = load(path)

    def __call__(self, prompts: Sequence[Sequence[int]], group: int, seed: int) -> Work:
        """`group` responses to each prompt; tokens after the end token are not counted."""
        torch.manual_seed(seed)
        ids_BT = torch.tensor(prompts).repeat_interleave(group, dim=0)
        with torch.no_grad():
            out_BT = self.model.generate(
                input_ids=ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=MAX_NEW_TOKENS,
                eos_token_id=END_ID,
                pad_token_id=PAD_ID,
            )
        return counted(out_BT[:, ids_BT.shape[1] :])


def counted(responses_BT: torch.Tensor) -> Work:
    """Tokens up to the end token, that one included."""
    ended_BT = (responses_BT == END_ID).int()
    before_BT = ended_BT.cumsum(1) - ended_BT
    return sampled((before_BT == 0).sum(1).tolist())


class ContinuousBatching:
    """transformers' continuous batching, its manager kept between calls."""

    def __init__(self, path: Path) -> None:
        from transformers import ContinuousBatchingConfig

        self.model = load(path)
        # In pages of 256 tokens these responses would leave most of the memory empty.
        self.config = ContinuousBatchingConfig(
            page_size=32, num_blocks=2048, max_batch_tokens=512, use_cuda_graph=False
        )

    def __call__(self, prompts: Sequence[Sequence[int]], group: int, seed: int) -> Work:
        """`group` responses to each prompt."""
        torch.manual_seed(seed)
        settings = self.model.generation_config
        settings.max_new_tokens = MAX_NEW_TOKENS
        rows = [list(prompt) for prompt in prompts for _ in range(group)]
        results = self.model.generate_batch(
            rows,
            generation_config=settings,
            continuous_batching_config=self.config,
            persistent_manager=True,
        )
        lengths = [len(result.generated_tokens) for result in results.values()]
        if len(lengths) != len(rows):
            raise RuntimeError(f"continuous batching answered {len(lengths)} of {len(rows)} rows")
        return sampled(lengths)

    def close(self) -> None:
        """Stop the manager's thread."""
        self.model.destroy_cached_continuous_batching_manager()


class Gate(TrainerCallback):
    """Holds a trainer after each step until it is let go."""

    def __init__(self) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.stop = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set-up is over."""
        self.done.release()
        self.go.acquire()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One optimiser step is over."""
        control.should_training_stop = self.stop
        self.done.release()
        if not self.stop:
            self.go.acquire()
        control.should_training_stop = self.stop


class Stepper:
    """`trainer.train()` in a thread of its own, one step at a time.

    What is timed is everything a user waits for in one step, without set-up, logging and saving.
    """

    def __init__(self, trainer: Any, count: Callable[[Any], Work]) -> None:
        self.trainer, self.count = trainer, count
        self.gate = Gate()
        self.error: BaseException | None = None
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self.gate)
        self.thread = threading.Thread(target=self._train, daemon=True)
        self.thread.start()
        self._wait()

    def step(self, repetition: int = 0) -> Work:
        """One optimiser step, sampling included where the trainer samples."""
        self.gate.go.release()
        self._wait()
        return self.count(self.trainer)

    def close(self) -> None:
        """End the trainer after the step that it holds at."""
        self.gate.stop = True
        self.gate.go.release()
        self.thread.join()

    def _train(self) -> None:
        try:
            self.trainer.train()
        except BaseException as error:
            self.error = error
            self.gate.done.release()

    def _wait(self) -> None:
        self.gate.done.acquire()
        if self.error is not None:
            raise RuntimeError("the peer's trainer failed") from self.error


def common(folder: Path, *, micro_batch: int, accumulate: int) -> dict[str, Any]:
    """Arguments of every trainer."""
    return {
        "output_dir": str(folder / "trainer"),
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": accumulate,
        "max_steps": ENDLESS,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def last_batch(trainer: Any) -> Work:
    """Response tokens of the batch that the trainer has just sampled and learned from."""
    lengths = torch.cat([part["completion_mask"].sum(1) for part in trainer._buffered_inputs])
    return sampled(lengths.tolist())


def distillation(
    student: Path,
    teacher: Path,
    texts: Sequence[Asked],
    folder: Path,
    *,
    group: int,
    micro_batch: int,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Stepper:
    """TRL's DistillationTrainer: on-policy, reverse KL over the whole vocabulary, temperature 1.

    It samples one response per prompt, so each prompt stands `group` times in the data. `dtype` is
    that of the weights, `settings` are further fields of DistillationConfig.
    """
    from trl import DistillationConfig, DistillationTrainer

    rows = [text for text in texts for _ in range(group)]
    arguments = DistillationConfig(
        **common(folder, micro_batch=micro_batch, accumulate=len(rows) // micro_batch) | settings,
        max_completion_length=MAX_NEW_TOKENS,
        temperature=1.0,
        top_k=0,
        beta=1.0,
        shuffle_dataset=False,
    )
    trainer = DistillationTrainer(
        model=load(student, dtype),
        teacher_model=load(teacher, dtype),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": rows}),
        processing_class=AutoTokenizer.from_pretrained(student),
    )
    return Stepper(trainer, last_batch)


def grpo(
    policy: Path,
    texts: Sequence[Asked],
    reward: Callable[[str], float],
    folder: Path,
    *,
    group: int,
    micro_batch: int,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Stepper:
    """TRL's GRPOTrainer without a KL penalty, one update per batch; `dtype` is that of the weights,
    `settings` are further fields of GRPOConfig."""
    from trl import GRPOConfig, GRPOTrainer

    def rewards(completions: list[Any], **kwargs: Any) -> list[float]:
        # Of a conversation it gives the messages that were added.
        said = [one if isinstance(one, str) else one[-1]["content"] for one in completions]
        return [reward(text) for text in said]

    rows = len(texts) * group
    arguments = GRPOConfig(
        **common(folder, micro_batch=micro_batch, accumulate=rows // micro_batch) | settings,
        max_completion_length=MAX_NEW_TOKENS,
        num_generations=group,
        temperature=1.0,
        top_k=0,
        beta=0.0,
        num_iterations=1,
        shuffle_dataset=False,
    )
    trainer = GRPOTrainer(
        model=load(policy, dtype),
        reward_funcs=rewards,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=AutoTokenizer.from_pretrained(policy),
    )
    return Stepper(trainer, last_batch)


def supervised(
    start: Path,
    prompts: list[list[int]],
    responses: list[list[int]],
    folder: Path,
    *,
    micro_batch: int,
    batch: int,
    **settings: Any,
) -> Stepper:
    """TRL's SFTTrainer on token ids, loss on the responses, rows in the order given.

    `settings` are further fields of SFTConfig. The data are one batch, so every step is the same.
    """
    from trl import SFTConfig, SFTTrainer

    rows = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
    masks = [[0] * len(p) + [1] * len(r) for p, r in zip(prompts, responses, strict=True)]
    arguments = SFTConfig(
        **common(folder, micro_batch=micro_batch, accumulate=batch // micro_batch),
        **{"max_length": None, "dataset_num_proc": None} | settings,
    )
    trainer = SFTTrainer(
        model=load(start),
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": rows, "completion_mask": masks}),
        processing_class=AutoTokenizer.from_pretrained(start),
    )
    tokens = sum(map(len, rows))
    return Stepper(trainer, lambda _: Work(tokens=tokens))


def preference(
    start: Path,
    prompts: list[list[int]],
    chosen: list[list[int]],
    rejected: list[list[int]],
    folder: Path,
    *,
    micro_batch: int,
) -> Stepper:
    """TRL's DPOTrainer, sigmoid loss, the reference's log-probs computed before the training.

    A step counts the prompt once per response, and the responses.
    """
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(
        **common(folder, micro_batch=micro_batch, accumulate=len(prompts) // micro_batch),
        max_length=None,
        beta=0.1,
        precompute_ref_log_probs=True,
    )
    # The trainer itself adds the end token.
    data = {
        "prompt": [text_of(row) + " " for row in prompts],
        "chosen": [text_of(row[:-1]) for row in chosen],
        "rejected": [text_of(row[:-1]) for row in rejected],
    }
    trainer = DPOTrainer(
        model=load(start),
        args=arguments,
        train_dataset=Dataset.from_dict(data),
        processing_class=AutoTokenizer.from_pretrained(start),
    )
    seen = [row[name] for name in ("chosen_ids", "rejected_ids") for row in trainer.train_dataset]
    if sorted(map(len, seen)) != sorted(map(len, (*chosen, *rejected))):
        raise RuntimeError("DPOTrainer reads other tokens than it was given")
    tokens = 2 * sum(map(len, prompts)) + sum(map(len, seen))
    return Stepper(trainer, lambda _: Work(tokens=tokens))
