"""Hub datasets that an earlier download left on this machine, for where the hub is not to be asked (HF_HUB_OFFLINE)."""

import re
from dataclasses import replace
from pathlib import Path

from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound

from headprobe.data.sources.source import Request, Source, some
from headprobe.data.sources.streamed import open_data_folder
from headprobe.errors import UsageError
from headprobe.text import Decision

COMMIT = re.compile(r"[0-9a-f]{40}")


def open_snapshot(request: Request) -> Source | None:
    """Open what `hf download` stored in the hub's cache; None where there is nothing of this dataset.

    Raises:
        UsageError: The wanted revision is not there, or the split or a column is not.
        RunError: A file is broken.
    """
    try:
        repositories = scan_cache_dir().repos
    except (CacheNotFound, OSError, ValueError):
        return None
    found = {
        revision.commit_hash: revision
        for repository in repositories
        if repository.repo_type == "dataset" and repository.repo_id == request.path
        for revision in repository.revisions
        if revision.files
    }
    wanted = request.revision or "main"
    commits = [commit for commit, revision in found.items() if commit == wanted or wanted in revision.refs]
    if not request.revision and not commits:
        commits = list(found)
    if not found:
        return None
    if len(commits) != 1:
        raise UsageError(
            f"the hub's cache has several or other commits of {request.path}: choose --data.revision from "
            f"{some(sorted(found))}, got {request.revision or 'none'}"
        )
    source = open_data_folder(replace(request, revision=None), Path(found[commits[0]].snapshot_path))
    source.identity["revision"] = commits[0]
    source.decisions = [*source.decisions, _from_cache(f"a download of commit {commits[0]}")]
    return source


def mark_cached(source: Source, request: Request, folder: str, configuration: str) -> None:
    """Say that `datasets` read its own cache, of which commit, and of which of the dataset's configurations.

    Raises:
        UsageError: Another revision was wanted: `datasets` takes the latest one that it has.
    """
    name = Path(folder).name
    if request.revision not in (None, "main", name):
        raise UsageError(
            f"the hub is not to be reached, and the cache of datasets on this machine has another revision of "
            f"{request.path}: leave out --data.revision for {name}, got {request.revision}"
        )
    source.identity["revision"] = name if COMMIT.fullmatch(name) else request.revision
    text = f"what load_dataset stored of commit {name}, configuration {configuration}"
    source.decisions = [*source.decisions, _from_cache(text)]


def _from_cache(what: str) -> Decision:
    return Decision("hub cache", f"the hub was not asked; {what}, is read from this machine's cache", shown=True)
