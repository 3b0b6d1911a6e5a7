"""From a model in memory to a server that runs until it is told to end."""

from __future__ import annotations

import asyncio
import logging.config
import os
import socket
from collections.abc import Callable
from dataclasses import asdict

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import vmem_kv
from vmem_kv.engine.async_engine import AsyncEngine
from vmem_kv.engine.config import EngineConfig
from vmem_kv.engine.engine import Engine
from vmem_kv.server.auth import Hosts, Keys
from vmem_kv.server.limits import Limits
from vmem_kv.server.log import check_level, log_config, note
from vmem_kv.server.metrics import Metrics
from vmem_kv.server.preload import Preload
from vmem_kv.server.run import Server, leave_at_once
from vmem_kv.server.service import Service
from vmem_kv.server.session_folder import SessionFolder
from vmem_kv.server.text import TextCodec


def serve_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: EngineConfig,
    *,
    name: str,
    limits: Limits,
    keys: Keys,
    hosts: Hosts,
    listener: socket.socket,
    log_level: str = "info",
    folder: SessionFolder | None = None,
    preload: Preload | None = None,
    on_started: Callable[[], None] = lambda: None,
) -> int:
    """Serve a model in the main thread; return the process's exit code. A second signal ends the process itself.

    Args:
        model: What to serve.
        tokenizer: The model's.
        config: How the engine runs.
        name: What clients call the model.
        limits: What clients may ask.
        keys: Who may ask.
        hosts: By which names.
        listener: A socket from `run.bind`.
        log_level: One of debug, info, warning, error.
        folder: Where clients may save sessions; None for nowhere.
        preload: What to begin with.
        on_started: Called once connections are accepted.

    Raises:
        ConfigError: The model cannot be served this way.
        VmemError: Something cannot be loaded.
    """
    check_level(log_level)
    preload = preload or Preload()
    preload.check(keys)
    inner = Engine(model, tokenizer, config)
    try:
        preload.into(inner, keys)
        if folder is not None:
            inner.saved.require()
            inner.saved.identity()  # every weight is read now, and not while a client waits
    except BaseException:
        inner.close()
        raise
    engine = AsyncEngine(inner)
    logging.config.dictConfig(log_config(log_level.upper()))
    codec = TextCodec(tokenizer, engine.engine.max_tokens_alone)
    service = Service(engine, codec, name, limits, keys, hosts, Metrics(engine), folder)
    note(
        "starting",
        version=vmem_kv.__version__,
        pid=os.getpid(),
        model=name,
        layout=engine.engine.memory.choice.why,
        max_model_len=engine.engine.max_model_len,
        max_tokens_alone=engine.engine.max_tokens_alone,
        engine=asdict(config),
        limits=asdict(limits),
        has_keys=bool(keys),
        n_loaded_sessions=len(preload.sessions),
        n_loaded_prompts=len(preload.prompts),
        saves_sessions=folder is not None,
    )
    engine.start()
    server = Server(service, listener)
    code = asyncio.run(server.run(on_started))
    if server.is_hurried:
        leave_at_once(code)
    return code
