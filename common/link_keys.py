"""Keys of the reward link: who may talk to whom over a network, and that nobody else can read along.

    keys/server.secret, server.public     the server's key pair; the secret stays on its machine
    keys/clients/robot.public             who may connect: one file for each client, read when a server starts
    keys/robot/client.secret, server.public     what the client `robot` needs: copy this folder to its machine

A key is one line of 40 characters (CurveZMQ, Z85). All files are readable by their owner alone; secrets that
others can read are refused, as ssh does.
"""

import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from common.runtime import UserError

HOW_TO_MAKE = "make keys with `python teleop_eval.py --make-keys FOLDER` on the server's machine"


@dataclass
class ServerKeys:
    secret: bytes
    clients: dict[bytes, str]  # public key -> name


@dataclass
class ClientKeys:
    public: bytes
    secret: bytes
    server: bytes  # the server's public key


def import_zmq() -> ModuleType:
    try:
        import zmq
    except ImportError as error:
        raise UserError(f"the reward link needs pyzmq ({error}); pip install pyzmq") from error
    if not zmq.has("curve"):
        raise UserError("this pyzmq was built without CURVE; pip install --force-reinstall pyzmq")
    return zmq


def make_keys(folder: str | Path, client: str = "robot") -> Path:
    """Make keys for `client`, and for the server where `folder` has none yet. -> the client's folder.

    Raises UserError instead of overwriting a key.
    """
    zmq = import_zmq()
    folder = Path(folder)
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", client) or client == "clients":
        raise UserError(f"'{client}' cannot name a client; use letters, digits, - and _")
    if (folder / client).exists() or (folder / "clients" / f"{client}.public").exists():
        raise UserError(f"{folder} has keys of '{client}' already; delete those, or name another client")
    for part in (folder, folder / "clients", folder / client):
        part.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not (folder / "server.secret").exists():
        public, secret = zmq.curve_keypair()
        _write_key(folder / "server.secret", secret)
        _write_key(folder / "server.public", public)
    public, secret = zmq.curve_keypair()
    _write_key(folder / client / "client.secret", secret)
    _write_key(folder / client / "server.public", _read_key(folder / "server.public"))
    _write_key(folder / "clients" / f"{client}.public", public)
    return folder / client


def load_server_keys(folder: str | Path) -> ServerKeys:
    """Raises UserError where a key is missing, readable by others, or no client is allowed."""
    folder = Path(folder)
    secret = _read_secret(folder / "server.secret")
    clients = {_read_key(path): path.stem for path in sorted((folder / "clients").glob("*.public"))}
    if not clients:
        raise UserError(f"{folder}/clients names no client, so nobody could connect; {HOW_TO_MAKE}")
    return ServerKeys(secret, clients)


def load_client_keys(folder: str | Path) -> ClientKeys:
    """Raises UserError where a key is missing or the secret readable by others."""
    folder = Path(folder)
    secret = _read_secret(folder / "client.secret")
    return ClientKeys(import_zmq().curve_public(secret), secret, _read_key(folder / "server.public"))


def _write_key(path: Path, key: bytes) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise UserError(f"{path} exists already; keys are not overwritten: delete it first") from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(key + b"\n")


def _read_secret(path: Path) -> bytes:
    key = _read_key(path)
    if path.stat().st_mode & 0o077:
        raise UserError(f"{path} can be read by others: chmod 600 {path}, or make new keys")
    return key


def _read_key(path: Path) -> bytes:
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise UserError(f"{path} is not there to be read ({error.strerror}); {HOW_TO_MAKE}") from error
    zmq = import_zmq()
    try:
        zmq.curve_public(key)  # takes any 40 characters of Z85
    except (ValueError, zmq.ZMQError) as error:
        raise UserError(f"{path} holds no key of 40 characters; {HOW_TO_MAKE}") from error
    return key


# ----------------------------------------------------------------------------------------------------
# Addresses


def parse_address(address: str) -> tuple[str, int]:
    """`tcp://host:port` -> host, port. Raises ValueError for anything else."""
    match = re.fullmatch(r"tcp://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]|\*):(\d{1,5})", address)
    if match is None or int(match[2]) > 65535:
        raise ValueError(f"'{address}' is no address; write tcp://host:port, such as tcp://192.168.1.7:5555")
    return match[1].strip("[]"), int(match[2])


def is_loopback(host: str) -> bool:
    """Whether only this machine can be meant: 127.0.0.0/8, ::1, localhost."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name, or * for all
        return False
