"""The command line: dispatches on its first word and turns errors into one message and an exit code.

Nothing heavy is imported before the word is known: `--help` answers at once.
"""

import gc
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import TextIO

from headprobe import __version__
from headprobe.commands.help import SCREENS
from headprobe.errors import HeadprobeWarning, RunError, UsageError, was_interrupted

HELP = """\
usage: headprobe COMMAND [OPTIONS]      (python -m headprobe is the same)

What does each attention head do? Mask heads of any timm vision transformer and measure what the model loses.

commands:
  study    answer the question for a model in one run: all kinds of masks, ablations and statistics, and a page of them
  report   make that page again, or of any other runs, several side by side
  compare  the same masks in several runs, on other data or weights: drops side by side, ranks, which masks differ
  test     score a model with and without chosen heads, on the same images, in one pass
  prune    remove heads for good: a smaller model with the masked model's logits
  masks    print which heads a mask spec stands for, without running anything
  check    prove, layer by layer, that masks take effect on a model
  models   list timm's architectures with heads, and which statistics each has
  status   show how far a run is: units done, images a second, time left
  convert  turn a checkpoint of a training program into safetensors for --model.weights
  fit      train the bundled model again from nothing, or a model further without some of its heads

examples:
  headprobe study                                         the bundled model and images, offline, in minutes
  headprobe study --model.name vit_base_patch16_224 --data.path PATH --data.max_images 500 --dry-run
  headprobe report lightning_logs/version_0 lightning_logs/version_1
  headprobe compare lightning_logs/version_0 lightning_logs/version_1
  headprobe test --mask-spec layer:3                      the bundled model and images, offline
  headprobe test --config configs/imagenet_vit_base.yaml --mask-spec each:layer
  headprobe test --model.name deit_tiny_patch16_224 --data.path PATH --mask-spec each:head --dry-run
  headprobe prune --mask-spec layer:3+random:6 --ablation linear --output small
  headprobe masks random:0-36/6:0-4 --model.name deit_tiny_patch16_224
  headprobe check swin_tiny_patch4_window7_224
  headprobe status lightning_logs/version_0
  headprobe convert model_best.pth.tar my_model.safetensors

mask specs: none  all  layer:3  layer:0-5  index:2  head:3.1  random:24:SEED  one-per-layer:SEED  file:mask.json
            keep:SPEC  each:layer  each:index  each:head  each:pair  subsets:layer  random:0-36/6:0-4
            grow:random:SEEDS  grow:PATH:COLUMN  and several of them joined with +

headprobe COMMAND --help shows a command's options. Exit codes: 0 done, 1 failed run, 2 usage, 130 interrupted.
"""


BROKEN_PIPE = 141
"""The exit code by which shells know a program whose reader has gone: 128 and the number of SIGPIPE."""

INTERRUPTED = "interrupted; finished results are complete, and a test is resumed by the same command"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: The words after the program's name; those of the command line if None.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = words[0] if words else "--help"
    if command in ("-h", "--help", "help"):
        sys.stdout.write(HELP)
        return 0
    if command in ("-V", "--version"):
        sys.stdout.write(f"headprobe {__version__}\n")
        return 0
    if command in _LIGHTNING and {"-h", "--help"} & set(words):
        sys.stdout.write(SCREENS[command])
        return 0
    if command not in _COMMANDS:
        known = ", ".join(_COMMANDS)
        return _fail(f"the first word must be a command ({known}); options come after it, got {command!r}", code=2)
    try:
        with _plain_warnings():
            _run(command, words, given=arguments is not None)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        return BROKEN_PIPE
    except UsageError as error:
        return _fail(str(error), code=2)
    except RunError as error:
        return _fail(str(error), code=1)
    except (KeyboardInterrupt, RuntimeError) as error:
        if not was_interrupted(error):
            raise
        return _fail(INTERRUPTED, code=130)
    except SystemExit as stop:
        # Lightning ends an interrupted process with code 1 and no message.
        if was_interrupted(stop):
            return _fail(INTERRUPTED, code=130)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def _reader_has_gone() -> bool:
    """Return whether nobody reads the output any more, such as `head`, which has enough; then the rest goes nowhere."""
    try:
        sys.stdout.write("\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes the rest when it ends
        return True
    return False


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Print headprobe's own warnings as one line, without the file and the line of code that they came from."""
    usual = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, HeadprobeWarning):
            sys.stderr.write(f"headprobe: {message}\n")
        else:
            usual(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = usual


_COMMANDS = {
    "study": "study",
    "report": "report",
    "compare": "compare",
    "test": "test_and_fit",
    "fit": "test_and_fit",
    "prune": "prune",
    "masks": "masks",
    "check": "check",
    "models": "models",
    "status": "status",
    "convert": "convert",
}
"""The module of `headprobe.commands` behind each command."""

_LIGHTNING = ("test", "fit", "study", "prune")
"""Commands with a parser of Lightning's, which takes the command's word too, and reads `sys.argv` by itself."""


def _run(command: str, words: list[str], given: bool) -> None:
    """Import a command and run it.

    Args:
        command: Its word.
        words: All words, the command first.
        given: The words were given by a caller, not by the command line.
    """
    name = f"headprobe.commands.{_COMMANDS[command]}"
    if given:
        module = import_module(name)
    else:
        module = _import_alone(name)
        keep_freed_memory()
    if command not in _LIGHTNING:
        module.run(words[1:])
    elif help_options := [word for word in words if word in ("--help-trainer", "--help-all")]:
        module.print_options(command, everything=help_options[0] == "--help-all")
    else:
        module.run(words if given else None)


def _import_alone(name: str) -> ModuleType:
    """Import a command into a process that does nothing else, without searching for garbage on the way.

    torch, timm and lightning make a million objects that stay. To search them while they are made, and once more as the
    process ends, takes as long as half of the imports.
    """
    gc.disable()
    module = import_module(name)
    gc.freeze()
    gc.enable()
    return module


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's <malloc.h>
LARGEST_KEPT = 32 << 20
"""Bytes of a block that glibc keeps, at most: it takes no more."""
MOST_KEPT = 128 << 20
"""Bytes at the end of its memory that nobody uses."""


def keep_freed_memory() -> None:
    """Have glibc keep the memory that tensors give back for those that come next.

    It returns blocks as large as the activations of a small model to the system, and each layer takes them anew, page
    by page: a tenth of a run without masks on a CPU. Who has set malloc's variables knows better.
    """
    if any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        return
    import ctypes  # not at module level: `--help` needs none of it

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # musl has none
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        mallopt(M_TRIM_THRESHOLD, MOST_KEPT)


SECONDS_FOR_THE_FIRST = 5.0


def _fail(message: str, code: int) -> int:
    """Print the message, once and not once per process, and return the exit code."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        from headprobe.text import without_secrets  # not at module level: `--help` needs none of it

        sys.stderr.write(f"headprobe: error: {without_secrets(message)}\n")
    else:
        time.sleep(SECONDS_FOR_THE_FIRST)  # torchrun ends all when one ends: the first process must have printed
    return code
