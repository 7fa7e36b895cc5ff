"""What a run tells about its stages, as it happens."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

EventKind: TypeAlias = Literal[
    "started", "progress", "finished", "cached", "failed", "blocked", "waits"
]


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a stage.

    Payload by kind: started {"reason", "threads", "log"}; progress: one line of metrics.jsonl as it
    is, or {"waiting": why} while another run works on that stage; finished {"metrics", "path"};
    cached {"path", "reason"}; failed {"error", "log"}; blocked {"reason"};
    waits {"reason"}: it ended, and goes on in a later run when a file has been filled in.
    """

    kind: EventKind
    name: str
    seconds: float = 0.0
    """Since the stage started in this run."""
    payload: Mapping[str, Any] = field(default_factory=dict)
