"""Results as the last commit holds them, whatever a run has since put in their place."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path


def committed_results(root: Path) -> tuple[str, dict[str, bytes]]:
    """The last commit of the checkout at `root`, and all files below results/ in it, by path relative to `root`.

    Raises `ValueError` where there is no commit, as in a copy without git.
    """
    commit = _git(root, "rev-parse", "--short", "HEAD").decode().strip()
    with tarfile.open(fileobj=io.BytesIO(_git(root, "archive", "HEAD", "results"))) as archive:
        members = [member for member in archive if member.isfile()]
        return commit, {member.name: _content(archive, member) for member in members}


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None  # as it is a file
    return file.read()


def _git(root: Path, *arguments: str) -> bytes:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=True)
    except FileNotFoundError as error:
        raise ValueError("git is not installed: what was committed cannot be read") from error
    except subprocess.CalledProcessError as error:
        message = error.stderr.decode(errors="replace").strip()
        raise ValueError(f"no committed results in {root}: {message}") from error
    return done.stdout
