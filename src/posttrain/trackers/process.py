"""The process of one tracker: `python -m posttrain.trackers.process module:Class NOTE`.

Standard input has one JSON object per line: what the run is, then its events. When it ends the run
has ended, or is gone, and the tracker finishes. What the library prints goes into a log; how it
failed is the last line of that.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, TextIO

from posttrain.trackers.base import About, Stage
from posttrain.trackers.feed import Feed


def main(place: str, note: Path, lines: TextIO) -> None:
    """Tell the tracker at `place` what comes in `lines`."""
    # Ctrl-C is for the run, which then ends the input: what was told before is to be kept.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tracker: Any = resolve_name(place)()
    about = json.loads(lines.readline())
    stages = [Stage(**stage) for stage in about.pop("stages")]
    feed = Feed(tracker, About(stages=stages, **about), note)
    for line in lines:
        # A run that was killed may have left half a line.
        if line.endswith("\n"):
            event = json.loads(line)
            feed.take(event["kind"], event["name"], event["seconds"], event["payload"])
    feed.close()


if __name__ == "__main__":
    try:
        main(sys.argv[1], Path(sys.argv[2]), sys.stdin)
    except Exception as error:
        print(f"\n{type(error).__name__}: {' '.join(str(error).split())}", flush=True)
        sys.exit(1)
