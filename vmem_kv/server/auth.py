"""Who may ask: the Host header's names, and API keys.

Guarantees: a key is compared in constant time, and never stored, logged or echoed in clear. Clients of different keys
are different domains: no page goes from one to the other without being scrubbed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
from collections.abc import Sequence

from vmem_kv.errors import ConfigError
from vmem_kv.server.errors import ApiError

MIN_KEY_CHARACTERS = 8
MAX_HEADER_CHARACTERS = 4_096
_OPEN_PATHS = frozenset({"/health", "/ready"})
_BROWSER_PATHS = frozenset({"/dashboard", "/dashboard/data"})


class Keys:
    """The API keys, as digests. Without any, everybody may ask.

    Raises:
        ConfigError: A key is too short or not plain ASCII.
    """

    def __init__(self, keys: Sequence[str] = ()) -> None:
        for key in keys:
            if len(key) < MIN_KEY_CHARACTERS or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError(f"an API key must have {MIN_KEY_CHARACTERS} or more printable ASCII characters")
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    @property
    def domains(self) -> list[str]:
        """Everybody whose requests may come; one domain where there are no keys."""
        return [_domain(index) for index in range(len(self._digests))] or [""]

    def digest_of(self, domain: str) -> bytes:
        """Return a key's digest by its domain, for what outlasts the order of keys; nothing where there are no keys."""
        return dict(zip(self.domains, self._digests, strict=False)).get(domain, b"")

    def domain(self, path: str, authorization: Sequence[str]) -> str:
        """Return whose request it is.

        Args:
            path: Of the request.
            authorization: The Authorization headers.

        Raises:
            ApiError: 401: there is no valid key.
        """
        if not self._digests or path in _OPEN_PATHS:
            return ""
        is_browser = path in _BROWSER_PATHS
        headers = {"WWW-Authenticate": 'Basic realm="vmem_kv"' if is_browser else "Bearer"}
        given = _key_of(authorization, is_browser)
        if not given:
            text = (
                "You didn't provide an API key. You need to provide your API key in an Authorization header using "
                "Bearer auth (i.e. Authorization: Bearer YOUR_KEY)."
            )
            raise ApiError(401, text, headers=headers)
        digest = hashlib.sha256(given.encode()).digest()
        found = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them, always
        if not any(found):
            raise ApiError(401, "Incorrect API key provided.", code="invalid_api_key", headers=headers)
        return _domain(found.index(True))


def _domain(index: int) -> str:
    return f"key-{index}"


def _key_of(authorization: Sequence[str], is_browser: bool) -> str:
    """Return the key, or nothing. A browser asks its user for a name and a password: the password is the key."""
    if len(authorization) != 1 or len(authorization[0]) > MAX_HEADER_CHARACTERS:
        return ""
    scheme, _, value = authorization[0].partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic" and is_browser:
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""


def is_loopback(host: str) -> bool:
    """Whether nobody outside this machine reaches a server bound there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Hosts:
    """The names by which this server may be called. A web page that points its own name at us is none of them.

    Args:
        bound: Where the server listens. On loopback only loopback's names count; elsewhere the key protects.
        extra: Further names.
    """

    def __init__(self, bound: str, extra: Sequence[str] = ()) -> None:
        self._is_any = not is_loopback(bound)
        self._names = {name.lower() for name in extra}

    def check(self, header: str) -> None:
        """Check the Host header.

        Raises:
            ApiError: 421: it is a name that is not ours.
        """
        name = header.strip().lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
        if not (self._is_any or name in self._names or is_loopback(name)):
            raise ApiError(421, "This server does not answer to this Host name.", code="invalid_host")
