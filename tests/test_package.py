"""The promises of the repository as a package, apart from its formulas."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from mutations import FAULTS, Fault
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import jreg_megatron

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
)

REGISTRY_HOST = re.compile(r"py[p]i\.(org|python|nvidia)|python[h]osted\.org|download\.pytorc[h]\.org")
MACHINE_PATH = re.compile(r"(?<![\w.])/(home|root|work|Users)/\w")


def test_the_core_imports_without_megatron() -> None:
    program = (
        "import sys\n"
        "from jreg_megatron import JRegConfig, attach, displacement, jump_rate, layer_weights\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    imported = run.stdout.split()
    assert "torch" in imported
    assert not {"megatron", "transformers", "matplotlib", "sentencepiece"} & set(imported)


def built(target: str, folder: Path) -> Path:
    """The distribution of this kind, made in an empty folder."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    (made,) = folder.iterdir()
    return made


def own_files() -> list[str]:
    """The files that the repository holds, or would hold once they are added."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: no list of the repository's own files")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [name for name in names if (ROOT / name).is_file() and not (ROOT / name).is_symlink()]


def test_no_room_imports_one_that_is_below_it_in_contributing() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("| room in")[2].partition("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines()[2:]]
    order = [name.replace("/", ".").strip(".") for row in rows for name in re.findall(r"`([\w/]+)`", row)]
    package = ROOT / "jreg_megatron"

    def room(module: str) -> str:
        return module.split(".")[1]

    def home(name: str) -> str:
        """The module of a public name, or the module of this name."""
        return str(getattr(getattr(jreg_megatron, name, None), "__module__", f"jreg_megatron.{name}"))

    found, upward = set(), []
    for file in package.rglob("*.py"):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        if module == "jreg_megatron.__init__":
            continue
        here = room(module)
        found.add(here)
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not getattr(node, "level", 0), f"{module} has a relative import"
            if names == ["jreg_megatron"]:
                names = [home(alias.name) for alias in node.names]
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                names = [str(of.value) for of in node.args if isinstance(of, ast.Constant)]
            for name in names:
                there = room(name) if name.startswith("jreg_megatron.") else ""
                if there in order and order.index(there) > order.index(here):
                    upward.append(f"{module} imports {name}")
    assert found == set(order)
    assert not upward, "\n".join(upward)


def test_the_source_distribution_holds_all_files_of_the_repository(tmp_path: Path) -> None:
    with tarfile.open(built("sdist", tmp_path)) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    assert held == {*own_files(), "PKG-INFO"}


# te is compiled for one GPU's CUDA; its version is the container's to choose.
@pytest.mark.parametrize("extra", [None, *sorted(EXTRAS.keys() - {"te"})])
def test_every_dependency_is_pinned_to_a_version_it_allows(extra: str | None) -> None:
    for line in EXTRAS[extra] if extra else PROJECT["dependencies"]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)]), line


def test_the_unrelated_package_called_apex_is_never_asked_for() -> None:
    asked = [
        Requirement(line).name for lines in (PROJECT["dependencies"], *EXTRAS.values()) for line in lines
    ]
    assert "apex" not in {canonicalize_name(name) for name in [*asked, *PINS]}


def test_the_wheel_holds_what_runs_and_no_pictures_pages_or_kept_results(tmp_path: Path) -> None:
    wheel = built("wheel", tmp_path)
    files = {str(file.relative_to(ROOT)) for file in (ROOT / "jreg_megatron").rglob("*") if file.is_file()}
    files = {file for file in files if "__pycache__" not in file}
    left_out = {file for file in files if file.endswith((".png", "README.md")) or "bench/results/" in file}
    assert "jreg_megatron/paper/paper.toml" in files and len(left_out) > 10
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == files - left_out


def test_no_file_names_a_package_registry_or_a_path_of_one_machine() -> None:
    found = [
        f"{name}:{number}: {line}"
        for name in own_files()
        for number, line in enumerate((ROOT / name).read_text(errors="replace").splitlines(), start=1)
        if REGISTRY_HOST.search(line) or MACHINE_PATH.search(line)
    ]
    assert not found, "\n".join(found)


def _anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_of_a_page_leads_to_a_file_and_a_heading() -> None:
    folders = ("docker", "jreg_megatron", "patches", "recipes", "tests")
    pages = [*ROOT.glob("*.md"), *(page for folder in folders for page in (ROOT / folder).rglob("*.md"))]
    assert len(pages) > 15
    broken = []
    for page in pages:
        for link in re.findall(r"\]\((?!http)([^)\s]+)\)", page.read_text()):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            if not target.exists() or (anchor and anchor not in _anchors(target)):
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_of_make_mutations_still_finds_its_place(fault: Fault) -> None:
    code = (ROOT / "jreg_megatron" / fault.file).read_text()
    assert fault.put_into(code) != code
