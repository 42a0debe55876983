"""Tests of the packages that the images install: their digests, and the lists of them (SBOM)."""

import json
import re
import subprocess
import sys
import tomllib
from urllib.parse import quote

import pytest
from packaging.requirements import Requirement

from tests.conftest import ROOT

IMAGES = {"cpu": ("cpu",), "gpu": ("gpu",), "training": ("cpu", "torch-cpu", "training")}
SCRIPT = ROOT / "deploy" / "sbom.py"
MAX_LIST_BYTES = 200_000


def run(*arguments: str, text: str = "") -> tuple[int, str]:
    """Run the script of the lists, and return its exit status and its output."""
    command = [sys.executable, str(SCRIPT), *arguments]
    result = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    return result.returncode, result.stdout + result.stderr


def pinned(name: str) -> dict[str, str]:
    """Return the version of each package in a file of requirements."""
    lines = (ROOT / "deploy" / "requirements" / f"{name}.txt").read_text().splitlines()
    blocks = [line.removesuffix(" \\").split(";")[0].strip() for line in lines if line[:1].isalnum()]
    return {re.sub(r"\[.*\]", "", package): version for package, _, version in (one.partition("==") for one in blocks)}


def test_the_lists_of_packages_are_up_to_date() -> None:
    assert run("--check") == (0, "")


@pytest.mark.parametrize("image", IMAGES)
def test_a_list_has_the_packages_of_the_requirements_and_the_project(image: str) -> None:
    path = ROOT / "deploy" / "sbom" / f"{image}.json"
    assert path.stat().st_size < MAX_LIST_BYTES
    content = json.loads(path.read_text())
    assert (content["bomFormat"], content["specVersion"], content["version"]) == ("CycloneDX", "1.6", 1)
    libraries = [one for one in content["components"] if one["type"] == "library"]
    expected: dict[str, str] = {}
    for name in IMAGES[image]:
        expected |= pinned(name)
    assert {one["name"]: one["version"] for one in libraries} == expected
    assert [one["purl"] for one in libraries] == [
        f"pkg:pypi/{one['name']}@{quote(one['version'])}" for one in libraries
    ]
    references = [one["bom-ref"] for one in content["components"]]
    assert len(set(references)) == len(references)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    application = content["metadata"]["component"]
    assert (application["name"], application["licenses"]) == (
        project["name"],
        [{"license": {"id": project["license"]}}],
    )
    assert "version" not in application  # a tag gives it: the files of `make dist` have it
    for line in (*project["dependencies"], *project["optional-dependencies"]["server"]):
        requirement = Requirement(line)
        assert requirement.specifier.contains(expected[requirement.name.lower()]), line
    (base,) = [one for one in content["components"] if one["type"] == "container"]
    assert f"FROM {base['name']}:{base['version']} AS serving" in (ROOT / "Dockerfile").read_text()


def test_an_images_packages_are_compared_with_its_list() -> None:
    installed = [f"{name}=={version}" for name, version in pinned("cpu").items()]
    installed += ["pip==1.0", "capsnet-serving==0.0", "# a comment"]
    assert run("--compare", "cpu", text="\n".join(installed))[0] == 0
    spelled = "\n".join(installed).replace("googleapis-common-protos", "Googleapis_Common.Protos")
    assert run("--compare", "cpu", text=spelled)[0] == 0
    changed = [line.replace(pinned("cpu")["pillow"], "1.0") for line in installed if not line.startswith("numpy")]
    status, output = run("--compare", "cpu", text="\n".join([*changed, "evil==6.6"]))
    assert status == 1
    assert output.splitlines() == [
        "evil: 6.6; the SBOM says nothing",
        f"numpy: not installed; the SBOM says {pinned('cpu')['numpy']}",
        f"pillow: 1.0; the SBOM says {pinned('cpu')['pillow']}",
    ]


def test_every_installation_of_the_images_has_digests() -> None:
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
    commands = re.findall(r"\bpip (?:--python \S+ )?(?:install|wheel|download)\b[^&]*", text)
    from_requirements = [one for one in commands if "--requirement" in one]
    local = [one for one in commands if "--requirement" not in one]
    assert len(from_requirements) == 5
    for command in from_requirements:
        assert "--require-hashes" in command
        assert "--only-binary :all:" in command
    assert len(local) == 2  # the project's own wheel, built and installed
    for command in local:
        assert "--no-deps" in command
        assert re.search(r"(?: \.| /wheels/\*\.whl)\s*$", command), command
    assert "--no-build-isolation" in local[0]  # isolation would download the newest tools


def test_the_tools_that_build_the_wheel_have_digests_and_match_the_project() -> None:
    text = (ROOT / "deploy" / "requirements" / "build.txt").read_text()
    for block in re.split(r"\n(?=\S)", text.strip()):
        assert "--hash=sha256:" in block, block
    for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(pinned("build")[requirement.name]), f"{line}; run: make requirements"


def test_every_file_of_requirements_is_audited() -> None:
    names = {path.stem for path in (ROOT / "deploy" / "requirements").glob("*.txt")}
    result = subprocess.run(["make", "--dry-run", "audit"], cwd=ROOT, capture_output=True, text=True, check=True)
    # PyTorch's build for the CPU is the release in torch-cuda, and PyPI knows no version +cpu.
    audited = names - {"torch-cpu"}
    assert set(re.findall(r"--requirement deploy/requirements/([\w-]+)\.txt", result.stdout)) == audited
    assert pinned("torch-cpu") == {"torch": f"{pinned('torch-cuda')['torch']}+cpu"}
    assert "--strict" in result.stdout  # a package that cannot be looked up is no clean one
