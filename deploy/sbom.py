"""Software bill of materials (SBOM) of each image, in CycloneDX 1.6: written, or compared with ``--check``.

``python deploy/sbom.py --wheel dist/NAME.whl`` writes them beside a wheel, with its version and digest.
``python deploy/sbom.py --compare cpu`` reads lines ``NAME==VERSION`` of an image's Python packages from standard input,
as ``pip freeze`` writes them, and fails if they are not those of the SBOM.
"""

import argparse
import email
import hashlib
import json
import re
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

ROOT = Path(__file__).parent.parent
REQUIREMENTS = ROOT / "deploy" / "requirements"
FOLDER = ROOT / "deploy" / "sbom"
#: For each SBOM, the requirements that the image's stage installs, in this order; later versions replace earlier ones.
IMAGES = {"cpu": ("cpu",), "gpu": ("gpu",), "training": ("cpu", "torch-cpu", "training")}
_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
_PINNED = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^\s;\\]+)", re.MULTILINE)
_BASE = re.compile(r"^FROM (\S+):(\S+) AS serving$", re.MULTILINE)
# Packages that come with the interpreter and are no part of the image's environment.
_IGNORED = frozenset({"pip"})


class Wheel(NamedTuple):
    """The version of a wheel of the project, and the SHA-256 of its file."""

    version: str
    sha256: str


def pinned(name: str) -> dict[str, str]:
    """Return the version of each package in a file of requirements."""
    text = (REQUIREMENTS / f"{name}.txt").read_text()
    return {_normal(package): version for package, version in _PINNED.findall(text)}


def packages(image: str) -> dict[str, str]:
    """Return the version of each Python package in an image, without the project itself."""
    found: dict[str, str] = {}
    for name in IMAGES[image]:
        found |= pinned(name)
    return dict(sorted(found.items()))


def sbom(image: str, wheel: Wheel | None = None) -> dict[str, Any]:
    """Return an image's SBOM. It has neither a date nor a serial number, so the same packages give the same bytes.

    wheel: the project's wheel; None leaves out its version and digest.
    """
    base, tag = _BASE.findall((ROOT / "Dockerfile").read_text())[0]
    application = f"{_PROJECT['name']}@{wheel.version}" if wheel else _PROJECT["name"]
    components = [
        {
            "type": "library",
            "bom-ref": f"{name}@{version}",
            "name": name,
            "version": version,
            "purl": _purl(name, version),
        }
        for name, version in packages(image).items()
    ]
    container = {
        "type": "container", "bom-ref": f"{base}@{tag}", "name": base, "version": tag,
        "purl": f"pkg:docker/{base}@{tag}",
        "description": "The base image. Its Debian packages are not listed here.",
    }  # fmt: skip
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": application,
                "name": _PROJECT["name"],
                "description": _PROJECT["description"],
                "licenses": [{"license": {"id": _PROJECT["license"]}}],
            }
            | ({"version": wheel.version, "hashes": [{"alg": "SHA-256", "content": wheel.sha256}]} if wheel else {}),
            "properties": [
                {"name": f"capsnet:requirements:{name}.txt:sha256", "value": _sha256(REQUIREMENTS / f"{name}.txt")}
                for name in IMAGES[image]
            ],
        },
        "components": [container, *components],
        "compositions": [{"aggregate": "incomplete", "assemblies": [application]}],
    }


def text_of(image: str, wheel: Wheel | None = None) -> str:
    """Return the content of an image's SBOM file."""
    return json.dumps(sbom(image, wheel), indent=1) + "\n"


def write_beside(path: Path) -> None:
    """Write the SBOM of each image beside a wheel of the project."""
    with zipfile.ZipFile(path) as archive:
        [name] = [one for one in archive.namelist() if one.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    wheel = Wheel(metadata["Version"], _sha256(path))
    for image in IMAGES:
        path.with_name(f"{_PROJECT['name']}-{wheel.version}-{image}.cdx.json").write_text(text_of(image, wheel))


def differences(image: str, installed: str) -> list[str]:
    """Return what differs between an image's SBOM and its installed packages, one line each.

    installed: lines ``NAME==VERSION``. The project's own line and lines of other forms are ignored.
    """
    ignored = _IGNORED | {_normal(_PROJECT["name"])}
    found = {_normal(name): version for name, version in _PINNED.findall(installed)}
    expected = packages(image)
    return [
        f"{name}: {found.get(name, 'not installed')}; the SBOM says {expected.get(name, 'nothing')}"
        for name in sorted((found.keys() | expected.keys()) - ignored)
        if found.get(name) != expected.get(name)
    ]


def main() -> int:
    """Write, check or compare, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file is not up to date")
    parser.add_argument("--wheel", type=Path, help="write the files beside this wheel, with its version and digest")
    parser.add_argument("--compare", choices=IMAGES, help="compare standard input with this image's SBOM")
    arguments = parser.parse_args()
    if arguments.compare:
        found = differences(arguments.compare, sys.stdin.read())
        print("\n".join(found) or f"the packages are those of deploy/sbom/{arguments.compare}.json")
        return bool(found)
    if arguments.wheel:
        write_beside(arguments.wheel)
        return 0
    stale = [image for image in IMAGES if not _is_current(image)]
    for image in stale if arguments.check else IMAGES:
        if arguments.check:
            print(f"deploy/sbom/{image}.json is not up to date; run: make sbom", file=sys.stderr)
        else:
            (FOLDER / f"{image}.json").write_text(text_of(image))
    return bool(stale and arguments.check)


def _is_current(image: str) -> bool:
    path = FOLDER / f"{image}.json"
    return path.is_file() and path.read_text() == text_of(image)


def _normal(name: str) -> str:
    """Return a package's name in the one spelling that compares (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _purl(name: str, version: str) -> str:
    return f"pkg:pypi/{name}@{quote(version)}"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
