"""Tests of tokens, certificates' files, and the limits of clients, without a server of models."""

import asyncio
import gc
import os
import resource
import stat
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

import serving.access.files
import serving.access.tokens as tokens_module
from serving import tokens as command
from serving.access.certificates import Certificates
from serving.access.files import AccessError
from serving.access.guard import ClientLimits, Guard, authorization_of
from serving.access.quotas import Quotas
from serving.access.tokens import Identity, TokenEntry, Tokens, TooManyChecks, new_token, read_entries, write_entries
from serving.errors import Forbidden, Unauthenticated
from serving.rpc.status import status_of
from serving.server import Server, StartError
from serving.settings import read
from serving.transport import grpcio_calls
from serving.transport.headers import Status
from serving.transport.methods import UNDECIDED, CallbackMethod, Peer, peer_of
from tests.certificates import make_all, make_certificate
from tests.conftest import settings
from tests.raw_client import wait_for

PEER = Peer("10.0.0.1")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tokens.json"


@pytest.fixture(autouse=True)
def read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make each use read the files again."""
    monkeypatch.setattr(serving.access.files, "_CHECK_SECONDS", 0)


def add(file: Path, name: str, *roles: str, **limits: float) -> str:
    token, hash_ = new_token(name)
    entries = read_entries(file) if file.exists() else []
    entry = TokenEntry(name, roles or ("predict",), hash_, calls=limits.get("calls"), rate=limits.get("rate"))  # type: ignore[arg-type]
    write_entries(file, [*entries, entry])
    return token


def guard_of(tokens: Tokens | None, mutual: bool = False) -> Guard:
    return Guard(tokens, mutual, ClientLimits(), lambda *parts: status_of(parts[-1]), time.monotonic)


def test_the_command_makes_lists_and_removes_tokens_and_keeps_no_secret(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["add", str(file), "alice", "--calls", "5", "--rate", "2.5"]) == 0
    token = capsys.readouterr().out.strip()
    assert command.main(["add", str(file), "ops", "--role", "metrics", "--role", "admin"]) == 0
    assert command.main(["add", str(file), "robot", "--certificate", "robot.example"]) == 0
    capsys.readouterr()
    assert token.startswith("alice.")
    assert token.removeprefix("alice.") not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert command.main(["list", str(file)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "alice predict calls=5 rate=2.5",
        "ops metrics,admin",
        "robot predict certificate=robot.example",
    ]
    assert command.main(["add", str(file), "alice"]) == 1
    assert "has a client of this name" in capsys.readouterr().err
    assert command.main(["remove", str(file), "alice"]) == 0
    assert command.main(["remove", str(file), "alice"]) == 1
    assert command.main(["list", str(file.parent / "none")]) == 1
    assert command.main(["add", str(file), "a b"]) == 1
    assert "name: 'a b'; expected 1 to 64 letters" in capsys.readouterr().err
    assert sorted(path.name for path in file.parent.iterdir()) == [file.name]


def test_commands_at_the_same_time_lose_no_token(file: Path) -> None:
    barrier = threading.Barrier(4)

    def run(name: str) -> int:
        barrier.wait(20)
        return command.main(["add", str(file), name])

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, "abcd")) == [0] * 4
    assert sorted(entry.name for entry in read_entries(file)) == list("abcd")
    assert list(file.parent.iterdir()) == [file]


def test_a_changed_file_keeps_its_permissions_its_owner_and_the_link_to_it(file: Path) -> None:
    add(file, "alice")
    file.chmod(0o640)
    link = file.with_name("link")
    link.symlink_to(file.name)
    if os.geteuid() == 0:
        os.chown(file, 12345, 12346)
    before = file.stat()
    assert command.main(["add", str(link), "bob"]) == 0
    after = file.stat()
    assert link.is_symlink()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert [entry.name for entry in read_entries(file)] == ["alice", "bob"]


def test_a_certificate_belongs_to_one_client(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["add", str(file), "a", "--certificate", "robot"]) == 0
    assert command.main(["add", str(file), "b", "--role", "admin", "--certificate", "robot"]) == 1
    assert "robot: the file has a client with this certificate" in capsys.readouterr().err
    assert command.main(["add", str(file), "b", "--certificate", "robot\nc admin"]) == 1
    write_entries(file, [TokenEntry(name, ("predict",), certificate="robot") for name in "ab"])
    with pytest.raises(AccessError, match="a certificate comes twice"):
        Tokens(str(file))


def test_a_token_has_its_identity_and_nothing_else_has_one(file: Path) -> None:
    token = add(file, "alice", "predict", "metrics", calls=3)
    other = add(file, "bob")
    tokens = Tokens(str(file))

    async def ask(text: str) -> str:
        identity = await tokens.check(text, "peer")
        return identity.name if identity else ""

    assert asyncio.run(ask(token)) == "alice"
    assert tokens.remembered(token)[0]
    for wrong in (
        token[:-1], token + "x", token.upper(), "alice." + other.partition(".")[2], "alice.", "alice", ".", "nobody.x",
    ):  # fmt: skip
        assert asyncio.run(ask(wrong)) == ""
        assert tokens.remembered(wrong) == (True, None)
    identity = asyncio.run(tokens.check(token, "peer"))
    assert identity
    assert (identity.roles, identity.calls, identity.rate) == (frozenset({"predict", "metrics"}), 3, None)


def test_a_changed_file_counts_at_once_and_a_broken_one_never(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = add(file, "alice")
    tokens = Tokens(str(file))
    assert asyncio.run(tokens.check(old, "peer"))
    new = new_token("alice")
    assert asyncio.run(tokens.check(new[0], "peer")) is None
    write_entries(file, [TokenEntry("alice", ("predict",), new[1])])
    assert asyncio.run(tokens.check(new[0], "peer")), "it was wrong before"
    assert asyncio.run(tokens.check(old, "peer")) is None
    file.write_text("{")
    assert asyncio.run(tokens.check(new[0], "peer"))
    file.unlink()
    assert asyncio.run(tokens.check(new[0], "peer"))
    assert "the tokens cannot be read again, the earlier ones stay in use" in caplog.text


def test_earlier_files_and_the_tokens_that_were_in_them_are_forgotten(file: Path) -> None:
    kept = add(file, "alice")
    tokens = Tokens(str(file))
    alice = read_entries(file)

    async def use(token: str) -> bool:
        return await tokens.check(token, "peer") is not None

    earlier = []
    for number in range(5):
        token, hashed = new_token("bob")
        write_entries(file, [*alice, TokenEntry("bob", ("predict",), hashed)])
        assert asyncio.run(use(kept)) and asyncio.run(use(token)) and not asyncio.run(use(f"bob.{number}"))
        earlier.append(weakref.ref(tokens._entries.content["bob"]))
    write_entries(file, alice)
    assert tokens.remembered(kept)[0]
    gc.collect()
    assert [one() for one in earlier] == [None] * 5


def test_a_full_disk_keeps_the_previous_tokens(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add(file, "alice")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size // 2, before[1]))
    try:
        assert command.main(["add", str(file), "bob"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert capsys.readouterr().out == "", "no token that is in no file"
    assert [entry.name for entry in read_entries(file)] == ["alice"]
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "null", '{"tokens": 3}', '{"tokens": [{}]}', '{"tokens": [{"name": "a", "roles": ["predict"]}]}',
        '{"tokens": [{"name": "a", "roles": ["king"], "certificate": "a"}]}',
        '{"tokens": [{"name": "a", "roles": [], "certificate": "a"}]}',
        '{"tokens": [{"name": "a", "roles": ["predict"], "hash": "scrypt$3$8$1$AA==$AA=="}]}',
        '{"tokens": [{"name": "a", "roles": ["predict"], "hash": "scrypt$1073741824$8$1$AA==$AA=="}]}',
        '{"tokens": [{"name": "a", "roles": ["predict"], "hash": 5}]}',
        '{"tokens": [{"name": "a", "roles": ["predict"], "certificate": "a", "calls": -1}]}',
        '{"tokens": [{"name": "a", "roles": ["predict"], "certificate": "a", "rate": true}]}',
        '{"tokens": [{"name": "a", "roles": ["predict"], "certificate": "a", "rate": Infinity}]}',
        f'{{"tokens": [{{"name": "a", "roles": ["predict"], "certificate": "a", "rate": {10**400}}}]}}',
        '{"tokens": [{"name": "a", "roles": ["predict"], "certificate": "a", "rat": 1}]}',
        f'{{"tokens": [{{"name": "a", "roles": ["predict"], "hash": "scrypt$131072$16$1$AA==${"A" * 43}="}}]}}',
        f'{{"tokens": [{{"name": "a", "roles": ["predict"], "hash": "scrypt$-2$8$-1$AA==${"A" * 43}="}}]}}',
        '{"tokens": [{"name": "a", "roles": ["predict"], "certificate": "a"}, '
        '{"name": "a", "roles": ["predict"], "certificate": "b"}]}',
        "[" * 10_000,
    ],
)  # fmt: skip
def test_a_file_that_is_wrong_is_refused_by_name(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(AccessError, match=f"tokens: '{file}'"):
        Tokens(str(file))


def test_many_wrong_tokens_of_one_peer_leave_room_for_another(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = add(file, "alice")
    tokens = Tokens(str(file))
    going = threading.Event()
    hash_ = tokens_module._scrypt

    def slow(*arguments: object) -> bytes:
        going.wait(20)
        return hash_(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tokens_module, "_scrypt", slow)

    async def main() -> None:
        flood = [asyncio.create_task(tokens.check(f"x.{index}", "bad")) for index in range(50)]
        honest = asyncio.create_task(tokens.check(token, "good"))
        await asyncio.sleep(0)
        going.set()
        outcomes = await asyncio.gather(*flood, return_exceptions=True)
        assert sum(isinstance(one, TooManyChecks) for one in outcomes) == 46
        assert (await honest) is not None
        assert await tokens.check("x.0", "bad") is None

    asyncio.run(main())


def test_the_door_begins_the_check_of_a_token_and_takes_no_message_with_one_too_many(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = add(file, "alice")
    tokens = Tokens(str(file))
    [method] = guard_of(tokens).protect({"/a/B": CallbackMethod(lambda data, context: None)}, "predict").values()

    def enter(token: str) -> Status | None:
        assert method.door
        return method.door(None, (("authorization", f"Bearer {token}"),), 0, PEER)

    assert enter(token) is UNDECIDED
    [check] = tokens._under_way.values()
    assert check.result(20)
    wait_for(lambda: not tokens._under_way)
    assert enter(token) is None
    monkeypatch.setattr(tokens_module, "_MAX_CHECKS_OF_PEER", 0)
    refused = enter("alice.guess")
    assert refused
    assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert enter(token) is None


def test_the_first_calls_with_a_token_share_one_check_that_none_of_them_ends(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = add(file, "alice")
    tokens = Tokens(str(file))
    going = threading.Event()
    hash_ = tokens_module._scrypt
    hashed: list[object] = []

    def slow(*arguments: object) -> bytes:
        hashed.append(arguments)
        going.wait(20)
        return hash_(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tokens_module, "_scrypt", slow)

    async def main() -> None:
        calls = [asyncio.create_task(tokens.check(token, "peer")) for _ in range(100)]
        await asyncio.sleep(0)
        for call in calls[:50]:
            call.cancel()
        going.set()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert [isinstance(one, asyncio.CancelledError) for one in outcomes] == [True] * 50 + [False] * 50
        assert {one.name for one in outcomes if isinstance(one, Identity)} == {"alice"}
        assert len(hashed) == 1
        assert not tokens._checks and not tokens._under_way

    asyncio.run(main())


def test_only_a_whole_bearer_header_counts(file: Path) -> None:
    token = add(file, "alice")
    guard = guard_of(Tokens(str(file)))
    asyncio.run(guard.admit(f"Bearer {token}", PEER, "predict"))
    asyncio.run(guard.admit(f"bearer {token}", PEER, "predict"))
    for wrong in (None, "", token, "Basic x", "Bearer", "Bearer ", f"Bearer {token} ", "Bearer " + "x" * 600):
        with pytest.raises(Unauthenticated, match=r"^authorization: .*expected Bearer and a token$") as caught:
            asyncio.run(guard.admit(wrong, PEER, "predict"))
        assert "alice" not in str(caught.value)
    with pytest.raises(Forbidden, match="alice may not call this method; it needs the role admin"):
        asyncio.run(guard.admit(f"Bearer {token}", PEER, "admin"))
    twice = authorization_of((("authorization", f"Bearer {token}"), ("authorization", f"Bearer {token}")))
    with pytest.raises(Unauthenticated):
        asyncio.run(guard.admit(twice, PEER, "predict"))


def test_a_wrong_secret_and_an_unknown_name_get_the_same_answer_after_the_same_work(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(file, "alice")
    guard = guard_of(Tokens(str(file)))
    hashed: list[tuple[int, ...]] = []
    hash_ = tokens_module._scrypt

    def counted(secret: str, salt: bytes, n: int, r: int, p: int) -> bytes:
        hashed.append((n, r, p))
        return hash_(secret, salt, n, r, p)

    monkeypatch.setattr(tokens_module, "_scrypt", counted)
    texts = []
    for wrong in ("alice.guess", "mallory.guess"):
        with pytest.raises(Unauthenticated) as caught:
            asyncio.run(guard.admit(f"Bearer {wrong}", PEER, "predict"))
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
    assert len(hashed) == 2
    assert hashed[0] == hashed[1]


def test_unknown_names_take_the_times_of_the_names_that_are_there(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {"cheap": 2**4, "dear": 2**12}
    entries = []
    for name, n in costs.items():
        parts = new_token(name)[1].split("$")
        parts[1] = str(n)
        entries.append(TokenEntry(name, ("predict",), "$".join(parts)))
    write_entries(file, entries)
    tokens = Tokens(str(file))
    hashed: list[int] = []

    def noted(secret: str, salt: bytes, n: int, r: int, p: int) -> bytes:
        hashed.append(n)
        return b""

    monkeypatch.setattr(tokens_module, "_scrypt", noted)
    found = {}
    for name in (f"nobody{index}" for index in range(40)):
        for guess in "ab":
            assert asyncio.run(tokens.check(f"{name}.{guess}", "peer")) is None
        assert hashed[-1] == hashed[-2], "one name always takes the same time"
        found[name] = hashed[-1]
    assert set(found.values()) == set(costs.values())


def test_a_certificate_is_an_identity_with_every_role_or_those_of_the_file(file: Path) -> None:
    known, unknown = Peer("10.0.0.1", "robot"), Peer("10.0.0.1", "stranger")
    alone = guard_of(None, mutual=True)
    asyncio.run(alone.admit(None, unknown, "admin"))
    with pytest.raises(Unauthenticated, match="certificate: none came"):
        asyncio.run(alone.admit(None, PEER, "predict"))
    write_entries(file, [TokenEntry("robot", ("predict",), certificate="robot")])
    both = guard_of(Tokens(str(file)), mutual=True)
    asyncio.run(both.admit(None, known, "predict"))
    for peer, role, error in ((known, "admin", Forbidden), (unknown, "predict", Unauthenticated)):
        with pytest.raises(error):
            asyncio.run(both.admit(None, peer, role))
    with pytest.raises(Unauthenticated):  # a certificate is no token
        asyncio.run(both.admit("Bearer robot.", PEER, "predict"))


def test_a_client_has_its_calls_in_flight_and_its_rate_and_waits_for_no_other() -> None:
    now = [0.0]
    quotas = Quotas(lambda: now[0])
    assert [quotas.begin("a", 2, None) for _ in range(3)] == [
        "", "", "2 calls of this client are in flight; the limit is 2",
    ]  # fmt: skip
    assert quotas.begin("b", 2, None) == ""
    quotas.end("a")
    assert quotas.begin("a", 2, None) == ""
    assert [bool(quotas.begin("c", None, 2)) for _ in range(4)] == [False, False, True, True]
    now[0] = 0.5
    assert [bool(quotas.begin("c", None, 2)) for _ in range(2)] == [False, True]


def test_a_changed_rate_counts_at_once() -> None:
    quotas = Quotas(lambda: 0.0)
    assert [bool(quotas.begin("a", None, 1)) for _ in range(2)] == [False, True]
    assert [bool(quotas.begin("a", None, 3)) for _ in range(4)] == [False, False, False, True]
    assert [bool(quotas.begin("a", None, 1)) for _ in range(2)] == [False, True]
    assert not any(quotas.begin("a", None, None) for _ in range(9))
    assert [bool(quotas.begin("a", None, 1)) for _ in range(2)] == [False, True]


def test_an_anonymous_client_is_its_address_or_its_network_of_ipv6() -> None:
    guard = guard_of(None)
    names = {
        address: identity.name
        for address in ("10.0.0.1", "2001:db8:1:2:3::4", "2001:db8:1:2:ffff::9", "2001:db8:1:3::4", "::ffff:10.0.0.1",
                        "fe80::1%eth0", "unix")
        if (identity := guard.at_once(None, Peer(address), "predict"))
    }  # fmt: skip
    assert list(names.values()) == [
        "10.0.0.1", "2001:db8:1:2::/64", "2001:db8:1:2::/64", "2001:db8:1:3::/64", "10.0.0.1", "fe80::/64", "unix",
    ]  # fmt: skip


def test_the_checks_of_tokens_from_a_network_of_ipv6_count_as_one_clients(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(file, "alice")
    tokens = Tokens(str(file))
    clients: list[str] = []

    async def check(token: str, client: str) -> None:
        clients.append(client)

    monkeypatch.setattr(tokens, "check", check)

    async def main() -> None:
        for address in ("2001:db8::1", "2001:db8::ffff:2", "10.0.0.1"):
            with pytest.raises(Unauthenticated):
                await guard_of(tokens).admit("Bearer a.b", Peer(address), "predict")

    asyncio.run(main())
    assert clients == ["2001:db8::/64", "2001:db8::/64", "10.0.0.1"]


def test_files_that_cannot_be_read_end_the_start_by_name(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    with pytest.raises(StartError, match=f"^tokens: '{missing}' cannot be read: No such file or directory$"):
        Server(settings(tokens=missing))
    make_all(tmp_path)
    with pytest.raises(StartError, match=f"^tls_key: '{missing}' cannot be read"):
        Server(settings(tls_cert=str(tmp_path / "server.pem"), tls_key=missing))


@pytest.mark.parametrize("kind", ["pipe", "large"])
def test_a_file_that_would_keep_the_calls_waiting_is_refused(file: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(file)
    else:
        with file.open("wb") as opened:
            opened.truncate(2**24 + 1)
    with pytest.raises(AccessError, match=f"the tokens: '{file}'; expected a file of at most 16777216 bytes"):
        Tokens(str(file))


def test_clients_that_have_gone_are_forgotten_and_busy_ones_are_not() -> None:
    quotas = Quotas(lambda: 0.0)
    quotas.begin("busy", 1, None)
    for index in range(11_000):
        quotas.begin(str(index), 1, None)
        quotas.end(str(index))
    assert len(quotas._quotas) <= 10_001
    assert quotas.begin("busy", 1, None)


@pytest.mark.parametrize(
    ("names", "found"),
    [([], ""), (["a"], "a"), (["a", "b"], ""), (["a", "a"], ""), (["x" * 64], "x" * 64), (["x" * 65], "")],
)
def test_a_certificate_has_the_only_common_name_or_none(names: list[str], found: str) -> None:
    subject = (*((("commonName", name),) for name in names), (("organizationName", "o"),))
    assert peer_of(("10.0.0.1", 5), {"subject": subject}).subject == found
    properties = {
        "x509_subject": [",".join(("O=x\\,CN=y", *(f"CN={name}" for name in names))).encode()],
        "x509_common_name": [name.encode() for name in names[:1]],
    }
    assert grpcio_calls._subject(properties) == found


def test_certificates_are_renewed_and_broken_ones_are_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_all(tmp_path)
    chain, key, authorities = (tmp_path / name for name in ("server.pem", "server.key", "ca.pem"))
    certificates = Certificates(str(chain), str(key), str(authorities))
    assert certificates.mutual
    first = certificates.grpc_context()
    assert certificates.grpc_context() is first
    key.write_bytes((tmp_path / "client.key").read_bytes())
    assert certificates.grpc_context() is first
    assert "the TLS certificates cannot be read again" in caplog.text
    make_certificate(tmp_path, "server", "DNS:renewed")
    assert certificates.grpc_context() is not first
    assert certificates.pem()[0] == chain.read_bytes()
    key.unlink()
    assert certificates.pem()[0] == chain.read_bytes()


def test_files_that_are_no_certificates_are_refused_by_name(tmp_path: Path) -> None:
    make_all(tmp_path)
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("no certificate")
    chain, key = str(tmp_path / "server.pem"), str(tmp_path / "server.key")
    for pair in ((str(wrong), key), (chain, str(wrong)), (chain, str(tmp_path / "client.key"))):
        with pytest.raises(AccessError, match=r"tls_cert and tls_key: .* expected a certificate chain and its private"):
            Certificates(*pair)
    with pytest.raises(AccessError, match=r"tls_client_ca: .* expected certificates of authorities in PEM"):
        Certificates(chain, key, str(wrong))
    with pytest.raises(OSError, match="missing"):
        Certificates(chain, str(tmp_path / "missing"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.1.2.3", "myhost", "[::]", "unix"])
def test_a_host_that_others_reach_needs_tls_tokens_or_a_word(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read(["--host", host], {})
    assert "others could call without TLS and tokens" in capsys.readouterr().err
    assert read(["--host", host, "--insecure"], {}).insecure
    assert read(["--host", host], {"CAPSNET_INSECURE": "1"}).insecure
    assert not read(["--host", host, "--tokens", "t"], {"CAPSNET_INSECURE": "false"}).insecure
    assert read(["--host", host, "--tls-cert", "c", "--tls-key", "k"], {}).tls_cert == "c"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "[::1]", "::ffff:127.0.0.1", "localhost"])
def test_a_host_that_only_this_machine_reaches_needs_none(host: str) -> None:
    assert read(["--host", host], {}).host == host


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--tls-cert", "c"], "tls_cert and tls_key: 'c' and ''; expected both files or neither"),
        (["--tls-key", "k"], "expected both files or neither"),
        (["--tls-client-ca", "a"], "tls_client_ca: needs tls_cert and tls_key"),
        (["--client-rate", "-1"], "client_rate: -1"),
        (
            ["--host", "0.0.0.0", "--tls-cert", "c", "--tls-key", "k", "--admin-port", "9"],
            "admin_port: 9; others could load and unload models on host '0.0.0.0'",
        ),
    ],
)
def test_settings_of_access_that_contradict_each_other_are_refused(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        read(arguments, {})
    assert text in capsys.readouterr().err


def test_a_variable_of_a_choice_is_1_or_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read([], {"CAPSNET_INSECURE": "maybe"})
    assert "environment variable CAPSNET_INSECURE: 'maybe'; expected 1 or 0" in capsys.readouterr().err
    assert not read([], {"CAPSNET_REFLECTION": "0"}).reflection
