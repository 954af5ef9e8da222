"""Encryption: who may connect to a server with a certificate, and to one that asks its clients for theirs."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import typer
from scripted_engine import ScriptedEngine
from served_shop import ShopFolders
from server_thread import ServerThread
from shoplm.client import Client, UnavailableError
from shoplm.client.cli import register
from shoplm.errors import ConfigurationError
from tiny_shop import DEMO_CUSTOMER
from typer.testing import CliRunner

SECONDS = 10.0
verbs = typer.Typer()
register(verbs)


@dataclass(frozen=True)
class Authority:
    """A certificate authority of its own, and one certificate for 127.0.0.1 that it has signed."""

    root: Path
    certificate: Path
    key: Path


def _authority(folder: Path, name: str) -> Authority:
    """Made by openssl, as an operator would."""
    folder.mkdir()

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    extensions = ("-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign")
    openssl(
        "req", "-x509", *curve, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", f"/CN={name}", *extensions
    )
    openssl("req", *curve, "-keyout", "own.key", "-out", "own.csr", "-subj", "/CN=127.0.0.1")
    (folder / "own.ext").write_text("subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n")
    signer = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial")
    openssl("x509", "-req", "-in", "own.csr", *signer, "-out", "own.pem", "-days", "2", "-extfile", "own.ext")
    return Authority(folder / "ca.pem", folder / "own.pem", folder / "own.key")


@pytest.fixture(scope="module")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> tuple[Authority, Authority]:
    """Ours, and a stranger's."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed: no certificates can be made")
    folder = tmp_path_factory.mktemp("certificates")
    return _authority(folder / "ours", "ours"), _authority(folder / "stranger", "stranger")


def serve(folders: ShopFolders, ours: Authority, *flags: str) -> ServerThread:
    config = folders.config("--tls-certificate", str(ours.certificate), "--tls-key", str(ours.key), *flags)
    return ServerThread(config, lambda *_: ScriptedEngine())


def client(server: ServerThread, root: Authority | None, own: Authority | None = None) -> Client:
    return Client(
        server.address,
        root_certificates=None if root is None else root.root.read_bytes(),
        certificate_chain=None if own is None else own.certificate.read_bytes(),
        private_key=None if own is None else own.key.read_bytes(),
        retries=False,
        timeout=SECONDS,
    )


def test_a_certificate_is_checked_against_the_clients_roots(
    shop_folders: ShopFolders, authorities: tuple[Authority, Authority]
) -> None:
    ours, stranger = authorities
    with serve(shop_folders, ours) as server:
        with client(server, ours) as trusting:
            assert trusting.recommend(DEMO_CUSTOMER).items
            assert trusting.chat("hello").text()
        for wrong in (stranger, None):  # None: no encryption at all
            with client(server, wrong) as refused, pytest.raises(UnavailableError):
                refused.recommend(DEMO_CUSTOMER)


def test_mutual_tls_lets_in_only_clients_of_our_authority(
    shop_folders: ShopFolders, authorities: tuple[Authority, Authority]
) -> None:
    ours, stranger = authorities
    with serve(shop_folders, ours, "--tls-client-ca", str(ours.root)) as server:
        with client(server, ours, ours) as known:
            assert known.recommend(DEMO_CUSTOMER).items
        files = ["--ca-file", str(ours.root), "--cert-file", str(ours.certificate), "--key-file", str(ours.key)]
        assert CliRunner().invoke(verbs, ["model", "--address", server.address, *files]).exit_code == 0
        for own in (stranger, None):
            with client(server, ours, own) as refused, pytest.raises(UnavailableError):
                refused.recommend(DEMO_CUSTOMER)


def test_a_renewed_certificate_is_used_without_a_new_start(
    shop_folders: ShopFolders,
    authorities: tuple[Authority, Authority],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ours, other = authorities
    mine = Authority(ours.root, tmp_path / "own.pem", tmp_path / "own.key")

    def put(name: str, source: Path) -> None:
        shutil.copy(source, tmp_path / "new")
        (tmp_path / "new").replace(tmp_path / name)  # another file, also within one tick of the clock

    def answers(root: Authority) -> bool:
        with client(server, root) as caller:
            try:
                return bool(caller.recommend(DEMO_CUSTOMER).items)
            except UnavailableError:
                return False

    put("own.pem", ours.certificate)
    put("own.key", ours.key)
    with serve(shop_folders, mine) as server:
        assert (answers(ours), answers(other)) == (True, False)
        put("own.pem", other.certificate)  # its key is not there yet
        assert (answers(ours), answers(other)) == (True, False)
        put("own.key", other.key)
        assert (answers(ours), answers(other)) == (False, True)
        (tmp_path / "own.key").unlink()
        assert answers(other)
    said = [each.getMessage() for each in caplog.records if each.levelname == "ERROR" and each.name == "shoplm.api"]
    assert [line.startswith("the certificate before stays in force: tls_") for line in said] == [True, True]


def test_a_token_and_tls_together(shop_folders: ShopFolders, authorities: tuple[Authority, Authority]) -> None:
    ours, _ = authorities
    with serve(shop_folders, ours, "--auth-tokens", "secret") as server:
        root = ours.root.read_bytes()
        with Client(server.address, root_certificates=root, token="secret", timeout=SECONDS) as good:
            assert good.recommend(DEMO_CUSTOMER).items
        channel = grpc.secure_channel(server.address, grpc.ssl_channel_credentials(root))
        with pytest.raises(grpc.RpcError) as raised:
            channel.unary_unary("/shoplm.v1.ModelService/GetModel")(b"", timeout=SECONDS)
        assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("broken", ["certificate", "key", "mismatch", "ca"])
def test_files_that_are_no_certificate_end_the_start(
    shop_folders: ShopFolders, authorities: tuple[Authority, Authority], tmp_path: Path, broken: str
) -> None:
    ours, stranger = authorities
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("not a certificate\n")
    certificate = nonsense if broken == "certificate" else ours.certificate
    key = {"key": nonsense, "mismatch": stranger.key}.get(broken, ours.key)
    flags = ["--tls-certificate", str(certificate), "--tls-key", str(key)]
    if broken == "ca":
        flags += ["--tls-client-ca", str(nonsense)]
    server = ServerThread(shop_folders.config(*flags), lambda *_: ScriptedEngine())
    with pytest.raises(ConfigurationError, match="tls_client_ca" if broken == "ca" else "tls_certificate"):
        server.__enter__()
    server.run(server.server.close(0))
    server.loop.call_soon_threadsafe(server.loop.stop)
