"""Keys of the reward link: who gets in, who does not, and that the files are for their owner alone."""

import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from doubles import FakeModel
from link_doubles import ANY_PORT, RunningServer, frames_of, free_endpoint, linked, servers, until

from common.link import LinkConfig, ScoreLink
from common.link_keys import is_loopback, make_keys, parse_address
from common.reward_client import RewardLink
from common.reward_server import RewardServer
from common.runtime import UserError


@pytest.fixture
def start() -> Iterator[Callable[..., RunningServer]]:
    with servers() as start:
        yield start


@pytest.fixture
def keys(tmp_path) -> Path:
    folder = tmp_path / "keys"
    assert make_keys(folder) == folder / "robot"
    return folder


def test_keys_are_for_their_owner_alone_and_never_overwritten(keys):
    files = {str(path.relative_to(keys)): path for path in keys.rglob("*") if path.is_file()}
    assert set(files) == {
        "server.secret",
        "server.public",
        "clients/robot.public",
        "robot/client.secret",
        "robot/server.public",
    }
    assert {stat.S_IMODE(path.stat().st_mode) for path in files.values()} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (keys, keys / "robot")} == {0o700}
    before = {name: path.read_bytes() for name, path in files.items()}
    assert len(set(before.values())) == 4  # the server's public key is there twice
    with pytest.raises(UserError, match="has keys of 'robot' already"):
        make_keys(keys)
    make_keys(keys, "second")
    assert {name: path.read_bytes() for name, path in files.items()} == before
    assert (keys / "second" / "server.public").read_bytes() == before["server.public"]
    (keys / "server.secret").unlink()
    with pytest.raises(UserError, match=r"server.public exists already; keys are not overwritten"):
        make_keys(keys, "third")


@pytest.mark.parametrize("name", ["clients", "", "../x", "a/b", "a b"])
def test_a_client_needs_a_plain_name(tmp_path, name):
    with pytest.raises(UserError, match="cannot name a client"):
        make_keys(tmp_path, name)


def test_keys_that_are_missing_or_open_to_others(keys):
    with pytest.raises(UserError, match=r"nowhere/server.secret is not there"):
        RewardServer(FakeModel(), ANY_PORT, keys / "nowhere")
    (keys / "server.secret").chmod(0o640)
    with pytest.raises(UserError, match=r"server.secret can be read by others: chmod 600"):
        RewardServer(FakeModel(), ANY_PORT, keys)
    (keys / "server.secret").chmod(0o600)
    (keys / "clients" / "robot.public").write_text("short\n")
    with pytest.raises(UserError, match=r"robot.public holds no key of 40 characters"):
        RewardServer(FakeModel(), ANY_PORT, keys)
    (keys / "clients" / "robot.public").unlink()
    with pytest.raises(UserError, match="names no client, so nobody could connect"):
        RewardServer(FakeModel(), ANY_PORT, keys)
    (keys / "robot" / "client.secret").chmod(0o644)
    with pytest.raises(UserError, match=r"client.secret can be read by others"):
        ScoreLink(free_endpoint(), LinkConfig(keys=str(keys / "robot")))


@pytest.mark.parametrize("address", ["tcp://*:0", "tcp://0.0.0.0:0", "tcp://192.168.1.7:5555", "tcp://gpu:0"])
def test_without_keys_nobody_else_gets_in_and_nothing_goes_out(address):
    with pytest.raises(UserError, match="can be reached from other machines"):
        RewardServer(FakeModel(), address)
    with pytest.raises(UserError, match=r"is another machine: name the folder .* in reward.link.keys"):
        ScoreLink(address, LinkConfig(timeout_s=0.1))


def test_which_addresses_are_this_machine():
    assert [is_loopback(h) for h in ("127.0.0.1", "127.9.9.9", "::1", "localhost")] == 4 * [True]
    assert [is_loopback(h) for h in ("*", "0.0.0.0", "::", "127.1", "localhost.evil.org")] == 5 * [False]
    assert parse_address("tcp://[::1]:80") == ("::1", 80)
    with pytest.raises(ValueError, match="write tcp://host:port"):
        parse_address("tcp://127.0.0.1;192.168.1.7:5555")  # ZeroMQ's form for two addresses


def test_a_server_for_all_addresses_with_keys(start, keys):
    served = start(FakeModel(), "tcp://0.0.0.0:0", keys)
    port = served.endpoint.rpartition(":")[2]
    with RewardLink(linked(f"tcp://127.0.0.1:{port}", link={"keys": str(keys / "robot")})) as link:
        assert link.score(frames_of(60, 40)).success.tolist() == [True, False]
    assert "client robot is in" in served.log()


def test_strangers_are_refused_and_the_server_goes_on(start, keys, tmp_path):
    served = start(FakeModel(), keys_dir=keys)
    make_keys(tmp_path / "other")
    unknown, mixed = tmp_path / "other" / "robot", tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "server.public").write_bytes((keys / "server.public").read_bytes())
    (mixed / "client.secret").write_bytes((unknown / "client.secret").read_bytes())
    (mixed / "client.secret").chmod(0o600)
    for keys_dir, reason in (
        (str(unknown), "its keys are not those of reward.link.keys"),  # another server's key
        (str(mixed), "it does not know this client's key"),
        (None, "its keys are not those of reward.link.keys"),
    ):
        with pytest.raises(UserError, match=reason):
            RewardLink(linked(served, link={"keys": keys_dir, "timeout_s": 2.0}))
    until(lambda: "refused: a connection without a key" in served.log())
    assert served.model.batches == []
    with RewardLink(linked(served, link={"keys": str(keys / "robot")})) as link:
        assert link.score(frames_of(60)).success.tolist() == [True]


def test_a_client_with_keys_tells_nothing_to_a_server_without(start, keys):
    served = start(FakeModel())
    with pytest.raises(UserError, match="no reward server is there"):
        RewardLink(linked(served, link={"keys": str(keys / "robot"), "timeout_s": 2.0}))
    assert served.server.stats.clients == set()


def test_a_client_let_in_later_connects_by_itself(start, keys):
    """ZeroMQ gives a connection up for good when its key is refused."""
    hidden = keys / "robot.public"
    (keys / "clients" / "robot.public").rename(hidden)
    make_keys(keys, "second")
    first = start(FakeModel(), keys_dir=keys)
    got: list[Any] = []
    cfg = linked(first, link={"keys": str(keys / "robot")})
    thread = threading.Thread(target=lambda: got.append(RewardLink(cfg)))
    thread.start()
    until(lambda: "refused" in first.log())
    first.stop()
    hidden.rename(keys / "clients" / "robot.public")
    start(FakeModel(), first.endpoint, keys)
    thread.join()
    with got[0] as link:
        assert link.score(frames_of(60)).success.tolist() == [True]
