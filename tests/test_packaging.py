"""The package as others install it, the pins, and what the repository promises about itself."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from importlib.metadata import metadata, version
from importlib.resources import files
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def call(*command: object, cwd: Path, env: dict[str, str] = ENVIRONMENT) -> str:
    result = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, f"{command} failed\n{result.stdout}\n{result.stderr}"
    return result.stdout


def pins(lines: list[str]) -> dict[str, str]:
    return {
        canonicalize_name(name): pin for name, pin in (line.strip(" -").split("==") for line in lines if "==" in line)
    }


@pytest.fixture(scope="session")
def tracked(root) -> list[Path]:
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    return [
        root / name for name in call("git", "ls-files", "-z", cwd=root).split("\0") if name and (root / name).is_file()
    ]


@pytest.fixture(scope="session")
def lock(root) -> dict[str, str]:
    return pins((root / "requirements.lock").read_text().splitlines())


@pytest.fixture(scope="session")
def project(root) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="session")
def wheel(root, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    call(
        sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "-w", folder, root, cwd=folder
    )
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Path:
    """The `bin` folder of an environment with the wheel; its dependencies are borrowed from the present environment."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-qq", "--no-deps", "--no-index", wheel]
    call(*pip, cwd=folder)
    site = next((folder / "lib").glob("python*")) / "site-packages"
    (site / "borrowed.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    return folder / "bin"


def test_assets_travel_in_the_wheel(wheel):
    assets = Path(str(files("robustclip"))) / "assets"
    expected = {path.relative_to(assets.parent.parent).as_posix() for path in assets.rglob("*") if path.is_file()}
    assert {".toml", ".csv", ".json", ".safetensors"} <= {Path(name).suffix for name in expected}
    assert expected <= set(zipfile.ZipFile(wheel).namelist())


def test_shipped_results_travel_in_the_wheel(root, wheel):
    shipped = [path.relative_to(root) for path in (root / "results").rglob("*") if path.is_file()]
    assert shipped
    assert {f"robustclip/{path.as_posix()}" for path in shipped} <= set(zipfile.ZipFile(wheel).namelist())
    assert wheel.stat().st_size < 30_000_000


@pytest.mark.slow
def test_a_notebook_finds_shipped_results_with_nothing_but_the_wheel(root, installed, tmp_path):
    empty = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    page = root / "book" / "mmcoa" / "summary.ipynb"
    call(installed / "python", "-m", "papermill", "--no-progress-bar", page, "out.ipynb", cwd=tmp_path, env=empty)
    outputs = [output for cell in nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
               for output in cell.get("outputs", [])]  # fmt: skip
    assert not [output for output in outputs if output.output_type in {"error", "stream"}]
    assert max(output.get("data", {}).get("text/html", "").count("<tr") for output in outputs) > 10


def test_installed_package_finds_its_shipped_results_from_any_folder_and_measures_others(installed, tmp_path):
    command = (
        "import robustclip; from robustclip.study import shipped_folder; print(robustclip.__file__, shipped_folder())"
    )
    where, found = map(Path, call(installed / "python", "-c", command, cwd=tmp_path).split())
    assert where.is_relative_to(installed.parent), "the editable package shadows the wheel"
    assert found.is_relative_to(installed.parent)
    assert (found / "full").is_dir()
    cells = ["--scale", "quick", "--role", "cifar10", "--attack", "clean", "--attack", "noise", "--eps", "0.0123"]
    env = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("ROBUSTCLIP_")}
    answer = json.loads(call(installed / "robustclip", "run", *cells, "--json", cwd=tmp_path, env=env))
    assert [row["origin"] for row in answer] == ["shipped", "measured"]


def test_installed_packages_agree(root):
    call(sys.executable, "-m", "pip", "check", cwd=root)


def test_conda_users_get_the_same_pins(root, lock):
    dependencies = yaml.safe_load((root / "environment.yml").read_text())["dependencies"]
    assert "python=3.11" in dependencies
    assert pins(dependencies[-1]["pip"]) == lock


def test_the_bill_of_materials_lists_the_pins(root, lock):
    found = json.loads((root / "sbom.json").read_text())
    assert found["bomFormat"] == "CycloneDX"
    assert {canonicalize_name(one["name"]): one["version"] for one in found["components"]} == lock
    assert all(
        one["purl"] == f"pkg:pypi/{canonicalize_name(one['name'])}@{one['version']}" for one in found["components"]
    )


def test_every_requirement_is_pinned_within_its_range(project, lock):
    extras = project["optional-dependencies"]
    assert {"book", "slurm", "dev"} <= set(extras)
    for requirement in map(
        Requirement, [*project["dependencies"], *(line for extra in extras.values() for line in extra)]
    ):
        assert lock[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_environment_has_the_pinned_versions(lock):
    for name in ("torch", "open-clip-torch", "transformers", "jupyter-book", "papermill", "sphinx-mathjax-offline"):
        assert version(name).split("+")[0] == lock[name], f"{name}: run `make test`, which installs the pins"


def test_every_pin_takes_the_oldest_python_we_promise(project, lock):
    oldest = re.search(r"[\d.]+", project["requires-python"])[0] + ".0"
    needs = {name: metadata(name).get("Requires-Python") or "" for name in lock}
    assert not {name: need for name, need in needs.items() if oldest not in SpecifierSet(need)}


def test_binder_installs_the_pins_and_then_the_package(root):
    folder = root / ".binder"
    (line,) = [line for line in (folder / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert (folder / line.removeprefix("-r ")).resolve() == root / "requirements.lock"
    assert (folder / "runtime.txt").read_text() == "python-3.11\n"
    assert os.access(folder / "postBuild", os.X_OK)


def test_readme_shows_the_two_commands(root):
    readme = (root / "README.md").read_text()
    assert re.search(r"^make book\b", readme, re.MULTILINE)
    assert re.search(r"^make test\b", readme, re.MULTILINE)


def test_address_of_the_repository_is_the_same_everywhere(root, project):
    address = yaml.safe_load((root / "_config.yml").read_text())["repository"]["url"]
    assert project["urls"]["Repository"] == address
    assert yaml.safe_load((root / "CITATION.cff").read_text())["repository-code"] == address
    assert address in (root / "README.md").read_text()


def test_version_is_the_same_everywhere(root, project):
    assert yaml.safe_load((root / "CITATION.cff").read_text())["version"] == project["version"]
    assert f"## {project['version']}\n" in (root / "CHANGELOG.md").read_text()


def test_workflows_pin_their_actions(root):
    workflows = sorted((root / ".github" / "workflows").glob("*.yml"))
    assert {path.stem for path in workflows} == {"publish", "test", "weekly"}
    for path in workflows:
        jobs = yaml.safe_load(path.read_text())["jobs"].values()
        used = [step["uses"] for job in jobs for step in job["steps"] if "uses" in step]
        assert used
        assert all(re.search(r"@v\d+", action) for action in used), path


def test_help_explains_every_target(root):
    targets = set(re.findall(r"^([a-z]+):", (root / "Makefile").read_text(), re.MULTILINE))
    helped = set(re.findall(r"^  make ([a-z]+) ", call("make", "help", cwd=root), re.MULTILINE))
    assert targets == helped >= {"book", "test", "lint", "serve", "reproduce", "clean", "lock"}


def test_clone_stays_small(tracked):
    assert not [path for path in tracked if path.stat().st_size > 10_000_000]
    assert sum(path.stat().st_size for path in tracked) < 40_000_000


def test_no_machine_appears_in_the_files(root, tracked):
    machine = re.compile(rb"/(?:home|root|Users|work)/\w")
    found = [path.relative_to(root) for path in tracked if machine.search(path.read_bytes())]
    assert not found, f"absolute paths of one machine in {found}"
