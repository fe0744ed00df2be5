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


# seconds to wait in the middle of a run, and for a hub that answers "later"; its own limits count 5 minutes
READING = 600.0


ANSWER = 30.0  # seconds to wait for one answer, where the client itself would wait for 100 or for ever


FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between tries, doubled each time


QUIET = 60.0  # an outage that begins so soon after the last one ended is the same one to the user


RETRIED = frozenset({408, 429, 500, 502, 503, 504})


READ_RETRIES = 4  # rounds of datasets' own, for connections that break within a file that is read in one go


AGAIN = "run the same command again to resume"


_log = logging.getLogger(__name__)


_dice = SystemRandom()  # tries of many processes spread out, and the run's own random numbers stay as they are


class Patience:
    """How long this process waits, and whether it has given up.

    Attributes:
        away: Seconds to wait for a hub that cannot be reached.
        gave_up: The error to end with, once waiting was in vain.
    """

    def __init__(self) -> None:
        self.away = OPENING
        self.gave_up: RunError | None = None
        # Until when nothing is to be said. Forked DataLoader workers share it, so that one line is one line.
        self.quiet: Any = None
        self.installed = False


_patience = Patience()


def be_patient(reading: bool) -> None:
    """Bound the waits of this process from here on; called in every process that opens or reads a hub dataset.

    Args:
        reading: Whether files are read, which waits out longer outages than the opening of a dataset.
    """
    _patience.away = READING if reading else OPENING
    _patience.gave_up = None
    if not _patience.installed:
        _install()


def gave_up() -> RunError | None:
    """Return the error with which waiting ended, which libraries in between may have replaced by one of theirs."""
    return _patience.gave_up


def _install() -> None:
    client = get_session()
    library = type(client).__module__.split(".")[0]
    _patience.installed = True
    _patience.quiet = multiprocessing.Value("d", 0.0)
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
    """Send a request until it is answered, or until patience ends.

    Raises:
        RunError: The hub stayed away or overloaded.
    """
    name = _wanted(request.url.path)
    if name is None:
        return send(request, **options)
    if _patience.gave_up is not None:  # some callers try once more whatever the error was
        raise _patience.gave_up
    limits = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {kind: min(limit or ANSWER, ANSWER) for kind, limit in limits.items()}
    wait = _Wait(name)
    while True:
        try:
            response = send(request, **options)
        except errors as error:
            wait.once_more(_reason(error), _patience.away, None)
            continue
        if response.status_code not in RETRIED:
            wait.over()
            return response
        response.close()
        phrase = HTTPStatus(response.status_code).phrase.lower()
        asked = _seconds_asked(response.headers)
        wait.once_more(f"answers {response.status_code} ({phrase})", READING, asked)


class _Wait:
    """The tries of one request."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._began: float | None = None
        self._pause = FIRST_PAUSE

    def once_more(self, reason: str, patience: float, asked: float | None) -> None:
        """Pause before the next try, as long as the hub asks or a little longer each time.

        Raises:
            RunError: There is no time left for another try.
        """
        now = time.monotonic()
        self._began = now if self._began is None else self._began
        left = self._began + patience - now
        if left <= 0 or (asked is not None and asked > left):
            _patience.gave_up = RunError(self._in_vain(reason, now, asked))
            raise _patience.gave_up
        self._say(reason, left, now)
        time.sleep(min(left, self._pause * _dice.uniform(0.75, 1) if asked is None else asked))
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def over(self) -> None:
        """Let the next outage be announced."""
        if self._began is not None:
            _patience.quiet.value = min(_patience.quiet.value, time.monotonic() + QUIET)

    def _in_vain(self, reason: str, now: float, asked: float | None) -> str:
        trouble = f"{self._name} cannot be read: the hub {reason}"
        if asked is not None:
            return f"{trouble} and asks to wait for {_in_words(asked)}: wait until {_clock(asked)}, then {AGAIN}"
        waited = _in_words(now - (self._began or now))
        return f"{trouble}, after {waited} of trying: check the network or wait a little, then {AGAIN}"

    def _say(self, reason: str, left: float, now: float) -> None:
        if _may_speak(now, now + left):
            until = f"for up to {_in_words(left)}, until {_clock(left)}"
            _log.warning("headprobe: the hub %s for %s: trying again %s", reason, self._name, until)


def _may_speak(now: float, until: float) -> bool:
    """Claim the line of this outage for this process."""
    lock = _patience.quiet.get_lock()
    if not lock.acquire(block=False):  # another one speaks right now
        return False
    try:
        mine = bool(_patience.quiet.value <= now)
        if mine:
            _patience.quiet.value = until
        return mine
    finally:
        lock.release()


def _one_line(record: logging.LogRecord) -> bool:
    """Replace what datasets says at each of its own tries."""
    if "Retrying in" not in record.getMessage():
        return True
    now, left = time.monotonic(), READ_RETRIES * 60.0
    record.msg = f"headprobe: the hub broke the connection: trying again for up to {_in_words(left)}"
    record.args = None
    return _may_speak(now, now + left)


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


def _seconds_asked(headers: Any) -> float | None:
    """Read how long the hub asks to wait; a date instead of seconds is not understood, as in its own client."""
    limit = re.search(r"r\s*=\s*0\s*;\s*t\s*=\s*(\d+)", headers.get("ratelimit", ""))
    text = limit.group(1) if limit else headers.get("retry-after", "").strip()
    return float(text) + 1 if text.isdecimal() else None  # 1 more, against rounding


def _in_words(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes"


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M", time.localtime(time.time() + seconds))
