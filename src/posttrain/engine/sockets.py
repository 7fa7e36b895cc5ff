"""A short place for the sockets of multiprocessing.

A socket's path may have about a hundred bytes, and multiprocessing makes its own below the
temporary directory, which is often longer than that on clusters. What else is temporary stays where
`TMPDIR` says.
"""

import os
import tempfile
from collections.abc import Sequence
from multiprocessing import util
from typing import Final

from posttrain.engine.errors import ConfigError

MAX_PATH: Final = 100
"""Bytes of a socket's path: 107 on Linux, 103 on macOS."""
_OWN_PART: Final = len("/pymp-12345678/listener-12345678")
_SHORT: Final = ("/tmp", "/var/tmp", "/dev/shm")


def use_short_sockets(places: Sequence[str] = _SHORT) -> None:
    """Have multiprocessing, in this process and those it starts, put sockets into the first of
    `places` that can be written to, where the temporary directory is too long for one.

    Raises ConfigError where there is no such place.
    """
    if len(os.fsencode(tempfile.gettempdir())) + _OWN_PART <= MAX_PATH:
        return
    usable = [place for place in places if os.access(place, os.W_OK | os.X_OK)]
    if not usable:
        raise ConfigError(
            f"TMPDIR: {tempfile.gettempdir()} is too long for the path of a socket, and none of "
            f"{', '.join(places)} can be written to; set TMPDIR to a directory of at most "
            f"{MAX_PATH - _OWN_PART} bytes"
        )
    before = tempfile.tempdir
    tempfile.tempdir = usable[0]
    try:
        # It makes its directory once, and remembers it for its children too.
        util.get_temp_dir()
    finally:
        tempfile.tempdir = before
