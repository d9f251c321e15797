"""What is shipped: the wheel, the pinned versions, the size of files, and nothing of anybody's machine."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
VERBS = ("train", "distill", "relabel", "evaluate")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LONGEST_FILE = 400
LONGEST_ENTRY_POINT = 45

# Written in parts, so that this file does not contain what it looks for.
MACHINE_PATHS = re.compile(
    "|".join(rf"(?<![\w.~$}}]){re.escape(f'/{top}/')}\\w" for top in ("work", "root", "home", "Users"))
)
REGISTRIES = re.compile("|".join(re.escape(part + rest) for part, rest in (("pypi", ".org"), ("python", "hosted"))))
INDEX_OPTIONS = re.compile(
    "|".join(f"--{name}" for name in ("index" + "-url", "extra-index" + "-url", "find" + "-links"))
)


def project_files() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    # Files that are not committed yet count too, those that git ignores do not.
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def texts() -> list[tuple[Path, str]]:
    found = []
    for path in project_files():
        try:
            found.append((path.relative_to(ROOT), path.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            continue
    return found


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)


# --- versions ---------------------------------------------------------------------------------------------------------


def test_constraints_hold_names_and_versions_only() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+]+", line), line


def test_every_requirement_is_pinned_within_its_bounds() -> None:
    pinned = {canonicalize_name(name): version for name, version in pins().items()}
    project = PROJECT["project"]
    asked = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    for text in asked:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), text


def test_every_import_is_a_requirement() -> None:
    names = {canonicalize_name(Requirement(text).name) for text in PROJECT["project"]["dependencies"]}
    distributions = {"PIL": "pillow", "sklearn": "scikit-learn", "hydra": "hydra-core", "yaml": "pyyaml"}
    # pydantic brings its own core, and PyTorch for GPUs brings Triton, which is imported only where there is one; wandb
    # and what follows it are imported only where their extra is asked for.
    optional = {"pydantic_core", "triton", "wandb", "wandb_workspaces", "tensorboard"}
    for path in (ROOT / "cvdd").rglob("*.py"):
        for module in _imports(path) - set(sys.stdlib_module_names) - optional - {"cvdd"}:
            assert canonicalize_name(distributions.get(module, module)) in names, f"{path.name} imports {module}"


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


# --- files ------------------------------------------------------------------------------------------------------------


def test_files_stay_small() -> None:
    long = {str(path): text.count("\n") for path, text in texts() if path.suffix == ".py"}
    assert not {path: lines for path, lines in long.items() if lines > LONGEST_FILE}


@pytest.mark.parametrize("verb", VERBS)
def test_entry_points_are_short(verb: str) -> None:
    assert (ROOT / f"{verb}.py").read_text().count("\n") < LONGEST_ENTRY_POINT


def test_no_file_names_a_machine_or_a_registry() -> None:
    for path, text in texts():
        for pattern in (MACHINE_PATHS, REGISTRIES, INDEX_OPTIONS):
            match = pattern.search(text)
            assert match is None, f"{path} contains {match and match[0]!r}"


def test_python_files_are_ascii() -> None:
    assert not [str(path) for path, text in texts() if path.suffix == ".py" and not text.isascii()]


def test_ci_calls_only_what_users_have() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert re.findall(r"^make [a-z-]+", script, re.MULTILINE) == [
        "make lint",
        "make test",
        "make test-ranks",
        "make test-faults",
        "make test-slurm",
    ]


def test_make_help_lists_every_target() -> None:
    done = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ("demo", "compare", "test", "test-slow", "test-ranks", "test-slurm", "test-faults", "lint", "clean"):
        assert re.search(rf"^make {target} +\w", done.stdout, re.MULTILINE)


def test_a_package_that_says_it_is_typed_tells_type_checkers() -> None:
    assert "Typing :: Typed" in PROJECT["project"]["classifiers"]
    assert (ROOT / "cvdd" / "py.typed").is_file()


def test_a_readme_is_part_of_the_package() -> None:
    assert (ROOT / "README.md").exists() == ("readme" in PROJECT["project"])


# --- the wheel --------------------------------------------------------------------------------------------------------


def test_console_commands_lead_to_functions() -> None:
    assert PROJECT["project"]["scripts"] == {f"cvdd-{verb}": f"cvdd.cli:{verb}" for verb in VERBS}
    installed = {point.name: point for point in entry_points(group="console_scripts") if point.name.startswith("cvdd-")}
    for point in installed.values():
        assert callable(point.load())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel as ``pip install .`` does, from a copy that also holds a private conf/local."""
    source = tmp_path_factory.mktemp("source")
    for path in project_files():
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (source / "conf" / "local").mkdir(exist_ok=True)
    (source / "conf" / "local" / "default.yaml").write_text("seed: 1\n")
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "No matching distribution found for hatchling" in done.stderr:
        pytest.skip("the build backend cannot be fetched here")
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_wheel_holds_package_configuration_and_templates(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    tracked = {path.relative_to(ROOT).as_posix() for path in project_files()}
    expected = {name for name in tracked if name.startswith(("cvdd/", "hydra_plugins/"))}
    expected |= {f"cvdd/{name}" for name in tracked if name.startswith("conf/")}
    assert held == expected
    assert licences


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_installed_commands_work_from_any_folder(verb: str, wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    packages = next((environment / "lib").glob("python*")) / "site-packages"
    # The libraries are those of the running environment; only the project itself is installed anew.
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "libraries.pth").write_text("\n".join(libraries) + "\n")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run([*install, "--ignore-installed"], check=True, capture_output=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [environment / "bin" / f"cvdd-{verb}", "--cfg", "job", "--resolve", "ipc=50"]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "images_per_class: 50" in done.stdout
    where = subprocess.run(
        [python, "-c", "import cvdd; print(cvdd.__file__)"], cwd=elsewhere, capture_output=True, text=True, check=True
    )
    assert where.stdout.startswith(str(environment))
    call = f"import cvdd\ntry:\n    cvdd.{verb}('method=nonsense')\nexcept ValueError as error:\n    print(error)"
    said = subprocess.run([python, "-c", call], cwd=elsewhere, capture_output=True, text=True, check=True).stdout
    assert said.startswith("method=nonsense: choose apm")
    assert not list(elsewhere.glob("*/*/*"))
