"""Tests of the project's packages before they are built: versions, licence, and what each extra brings."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager
from packaging.requirements import Requirement
from packaging.version import Version

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
GIT = ["git", "-c", "user.name=x", "-c", "user.email=x@y", "-c", "commit.gpgsign=false", "-c", "tag.gpgsign=false"]
SERVER_ONLY = {"h11", "hpack", "prometheus-client", "python-multipart", "starlette", "uvicorn", "uvloop"}


def requirement(lines: list[str], name: str) -> Requirement:
    [found] = [one for one in map(Requirement, lines) if one.name == name]
    return found


def version_of(folder: Path) -> str:
    """Return the version of the project in a folder, as its build takes it."""
    return ProjectMetadata(str(folder), PluginManager()).version


def git(folder: Path, *arguments: str) -> None:
    subprocess.run([*GIT, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of the project that say what its version is, outside of git."""
    monkeypatch.delenv("SETUPTOOLS_SCM_PRETEND_VERSION", raising=False)
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_a_tag_gives_the_version_and_a_later_commit_the_next_one(tree: Path) -> None:
    git(tree, "init", "--quiet")
    git(tree, "add", ".")
    git(tree, "commit", "--quiet", "-m", "first")
    assert Version(version_of(tree)).release == (0, 0, 1)  # before the first tag
    git(tree, "tag", "v1.2.0")
    assert version_of(tree) == "1.2.0"
    git(tree, "commit", "--quiet", "--allow-empty", "-m", "second")
    later = Version(version_of(tree))
    assert later.is_devrelease and later.release == (1, 2, 1)
    assert later.local and later.local.startswith("g")


def test_a_tree_without_git_has_a_version_too(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert version_of(tree) == "0.0.0"
    with monkeypatch.context() as changed:
        changed.setenv("SETUPTOOLS_SCM_PRETEND_VERSION", "3.4.5")  # as the image's build does
        assert version_of(tree) == "3.4.5"
    (tree / "PKG-INFO").write_text("Metadata-Version: 2.4\nName: capsnet-serving\nVersion: 2.0.1\n")
    assert version_of(tree) == "2.0.1"  # a source distribution's


def test_an_image_has_the_version_that_its_build_was_given() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert 'SETUPTOOLS_SCM_PRETEND_VERSION="$VERSION"' in text
    for stage in re.split(r"^FROM ", text, flags=re.MULTILINE):
        if "LABEL" in stage:
            label = stage.partition("LABEL ")[2]
            assert "ARG VERSION=0.0.0\nARG REVISION=unknown\n" in stage
            assert 'image.version="$VERSION"' in label and 'image.revision="$REVISION"' in label
            assert 'image.licenses="Apache-2.0"' in label
    assert text.count("LABEL ") == 2
    commands = subprocess.run(["make", "--dry-run", "image"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert '--build-arg VERSION="$' in commands.stdout and '--build-arg REVISION="$' in commands.stdout


def test_the_licence_is_said_by_the_package_and_its_files_go_with_it() -> None:
    assert (PROJECT["license"], PROJECT["license-files"]) == ("Apache-2.0", ["LICENSE", "NOTICE"])
    assert (ROOT / "LICENSE").read_text().split()[:3] == ["Apache", "License", "Version"]
    assert not [one for one in PROJECT["classifiers"] if one.startswith("License ::")]  # PEP 639 replaces them
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {"!LICENSE", "!NOTICE"} <= set(ignored)
    assert re.search(r"^license: Apache-2.0$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)


def test_each_file_of_a_data_set_in_the_repository_is_in_the_notices() -> None:
    notice = (ROOT / "NOTICE").read_text()
    listing = subprocess.run(["git", "ls-files", "*ubyte*", "*/shelf/*"], cwd=ROOT, capture_output=True, text=True)
    made_here = {"blank.png", "noise.png"}
    for name in listing.stdout.split():
        if Path(name).name not in made_here:
            assert name.replace("labels-idx1", "images-idx3") in notice, name
    for data_set in ("MNIST", "Fashion-MNIST"):
        assert f"\n{data_set}\n" in notice


@pytest.mark.parametrize("package", ["protos", "serving", "training", "export"])
def test_each_package_has_types_for_its_users(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()


def test_the_client_needs_nothing_that_only_the_server_uses() -> None:
    base = {Requirement(one).name for one in PROJECT["dependencies"]}
    server = {Requirement(one).name for one in EXTRAS["server"]}
    assert not base & SERVER_ONLY
    assert server >= SERVER_ONLY
    for build in ("cpu", "gpu"):
        assert requirement(EXTRAS[build], PROJECT["name"]).extras == {"server"}


def test_the_client_takes_the_oldest_protobuf_and_grpcio_that_its_code_works_with() -> None:
    text = (ROOT / "protos" / "capsnet" / "v1" / "capsnet_pb2.py").read_text()
    [made_by] = re.findall(r"^# Protobuf Python Version: (\S+)$", text, re.MULTILINE)
    services = (ROOT / "protos" / "capsnet" / "v1" / "capsnet_pb2_grpc.py").read_text()
    [made_for] = re.findall(r"^GRPC_GENERATED_VERSION = '(\S+)'$", services, re.MULTILINE)
    for name, version in (("protobuf", made_by), ("grpcio", made_for)):
        assert f">={version}" in str(requirement(PROJECT["dependencies"], name).specifier)
    [protoc] = re.findall(r"^PROTOC := grpcio-tools==(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert protoc == made_for


def test_pytorch_is_a_range_for_users_and_one_version_in_the_tests_and_the_image() -> None:
    wanted = requirement(EXTRAS["train"], "torch").specifier
    [tested] = requirement(EXTRAS["dev"], "torch").specifier
    assert tested.operator == "==" and wanted.contains(tested.version)
    assert {one.operator for one in wanted} == {">=", "<"}
    for build, local in (("cpu", "+cpu"), ("cuda", "")):
        lines = (ROOT / "deploy" / "requirements" / f"torch-{build}.txt").read_text().splitlines()
        assert f"torch=={tested.version}{local} \\" in lines
    training = (ROOT / "deploy" / "requirements" / "training.txt").read_text()
    assert not re.search(r"^(torch|nvidia|cuda|triton)\b", training, re.MULTILINE)


def test_the_compromised_releases_of_lightning_are_never_installed() -> None:
    specifier = requirement(EXTRAS["train"], "lightning").specifier
    assert not any(specifier.contains(version) for version in ("2.6.2", "2.6.3"))
    assert specifier.contains("2.6.4")


def test_each_command_has_a_console_script() -> None:
    assert PROJECT["scripts"] == {
        "capsnet-server": "serving.__main__:main",
        "capsnet-client": "serving.client.__main__:main",
        "capsnet-train": "training.__main__:main",
        "capsnet-export": "export.__main__:main",
    }
