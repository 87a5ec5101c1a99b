"""Goes through a folder and those below it."""

import os
from collections.abc import Iterator
from typing import AnyStr


def walk(root: AnyStr) -> Iterator[tuple[os.DirEntry[AnyStr], bool]]:
    """Each entry at any depth, by name, and whether it is a folder. Links are followed, hidden folders not entered.

    A folder is entered once, whatever links lead to it, and after the other entries of the folder that it is in.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        folders: list[AnyStr] = []
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)  # if two paths lead to a folder, always use the same
        for entry in entries:
            # Of a link in a loop, is_dir() raises an error.
            is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
            if is_folder and not os.fsencode(entry.name).startswith(b"."):
                folders.append(entry.path)
            yield entry, is_folder
        waiting += reversed(folders)
