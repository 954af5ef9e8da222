"""TLS of the gRPC port: the certificate, its key and the CA of clients, read anew when their files change."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path
from typing import TypeAlias

import grpc
from shoplm.config import ServerConfig, read_file
from shoplm.errors import ConfigurationError

Stamp: TypeAlias = "tuple[tuple[int, int], ...]"  # inode and time of each file

log = logging.getLogger("shoplm.api")


def server_credentials(config: ServerConfig) -> grpc.ServerCredentials | None:
    """What the settings name; None for no TLS. Raises ConfigurationError naming the file that cannot be used."""
    if config.tls_certificate is None or config.tls_key is None:
        if config.is_public:
            log.warning("gRPC listens on %s without TLS; set tls_certificate and tls_key", config.host)
        return None
    files = _Files(config.tls_certificate, config.tls_key, config.tls_client_ca)
    return grpc.dynamic_ssl_server_credentials(
        files.read(),
        files.changed,  # type: ignore[arg-type]  # gRPC takes None for no change
        require_client_authentication=config.tls_client_ca is not None,
    )


class _Files:
    """The files, and when they were read."""

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        self._certificate = certificate
        self._key = key
        self._client_ca = client_ca
        self._read: Stamp | None = None

    def read(self) -> grpc.ServerCertificateConfiguration:
        """Raises ConfigurationError."""
        self._read = self._stamp()
        chain = read_file("tls_certificate", self._certificate)
        key = read_file("tls_key", self._key)
        client_ca = read_file("tls_client_ca", self._client_ca) if self._client_ca else None
        _check(self._certificate, self._key, self._client_ca)
        return grpc.ssl_server_certificate_configuration([(key, chain)], client_ca)

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by a thread of gRPC's at each handshake. Returns what the files hold if they have changed. Files that
        cannot be used are logged once, and the ones before stay in force."""
        if self._stamp() == self._read:
            return None
        try:
            changed = self.read()
        except (ConfigurationError, OSError) as error:
            log.error("the certificate before stays in force: %s", error)
            return None
        log.info("another certificate is in force", extra={"tls_certificate": str(self._certificate)})
        return changed

    def _stamp(self) -> Stamp | None:
        """None where one is missing."""
        try:
            found = [path.expanduser().stat() for path in (self._certificate, self._key, self._client_ca) if path]
        except OSError:
            return None
        return tuple((each.st_ino, each.st_mtime_ns) for each in found)


def _check(certificate: Path, key: Path, client_ca: Path | None) -> None:
    """gRPC says only that it cannot listen; Python's own TLS says what is wrong with which file."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # A key with a passphrase would make OpenSSL ask the terminal for it.
        context.load_cert_chain(certificate.expanduser(), key.expanduser(), password=lambda: "")
    except (ssl.SSLError, ValueError) as error:
        raise ConfigurationError(
            f"tls_certificate {certificate} and tls_key {key} are no PEM certificate chain and its own key without a "
            f"passphrase: {error}"
        ) from error
    if client_ca is None:
        return
    try:
        context.load_verify_locations(client_ca.expanduser())
    except ssl.SSLError as error:
        raise ConfigurationError(f"tls_client_ca: {client_ca} is no PEM certificate: {error}") from error
