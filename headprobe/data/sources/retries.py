"""Waiting for a hub that is overloaded or away: only so long, with one line to the user, then one clear error.

`huggingface_hub` alone waits as long as a Retry-After header says (an hour, five times over), for ever where a request
has no time limit, and not at all for the requests that open a dataset; `datasets` adds rounds of its own. So dataset
requests are repeated here, below both, and our error passes through both. Nothing else of the client changes, and
requests for models stay as they are.
"""

import logging
import multiprocessing
import re
import time
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from importlib import import_module
from random import SystemRandom
from typing import Any
from urllib.parse import unquote

import datasets
from huggingface_hub import get_session, set_client_factory

from headprobe.errors import RunError

OPENING = 30.0  # seconds to wait for a hub that cannot be reached at all, before anything was read from it


# Seconds to wait in the middle of a run, and for a hub that answers "later"; the hub's own limits count 5 minutes.
READING = 600.0
ANSWER = 30.0  # seconds to wait for one answer, where the client itself would wait for 100 or for ever
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between tries, doubled each time
QUIET = 60.0  # seconds after an outage in which another one counts as the same, and gets no line of its own
RETRIED = frozenset({408, 429, 500, 502, 503, 504})  # status codes
READ_RETRIES = 4  # rounds of datasets' own, for connections that break within a file that is read in one go
AGAIN = "run the same command again to resume"

_log = logging.getLogger(__name__)
_dice = SystemRandom()  # spreads the tries of many processes, and leaves the run's own random numbers as they are


class Waiting:
    """How long this process waits for the hub, and whether it has stopped waiting.

    Attributes:
        unreachable: Seconds to wait for a hub that cannot be reached.
        final_error: The error to end with, once waiting was in vain.
        quiet_until: Time until which no line is due. Forked DataLoader workers share it, so that they print one line
            together.
        installed: Whether the hub's client repeats requests.
    """

    def __init__(self) -> None:
        self.unreachable = OPENING
        self.final_error: RunError | None = None
        self.quiet_until: Any = None
        self.installed = False


_waiting = Waiting()


def limit_waits(reading: bool) -> None:
    """Bound the waits of this process from here on; every process that opens or reads a hub dataset must call it.

    Args:
        reading: Whether files are read, which waits out longer outages than the opening of a dataset.
    """
    _waiting.unreachable = READING if reading else OPENING
    _waiting.final_error = None
    if not _waiting.installed:
        _install()


def final_error() -> RunError | None:
    """Return the error with which waiting ended; libraries in between may have replaced it by one of theirs."""
    return _waiting.final_error


def _install() -> None:
    client = get_session()
    library = type(client).__module__.split(".")[0]
    _waiting.installed = True
    _waiting.quiet_until = multiprocessing.Value("d", 0.0)

    for name in ("STREAMING_READ_MAX_RETRIES", "STREAMING_OPEN_MAX_RETRIES"):
        setattr(datasets.config, name, min(getattr(datasets.config, name), READ_RETRIES))
    logging.getLogger("datasets.utils.file_utils").addFilter(_one_line)

    if library not in ("httpx", "httpx2"):  # somebody who set a client of their own wants that one
        return
    # The module is huggingface_hub's choice, and changed with its releases.
    library_errors: Any = import_module(library)
    errors = (library_errors.TimeoutException, library_errors.NetworkError, library_errors.RemoteProtocolError)
    set_client_factory(partial(_client, type(client), client.event_hooks, errors))


def _client(kind: Any, hooks: Any, errors: tuple[type[Exception], ...]) -> Any:
    client = kind(event_hooks=hooks, follow_redirects=True, timeout=None)
    client.send = partial(_send, client.send, errors)
    return client


def _send(send: Callable[..., Any], errors: tuple[type[Exception], ...], request: Any, **options: Any) -> Any:
    """Send a request until the hub answers it, or until waiting has lasted too long.

    Raises:
        RunError: The hub stayed away or overloaded.
    """
    name = _wanted(request.url.path)
    if name is None:
        return send(request, **options)
    if _waiting.final_error is not None:  # some callers try once more whatever the error was
        raise _waiting.final_error

    limits = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {kind: min(limit or ANSWER, ANSWER) for kind, limit in limits.items()}
    tries = _Tries(name)
    while True:
        try:
            response = send(request, **options)
        except errors as error:
            tries.pause(_reason(error), _waiting.unreachable, None)
            continue
        if response.status_code not in RETRIED:
            tries.end()
            return response
        response.close()
        phrase = HTTPStatus(response.status_code).phrase.lower()
        tries.pause(f"answers {response.status_code} ({phrase})", READING, _retry_after(response.headers))


class _Tries:
    """The tries of one request.

    Args:
        name: The dataset or file that is wanted, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._began: float | None = None  # time of the first failure
        self._pause = FIRST_PAUSE

    def pause(self, reason: str, limit: float, retry_after: float | None) -> None:
        """Pause before the next try.

        Args:
            reason: What the hub did.
            limit: Seconds that all tries may take together.
            retry_after: Seconds that the hub asks to wait; None for a pause that is a little longer each time.

        Raises:
            RunError: There is no time left for another try.
        """
        now = time.monotonic()
        self._began = now if self._began is None else self._began
        left = self._began + limit - now
        if left <= 0 or (retry_after is not None and retry_after > left):
            _waiting.final_error = RunError(self._in_vain(reason, now, retry_after))
            raise _waiting.final_error

        self._announce(reason, left, now)
        time.sleep(min(left, self._pause * _dice.uniform(0.75, 1) if retry_after is None else retry_after))
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def end(self) -> None:
        """Let the next outage have its own line, if it comes later than `QUIET` seconds."""
        if self._began is not None:
            _waiting.quiet_until.value = min(_waiting.quiet_until.value, time.monotonic() + QUIET)

    def _in_vain(self, reason: str, now: float, retry_after: float | None) -> str:
        trouble = f"{self._name} cannot be read: the hub {reason}"
        if retry_after is not None:
            until = f"wait until {_clock(retry_after)}, then {AGAIN}"
            return f"{trouble} and asks to wait for {_in_words(retry_after)}: {until}"
        waited = _in_words(now - (self._began or now))
        return f"{trouble}, after {waited} of trying: check the network or wait a little, then {AGAIN}"

    def _announce(self, reason: str, left: float, now: float) -> None:
        if _claim_line(now, now + left):
            until = f"for up to {_in_words(left)}, until {_clock(left)}"
            _log.warning("headprobe: the hub %s for %s: trying again %s", reason, self._name, until)


def _claim_line(now: float, until: float) -> bool:
    """Claim the one line of an outage: return whether this process may print it, which no other may before `until`."""
    lock = _waiting.quiet_until.get_lock()
    if not lock.acquire(block=False):  # another process is printing it
        return False
    try:
        mine = bool(_waiting.quiet_until.value <= now)
        if mine:
            _waiting.quiet_until.value = until
        return mine
    finally:
        lock.release()


def _one_line(record: logging.LogRecord) -> bool:
    """Replace what `datasets` logs at each of its own tries by our one line."""
    if "Retrying in" not in record.getMessage():
        return True
    now, left = time.monotonic(), READ_RETRIES * 60.0
    record.msg = f"headprobe: the hub broke the connection: trying again for up to {_in_words(left)}"
    record.args = None
    return _claim_line(now, now + left)


def _wanted(path: str) -> str | None:
    """Return the dataset or the file of it that a request is for, None if it is for something else."""
    found = re.search(r"/datasets/(.+?)/resolve/[^/]+/(.+)|/api/datasets/([^/]+/[^/]+|[^/]+)", path)
    name = unquote(found.group(2) or found.group(3)) if found else ""
    return "".join(letter for letter in name if letter.isprintable()) or None


def _reason(error: Exception) -> str:
    kind = type(error).__name__
    if kind.startswith("Connect"):
        return "cannot be reached"
    return "does not answer" if kind.endswith("Timeout") else "breaks the connection"


def _retry_after(headers: Any) -> float | None:
    """Return the seconds that the hub asks to wait; a date instead of seconds counts as none, as in its own client."""
    limit = re.search(r"r\s*=\s*0\s*;\s*t\s*=\s*(\d+)", headers.get("ratelimit", ""))
    text = limit.group(1) if limit else headers.get("retry-after", "").strip()
    return float(text) + 1 if text.isdecimal() else None  # 1 more, against rounding


def _in_words(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes"


def _clock(seconds: float) -> str:
    """Return the time of day in so many seconds."""
    return time.strftime("%H:%M", time.localtime(time.time() + seconds))
