"""What operators see: metrics, logs and the dashboard, which never show what clients wrote."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from vmem_kv.server.dashboard import N_SAMPLES, History
from vmem_kv.server.log import JsonFormatter
from vmem_kv.server.metrics import Metrics

from .harness import PATHS, Running, good, serving, until

SECRET = "sk-secret-0123456789"


def numbers(running: Running) -> dict[str, float]:
    text = running.client.get("/metrics").text
    return {
        sample.name + "".join(f"/{v}" for v in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_are_the_engines_numbers(running: Running) -> None:
    before = numbers(running)
    running.post("chat", max_tokens=5)
    running.post("chat", max_tokens=0)
    running.client.get("/no/such/route")
    running.check_idle()  # the mapper has come to its end, too
    after = numbers(running)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grown("vmem_kv_generated_tokens_total") == 5
    assert grown("vmem_kv_prompt_tokens_total") == 5
    assert grown("vmem_kv_requests_total") == 1
    assert grown("vmem_kv_time_to_first_token_seconds_count") == 1
    assert grown("vmem_kv_request_seconds_count") == 1
    assert grown("vmem_kv_answers_finished_total/length") == 1
    assert grown("vmem_kv_http_responses_total//v1/chat/completions/200") == 1
    assert grown("vmem_kv_http_responses_total//v1/chat/completions/400") == 1
    assert grown("vmem_kv_http_responses_total/other/404") == 1
    stats = running.engine.memory.cache.stats()
    assert after["vmem_kv_pages/warm"] == stats.n_warm_pages
    assert after["vmem_kv_pages/live"] == 0
    assert after["vmem_kv_driver_calls_total/map"] == stats.driver_calls["map"]


def test_labels_do_not_grow_with_what_clients_send(running: Running) -> None:
    n_before = len(numbers(running))
    for i in range(30):
        running.client.get(f"/nowhere/{i}")
        running.client.get(f"/v1/models/{i}")
        running.client.request(f"METHOD{i}", "/health")
    assert len(numbers(running)) <= n_before + 8


def test_a_log_line_is_one_object_without_prompts_keys_or_control_characters(
    tiny_model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "vmem_kv")
    caplog.set_level(logging.DEBUG, "uvicorn")
    with serving(tiny_model_folder, keys=(SECRET,)) as running:
        headers = {"Authorization": f"Bearer {SECRET}"}
        caplog.clear()
        for endpoint in PATHS:
            for fields in ({}, {"stream": True}, {"model": "x\r\nINFO forged \x1b[31m"}, {"n": 0}, {"user": "u" * 900}):
                running.client.post(PATHS[endpoint], json=good(endpoint, **fields), headers=headers)
        running.client.get("/v1/nope%0d%0aforged", headers=headers)
        running.client.get("/v1/models", headers={"Authorization": f"Bearer {SECRET}x"})
    lines = [JsonFormatter().format(record) for record in caplog.records]  # the last one is written by now
    requests = [line for line in map(json.loads, lines) if line["message"] == "request"]
    assert len(requests) == 12
    assert [r["status"] for r in requests].count(200) == 4
    assert all(re.fullmatch(r"req_[0-9a-f]{32}", r["request_id"]) for r in requests)
    assert requests[0]["n_generated_tokens"] == 8
    for line in lines:
        assert not re.search(r"[\x00-\x1f\x7f]", line)
        assert not re.search(r"sky|blue|forged|sk-secret|Traceback", line)


def test_a_traceback_is_part_of_its_one_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        record = logging.LogRecord("a", logging.ERROR, __file__, 1, "it failed", None, (ValueError, error, None))
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert "two\nlines" in json.loads(line)["traceback"]


def test_a_bug_in_a_route_is_a_500_in_openais_form(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    codec = running.service.codec

    async def broken(*_: object) -> None:
        raise LookupError("nobody foresaw this")

    stock = codec.decode
    codec.decode = broken  # type: ignore[method-assign,assignment]
    try:
        response = running.client.post("/detokenize", json={"tokens": [1]})
    finally:
        codec.decode = stock  # type: ignore[method-assign]
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "foresaw" not in response.text
    until(lambda: "nobody foresaw this" in caplog.text)
    assert running.post("chat").status_code == 200


def test_the_dashboard_is_one_page_that_loads_nothing_else(running: Running) -> None:
    page = running.client.get("/dashboard")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    addresses = re.findall(r"https?://[^\s\"'`]+", page.text)
    assert set(addresses) == {"http://www.w3.org/2000/svg"}  # a name, which nothing loads
    assert not re.search(r"<script[^>]+src|<link[^>]+href=\"(?!data:)|@import|innerHTML", page.text)
    assert "prefers-color-scheme: dark" in page.text


def test_the_page_reads_only_fields_that_the_data_has(running: Running) -> None:
    running.post("chat")
    until(lambda: bool(running.client.get("/dashboard/data").json()["samples"]))
    data = running.client.get("/dashboard/data").json()
    page = running.client.get("/dashboard").text
    read = set(re.findall(r"\bdata\.(\w+)", page))
    assert read >= {"slots", "samples", "pages", "span_bytes", "token_bytes"}
    assert read <= set(data)
    assert set(re.findall(r"s => s\.(\w+)", page)) <= set(data["samples"][0]) | {"mapped_bytes", "state"}
    assert set(re.findall(r"\bslot\.(\w+)", page)) <= set(data["slots"][0])
    assert set(re.findall(r"\blast\.(\w+)", page)) <= set(data["samples"][0])
    assert len(data["slots"]) == 4 + 12  # of which twelve are there for cached prefixes
    assert sum(slot["mapped_bytes"] for slot in data["slots"]) >= data["mapped_bytes"] > 0
    assert (data["pages"]["warm"] + data["pages"]["cached"]) * data["page_bytes"] == data["mapped_bytes"]


def test_history_has_rates_and_an_end(running: Running) -> None:
    metrics = Metrics(running.service.engine)
    history = History(metrics)
    stats = running.engine.snapshot()
    history.add(stats, 10.0)
    running.post("chat", max_tokens=6)
    metrics.saw_first_token(0.25)
    metrics.saw_first_token(0.75)
    history.add(running.engine.snapshot(), 12.0)
    first, second = history.samples()
    assert first["generated_tokens_per_s"] == 0
    assert second["generated_tokens_per_s"] == 3
    assert second["first_token_s"] == 0.5
    for i in range(N_SAMPLES + 5):
        history.add(stats, 13.0 + i)
    assert len(history.samples()) == N_SAMPLES
    assert history.samples()[-1]["first_token_s"] is None
