"""A progress bar over answers, with tokens a second, on standard error where that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from vmem_kv.engine.request import SequenceUpdate


class Watcher(Protocol):
    """Whoever wants to see updates as they come."""

    def see(self, update: SequenceUpdate) -> None:
        """Take note of an update."""


class _Nobody:
    def see(self, update: SequenceUpdate) -> None:
        pass


@contextmanager
def open_progress(n_answers: int, *, is_shown: bool) -> Iterator[Watcher]:
    """Draw a bar until the context ends. Not to be shown, or without a terminal, nothing is imported or drawn."""
    if not (is_shown and sys.stderr is not None and sys.stderr.isatty()):
        yield _Nobody()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    class Bar:
        def __init__(self, progress: Progress) -> None:
            self._progress = progress
            self._task = progress.add_task("Generating", total=n_answers, speed="")
            self._n_tokens = 0

        def see(self, update: SequenceUpdate) -> None:
            self._n_tokens += len(update.token_ids)
            seconds = self._progress.tasks[0].elapsed
            speed = f"{self._n_tokens / seconds:.0f} tokens/s" if seconds else ""
            self._progress.update(self._task, advance=int(update.is_finished), speed=speed)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    speed = TextColumn("{task.fields[speed]}")
    with Progress(*columns, speed, console=Console(stderr=True), transient=True) as progress:
        yield Bar(progress)
