"""Saved sequences: the same on any layout, and anything but what was saved is refused before anything changes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vmem_kv.errors import ConfigError, FileError, FileRefused, OutOfDiskSpace, OutOfHostMemory, UsageError
from vmem_kv.layout import LAYOUT_KINDS, LayerSpec, Layout
from vmem_kv.tiers import files, streams
from vmem_kv.tiers.files import ModelIdentity, load, save

from ..core.bench import PAGE, make_layout
from .bench import TierBench
from .conftest import OpenTiers
from .test_disk import parked

TOKENS = [11 * i - 5 for i in range(48)]
IDENTITY = ModelIdentity("tiny@1", "float16")


def saved(bench: TierBench, path: Path, n_tokens: int = 30) -> bytes:
    """Save a sequence; its file's contents."""
    copy = parked(bench, TOKENS[:n_tokens])
    save(path, bench.host, copy, IDENTITY)
    bench.host.drop(copy)
    return path.read_bytes()


def signed(data: bytes, change: Callable[[dict[str, object]], None]) -> bytes:
    """A file with another header, whose digest fits: what somebody would write who knows the format."""
    n_header = struct.unpack_from("<I", data, 12)[0]
    header = json.loads(data[56 : 56 + n_header])
    change(header)
    return put_together(json.dumps(header).encode(), data[56 + n_header :])


def put_together(text: bytes, rest: bytes, version: int = 1) -> bytes:
    numbers = struct.pack("<IIQ", version, len(text), 56 + len(text) + len(rest))
    return b"vmem_kv\n" + numbers + hashlib.blake2b(numbers + text, digest_size=32).digest() + text + rest


@pytest.mark.parametrize("kind", LAYOUT_KINDS)
@pytest.mark.parametrize("other", LAYOUT_KINDS)
def test_a_saved_sequence_loads_into_any_layout(tmp_path: Path, kind: str, other: str) -> None:
    path = tmp_path / "session"
    one, two = TierBench(kind, backend="native"), TierBench(other, backend="native")
    saved(one, path, 29)
    copy = load(path, two.host, two.layout, IDENTITY)
    assert list(copy.tokens) == TOKENS[:29]
    slot = two.cache.acquire()
    two.host.restore(copy, two.cache, slot)
    # The same bytes for the same layer, K or V, head and token, wherever these stand.
    original = one.begin(TOKENS[:29])
    for a, b in zip([*one.layout.keys, *one.layout.values], [*two.layout.keys, *two.layout.values], strict=True):
        for token in range(29):
            for head in range(a.spec.n_heads):
                places = [
                    bench.cache.region.reservation.base
                    + s.offset_bytes
                    + slot_id * s.slot_bytes
                    + head * s.head_bytes
                    + token * s.token_bytes
                    for bench, s, slot_id in ((one, a, original), (two, b, slot))
                ]
                rows = [one.memory.read(place, a.spec.head_bytes) for place in places]
                assert rows[0] == rows[1]
    one.end()
    two.end()


def test_long_sequences_are_turned_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "session"
    one, two = TierBench("per_head", backend="native"), TierBench("token_major", backend="native")
    saved(one, path, 41)
    whole = load(path, two.host, two.layout, IDENTITY)
    monkeypatch.setattr(streams, "_CONVERSION_BYTES", 7 * one.layout.token_bytes)
    pieces = load(path, two.host, two.layout, IDENTITY)
    assert streams.checksums(two.host, whole) == streams.checksums(two.host, pieces)
    one.end()
    two.end()


def test_on_both_drivers_a_file_is_private_and_replaced_as_a_whole(open_tiers: OpenTiers, tmp_path: Path) -> None:
    bench, path = open_tiers(), tmp_path / "session"
    saved(bench, path, 10)
    saved(bench, path, 30)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["session"]
    copy = load(path, bench.host, bench.layout, IDENTITY)
    assert bench.copy_holds(copy, TOKENS[:30])
    slot = bench.cache.acquire()
    bench.host.restore(copy, bench.cache, slot)
    assert bench.holds(slot, TOKENS[:30])


def test_a_failed_save_leaves_the_old_file(
    open_tiers: OpenTiers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, path = open_tiers(), tmp_path / "session"
    old = saved(bench, path, 10)
    copy = parked(bench, TOKENS)

    def fail(code: int) -> Callable[..., None]:
        def call(*arguments: object) -> None:
            raise OSError(code, os.strerror(code))

        return call

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    for name in ("posix_fallocate", "pwrite", "fsync", "replace"):
        for planted, error in ((fail(errno.ENOSPC), OutOfDiskSpace), (fail(errno.EIO), FileError)):
            with monkeypatch.context() as patch:
                patch.setattr(os, name, planted)
                with pytest.raises(error):
                    save(path, bench.host, copy, IDENTITY)
        with monkeypatch.context() as patch:
            patch.setattr(os, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                save(path, bench.host, copy, IDENTITY)
        assert path.read_bytes() == old
        assert [entry.name for entry in tmp_path.iterdir()] == ["session"]
    with pytest.raises(FileError, match="cannot save"):
        save(tmp_path / "missing" / "session", bench.host, copy, IDENTITY)
    with pytest.raises(UsageError, match="holds tokens"):
        save(path, bench.host, bench.host.new_copy(bench.layout), IDENTITY)
    assert bench.copy_holds(copy, TOKENS)


def test_every_changed_byte_and_every_missing_end_is_refused(tmp_path: Path) -> None:
    layers = [LayerSpec.uniform(1, 4, 2)] * 2
    layout = Layout.build("per_layer", layers, n_slots=2, max_tokens=16, page_bytes=PAGE)
    bench, path, rng = TierBench(backend="native"), tmp_path / "session", random.Random(1)
    with bench.host.filling(layout, range(7)) as copy:
        for _, views in bench.host.rows(copy):
            for view in views:
                view[:] = rng.randbytes(len(view))
    save(path, bench.host, copy, IDENTITY)
    data = path.read_bytes()
    bench.host.drop(copy)

    def refused(changed: bytes) -> bool:
        path.write_bytes(changed)
        try:
            again = load(path, bench.host, layout, IDENTITY)
        except FileRefused:
            return True
        bench.host.drop(again)
        return False

    assert not refused(data)
    for index in range(len(data)):
        for bit in (0x01, 0x80):
            assert refused(data[:index] + bytes([data[index] ^ bit]) + data[index + 1 :]), f"byte {index}"
        assert refused(data[:index]), f"{index} bytes"
    assert refused(data + b"\0")
    assert refused(data + data)
    assert (bench.frames.n_taken, bench.host.stats().n_copies) == (0, 0)
    bench.check()
    bench.end()


def test_the_fuzz_above_is_seen_to_fail_without_checksums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, path = TierBench(backend="native"), tmp_path / "session"
    data = saved(bench, path, 10)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(FileRefused, match="altered"):
        load(path, bench.host, bench.layout, IDENTITY)
    monkeypatch.setattr(streams.zlib, "crc32", lambda data, start=0: 0)
    monkeypatch.setattr(files, "_from_json", lambda text, read=files._from_json: read(text)._replace(sums=(0,) * 4))
    assert load(path, bench.host, bench.layout, IDENTITY).n_tokens == 10
    monkeypatch.undo()
    bench.end()


def test_what_is_well_formed_but_not_ours_is_refused(tmp_path: Path) -> None:
    bench, path = TierBench(backend="native"), tmp_path / "session"
    data = saved(bench, path, 30)
    rows = data[-30 * (8 + bench.layout.token_bytes) :]

    def refuse(contents: bytes, text: str, layout: Layout | None = None, identity: ModelIdentity = IDENTITY) -> None:
        path.write_bytes(contents)
        with pytest.raises(FileRefused, match=text) as caught:
            load(path, bench.host, layout or bench.layout, identity)
        assert str(path) in str(caught.value)
        assert bench.frames.n_taken == 0

    refuse(data, "'tiny@1' in 'float16'; wanted are rows of 'tiny@2'", identity=ModelIdentity("tiny@2", "float16"))
    refuse(data, "wanted are rows of 'tiny@1' in 'bfloat16'", identity=ModelIdentity("tiny@1", "bfloat16"))
    refuse(data, "30 tokens; a slot of this cache holds 29", make_layout(max_tokens=29))
    other = Layout.build("per_layer", [LayerSpec.uniform(1, 8, 2)], n_slots=1, max_tokens=48, page_bytes=PAGE)
    refuse(data, "2 layers are not those", other)
    for n_bytes in (0, 3, len(files.MAGIC), 55):
        refuse(data[:n_bytes], f"truncated: it ends at byte {n_bytes}")
    for foreign in (b"#!/bin/sh\n" * 100, b"#!/bin/sh\nexit 0\n", b"x", b"vmem_kv\r"):
        refuse(foreign, "no sequence that vmem_kv saved")
    refuse(put_together(b"{}", rows, version=2), "version 2 of the format; this is version 1")
    refuse(put_together(b"{}", rows, version=0), "version 0")
    refuse(put_together(b"", rows), "header has 0 bytes")
    refuse(put_together(b" " * (files.MAX_HEADER_BYTES + 1), rows), "at most")
    refuse(data[:-1], "truncated, or added to")
    for nonsense in (b"{}", b"[]", b"[" * 100_000, b"\xff\xfe", b"1" * 5000, b"null"):
        refuse(put_together(nonsense, rows), "makes no sense")

    def with_header(text: str, **fields: object) -> None:
        refuse(signed(data, lambda header: header.update(fields)), text)

    assert not refused_by_signing(bench, path, data)
    with_header("makes no sense", model=7)
    with_header("makes no sense", n_tokens="30")
    with_header("makes no sense", n_tokens=True)
    with_header("makes no sense", n_tokens=-1)
    with_header("makes no sense", n_tokens=1e3)
    with_header("makes no sense", n_tokens=1 << 70)
    with_header("makes no sense", layers=[[1, 2]])
    with_header("makes no sense", layers={})
    with_header("makes no sense", sums=[-1])
    with_header("makes no sense", more=1)
    with_header("byte order is 'big'", byte_order="big")
    with_header("has 0 tokens", n_tokens=0)
    with_header("tokens take", n_tokens=29)
    with_header("unknown layout", kind="per_token")
    with_header("unknown layout", kind="group:0")
    with_header("too long", kind="group:" + "9" * 5000)
    n_digits = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(1000)
    with_header("1000 digits", kind="group:" + "9" * 2000)
    sys.set_int_max_str_digits(n_digits)
    with_header("checksums for", kind="token_major")
    with_header("checksums for", sums=[])
    with_header("token ids were altered", tokens_digest="")
    with_header("planes were altered", sums=[0, 0, 0, 0])
    bench.end()


def refused_by_signing(bench: TierBench, path: Path, data: bytes) -> bool:
    """Whether a file is refused only because `signed` wrote it."""
    path.write_bytes(signed(data, lambda header: None))
    bench.host.drop(load(path, bench.host, bench.layout, IDENTITY))
    return False


def test_what_is_no_plain_file_is_refused(tmp_path: Path) -> None:
    bench = TierBench(backend="native")
    with pytest.raises(FileError, match="No such file"):
        load(tmp_path / "missing", bench.host, bench.layout, IDENTITY)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(FileRefused, match="not a plain file"):
            load(path, bench.host, bench.layout, IDENTITY)
    bench.end()


def test_a_file_beyond_the_budget_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    one, two = TierBench(backend="native"), TierBench(backend="native", n_frames=4)
    saved(one, tmp_path / "session", 30)
    with pytest.raises(FileRefused, match="of which there are 4 in all"):
        load(tmp_path / "session", two.host, two.layout, IDENTITY)
    assert two.frames.n_taken == 0
    three = TierBench(backend="native", n_frames=16)
    parked(three, TOKENS[:30])
    with pytest.raises(OutOfHostMemory):  # only now
        load(tmp_path / "session", three.host, three.layout, IDENTITY)
    for bench in (one, two, three):
        bench.end()


@pytest.mark.parametrize("name", ["model", "dtype", "byte_order", "kind", "tokens_digest"])
@pytest.mark.parametrize("text", ["a\n\x1b[31m INFO forged \ud800", "x" * 4000, "\x00" * 100_000])
def test_what_a_file_says_goes_into_a_message_escaped_and_cut(tmp_path: Path, name: str, text: str) -> None:
    bench, path = TierBench(backend="native"), tmp_path / "session"
    data = saved(bench, path, 30)
    path.write_bytes(signed(data, lambda header: header.update({name: text})))
    with pytest.raises(FileRefused) as caught:
        load(path, bench.host, bench.layout, IDENTITY)
    said = str(caught.value).removeprefix(str(path))
    assert said.isprintable()
    assert said.isascii()
    assert len(said) < 1000
    bench.end()


@pytest.mark.parametrize(("model", "dtype"), [("", "float16"), ("m", ""), ("m" * 5000, "float16"), (7, "float16")])
def test_an_identity_says_something(model: str, dtype: str) -> None:
    with pytest.raises(ConfigError, match="must be a text"):
        ModelIdentity(model, dtype)
