"""Good traffic amid garbage, more demand than memory, servers opened and closed: nothing changes, nothing is left."""

from __future__ import annotations

import concurrent.futures
import gc
import json
import random
from pathlib import Path
from typing import Any

from ..held import Held
from .harness import PATHS, Running, events, good, serving, text_of, until
from .test_bad_input import RAW, ROWS
from .test_generation import pieces


def test_good_streams_are_the_same_amid_garbage(running: Running) -> None:
    rng = random.Random(11)
    asks: list[tuple[str, dict[str, Any]]] = [
        (endpoint, {"max_tokens": 20 + i, "temperature": i % 2 * 1.2, "seed": i, "stream": True})
        for i in range(4)
        for endpoint in PATHS
    ]

    def stream(item: tuple[str, dict[str, Any]]) -> str:
        return pieces(item[0], events(running.post(item[0], **item[1]).text))

    def garbage(_: int) -> int:
        _, endpoints, fields, *_rest = rng.choice(ROWS)
        endpoint = rng.choice(endpoints)
        body = rng.choice(RAW)[1] if rng.random() < 0.2 else json.dumps(good(endpoint, **fields)).encode()
        headers = {"Content-Type": "application/json"}
        return running.client.post(PATHS[endpoint], content=body, headers=headers).status_code

    alone = [stream(item) for item in asks]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        bad = pool.map(garbage, range(150))
        again = list(pool.map(stream, asks * 3))
        statuses = set(bad)
    assert again == alone * 3
    assert statuses <= {400, 404}


def test_more_demand_than_memory_gives_the_same_answers(tiny_model_folder: Path) -> None:
    asks = [good(e, max_tokens=60 + i, ignore_eos=True) for i in range(6) for e in PATHS]

    def ask(running: Running, body: dict[str, Any]) -> str:
        endpoint = "chat" if "messages" in body else "completions"
        response = running.client.post(PATHS[endpoint], json=body)
        assert response.status_code == 200, response.text
        return text_of(endpoint, response.json())

    with serving(tiny_model_folder, max_num_seqs=6) as running:
        alone = [ask(running, body) for body in asks]
        longest = running.engine.memory.n_pages(80) * running.engine.memory.pool.page_bytes
    with serving(tiny_model_folder, max_num_seqs=6, max_bytes=2 * longest) as running:
        with concurrent.futures.ThreadPoolExecutor(len(asks)) as pool:
            together = list(pool.map(lambda body: ask(running, body), asks))
        assert together == alone
        running.check_idle()


def test_a_server_leaves_no_thread_and_no_descriptor(tiny_model_folder: Path) -> None:
    def live() -> Held:
        gc.collect()
        return Held.now()

    def once() -> None:
        with serving(tiny_model_folder) as running:
            assert running.post("chat", stream=True).status_code == 200

    once()
    before = live()
    for _ in range(3):
        once()
    until(lambda: not live().beyond(before))  # nobody waits for the text's thread, which ends by itself
