"""Datasets streamed from the Hugging Face hub, and the message with the remedy where the hub refuses."""

import re
from collections.abc import Iterator, Sequence
from itertools import chain

import datasets
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError

from headprobe.data.sources.footer import check_one_schema, plan_units, read_footer
from headprobe.data.sources.retries import AGAIN, final_error, limit_waits
from headprobe.data.sources.source import (
    Chunk,
    Request,
    Source,
    UnitRule,
    check_inside,
    choose_split,
    file_name,
    outside,
    safe_text,
)
from headprobe.data.sources.streamed import StreamedSource
from headprobe.errors import RunError, UsageError

# HfHubHTTPError is an OSError in recent releases of huggingface_hub only.
HUB_ERRORS = (DatasetsError, HfHubHTTPError, OSError, ValueError, RuntimeError)


class HubSource(StreamedSource):
    """A dataset on the hub: reading waits for the hub, within bounds."""

    def chunks(self, unit: int, rows: int) -> Iterator[Chunk]:
        """Read a unit from its first row, `rows` rows at a time.

        Raises:
            RunError: The unit cannot be read.
        """
        limit_waits(reading=True)
        yield from super().chunks(unit, rows)

    def explain_read(self, error: Exception, unit: int) -> RunError:
        """Return the message, with the remedy, for an error in the middle of a unit."""
        trouble = f"{self.unit_name(unit)} (unit {unit}) cannot be read: {safe_text(error)}"
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
        if status in (401, 403):
            remedy = "Check the login (`hf auth login` or HF_TOKEN) and the terms on the dataset's page"
        elif status == 404:
            remedy = "Set --data.revision to a commit that has the file"
        else:
            remedy = "Mend the file or the network"
        return final_error() or RunError(f"{trouble}. {remedy}, then {AGAIN}")


def open_hub(request: Request) -> Source:
    """Open a hub dataset; a handful of requests, no image is read.

    Raises:
        UsageError: It does not exist, needs a login or accepted terms, or lacks the split or a column.
        RunError: The hub cannot be reached.
    """
    limit_waits(reading=False)
    try:
        builder = datasets.load_dataset_builder(request.path, request.name, revision=request.revision)
        there: dict[str, list[str]] = {}
        for name, found in (builder.config.data_files or {}).items():
            there[name] = [str(file) for file in found]
        check_inside(list(chain.from_iterable(there.values())), f"hf://datasets/{request.path}@", request.path)
        streams = builder.as_streaming_dataset()
    except UsageError:
        raise
    except RunError as error:
        raise (error if final_error() is None else _not_here(request, error)) from None
    except HUB_ERRORS as error:
        if is_offline(error):
            from headprobe.data.sources.hub_cache import open_snapshot

            if (source := open_snapshot(request)) is not None:
                return source
        ended = final_error()
        raise (explain(error, request) if ended is None else _not_here(request, ended)) from None

    split = choose_split(request.split, [str(name) for name in streams], request.path)
    known = (builder.info.splits or {}).get(split)
    images = (known.num_examples or None) if known else None
    source = _cut(streams[split], split, there.get(split, []), images, request)
    if not there:  # what load_dataset stored before, where the hub is not to be reached
        from headprobe.data.sources.hub_cache import mark_cached

        mark_cached(source, request, builder.cache_dir, builder.config.name)
    return source


def _not_here(request: Request, ended: RunError) -> RunError:
    """Return the error of a hub that stayed away: whoever mistyped a folder must not look for the fault there."""
    return RunError(f"{request.path} is no file or folder here, and is looked for on the hub: {ended}")


def _cut(
    stream: datasets.IterableDataset, split: str, files: Sequence[str], images: int | None, request: Request
) -> Source:
    """Cut a split into units: files, or row groups of Parquet files.

    Args:
        stream: The split.
        split: Its name.
        files: Addresses of its files.
        images: Rows in all of them, None where the dataset does not say.
        request: What the user wants to open.
    """
    rule: UnitRule = "file" if request.unit == "auto" else request.unit
    parquet = bool(files) and all(file.endswith(".parquet") for file in files)
    names = [file_name(file) for file in files]
    sizes = None
    if rule == "row_group" and not parquet:
        raise UsageError(
            f"--data.unit must be file or auto: {request.path} is not made of Parquet files, got row_group"
        )
    if parquet and (rule == "row_group" or request.sizes):
        footers = [read_footer(file) for file in files]
        check_one_schema(footers, request)
        names, sizes = plan_units(footers, rule)

    try:
        stream = stream.reshard() if rule == "row_group" else stream
    except HUB_ERRORS as error:
        raise final_error() or explain(error, request) from None
    if len(names) != stream.num_shards:  # archives can hold several shards, or be one shard together
        names = [f"{request.path} {split} shard {index}" for index in range(stream.num_shards)]

    identity = {
        "split": split,
        "revision": commit(files) or request.revision,
        "unit": rule,
        "files": [{"name": file_name(file)} for file in files],
    }
    return HubSource(stream, names, sizes, images, request, identity)


def commit(files: Sequence[str]) -> str | None:
    """Return the commit that `hf://datasets/owner/name@commit/...` addresses were resolved to, if it is in them."""
    found = re.search(r"@([0-9a-f]{40})/", files[0]) if files else None
    return found.group(1) if found else None


def is_offline(error: Exception) -> bool:
    """Return whether the client did not even try, because HF_HUB_OFFLINE is set."""
    text = str(error)
    return "OfflineModeIsEnabled" in text or "ffline mode" in text


def explain(error: Exception, request: Request) -> UsageError | RunError:
    """Return the message, with the remedy, for an error of the hub's client.

    The client raises the same class, without a cause, for a missing login, terms not accepted and a missing dataset:
    only its text distinguishes them.
    """
    text = safe_text(error)
    path = request.path
    page = f"https://huggingface.co/datasets/{path}"
    if "must be authenticated" in text:
        return UsageError(
            f"{path} is gated: log in with `hf auth login` (or set HF_TOKEN) and accept the terms at {page}, "
            "or give --data.path a local copy"
        )
    if "is a gated dataset" in text or "ask for access" in text:
        return UsageError(
            f"{path} is gated and this account has no access yet: accept the terms at {page} and run again"
        )
    if "doesn't exist on the Hub" in text or "cannot be accessed" in text:
        return UsageError(
            f"there is no such folder here and no such dataset on the hub (a private one needs `hf auth login` or "
            f"HF_TOKEN): check --data.path and --data.revision, got {path}"
        )
    if is_offline(error):
        return RunError(
            f"{path} is no folder here, it is not in the hub's cache on this machine, and HF_HUB_OFFLINE is set: unset "
            f"it, download it before (hf download {path} --repo-type dataset), or give --data.path a local copy (a "
            "folder of Parquet files)"
        )
    if isinstance(error, ConnectionError) or "Couldn't reach" in text:
        return RunError(
            f"{path} is no folder here, and the hub does not answer: check the network and run again, or give "
            "--data.path a local copy (a folder of Parquet files), or set HF_HUB_OFFLINE=1 if it was downloaded before"
        )
    if isinstance(error, HfHubHTTPError):
        return RunError(f"the hub refused to serve {path}: {text}. Wait a little, then {AGAIN}")
    if "cripts are no longer supported" in text:
        return UsageError(
            f"{path} is made by a script, which is never run: choose a dataset of Parquet files, or its Parquet copy "
            f"with --data.revision refs/convert/parquet, got {request.revision}"
        )
    if "don't belong to" in text:
        return outside(path)
    options = f"--data.name {request.name}, --data.revision {request.revision}"
    return UsageError(f"{path} cannot be opened: {text}. Change --data.name or --data.revision, got {options}")
