"""What runs inside a stage's process: from the engine's job to the stage's loop.

The engine knows a stage only as the function `run_job`; everything about machine learning starts
here.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from posttrain.backends.outside.adapters import base_of, is_adapter
from posttrain.engine.errors import StageError
from posttrain.engine.graph import Node
from posttrain.engine.process import Job
from posttrain.engine.record import RECORD, Record, label_of
from posttrain.engine.work import read_warnings, write_facts
from posttrain.report.card import model_card
from posttrain.report.samples import given_every
from posttrain.stages.config import build_config
from posttrain.stages.kinds import KINDS, kind_of

if TYPE_CHECKING:  # they import torch
    import torch

    from posttrain.backends.base import Backend
    from posttrain.stages.context import Context

EXECUTE = "posttrain.stages.worker:run_job"
PRELOAD = (
    *("torch", "reasoning_gym", "transformers.models.auto.modeling_auto"),
    *("transformers.models.auto.tokenization_auto", "transformers.models.qwen3.modeling_qwen3"),
    *sorted({kind.run.partition(":")[0] for kind in KINDS.values()}),
)
"""Everything heavy that stages import: the fork server imports it once for all of them."""

ADAPTERS = "peft"
"""What stages with adapters import beside that; it takes seconds."""

DEVICE, COMPILE = "POSTTRAIN_DEVICE", "POSTTRAIN_COMPILE"
"""Entries of a job's environment: the type of device that computes, the CPU without one, and, if it
is there, that the learner is to be compiled."""
BACKEND, LOCAL = "POSTTRAIN_BACKEND", "posttrain.backends.local:LocalBackend"
"""The entry that names the class of the backend, and the class without one. It is called with
`device`, `compile` and `workers` by name."""

TINY_BYTES = 16_000_000
"""Weights of about four million parameters in float32."""


def preload(nodes: Iterable[Node]) -> tuple[str, ...]:
    """What the fork server is to import for these stages."""
    adapters = any(node.config.get("lora") or "base" in node.inputs for node in nodes)
    return (*PRELOAD, ADAPTERS) if adapters else PRELOAD


def run_job(job: Job) -> dict[str, Any]:
    """Run one stage; returns its summary metrics."""
    if "import_from" in job.runtime:
        sys.path.insert(0, job.runtime["import_from"])
    # Not at the top: who starts stages imports this file, and can do without torch.
    import torch

    from posttrain.backends.device import check_precision
    from posttrain.stages.context import Context
    from posttrain.stages.out_of_memory import in_words

    environment = os.environ | job.environment
    device = torch.device(environment.get(DEVICE, "cpu"))
    if device.type == "cuda":
        # What cuBLAS needs for the same bits every time; read when it is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    check_precision(getattr(torch, job.config.get("precision", "float32")), device)
    torch.set_num_threads(useful_threads(job))
    torch.use_deterministic_algorithms(True)
    # On by default with the line above; it writes every fresh tensor once for nothing.
    torch.utils.deterministic.fill_uninitialized_memory = False
    with ExitStack() as stack:
        # Threads for what can be done beside each other, where the stage has more cores than one
        # operation uses. With no core to spare they would only take turns.
        count = job.threads // torch.get_num_threads()
        workers = None
        if count >= 2 and device.type == "cpu":
            workers = stack.enter_context(ThreadPoolExecutor(count, thread_name_prefix="work"))
        ctx = Context(
            name=job.name,
            work=Path(job.work),
            inputs=job.inputs,
            threads=job.threads,
            backend=new_backend(environment, workers=workers),
            workers=workers,
            runtime=job.runtime,
            sample_every=given_every(environment),
        )
        stack.enter_context(closing(ctx))
        try:
            metrics = run_stage(job, ctx)
            ctx.finish()
        except (RuntimeError, OSError, MemoryError) as error:
            parts = ctx.backend.parts
            told = in_words(error, stage=job.name, config=job.config, device=device, parts=parts)
            if told is None:
                raise
            raise StageError(told) from error
    write_facts(ctx.work, **ctx.facts, **used(ctx.tokens, device))
    if kind_of(job.kind).is_model():
        write_card(job, ctx.out, metrics, read_warnings(ctx.work), ctx.facts)
    return dict(metrics)


def used(tokens: int, device: torch.device) -> dict[str, float]:
    """What this stage used up: tokens that it processed, if it says, seconds of processors, and the
    most bytes of memory that it had at once, its largest child process and a CUDA device by
    themselves."""
    import torch

    own, children = (
        resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    found: dict[str, float] = {"peak_memory": own}
    spent = resource.getrusage(resource.RUSAGE_SELF)
    found["processor_seconds"] = round(spent.ru_utime + spent.ru_stime, 3)
    if children:
        found["peak_memory_of_a_child"] = children
    if device.type == "cuda":
        found["peak_memory_of_device"] = torch.cuda.max_memory_allocated(device)
    return found | ({"tokens": tokens} if tokens else {})


def new_backend(
    environment: Mapping[str, str], *, workers: ThreadPoolExecutor | None = None
) -> Backend:
    """What makes the models of a stage: the class that `environment` names, or the local one."""
    make = resolve_name(environment.get(BACKEND, LOCAL))
    device = environment.get(DEVICE, "cpu")
    backend: Backend = make(device=device, compile=COMPILE in environment, workers=workers)
    return backend


def run_stage(job: Job, ctx: Context) -> dict[str, Any]:
    """The loop of the job's kind; returns its summary metrics."""
    kind = kind_of(job.kind)
    settings = job if kind.from_outside else build_config(job.kind, job.name, job.config)
    metrics: dict[str, Any] = kind.loop()(settings, ctx)
    return metrics


def write_card(
    job: Job,
    out: Path,
    metrics: Mapping[str, Any],
    warnings: Sequence[str] = (),
    facts: Mapping[str, Any] | None = None,
) -> None:
    """README.md beside the weights; `facts` are what the stage adds to its provenance. Scores are
    not in it: they come after; an export has them."""
    inputs = {edge: _known_record(Path(path)) for edge, path in job.inputs.items()}
    made = {**vars(job), "inputs": inputs, "metrics": metrics, "warnings": warnings}
    made["provenance"] = dict(facts or {})
    if "origin" in job.runtime:
        made["provenance"]["origin"] = job.runtime["origin"]
    card = model_card(made, ancestors=_ancestors(job.inputs), adapter=is_adapter(out))
    path = out / "README.md"
    # It may be a link to a file of somebody else.
    path.unlink(missing_ok=True)
    path.write_text(card, encoding="utf-8")


def _known_record(artifact: Path) -> Record:
    """The record of an input: the store has looked at its form when the run was planned."""
    record: Record = json.loads((artifact / RECORD).read_bytes())
    return record


def _ancestors(inputs: Mapping[str, str]) -> list[Record]:
    """The records of all that the inputs descend from, as far as they lie beside them in the
    store."""
    found: dict[str, Record] = {}
    frontier = [Path(path) for path in inputs.values()]
    while frontier:
        path = frontier.pop()
        try:
            record = _known_record(path)
        except (OSError, ValueError):
            # Damaged further up: `verify` tells, and the model of this stage is as good as ever.
            continue
        if record["fingerprint"] in found:
            continue
        found[record["fingerprint"]] = record
        beside = (
            path.parents[1] / s["kind"] / label_of(s) for s in record.get("inputs", {}).values()
        )
        frontier += [place for place in beside if (place / RECORD).is_file()]
    return list(found.values())


def useful_threads(job: Job) -> int:
    """Threads for the stage's arithmetic: one for a tiny model, else all that it may have.

    Below a few million parameters a matrix product is over before a second thread has woken, and
    on a busy machine threads waiting for each other make it ten times slower. It follows from the
    stage's settings and inputs and from its share of the cores, which is fixed before the run, so
    that the numbers do not depend on what else happens to run.
    """
    if job.kind == "pretrain":
        config = job.config
        # Four projections of the attention, three of the gated MLP; then 4 bytes per weight.
        width = 4 * config["num_heads"] * config["head_dim"] + 3 * config["intermediate_size"]
        largest = 4 * config["num_layers"] * config["hidden_size"] * width
    else:
        paths = [place for path in job.inputs.values() for place in _with_base(Path(path))]
        weights = (path.glob("*.safetensors") for path in paths)
        largest = max((file.stat().st_size for files in weights for file in files), default=0)
    return 1 if largest < TINY_BYTES else job.threads


def _with_base(path: Path) -> list[Path]:
    """An input, and the base of an adapter."""
    return [path, *(_with_base(base_of(path)) if is_adapter(path) else ())]
