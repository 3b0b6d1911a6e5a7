"""Every form of trace, and every way in which a file can be none."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import tracemalloc
from pathlib import Path

import pytest

from vmem_kv.errors import ConfigError
from vmem_kv.traces import Request, find_shape, read_trace, scan_trace
from vmem_kv.traces.conversations import MAX_CONVERSATION_CHARS
from vmem_kv.traces.lines import MAX_LINE_BYTES

SIZE = "# block_size: 99\n"
HEADER = "arrival_s,prompt_tokens,output_tokens,session_id,prefix_hashes\n"


def write(folder: Path, text: str | bytes, name: str = "trace.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def requests(path: Path) -> list[Request]:
    return list(read_trace(path))


def test_a_csv_of_two_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "prompt_tokens,output_tokens\n100,50\n")
    assert requests(path) == [Request(None, 100, 50)]
    summary = scan_trace(path)
    # The last output is never written.
    assert (summary.form, summary.n_requests, summary.longest_tokens, summary.shortest_tokens) == (
        "normalised",
        1,
        149,
        149,
    )
    assert not summary.has_arrivals


def test_the_normalised_form(tmp_path: Path) -> None:
    text = f"# trace: mine\n# source: \x22quoted\x22\n{SIZE}{HEADER}0,374,44,,\n\n4.5,396,0,s1,1-3 7\n4.5,1,7,s1,\n"
    path = write(tmp_path, text)
    blocks = (range(1, 4), range(7, 8))
    assert requests(path) == [Request(0.0, 374, 44), Request(4.5, 396, 0, blocks), Request(4.5, 1, 7)]
    summary = scan_trace(path)
    assert summary.block_tokens == 99
    assert scan_trace(path, 1).block_tokens == 0  # the first request has no blocks
    assert summary.has_arrivals
    assert summary.is_ascending
    assert (summary.prompt_tokens, summary.output_tokens, summary.mean_tokens) == (771, 51, 274)
    assert scan_trace(path, 2).n_requests == 2
    assert list(read_trace(path, 1)) == [Request(0.0, 374, 44)]


def test_columns_may_stand_in_any_order_and_be_quoted(tmp_path: Path) -> None:
    path = write(tmp_path, 'note,"output_tokens",prompt_tokens\n"a, b",5,6\nplain,7,8\n')
    assert requests(path) == [Request(None, 6, 5), Request(None, 8, 7)]


def test_arrivals_that_go_back_or_are_missing_are_noticed(tmp_path: Path) -> None:
    back = scan_trace(write(tmp_path, HEADER + "5,1,1,,\n4,1,1,,\n"))
    assert back.has_arrivals
    assert not back.is_ascending
    some = scan_trace(write(tmp_path, HEADER + "5,1,1,,\n,1,1,,\n"))
    assert (some.has_arrivals, some.n_arrivals) == (False, 1)


def test_what_a_file_says_of_its_arrivals_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path, f"# arrival_s: seconds since its session began\n# x: y\n{HEADER}0,1,1,,\n")
    assert scan_trace(path).arrival_note == "seconds since its session began"
    assert scan_trace(write(tmp_path, f"{HEADER}0,1,1,,\n")).arrival_note == ""
    assert len(scan_trace(write(tmp_path, f"# arrival_s: {'x' * 5000}\n{HEADER}0,1,1,,\n")).arrival_note) == 200


@pytest.mark.parametrize(
    "header", ["Prompt_Tokens, Output_Tokens", " PROMPT TOKENS ,output tokens", '"Prompt_tokens","OUTPUT_TOKENS"']
)
def test_names_of_columns_may_be_written_otherwise(tmp_path: Path, header: str) -> None:
    assert requests(write(tmp_path, f"{header}\n3,4\n")) == [Request(None, 3, 4)]
    assert requests(write(tmp_path, f"{header},Arrival_S\n3,4,5\n")) == [Request(5.0, 3, 4)]
    azure = write(tmp_path, "timestamp,contexttokens,generatedTokens\n2023-11-16 18:15:46,3,4\n")
    assert scan_trace(azure).form == "Azure"
    burst = write(tmp_path, "timestamp,request_tokens,Response Tokens\n5,3,4\n")
    assert requests(burst) == [Request(5.0, 3, 4)]


def test_lengths_at_the_end() -> None:
    assert [Request(None, 10, n).final_tokens for n in (0, 1, 2, 50)] == [10, 10, 11, 59]


def test_no_more_is_read_than_was_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path, PAIR + "3,4\nnonsense\n")
    assert list(read_trace(path, 1)) == [Request(None, 3, 4)]
    assert scan_trace(path, 1).n_requests == 1


def test_azure(tmp_path: Path) -> None:
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    lines += ["2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.9951690,396,109", "2023-11-17 00:00:00,1,2"]
    path = write(tmp_path, "\r\n".join(lines) + "\r\n")
    found = requests(path)
    assert [r[1:3] for r in found] == [(374, 44), (396, 109), (1, 2)]
    assert found[0].arrival_s is not None
    assert found[1].arrival_s == pytest.approx(found[0].arrival_s + 4.314579, abs=1e-6)
    assert scan_trace(path).form == "Azure"
    with_zone = write(tmp_path, f"{lines[0]}\n2023-11-16 18:15:46.680590+00:00,374,44\n")
    assert requests(with_zone)[0].arrival_s == pytest.approx(found[0].arrival_s, abs=1e-5)


def test_burstgpt(tmp_path: Path) -> None:
    text = (
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,Conversation log\n"
    )
    path = write(tmp_path, text + "45.5,GPT-4,300,0,300,API log\n")
    # Its mark of a failure.
    assert requests(path) == [Request(5.0, 472, 18)]
    summary = scan_trace(path)
    assert (summary.form, summary.n_requests, summary.output_tokens) == ("BurstGPT", 1, 18)
    assert summary.note == "1 left out that failed (0 response tokens)"
    with pytest.raises(ConfigError, match="no request but 1 that failed"):
        scan_trace(write(tmp_path, text.splitlines()[0] + "\n45.5,GPT-4,300,0,300,API log\n"))
    assert requests(write(tmp_path, PAIR + "300,0\n")) == [Request(None, 300, 0)]


def test_mooncake(tmp_path: Path) -> None:
    rows = [{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}]
    rows += [{"timestamp": 3000, "input_length": 7322, "output_length": 490, "hash_ids": [3, 4, 5, 7]}]
    path = write(tmp_path, "\n\n".join(map(json.dumps, rows)) + "\n", "trace.jsonl")
    assert requests(path) == [Request(0.0, 6758, 500, (range(2),)), Request(3.0, 7322, 490, (range(3, 6), range(7, 8)))]
    assert scan_trace(path).form == "Mooncake"
    assert scan_trace(path).block_tokens == 512


def conversation(*texts: str) -> dict[str, object]:
    speakers = itertools.cycle(("human", "gpt"))
    return {"id": "x", "conversations": [{"from": s, "value": t} for s, t in zip(speakers, texts, strict=False)]}


@pytest.mark.parametrize("indent", [None, 2])
def test_sharegpt(tmp_path: Path, indent: int | None) -> None:
    items = [conversation("a" * 40, "b" * 10, "c" * 4, "d" * 8), conversation(), conversation("é" * 8, "f" * 4)]
    path = write(tmp_path, json.dumps(items, indent=indent), "sharegpt.json")
    # A later prompt is all that was said before: 10 + 3 + 1 tokens.
    assert requests(path) == [Request(None, 10, 3), Request(None, 14, 2), Request(None, 2, 1)]
    summary = scan_trace(path)
    assert summary.form == "ShareGPT"
    assert "estimated" in summary.note


def test_sharegpt_is_read_piece_by_piece(tmp_path: Path) -> None:
    texts = [("x" * n, "y" * (n // 2)) for n in (10, 300_000, 5, 700_000, 1)] * 8
    path = write(tmp_path, json.dumps([conversation(*pair) for pair in texts]), "sharegpt.json")
    tracemalloc.start()
    try:
        found = requests(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == [Request(None, -(-len(a) // 4), -(-len(b) // 4)) for a, b in texts]
    assert peak < path.stat().st_size / 1.5


@pytest.mark.parametrize("name", ["a.csv.gz", "a.csv"])
def test_gzip_is_told_by_its_content(tmp_path: Path, name: str) -> None:
    assert requests(write(tmp_path, gzip.compress(b"prompt_tokens,output_tokens\n3,4\n"), name)) == [
        Request(None, 3, 4)
    ]


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    assert requests(write(tmp_path, b"\xef\xbb\xbfprompt_tokens,output_tokens\n3,4\n")) == [Request(None, 3, 4)]


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURST = "Timestamp,Model,Request tokens,Response tokens\n"
PAIR = "prompt_tokens,output_tokens\n"
GZIPPED = gzip.compress(PAIR.encode() + b"3,4\n" * 1000)

BAD_ROWS: dict[str, dict[str, str]] = {
    # header: rows below it, and what the message must say
    PAIR: {
        "1,2\n5": "line 3: has 1 columns, 2 are needed",
        "1,two": "line 2: output tokens are 'two'",
        "1.5,2": "line 2: prompt tokens are '1.5'",
        ",2": "line 2: prompt tokens are ''",
        "nan,2": "prompt tokens are 'nan'",
        "١٢,2": "which is no whole number",
        "1,2\n-3,4": "line 3: prompt tokens are -3; they must lie between 1",
        "0,4": "prompt tokens are 0",
        f"{10**30},4": "prompt tokens have 31 digits",
        "100000001,4": "must lie between 1 and 100,000,000",
        '1,"2\n3,4': "line 2: is no row of a CSV",
        "1,2\n1,234,5": "line 3: has 3 cells, but the header names 2 columns",
    },
    "arrival_ms," + PAIR: {"5,1,2": "line 1: has a column 'arrival_ms'; arrivals are read from one named arrival_s"},
    "Timestamp," + PAIR: {"5,1,2": "line 1: has a column 'Timestamp'; arrivals are read from one named arrival_s"},
    "Prompt Tokens," + PAIR: {"5,1,2": "has 'prompt_tokens' in its header more than once"},
    HEADER: {
        "nan,1,1,,": "line 2: the arrival is nan",
        "inf,1,1,,": "the arrival is inf",
        "-1,1,1,,": "the arrival is -1",
        "soon,1,1,,": "the arrival is 'soon'",
        "0,9,1,,1": "has prefix_hashes, but no line such as '# block_size: 16'",
        "0,9,1,,one": "prefix_hashes have 'one'; they are ids or runs of ids",
        "0,9,1,,1-": "prefix_hashes have '1-'",
        "0,9,1,,-1": "prefix_hashes have '-1'",
    },
    SIZE + HEADER: {
        "0,9,1,,1 2": "line 3: has 2 blocks of 99 tokens for a prompt of 9",
        "0,9,1,,2-1": "or a run of ids that goes down",
        f"0,9,1,,1-{10**30}": "block ids too large",
        f"0,9,1,,{2**31 // 99}": "block ids too large",
    },
    "# block_size: none\n" + HEADER: {"0,9,1,,": "line 1: tokens of a block are 'none'"},
    AZURE: {
        ",1,1": "line 2: the time is ''",
        "yesterday,1,1": "the time is 'yesterday'",
        "2023-11-16 18:15:46.,1,1": "it must look like",
    },
    BURST: {",x,1,1": "line 2: has no arrival"},
}

BAD_JSON: dict[str, str] = {
    # fields of a row of JSON: what the message must say
    '"timestamp": 1': "line 1: lacks input_length, output_length",
    '"timestamp": 1, "input_length": 9, "output_length": 1, "hash_ids": 5': "hash_ids must be a list",
    '"timestamp": 1, "input_length": 9, "output_length": 1, "hash_ids": [1, 2]': "has 2 blocks of 512 tokens",
    '"timestamp": 1, "input_length": 9, "output_length": 1, "hash_ids": [-1]': "whole numbers from 0 on",
    '"conversations": []': "ShareGPT's form is one JSON array",
    '"timestamp": 1, "input_length": "x", "output_length": 1': "input_length are 'x'",
    '"timestamp": 1, "input_length": true, "output_length": 1': "input_length are 'True'",
    '"timestamp": NaN, "input_length": 5, "output_length": 1': "the arrival is nan ms",
    '"timestamp": 1e999, "input_length": 5, "output_length": 1': "timestamp is 'inf'",
    '"timestamp": 1, "input_length": 5.5, "output_length": 1': "input_length are '5.5'",
    f'"timestamp": 1, "input_length": {10**4000}, "output_length": 1': "a number of 13288 bits",
    f'"timestamp": 1, "input_length": {"9" * 5000}, "output_length": 1': "is no JSON",
}

BAD_FILES: dict[str, tuple[str | bytes, str]] = {
    # what: content, what the message must say
    "empty": ("", "holds no request. The least that will do is two lines: prompt_tokens,output_tokens"),
    "white space": (" \n\n", "holds no request"),
    "header alone": (PAIR, "holds no request"),
    "comments alone": ("# a\n# b\n", "holds no request"),
    "zero bytes": (PAIR.encode() + b"1,2\n\0\0,4\n", "line 3: holds zero bytes"),
    "not UTF-8": (PAIR.encode() + b"1,2\n\xff\xfe,4\n", "line 3: is not UTF-8"),
    "UTF-16": (PAIR.encode("utf-16"), "UTF-16 text; save it as UTF-8"),
    "zip": (b"PK\x03\x04....", "a zip archive or a spreadsheet; unpack it"),
    "zstd": (b"\x28\xb5\x2f\xfd....", "pack it with gzip"),
    "Parquet": (b"PAR1....", "save it as CSV"),
    "unknown columns": ("a,b\n1,2\n", "line 1: has the columns 'a, b'"),
    "one column missing": ("prompt_tokens,output\n1,2\n", "Name them prompt_tokens and output_tokens"),
    "no header": ("1,2\n3,4\n", "line 1: is '1,2': the header is missing. Put one in front"),
    "semicolons": ("prompt_tokens;output_tokens\n1;2\n", "its cells stand apart by ';'. Separate them by commas"),
    "JSON, cut": ('{"timestamp": 0, "inp', "line 1: is no JSON"),
    "JSON, no object": ('{"timestamp": 0, "input_length": 1, "output_length": 1}\n[1]\n', "line 2: is no JSON object"),
    "JSON, deep": ('{"timestamp": ' + "[" * 100_000, "is no JSON"),
    "array, cut": ('[{"conversations": [', "line 1: a conversation that begins here is no JSON"),
    "array, not closed": ('[{"conversations": []}', "the file ends before its array does"),
    "array, empty": ("[]", "holds no request"),
    "array, no comma": ('[{"conversations": []} {"conversations": []}]', "a comma or the array's end"),
    "array, more behind": ('[{"conversations": []}] x', "something behind the array's end"),
    "array, other objects": ('[\n\n{"text": "x"}]', "line 3: a conversation has no list"),
    "array, other turns": ('[{"conversations": [{"from": "human"}]}]', "has no texts"),
    "array, deep": ("[" * 100_000, "is no JSON"),
    "array, not UTF-8": (b'[{"conversations": "\xff"}]', "not UTF-8 text"),
    "gzip, cut": (GZIPPED[: len(GZIPPED) // 2], "cannot be read"),
    "gzip, broken": (GZIPPED[:12] + b"junk" + GZIPPED[20:], "cannot be read"),
    "gzip in name only": (b"\x1f\x8bgarbage that goes on for a while", "cannot be read"),
    "gzip bomb": (gzip.compress(bytes(20_000_000)), "longer than"),
    "a conversation without end": (
        '[{"conversations": [{"from": "human", "value": "' + "x" * (MAX_CONVERSATION_CHARS + 10),
        "longer than",
    ),
}

BAD: dict[str, tuple[str | bytes, str]] = {
    **{row: (f"{header}{row}\n", reason) for header, rows in BAD_ROWS.items() for row, reason in rows.items()},
    **{fields: (f"{{{fields}}}\n", reason) for fields, reason in BAD_JSON.items()},
    **BAD_FILES,
}


@pytest.mark.parametrize("what", BAD, ids=lambda what: what[:60])
def test_what_is_no_trace_is_refused_with_file_and_reason(tmp_path: Path, what: str) -> None:
    content, reason = BAD[what]
    path = write(tmp_path, content)
    with pytest.raises(ConfigError) as caught:
        scan_trace(path)
    assert str(path) in str(caught.value)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 500
    if "holds no request" not in reason:
        with pytest.raises(ConfigError):
            requests(path)


def test_missing_folders_and_forbidden_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (tmp_path / "nowhere.csv", "there is no such file; name a request trace"),
        (tmp_path, "this is a folder"),
        (Path("/proc/self/mem"), "cannot be read"),
        (tmp_path / "pipe", "save it to a file first"),
    ):
        with pytest.raises(ConfigError, match=reason):
            scan_trace(path)


def test_a_file_that_may_not_be_read_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(path: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    path = write(tmp_path, PAIR + "1,2\n")
    monkeypatch.setattr(Path, "open", forbidden)  # root may read everything
    with pytest.raises(ConfigError, match="chmod u\\+r"):
        scan_trace(path)


def test_a_line_of_ten_million_characters_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = write(tmp_path, PAIR + "1" * 10_000_000 + ",5\n")
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match=r"line 2: longer than 1,048,576 bytes"):
            scan_trace(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * MAX_LINE_BYTES
    for start in ("x" * 10_000_000, "{" + " " * 10_000_000):
        with pytest.raises(ConfigError, match="line 1: longer"):
            scan_trace(write(tmp_path, start))


@pytest.mark.parametrize("seed", range(200))
def test_random_bytes_are_a_trace_or_a_config_error(tmp_path: Path, seed: int) -> None:
    """Cut, mix and damage good files; nothing but ConfigError may come out."""
    rng = random.Random(seed)
    good = [
        (SIZE + HEADER + "0,374,44,,\n4.5,396,0,s1,1-3 7\n").encode(),
        (AZURE + "2023-11-16 18:15:46.6805900,374,44\n").encode(),
        (BURST + "5,ChatGPT,472,18\n").encode(),
        b'{"timestamp": 0, "input_length": 6758, "output_length": 500}\n' * 3,
        json.dumps([conversation("a" * 40, "b" * 10)]).encode(),
        GZIPPED,
    ]
    data = bytearray(rng.choice(good))
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(4):
            case 0:
                data[at : at + 1] = rng.randbytes(1)
            case 1:
                data[at:at] = rng.choice([b",", b'"', b"\n", b"-", b"e9", b"[", b"{", b"nan", b"\xff", b"9" * 30])
            case 2:
                del data[at : at + rng.randint(1, 20)]
            case _:
                data[at:at] = rng.choice(good)[: rng.randint(1, 60)]
    path = write(tmp_path, bytes(data))
    try:
        summary = scan_trace(path)
    except ConfigError:
        return
    found = requests(path)
    assert summary.n_requests == len(found) >= 1
    assert all(r.prompt_tokens >= 1 and r.output_tokens >= 0 for r in found)


def test_shapes_by_name_and_by_numbers() -> None:
    assert find_shape("llama-3-8b").token_bytes == 2 * 32 * 8 * 128 * 2 == 131_072
    assert find_shape("Llama-3-70B").token_bytes == 2 * 80 * 8 * 128 * 2
    assert find_shape("qwen3-0.6b").token_bytes == 2 * 28 * 8 * 128 * 2
    assert find_shape("smollm2-135m").token_bytes == 2 * 30 * 3 * 64 * 2
    assert find_shape("deepseek-v3").token_bytes == 61 * (64 + 512) * 2
    assert find_shape("32x8x128").layers == find_shape("llama-3-8b").layers
    assert find_shape("2x3x5:fp32").token_bytes == 2 * 2 * 3 * 5 * 4
    assert find_shape("2x3x5:fp8").token_bytes == 2 * 2 * 3 * 5


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("100000x8x128:bf16", "layers is 100000; it must lie between 1 and 9,999"),
        ("32x10000x128", "heads is 10000; it must"),
        ("32x8x100000", "size of a head is 100000"),
        ("0x8x128", "layers is 0"),
        (f"{'9' * 5000}x8x128", "layers is 99999999999999999999; it must"),
        (f"{'0' * 5000}9x8x128", "layers is 00000"),
    ],
)
def test_a_shape_of_senseless_numbers_says_which(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        find_shape(text)


@pytest.mark.parametrize("text", ["", "gpt", "0x8x128", "32x8", "32x8x128:bf15", "99999x8x128", "32x8x128:", "-1x8x8"])
def test_unknown_shapes_are_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(ConfigError, match=r"llama-3-8b|between 1 and|bf16"):
        find_shape(text)
