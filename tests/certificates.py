"""Certificates for tests of TLS, made with openssl."""

import subprocess
from pathlib import Path

import pytest

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")


def openssl(folder: Path, *arguments: str) -> None:
    """Run openssl in a folder, or skip the test without it."""
    try:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")


def make_authority(folder: Path, name: str) -> None:
    """Write NAME.pem and NAME.key of an authority."""
    openssl(folder, "req", "-x509", *_KEY, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}")


def make_certificate(folder: Path, name: str, names: str = "DNS:client", authority: str = "ca") -> None:
    """Write NAME.pem and NAME.key, with this common name and these alternative names, signed by an authority."""
    openssl(
        folder, "req", "-x509", *_KEY, "-CA", f"{authority}.pem", "-CAkey", f"{authority}.key", "-keyout",
        f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}", "-addext", f"subjectAltName={names}",
        "-addext", "basicConstraints=CA:FALSE",
    )  # fmt: skip


def make_all(folder: Path) -> None:
    """Write ca, server (for capsnet and 127.0.0.1) and client, each .pem and .key, and other, another authority."""
    for name in ("ca", "other"):
        make_authority(folder, name)
    make_certificate(folder, "server", "DNS:capsnet,IP:127.0.0.1")
    make_certificate(folder, "client")
