"""Links of artifacts to files outside the store: whether they still lead to the same bytes, and new
ones where those bytes are somewhere else now.

What is from outside is links to a directory of somebody else, who may move it, prune a cache or put
something else there. The record has the sha256 of every file, so the same bytes are known wherever
they turn up: in the directory that a recipe names now, or in any place that the store has met
(`hashes.json`).
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from posttrain.engine.atomic import guarded, part_of
from posttrain.engine.errors import StoreError
from posttrain.engine.hashes import FileHashes
from posttrain.engine.record import Artifact


def astray(artifact: Artifact, hashes: FileHashes) -> list[str]:
    """The files of an artifact that are links and no longer lead to the bytes of its record."""
    return [
        name
        for name in artifact.files
        if (artifact.path / name).is_symlink() and not _holds(artifact, name, hashes)
    ]


def gone(artifact: Artifact) -> list[str]:
    """Those of them that lead nowhere. Looks, reads nothing."""
    return [
        name
        for name in artifact.files
        if (artifact.path / name).is_symlink() and not os.path.exists(artifact.path / name)
    ]


def found_again(
    artifact: Artifact, names: Iterable[str], directories: Iterable[Path], hashes: FileHashes
) -> dict[str, Path]:
    """Where the bytes of these files are now, of those that are found: in `directories` under the
    same name, or where the store met them."""
    wanted = list(names)
    known = {name: hashes.places(artifact.files[name]["sha256"]) for name in wanted}
    # Small files are not remembered; they lie beside the large ones.
    beside = [path.parent for paths in known.values() for path in paths]
    places = list(dict.fromkeys([*directories, *beside]))
    found = {}
    for name in wanted:
        sha256, size = artifact.files[name]["sha256"], artifact.files[name]["bytes"]
        for path in (*(place / name for place in places), *known[name]):
            # A link of the artifact itself leads where it leads.
            aim = Path(os.path.realpath(path))
            if _is(aim, sha256, size, hashes):
                found[name] = aim
                break
    return found


def renew(root: Path, artifact: Artifact, aims: Mapping[str, Path]) -> None:
    """Point links of an artifact in the store at `root` at other files, each as a whole."""
    with guarded(root, f"renewing the links of {artifact.label}"):
        for name, aim in aims.items():
            # Not beside the link: after a kill it would be a stray file of the artifact.
            part = part_of(root / f"{artifact.label}-{PurePosixPath(name).name}")
            part.unlink(missing_ok=True)
            part.symlink_to(aim)
            os.replace(part, artifact.path / name)


def lost_text(artifact: Artifact, names: Iterable[str], called: str = "") -> str:
    """What there is to say where such files are nowhere."""
    first = min(names, key=lambda name: (name.count("/"), name))
    path = artifact.path / first
    place = path.readlink().parent if path.is_symlink() else path.parent
    name = called or artifact.name
    state = (
        "its files are no longer at" if not os.path.exists(path) else "its files have changed at"
    )
    return (
        f"{name}: {state} {place} ({first}); let the recipe, or its parameter, name the directory "
        f"where they are now, or tell it by posttrain adopt DIR --name {name}, or run again when "
        "they are back"
    )


def check_links(root: Path, artifact: Artifact, hashes: FileHashes) -> None:
    """Make sure that an artifact's links lead somewhere, for who reads its files. Looks for those
    that do not in the places that the store knows. Raises StoreError where they are nowhere."""
    lost = gone(artifact)
    if not lost:
        return
    aims = found_again(artifact, lost, (), hashes)
    left = [name for name in lost if name not in aims]
    if left:
        raise StoreError(lost_text(artifact, left))
    renew(root, artifact, aims)


def _holds(artifact: Artifact, name: str, hashes: FileHashes) -> bool:
    entry = artifact.files[name]
    return _is(artifact.path / name, entry["sha256"], entry["bytes"], hashes)


def _is(path: Path, sha256: str, size: int, hashes: FileHashes) -> bool:
    try:
        return path.is_file() and path.stat().st_size == size and hashes.digest(path) == sha256
    except OSError:
        return False
