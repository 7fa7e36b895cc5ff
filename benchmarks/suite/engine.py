"""Whole commands, each in a new process: a cached recipe of 60 stages, and `mopd` from nothing."""

from __future__ import annotations

from many_stages import measure as measure_many_stages
from mopd import measure as measure_mopd
from suite.measure import Options, say
from suite.rows import Row, alone, not_measured

CACHED_SECONDS = 1.5
MOPD_SECONDS = 240.0


def run(options: Options) -> list[Row]:
    """The 60 stages, made once and then run again and again; one run of `mopd`."""
    return [cached(options), mopd(options)]


def cached(options: Options) -> Row:
    """Seconds of the second and later runs."""
    say("60 stages from an empty store, then the same command again")
    found = measure_many_stages(options.repetitions)
    again = found["commands"]["run"]["seconds"]
    if not found["cached_again"]:
        raise RuntimeError("the second run of the 60 stages was not all cached")
    return alone(
        f"second run of a recipe of {found['num_stages']} stages, all cached",
        "s",
        again,
        target=CACHED_SECONDS,
        note=f"the first run took {found['first_seconds']} s",
    )


def mopd(options: Options) -> Row:
    """Seconds from an empty store, one run."""
    path = "posttrain run mopd from an empty store"
    if options.quick:
        return not_measured(path, "s", "takes minutes", sense="<=", target=MOPD_SECONDS)
    say("mopd, seed 0, from an empty store")
    found = measure_mopd(0, "short")
    norm = found["evaluation"]["norm"]
    return alone(
        path,
        "s",
        [found["seconds"]],
        target=MOPD_SECONDS,
        note=f"seed 0, mean recovery {norm:.2f}; mopd.py has several seeds",
        details={"stages": found["stages"], "evaluation": found["evaluation"]},
    )
