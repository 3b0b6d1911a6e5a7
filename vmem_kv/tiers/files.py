"""A sequence in a file of its own: saved once, loaded by any later process, on any device, in any layout.

    offset  what
    0       magic (8 bytes), version (u32), bytes of the header (u32), bytes of the file (u64), BLAKE2b-256 of the
            three numbers and the header; all little-endian
    56      the header: JSON
    ...     the token ids, 8 bytes each
    ...     the rows, as `streams.py` says, in the order of the layout that they were saved from

Guarantees
  * Nothing is mapped, and no sequence changes, before everything was checked: what the file is, its version and length,
    whose model and which geometry, the token ids and every row. What is read, and what is allocated for it, is bounded
    by the checks before it. Anything else is FileRefused, which says what is wrong.
  * Saving is atomic: a file of that name is the old one or the new one, whatever fails, and is on disk when `save`
    returns. Files are readable by their owner only.
  * No code in a file is ever run.

Checksums find damage, not malice: load files only from where you would load a model from.

A file keeps its saver's layout, since rows then go out as they lie; loading into another layout turns them on the way.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import struct
import sys
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vmem_kv.errors import ConfigError, FileRefused, UsageError
from vmem_kv.layout import LayerSpec, Layout, TensorSpec
from vmem_kv.tiers.copies import HostCopy
from vmem_kv.tiers.host import HostTier
from vmem_kv.tiers.streams import checksums, dense_layout, file_error, read_all, read_rows, write_all, write_rows

MAGIC = b"vmem_kv\n"
VERSION = 1
MAX_HEADER_BYTES = 1 << 20
MAX_NAME_BYTES = 4096

_PROLOGUE = struct.Struct("<8sIIQ32s")
_NUMBERS = struct.Struct("<IIQ")
_TOKEN_BYTES = 8
_MAX_SUM = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Whose rows they are. Rows are used with the identity that they were saved with, and with no other.

    Attributes:
        model: Names the weights and everything else that the rows depend on: a path with a revision or a digest,
            adapters, how positions are scaled.
        dtype: The rows' element type, as torch names it: `"bfloat16"`. Two of them may have the same size.
    """

    model: str
    dtype: str

    def __post_init__(self) -> None:
        for name, value in (("model", self.model), ("dtype", self.dtype)):
            if not isinstance(value, str) or not 0 < len(value.encode(errors="replace")) <= MAX_NAME_BYTES:
                raise ConfigError(f"{name} is {value!r}; it must be a text of 1 to {MAX_NAME_BYTES} bytes")


class _Header(NamedTuple):
    """What the header says, checked for its form only."""

    model: str
    dtype: str
    byte_order: str
    kind: str
    layers: tuple[LayerSpec, ...]
    n_tokens: int
    tokens_digest: str
    sums: tuple[int, ...]


def save(path: str | Path, host: HostTier, copy: HostCopy, identity: ModelIdentity) -> None:
    """Write a copy to a file, replacing one of that name. The copy stays as it is.

    Raises:
        UsageError: The copy is empty, or being written. Nothing changed.
        OutOfDiskSpace: The disk is full. Nothing changed.
        FileError: The file cannot be written. Nothing changed; or, if the directory alone could not be forced to disk,
            the new file is there but might not outlast a power cut.
    """
    if copy.is_written or not copy.n_tokens:
        raise UsageError("only a copy that holds tokens, and is not being written, can be saved")
    header = _Header(
        identity.model,
        identity.dtype,
        sys.byteorder,
        copy.layout.kind,
        copy.layout.layers,
        copy.n_tokens,
        _digest(copy.tokens.tobytes()),
        tuple(checksums(host, copy)),
    )
    text = _to_json(header)
    n_file_bytes = _PROLOGUE.size + len(text) + copy.n_tokens * (_TOKEN_BYTES + copy.layout.token_bytes)
    numbers = _NUMBERS.pack(VERSION, len(text), n_file_bytes)
    beginning = MAGIC + numbers + hashlib.blake2b(numbers + text, digest_size=32).digest() + text
    path = Path(path)
    try:
        fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        try:
            try:
                os.posix_fallocate(fd, 0, n_file_bytes)
                offset = write_all(fd, beginning + copy.tokens.tobytes(), 0)
                write_rows(fd, offset, host, copy)
                os.fsync(fd)
            finally:
                os.close(fd)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        _sync_directory(path.parent)
    except OSError as error:
        raise file_error(f"save to {path}", n_file_bytes, error) from error


def load(path: str | Path, host: HostTier, layout: Layout, identity: ModelIdentity) -> HostCopy:
    """Read a file into a new host copy, from where it can be restored into any slot of a cache with this layout.

    Args:
        path: A file that `save` wrote.
        host: Where the copy is to be.
        layout: That of the cache: its layers must be those of the file, its kind need not.
        identity: Whose rows are wanted.

    Raises:
        FileRefused: The file is truncated, altered, foreign, longer than a slot or all of the host tier, or from a
            newer version. Nothing changed.
        FileError: The file cannot be opened or read. Nothing changed.
        OutOfHostMemory: The host tier has no room for it. Nothing changed but spare copies that went.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe of that name must not make us wait
        try:
            try:
                header, offset = _read_header(fd, layout, identity)
                n_frames = host.frames.n_frames_for(header.n_tokens * layout.token_bytes)
                if n_frames > host.frames.max_frames:
                    raise FileRefused(
                        f"its {header.n_tokens} tokens take {n_frames} frames of host memory, of which there are "
                        f"{host.frames.max_frames} in all; open the tier with more memory"
                    )
                tokens = _read_tokens(fd, offset, header)
                with host.filling(layout, tokens) as copy:
                    read_rows(fd, offset + len(tokens) * _TOKEN_BYTES, host, copy, header.kind, header.sums)
            except FileRefused as error:
                raise FileRefused(f"{path}: {error}") from error
        finally:
            os.close(fd)
    except OSError as error:
        raise file_error(f"load {path}", 0, error) from error
    return copy


def _read_header(fd: int, layout: Layout, identity: ModelIdentity) -> tuple[_Header, int]:
    """Everything before the token ids, checked; and where these begin."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise FileRefused("it is not a plain file")
    beginning = bytearray(min(_PROLOGUE.size, status.st_size))
    read_all(fd, memoryview(beginning), 0)
    if not MAGIC.startswith(beginning[: len(MAGIC)]):
        raise FileRefused("it is no sequence that vmem_kv saved")
    if len(beginning) < _PROLOGUE.size:
        raise FileRefused(f"the file was truncated: it ends at byte {len(beginning)}")
    _, version, n_header_bytes, n_file_bytes, digest = _PROLOGUE.unpack(beginning)
    if version != VERSION:
        raise FileRefused(f"it has version {version} of the format; this is version {VERSION}")
    if not 0 < n_header_bytes <= MAX_HEADER_BYTES:
        raise FileRefused(f"its header has {n_header_bytes} bytes; at most {MAX_HEADER_BYTES} are allowed")
    if n_file_bytes != status.st_size:
        raise FileRefused(f"it has {status.st_size} bytes instead of {n_file_bytes}: truncated, or added to")
    text = bytearray(n_header_bytes)
    read_all(fd, memoryview(text), _PROLOGUE.size)
    numbers = _NUMBERS.pack(version, n_header_bytes, n_file_bytes)
    if hashlib.blake2b(numbers + text, digest_size=32).digest() != digest:
        raise FileRefused("its header was altered")
    header = _from_json(bytes(text))
    if header.byte_order != sys.byteorder:
        raise FileRefused(f"it comes from a machine whose byte order is {header.byte_order!r:.80}")
    if (header.model, header.dtype) != (identity.model, identity.dtype):
        raise FileRefused(
            f"it belongs to {header.model!r:.300} in {header.dtype!r:.80}; wanted are rows of {identity.model!r:.300} "
            f"in {identity.dtype!r:.80}"
        )
    if header.layers != layout.layers:
        raise FileRefused(f"its {len(header.layers)} layers are not those of this cache ({len(layout.layers)})")
    if not 0 < header.n_tokens <= layout.max_tokens:
        raise FileRefused(f"it has {header.n_tokens} tokens; a slot of this cache holds {layout.max_tokens}")
    try:
        stored = dense_layout(header.kind, header.layers, header.n_tokens)
    except ValueError as error:  # a ConfigError is one; so is a number with more digits than Python reads
        raise FileRefused(f"its layout cannot be used: {error!s:.300}") from error
    if len(header.sums) != len(stored.planes):
        raise FileRefused(f"it has {len(header.sums)} checksums for {len(stored.planes)} planes")
    offset = _PROLOGUE.size + n_header_bytes
    expected_bytes = offset + header.n_tokens * (_TOKEN_BYTES + stored.token_bytes)
    if n_file_bytes != expected_bytes:
        raise FileRefused(f"it has {n_file_bytes} bytes; {header.n_tokens} tokens take {expected_bytes}")
    return header, offset


def _read_tokens(fd: int, offset: int, header: _Header) -> array[int]:
    raw = bytearray(header.n_tokens * _TOKEN_BYTES)
    read_all(fd, memoryview(raw), offset)
    if _digest(raw) != header.tokens_digest:
        raise FileRefused("its token ids were altered")
    return array("q", bytes(raw))


def _to_json(header: _Header) -> bytes:
    return json.dumps(header._asdict(), separators=(",", ":")).encode()


def _from_json(text: bytes) -> _Header:
    """Read a header, trusting nothing in it.

    Raises:
        FileRefused: It is not of the form that `_to_json` writes.
    """
    try:
        fields = json.loads(text)
        if not isinstance(fields, dict) or fields.keys() != set(_Header._fields):
            raise ValueError("other fields than expected")
        header = _Header(
            model=_text(fields["model"]),
            dtype=_text(fields["dtype"]),
            byte_order=_text(fields["byte_order"]),
            kind=_text(fields["kind"]),
            layers=tuple(_layer(layer) for layer in _list(fields["layers"])),
            n_tokens=_number(fields["n_tokens"], sys.maxsize),
            tokens_digest=_text(fields["tokens_digest"]),
            sums=tuple(_number(value, _MAX_SUM) for value in _list(fields["sums"])),
        )
    except (ValueError, RecursionError) as error:
        raise FileRefused(f"its header makes no sense: {error}") from error
    return header


def _layer(value: Any) -> LayerSpec:
    key, spec = (_tensor(one) for one in _list(value, 2))
    return LayerSpec(key, spec)


def _tensor(value: Any) -> TensorSpec:
    return TensorSpec(*(_number(one, sys.maxsize) for one in _list(value, 3)))


def _list(value: Any, n_items: int | None = None) -> Sequence[Any]:
    if not isinstance(value, list) or n_items not in (None, len(value)):
        raise ValueError("a list is missing, or has another length")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_NAME_BYTES:
        raise ValueError("a text is missing, or too long")
    return value


def _number(value: Any, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError("a number is missing, or out of range")
    return value


def _digest(data: bytes | bytearray) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
