"""Peak memory of one way to compute the loss, in a process of its own (Linux).

    python -m suite.loss_memory "ours" 4096 512 2048 --threads 2       # in benchmarks/

Prints one JSON object. What is measured is the process's high-water mark above what it holds after
a small warm-up with the inputs in place. The allocator is told to return every block of 128 KiB or
more at once (MALLOC_MMAP_THRESHOLD_), so that this is what is live at one time.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

THRESHOLD = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def peak_beyond_gradients(
    name: str, vocabulary: int, hidden: int, tokens: int, *, threads: int
) -> int:
    """Bytes beyond inputs and gradients, measured in a fresh process."""
    command = [sys.executable, "-m", "suite.loss_memory", name]
    command += [str(vocabulary), str(hidden), str(tokens), "--threads", str(threads)]
    done = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[1],
        env=os.environ | THRESHOLD,
    )
    return int(json.loads(done.stdout)["beyond_gradients"])


def main() -> None:
    """Measure in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method")
    parser.add_argument("sizes", type=int, nargs=3, metavar=("VOCABULARY", "HIDDEN", "TOKENS"))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()

    import torch

    from suite.loss_methods import method, problem

    torch.set_num_threads(arguments.threads)
    vocabulary, hidden, tokens = arguments.sizes
    loss = method(arguments.method)
    task = problem(vocabulary, hidden, tokens)
    task.part(1024, 16).gradients(loss)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = status("VmRSS")
    value = task.gradients(loss)
    extra = status("VmHWM") - before - task.gradient_bytes
    print(json.dumps({"beyond_gradients": extra, "loss": value}))


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    main()
