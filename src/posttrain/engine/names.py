"""What artifacts are called now, where a later run calls them otherwise than the one that made
them.

    {"format": 1, "names": {fingerprint: [name, ...]}}

A name is not identity, so a renamed stage is found in the store under its old name. Each run leaves
here what its recipe calls the artifacts that it finds: of each all names, the newest last, the one
in its record first. Only those are in the file that have had more than one. Several processes may
share it; a name that gets lost, because two wrote at once, is there again after the next run. A
damaged file counts as empty.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeVar

from posttrain.engine.atomic import remembered, write_whole
from posttrain.engine.record import SHORT, Record, Recorded

NAMES: Final = "names.json"
_FORMAT: Final = 1

R = TypeVar("R", bound=Recorded)


class Names:
    """The names in one file of a store, read when they are first needed."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @cached_property
    def _known(self) -> dict[str, list[str]]:
        return _read(self._path)

    @cached_property
    def _short(self) -> dict[str, list[str]]:
        return {fingerprint[:SHORT]: names for fingerprint, names in self._known.items()}

    def all_of(self, fingerprint: str, recorded: str) -> list[str]:
        """All names of an artifact, the newest last; `recorded` is that in its record. Of the
        fingerprint the first 12 digits are enough."""
        return self._short.get(fingerprint[:SHORT], [recorded])

    def now(self, fingerprint: str, recorded: str) -> str:
        """What the newest run that met an artifact calls it."""
        return self.all_of(fingerprint, recorded)[-1]

    def rename(self, record: Mapping[str, Any]) -> Record:
        """The record as it is to be shown: with the newest names, of its inputs and ancestors too.

        It is no longer what its digest is of.
        """
        return {
            **record,
            "name": self.now(record["fingerprint"], record["name"]),
            "inputs": {
                edge: {**source, "name": self.now(source["fingerprint"], source["name"])}
                for edge, source in record["inputs"].items()
            },
            "history": [self.rename(one) for one in record["history"]],
        }

    def current(self, shown: R) -> R:
        """An artifact, or what else has a record, with the newest names in its record."""
        return replace(shown, record=self.rename(shown.record))

    def remember(self, found: Iterable[tuple[str, str, str]]) -> None:
        """Take in what a run calls artifacts that are in the store already: (fingerprint, name in
        the record, name in the run) of each. Where it has two names for one, an old one stays."""
        self._forget()
        known = dict(self._known)
        asked: dict[str, list[str]] = {}
        for fingerprint, recorded, name in found:
            known.setdefault(fingerprint, [recorded])
            asked.setdefault(fingerprint, []).append(name)
        for fingerprint, names in asked.items():
            newest = known[fingerprint][-1]
            # The newest comes last; a name that the run does not use is older than those it does.
            used = [name for name in names if name != newest]
            used += [newest] if newest in names else []
            older = [name for name in known[fingerprint] if name not in used]
            known[fingerprint] = list(dict.fromkeys([*older, *used]))
        self._write({fp: names for fp, names in known.items() if len(names) > 1})

    def keep(self, fingerprints: Collection[str]) -> None:
        """Forget all others; the first 12 digits of each are enough."""
        self._forget()
        kept = {fingerprint[:SHORT] for fingerprint in fingerprints}
        self._write({fp: names for fp, names in self._known.items() if fp[:SHORT] in kept})

    def _forget(self) -> None:
        # Another process may have written it in the meantime.
        for attribute in ("_known", "_short"):
            self.__dict__.pop(attribute, None)

    def _write(self, known: Mapping[str, list[str]]) -> None:
        """Put this into the file where it says something else; does nothing where that is not
        possible: names are for people alone."""
        if known == self._known:
            return
        content = json.dumps({"format": _FORMAT, "names": known}, indent=1, sort_keys=True)
        try:
            write_whole(self._path, content.encode("ascii"))
        except OSError:
            return
        self._forget()


def _read(path: Path) -> dict[str, list[str]]:
    """What is in the file; nothing where it is missing, damaged or of another format."""
    content = remembered(path)
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        return {}
    names = content.get("names")
    if not isinstance(names, dict) or not all(map(_is_whole, names.values())):
        return {}
    return names


def _is_whole(names: Any) -> bool:
    return isinstance(names, list) and bool(names) and all(isinstance(n, str) for n in names)
