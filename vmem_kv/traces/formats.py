"""Request traces: five public forms, recognised by their first line, read one request at a time.

    normalised     CSV with prompt_tokens and output_tokens, and arrival_s in seconds if it has arrivals;
                   prefix_hashes, if it has them, are the ids of the prompt's blocks of `# block_size: N` tokens, "a-b"
                   being a run of ids; `# key: value` lines may stand in front, other columns are passed over, except
                   that arrivals by another name are refused
    Azure          CSV with TIMESTAMP, ContextTokens, GeneratedTokens
    BurstGPT       CSV with Timestamp, Request tokens, Response tokens; rows with 0 response tokens, which is how it
                   marks a failure, are left out and counted
    Mooncake       JSON lines with timestamp (ms), input_length, output_length, and hash_ids if it has them: the ids of
                   the prompt's blocks of 512 tokens
    ShareGPT       one JSON array of conversations: text, without arrivals and without lengths

Any of them may be gzipped. Names of columns are read without regard to case, outer spaces, and whether a space or an
underscore stands between words. ShareGPT's texts are counted as one token for every `CHARACTERS_PER_TOKEN` characters:
lengths are estimates then, and `TraceSummary.note` says so. Each answer is a request, and its prompt is all that was
said before it.

Guarantees: no file is held in memory as a whole; what is no row of its form raises ConfigError with file, line and
reason (so does a row with more cells than the header, or a header that has one name twice), and nothing is passed over
silently.

Equal leading ids mean equal leading tokens. The last id of a row may stand for a block that the prompt does not fill.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from vmem_kv.errors import ConfigError
from vmem_kv.traces.conversations import read_conversations
from vmem_kv.traces.lines import Place, open_trace, read_lines

CHARACTERS_PER_TOKEN = 4
"""English text in the vocabularies of today has about so many."""

MOONCAKE_BLOCK_TOKENS = 512

MAX_TOKENS = 100_000_000
"""A longer request is taken for a mistake."""

MAX_BLOCK_TOKENS = 1 << 31
"""Tokens of blocks are numbered below this."""

_MAX_ARRIVAL_S = 1e10

_MAX_NOTE_CHARS = 200
"""Of what a file says about its arrivals."""


class Request(NamedTuple):
    """One row of a trace."""

    arrival_s: float | None  # seconds from the trace's beginning, or from any other moment; None if it has no times
    prompt_tokens: int  # at least 1
    output_tokens: int
    blocks: tuple[range, ...] = ()  # ids of the prompt's blocks from its first token on, as runs; empty if unknown

    @property
    def final_tokens(self) -> int:
        """What it holds when it ends: the last output is never written, and a prompt is held if nothing is asked."""
        return self.prompt_tokens + max(1, self.output_tokens) - 1


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """What is in a trace. Whoever holds one knows that every row was read and is sound."""

    path: Path
    form: str
    n_requests: int
    prompt_tokens: int  # sums
    output_tokens: int
    longest_tokens: int  # the greatest `Request.final_tokens`
    shortest_tokens: int  # the least
    n_arrivals: int  # rows that have one
    is_ascending: bool  # whether no request arrives before the one in front of it
    block_tokens: int  # tokens in a block of `Request.blocks`; 0 if no row has any
    arrival_note: str  # what the file itself says of its arrivals; may be empty
    note: str  # what a reader of results must know; may be empty

    @property
    def has_arrivals(self) -> bool:
        """In every row."""
        return self.n_arrivals == self.n_requests

    @property
    def mean_tokens(self) -> int:
        """Mean length of a request when it ends, at least 1."""
        return max(1, (self.prompt_tokens + self.output_tokens) // self.n_requests)


def scan_trace(path: Path, max_requests: int | None = None) -> TraceSummary:
    """Read a trace from end to end and summarise it.

    Raises:
        ConfigError: It cannot be read, a row is malformed, or it holds no request.
    """
    place = Place(path)
    n_requests = prompt_tokens = output_tokens = longest = n_arrivals = 0
    shortest = 2 * MAX_TOKENS
    is_ascending, has_blocks = True, False
    last_s = -math.inf
    with open_trace(place) as file:
        trace = _recognise(file, place)
        for request in islice(trace.requests, max_requests):
            n_requests += 1
            prompt_tokens += request.prompt_tokens
            output_tokens += request.output_tokens
            longest = max(longest, request.final_tokens)
            shortest = min(shortest, request.final_tokens)
            has_blocks = has_blocks or bool(request.blocks)
            if request.arrival_s is not None:
                n_arrivals += 1
                is_ascending = is_ascending and request.arrival_s >= last_s
                last_s = request.arrival_s
    if not n_requests:
        raise _holds_nothing(place)
    notes = []
    if trace.form == "ShareGPT":
        notes.append(f"lengths estimated, {CHARACTERS_PER_TOKEN} characters a token")
    if place.n_left_out:
        notes.append(f"{place.n_left_out:,} left out that failed (0 response tokens)")
    return TraceSummary(
        path,
        trace.form,
        n_requests,
        prompt_tokens,
        output_tokens,
        longest,
        shortest,
        n_arrivals,
        is_ascending,
        trace.block_tokens if has_blocks else 0,
        trace.arrival_note,
        "; ".join(notes),
    )


def read_trace(path: Path, max_requests: int | None = None) -> Iterator[Request]:
    """Yield the requests of a trace in the file's order, at most so many.

    Raises:
        ConfigError: While iterating, as `scan_trace` does.
    """
    place = Place(path)
    with open_trace(place) as file:
        yield from islice(_recognise(file, place).requests, max_requests)


def _holds_nothing(place: Place) -> ConfigError:
    place.line = 0
    if place.n_left_out:
        return place.error(f"holds no request but {place.n_left_out:,} that failed (0 response tokens)")
    return place.error(
        "holds no request. The least that will do is two lines: prompt_tokens,output_tokens and, for example, 100,50"
    )


class _Trace(NamedTuple):
    """An open trace."""

    form: str
    requests: Iterator[Request]
    block_tokens: int = 0
    arrival_note: str = ""


def _recognise(file: BinaryIO, place: Place) -> _Trace:
    """Look at the first line that is no comment, and at the comments in front of it."""
    start = file.read(256).lstrip(b"\xef\xbb\xbf \t\r\n")
    file.seek(0)
    if start.startswith(b"["):
        return _Trace("ShareGPT", _sharegpt(file, place))
    lines = read_lines(file, place)
    block_tokens, arrival_note = 0, ""
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip("# ") == "block_size" and line.startswith("#"):
            block_tokens = _count(value.strip(), "tokens of a block", 1, place)
        elif name.strip("# ") == "arrival_s" and line.startswith("#"):
            arrival_note = value.strip()[:_MAX_NOTE_CHARS]
        elif line.strip() and not line.startswith("#"):
            break
    else:
        raise _holds_nothing(place)
    if line.lstrip().startswith("{"):
        return _Trace("Mooncake", _mooncake(line, lines, place), MOONCAKE_BLOCK_TOKENS)
    header = [_column_name(cell) for cell in _cells(line, place)]
    if twice := [name for name in dict.fromkeys(header) if name and header.count(name) > 1]:
        raise place.error(
            f"has {', '.join(twice)[:120]!r} in its header more than once; each column needs a name of its own"
        )
    for name, columns, parse in _CSV_FORMS:
        if set(columns) <= set(header):
            found = _Columns(
                prompt=header.index(columns[0]),
                output=header.index(columns[1]),
                arrival=_arrival_index(name, header, place),
                blocks=header.index("prefix_hashes") if name == "normalised" and "prefix_hashes" in header else None,
                n_columns=len(header),
            )
            rows = _csv_rows(found, block_tokens, lines, place, parse)
            if name == "BurstGPT":
                rows = _answered(rows, place)
            return _Trace(name, rows, block_tokens, arrival_note)
    raise place.error(_unknown_header(line, header))


def _column_name(cell: str) -> str:
    """The name of a column that is known here, however it is written; any other as it is."""
    written = cell.strip()
    return _KNOWN_COLUMNS.get("_".join(written.lower().split()), written)


def _answered(requests: Iterator[Request], place: Place) -> Iterator[Request]:
    """Leave those out that got no answer, and count them."""
    for request in requests:
        if request.output_tokens:
            yield request
        else:
            place.n_left_out += 1


def _unknown_header(line: str, header: Sequence[str]) -> str:
    """What is wrong with a first line that is no header of a form known here, and what would be right."""
    if all(cell.replace(".", "", 1).isdigit() for cell in header):
        return f"is {line[:60]!r}: the header is missing. Put one in front, such as prompt_tokens,output_tokens"
    for separator in ";\t|":
        if len(header) == 1 and separator in line:
            return f"is {line[:60]!r}: its cells stand apart by {separator!r}. Separate them by commas"
    known = "; ".join(f"{name}: {', '.join(columns)}" for name, columns, _ in _CSV_FORMS)
    shown = ", ".join(header)
    return (
        f"has the columns {shown[:120]!r}, which is no form known here. Name them prompt_tokens and output_tokens "
        f"(and arrival_s, in seconds), or as the other forms have them ({known})"
    )


def _arrival_index(form: str, header: Sequence[str], place: Place) -> int | None:
    """The normalised form may lack its column of arrivals; in the others it is required.

    Raises:
        ConfigError: The normalised form has arrivals under another name: nobody knows their unit.
    """
    if form != "normalised":
        return header.index("Timestamp")
    if "arrival_s" in header:
        return header.index("arrival_s")
    if others := [name for name in header if name.lower().startswith(("arriv", "timestamp"))]:
        raise place.error(
            f"has a column {others[0][:40]!r}; arrivals are read from one named arrival_s, in seconds. Convert and "
            "rename it, or leave it out to play the trace without arrivals"
        )
    return None


class _Columns(NamedTuple):
    """Where in a row of a CSV file things stand."""

    prompt: int
    output: int
    arrival: int | None
    blocks: int | None
    n_columns: int

    @property
    def n_needed(self) -> int:
        """Cells that a row must have at least."""
        return max(self.prompt, self.output, self.arrival or 0) + 1


def _csv_rows(
    columns: _Columns,
    block_tokens: int,
    lines: Iterator[str],
    place: Place,
    parse_arrival: Callable[[str, Place], float | None],
) -> Iterator[Request]:
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        cells = _cells(line, place)
        if len(cells) < columns.n_needed:
            raise place.error(f"has {len(cells)} columns, {columns.n_needed} are needed: {line[:60]!r}")
        if len(cells) > columns.n_columns:
            raise place.error(
                f"has {len(cells)} cells, but the header names {columns.n_columns} columns; quote cells that hold "
                f"commas: {line[:60]!r}"
            )
        arrival_s = None if columns.arrival is None else parse_arrival(cells[columns.arrival].strip(), place)
        n_prompt = _count(cells[columns.prompt].strip(), "prompt tokens", 1, place)
        n_output = _count(cells[columns.output].strip(), "output tokens", 0, place)
        blocks: tuple[range, ...] = ()
        if columns.blocks is not None and len(cells) > columns.blocks:
            blocks = _block_runs(cells[columns.blocks], place)
            _check_blocks(blocks, n_prompt, block_tokens, place)
        yield Request(arrival_s, n_prompt, n_output, blocks)


def _block_runs(text: str, place: Place) -> tuple[range, ...]:
    """Read ids such as ``1-3 7``."""
    runs = []
    for word in text.split():
        first, dash, last = word.partition("-")
        if not (first.isdigit() and (last.isdigit() or not dash)) or not word.isascii() or len(word) > 40:
            raise place.error(f"prefix_hashes have {word[:40]!r}; they are ids or runs of ids, such as 1-3 7")
        runs.append(range(int(first), int(last or first) + 1))
    return tuple(runs)


def _check_blocks(blocks: tuple[range, ...], n_prompt: int, block_tokens: int, place: Place) -> None:
    if not blocks:
        return
    if not block_tokens:
        raise place.error("has prefix_hashes, but no line such as '# block_size: 16' stands before the header")
    if max(run.stop for run in blocks) * block_tokens > MAX_BLOCK_TOKENS:
        raise place.error(f"has block ids too large to number {block_tokens} tokens in each; count ids from 0")
    n_blocks = sum(map(len, blocks))
    if not all(blocks) or n_blocks > -(-n_prompt // block_tokens):
        raise place.error(
            f"has {n_blocks} blocks of {block_tokens} tokens for a prompt of {n_prompt}, or a run of ids that goes down"
        )


def _cells(line: str, place: Place) -> list[str]:
    if '"' not in line:
        return line.split(",")
    try:
        return next(csv.reader([line], strict=True))
    except (csv.Error, StopIteration) as error:
        raise place.error(f"is no row of a CSV file: {error}") from error


def _count(value: Any, what: str, least: int, place: Place) -> int:
    """Read a number of tokens, from the text of a CSV or from what JSON made of it."""
    if isinstance(value, str):
        digits = value[1:] if value[:1] in "+-" else value
        if not (digits.isascii() and digits.isdigit()):
            raise place.error(f"{what} are {value[:40]!r}, which is no whole number")
        if len(digits) > 20:
            raise place.error(f"{what} have {len(digits)} digits; they must lie between {least} and {MAX_TOKENS:,}")
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise place.error(f"{what} are {str(value)[:40]!r}, which is no whole number")
    if not least <= value <= MAX_TOKENS:
        shown = str(value) if abs(value) < 10**20 else f"a number of {value.bit_length()} bits"
        raise place.error(f"{what} are {shown}; they must lie between {least} and {MAX_TOKENS:,}")
    return value


def _seconds(text: str, place: Place) -> float | None:
    """An arrival in seconds; an empty one means that the trace has none."""
    if not text:
        return None
    try:
        arrival_s = float(text)
    except ValueError:
        raise place.error(f"the arrival is {text[:40]!r}, which is no number of seconds") from None
    return _checked_arrival(arrival_s, text, place)


def _checked_arrival(arrival_s: float, text: str, place: Place) -> float:
    if not 0 <= arrival_s <= _MAX_ARRIVAL_S:  # false for NaN, too
        raise place.error(f"the arrival is {text[:40]}; it must lie between 0 and {_MAX_ARRIVAL_S:g} seconds")
    return arrival_s


def _required_seconds(text: str, place: Place) -> float | None:
    if not text:
        raise place.error("has no arrival")
    return _seconds(text, place)


def _wall_clock(text: str, place: Place) -> float | None:
    """A moment such as ``2023-11-16 18:15:46.6805900``; without a zone it counts as UTC."""
    head, dot, rest = text.partition(".")
    n_digits = len(rest) - len(rest.lstrip("0123456789"))
    fraction, zone = rest[:n_digits], rest[n_digits:]
    try:
        if dot and not fraction:
            raise ValueError
        moment = datetime.fromisoformat(head + zone)
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        arrival_s = moment.timestamp() + int(fraction[:12] or 0) / 10 ** len(fraction[:12])
    except (ValueError, OverflowError, OSError):
        raise place.error(f"the time is {text[:40]!r}; it must look like 2023-11-16 18:15:46.6805900") from None
    return _checked_arrival(arrival_s, text, place)


_CSV_FORMS: tuple[tuple[str, tuple[str, ...], Callable[[str, Place], float | None]], ...] = (
    ("normalised", ("prompt_tokens", "output_tokens"), _seconds),
    ("Azure", ("ContextTokens", "GeneratedTokens", "Timestamp"), _wall_clock),
    ("BurstGPT", ("Request tokens", "Response tokens", "Timestamp"), _required_seconds),
)
"""Name, columns (prompt, output, and what else is required), how arrivals are written."""

_KNOWN_COLUMNS = {
    "_".join(name.lower().split()): name
    for name in ("arrival_s", "prefix_hashes", *(column for _, columns, _ in _CSV_FORMS for column in columns))
}
"""Their names by how they are compared."""


def _mooncake(first: str, lines: Iterator[str], place: Place) -> Iterator[Request]:
    line: str | None = first
    while line is not None:
        if line.strip():
            yield _mooncake_row(line, place)
        line = next(lines, None)


def _mooncake_row(line: str, place: Place) -> Request:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise place.error(f"is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise place.error(f"is no JSON object: {line[:40]!r}")
    missing = [name for name in ("timestamp", "input_length", "output_length") if name not in row]
    if missing and ("conversations" in row or "conversation" in row):
        raise place.error(
            "is a conversation on a line of its own; ShareGPT's form is one JSON array of them: [{...}, ...]"
        )
    if missing:
        raise place.error(f"lacks {', '.join(missing)}; a row of JSON has timestamp (ms), input_length, output_length")
    ids = row.get("hash_ids", [])
    if not isinstance(ids, list) or not all(isinstance(each, int) and each >= 0 for each in ids):
        raise place.error("hash_ids must be a list of ids, whole numbers from 0 on")
    stamp = row["timestamp"]
    if isinstance(stamp, bool) or not isinstance(stamp, int | float) or abs(stamp) > _MAX_ARRIVAL_S * 1000:
        raise place.error(f"timestamp is {str(stamp)[:40]!r}; it must be a number of milliseconds")
    n_prompt = _count(row["input_length"], "input_length", 1, place)
    blocks = _runs_of(ids)
    _check_blocks(blocks, n_prompt, MOONCAKE_BLOCK_TOKENS, place)
    return Request(
        _checked_arrival(stamp / 1000, f"{stamp} ms", place),
        n_prompt,
        _count(row["output_length"], "output_length", 0, place),
        blocks,
    )


def _runs_of(ids: Sequence[int]) -> tuple[range, ...]:
    """Put ids that follow each other together."""
    runs: list[range] = []
    for each in ids:
        if runs and each == runs[-1].stop:
            runs[-1] = range(runs[-1].start, each + 1)
        else:
            runs.append(range(each, each + 1))
    return tuple(runs)


def _sharegpt(file: BinaryIO, place: Place) -> Iterator[Request]:
    for turns in read_conversations(file, place):
        n_before = 0
        for speaker, text in turns:
            n_tokens = math.ceil(len(text) / CHARACTERS_PER_TOKEN)
            if speaker in ("gpt", "assistant", "chatgpt", "bing", "bard") and n_before:
                yield Request(
                    None, _count(n_before, "prompt tokens", 1, place), _count(n_tokens, "output tokens", 0, place)
                )
            n_before += n_tokens
