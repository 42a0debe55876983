"""Bearer tokens: a file of their hashes, and the check of a client's token.

A token is NAME.SECRET, and the file has the scrypt hash (RFC 7914) of each secret. A token is hashed once. Then its
keyed digest is remembered, so that a call costs one digest.
"""

import asyncio
import base64
import fcntl
import hashlib
import hmac
import json
import math
import os
import re
import secrets
import stat
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from serving.access.files import AccessError, Renewed

#: The roles: calls that classify or describe models; loading and unloading; and the page of metrics.
PREDICT, ADMIN, METRICS = ROLES = ("predict", "admin", "metrics")
#: The longest token that is looked at.
MAX_TOKEN_CHARACTERS = 512
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SECRET_BYTES = 32
# scrypt's costs: 8 MiB and some 20 ms. A secret has 256 random bits, so that guesses are hopeless even without them.
_N, _R, _P = 2**13, 8, 1
_SALT_BYTES = 16
_HASH_BYTES = 32
_MAX_COST = 2**19  # N * R * P of a hash in a file: 64 MiB if P is 1, and less than a second
_MAX_LIMIT = 10**9  # of calls in flight, and of calls a second
_MAX_WRONG = 4096  # tokens that are remembered
_MAX_CHECKS = 64  # that wait or run
_MAX_CHECKS_OF_PEER = 4


class TooManyChecks(Exception):
    """Too many tokens that are not known yet came at once."""


@dataclass(frozen=True)
class Identity:
    """A client that may call: its name, its roles, and its own limits or None for the server's.

    calls: the most calls in flight. rate: the most calls a second.
    """

    name: str
    roles: frozenset[str]
    calls: int | None = None
    rate: float | None = None


@dataclass(frozen=True)
class TokenEntry:
    """An entry of the token file.

    name: of the client. roles: some of ROLES. hash: of its secret. certificate: the common name of a client's
    certificate, in place of a hash. calls, rate: see Identity. Raises AccessError for a wrong value.
    """

    name: str
    roles: tuple[str, ...]
    hash: str = ""
    certificate: str = ""
    calls: int | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise AccessError(f"name: {self.name!r}; expected 1 to 64 letters, digits, - or _")
        if not self.roles or not set(self.roles) <= set(ROLES):
            raise AccessError(f"roles of {self.name}: {', '.join(map(str, self.roles))}; expected some of {ROLES}")
        if bool(self.hash) == bool(self.certificate) or not isinstance(self.certificate, str):
            raise AccessError(f"{self.name}: expected a hash or the common name of a certificate")
        if not self.certificate.isprintable():
            raise AccessError(f"certificate of {self.name}: {self.certificate!r}; expected printable characters")
        for field, value in (("calls", self.calls), ("rate", self.rate)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value <= _MAX_LIMIT):
                raise AccessError(f"{field} of {self.name}: {value!r}; expected a number above 0, at most {_MAX_LIMIT}")
        if self.hash:
            _parts(self.hash)

    @property
    def identity(self) -> Identity:
        return Identity(self.name, frozenset(self.roles), self.calls, self.rate)


#: The entries of a file by name.
Entries = Mapping[str, TokenEntry]


def read_entries(path: Path) -> list[TokenEntry]:
    """Return the entries of a token file. Raises AccessError, or OSError if the file cannot be read."""
    try:
        found = json.loads(path.read_bytes())
        entries = [_entry(one) for one in found["tokens"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        reason = str(error) if isinstance(error, AccessError) else "expected what python -m serving.tokens writes"
        raise AccessError(f"tokens: {str(path)!r}: {reason}") from error
    for what in ("name", "certificate"):  # otherwise a client would have the roles of either entry
        values = [value for one in entries if (value := getattr(one, what))]
        if len(set(values)) < len(values):
            raise AccessError(f"tokens: {str(path)!r}: a {what} comes twice")
    return entries


def write_entries(path: Path, entries: Iterable[TokenEntry]) -> None:
    """Write a token file in one step. Raises OSError.

    Only its owner can read a new file. An earlier file's owner and permissions stay, so that the server that reads it
    can read the new one, and a link to it stays a link.
    """
    kept = [{name: value for name, value in asdict(one).items() if value not in (None, "")} for one in entries]
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    temporary.touch(mode=0o600, exist_ok=False)
    try:
        temporary.write_text(json.dumps({"tokens": kept}, indent=2) + "\n")
        if path.exists():
            before, now = path.stat(), temporary.stat()
            if (before.st_uid, before.st_gid) != (now.st_uid, now.st_gid):
                os.chown(temporary, before.st_uid, before.st_gid)
            temporary.chmod(stat.S_IMODE(before.st_mode))
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes from changing a token file, between its reading and its writing. Raises OSError."""
    folder = os.open(Path(os.path.realpath(path)).parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def new_token(name: str) -> tuple[str, str]:
    """Return a new token for a client, and the hash of its secret."""
    secret = secrets.token_urlsafe(_SECRET_BYTES)
    salt = secrets.token_bytes(_SALT_BYTES)
    coded = [base64.b64encode(part).decode() for part in (salt, _scrypt(secret, salt, _N, _R, _P))]
    return f"{name}.{secret}", "$".join(("scrypt", str(_N), str(_R), str(_P), *coded))


class Tokens:
    """The tokens of a file, which is read again when it changes. Any thread may use it.

    Raises AccessError, or OSError if the file cannot be read.
    """

    def __init__(self, path: str) -> None:
        self._entries: Renewed[Entries] = Renewed(
            "the tokens", [path], lambda: {one.name: one for one in read_entries(Path(path))}
        )
        self._key = secrets.token_bytes(32)
        self._known = self._entries.content  # the entries to which the two below belong
        self._right: dict[bytes, TokenEntry] = {}
        self._wrong: OrderedDict[bytes, Entries] = OrderedDict()  # with the entries among which none fitted
        self._pool = ThreadPoolExecutor(1, "tokens")
        self._lock = threading.Lock()
        self._checks: Counter[str] = Counter()  # that wait or run, by peer
        self._under_way: dict[bytes, Future[TokenEntry | None]] = {}  # the same checks, by the token's digest
        _, self._unused_hash = new_token("unknown")

    def renew(self) -> None:
        """Read the file now if it has changed."""
        self._entries.check()

    def of_certificate(self, subject: str) -> Identity | None:
        """Return the identity of a certificate's common name, or None."""
        entries = self._entries.content.values()
        return next((one.identity for one in entries if subject and one.certificate == subject), None)

    def remembered(self, token: str) -> tuple[bool, Identity | None]:
        """Return if a token was checked before, and its identity, None if it is wrong."""
        entries, digest = self._entries.content, self._digest(token)
        if entries is not self._known:
            self._forget_old(entries)
        if (entry := self._right.get(digest)) and entries.get(entry.name) == entry:
            return True, entry.identity
        return self._wrong.get(digest) is entries, None

    def _forget_old(self, entries: Entries) -> None:
        """Keep only the tokens that are right in the newest file. A check that ends just now may be forgotten too."""
        self._known = entries
        self._wrong = OrderedDict()
        right = list(self._right.items())
        self._right = {digest: entry for digest, entry in right if entries.get(entry.name) == entry}

    async def check(self, token: str, peer: str) -> Identity | None:
        """Return the identity of a token, or None if it is wrong. peer: of ``client_of``.

        Raises TooManyChecks.
        """
        known, identity = self.remembered(token)
        if known:
            return identity
        entry = await asyncio.shield(asyncio.wrap_future(self.begin_check(token, peer)))
        return entry.identity if entry else None

    def begin_check(self, token: str, peer: str) -> "Future[TokenEntry | None]":
        """Return the check of a token, which all calls with this token share, and which none of them ends.

        Raises TooManyChecks.
        """
        digest = self._digest(token)
        with self._lock:
            if under_way := self._under_way.get(digest):
                return under_way
            if self._checks.total() >= _MAX_CHECKS or self._checks[peer] >= _MAX_CHECKS_OF_PEER:
                raise TooManyChecks
            self._checks[peer] += 1
            check = self._under_way[digest] = self._pool.submit(self._entry_of, token)
        check.add_done_callback(lambda _: self._end_check(digest, peer))
        return check

    def _end_check(self, digest: bytes, peer: str) -> None:
        with self._lock:
            del self._under_way[digest]
            self._checks[peer] -= 1
            if not self._checks[peer]:
                del self._checks[peer]

    def _entry_of(self, token: str) -> TokenEntry | None:
        """Return the entry of a token. An unknown name takes as long as a wrong secret."""
        name, _, secret = token.partition(".")
        entries, digest = self._entries.content, self._digest(token)
        entry = entries.get(name)
        n, r, p, salt, expected = _parts(entry.hash if entry and entry.hash else self._hash_in_place_of(name, entries))
        same = hmac.compare_digest(_scrypt(secret, salt, n, r, p), expected)
        if entry and entry.hash and same:
            self._right[digest] = entry
            return entry
        wrong = self._wrong
        wrong[digest] = entries
        while len(wrong) > _MAX_WRONG:
            wrong.popitem(last=False)
        return None

    def _hash_in_place_of(self, name: str, entries: Entries) -> str:
        """Return a hash for a name that has none: with the costs of an entry, always of the same one for a name."""
        hashes = [entry.hash for entry in entries.values() if entry.hash] or [self._unused_hash]
        return hashes[int.from_bytes(self._digest(name)) % len(hashes)]

    def _digest(self, token: str) -> bytes:
        """Return a digest whose lookup tells nothing about the token by its time, since its key is secret."""
        return hmac.digest(self._key, token.encode(errors="surrogateescape"), "sha256")


def _entry(fields: Mapping[str, Any]) -> TokenEntry:
    return TokenEntry(**{**fields, "roles": tuple(fields["roles"])})


def _scrypt(secret: str, salt: bytes, n: int, r: int, p: int) -> bytes:
    coded = secret.encode(errors="surrogateescape")
    return hashlib.scrypt(coded, salt=salt, n=n, r=r, p=p, maxmem=2**28, dklen=_HASH_BYTES)


def _parts(text: str) -> tuple[int, int, int, bytes, bytes]:
    """Return scrypt's costs n, r and p, the salt and the hash. Raises AccessError."""
    try:
        kind, n, r, p, *coded = text.split("$")
        salt, expected = (base64.b64decode(part, validate=True) for part in coded)
        costs = int(n), int(r), int(p)
        right = kind == "scrypt" and costs[0] > 1 and min(costs) > 0 and math.prod(costs) <= _MAX_COST
        if not right or costs[0].bit_count() != 1 or len(expected) != _HASH_BYTES:
            raise ValueError(text)
    except (ValueError, AttributeError) as error:
        raise AccessError("a hash is not scrypt$N$R$P$SALT$HASH") from error
    return *costs, salt, expected
