"""What a server has in host memory from its start: sessions and prompts from the operator's files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vmem_kv.engine.engine import Engine
from vmem_kv.errors import ConfigError
from vmem_kv.server.auth import Keys


@dataclass(frozen=True, slots=True)
class Preload:
    """What to load.

    Attributes:
        sessions: Names, and the files that they are to go on with.
        prompts: Files that every client's requests may begin with.
    """

    sessions: tuple[tuple[str, Path], ...] = ()
    prompts: tuple[Path, ...] = ()

    @classmethod
    def of(cls, sessions: Sequence[str], prompts: Sequence[Path]) -> Preload:
        """Read what was typed: `NAME=FILE` for each session, a file for each prompt.

        Raises:
            ConfigError: There is no name, or no file.
        """
        pairs = [text.partition("=") for text in sessions]
        for text, (name, _, file) in zip(sessions, pairs, strict=True):
            if not name or not file:
                raise ConfigError(f"--load-session {text} has no name or no file; write NAME=FILE")
        return cls(tuple((name, Path(file)) for name, _, file in pairs), tuple(prompts))

    def check(self, keys: Keys) -> None:
        """Hold it against the keys.

        Raises:
            ConfigError: There are sessions, and several keys whose they could be.
        """
        if self.sessions and len(keys.domains) > 1:
            raise ConfigError(
                "--load-session is given with several API keys, and a session belongs to one of them; let that client "
                "load it (--session-folder)"
            )

    def into(self, engine: Engine, keys: Keys) -> None:
        """Load everything, before the engine is used.

        Raises:
            VmemError: What cannot be loaded, and why; see `Engine.load_session`.
        """
        for path in self.prompts:
            engine.load_prompt(path, None)
        for name, path in self.sessions:
            engine.load_session(name, path, keys.domains[0])
