"""The promises of the images, without a Docker engine: the files are sound, and their steps work.

``docker/check.sh`` builds and uses both images, in minutes. Here each step runs alone, in seconds.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path

import pytest

import jreg_megatron
from jreg_megatron.cli import _COMMANDS

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
STEPS = DOCKER / "steps"
TOOLS = Path(sys.executable).parent
FILES = {path.name: path for path in (DOCKER / "Dockerfile", DOCKER / "Dockerfile.cpu")}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
NVIDIA = "2.13.0a0+8145d630e8.nv26.6.54250401"
"""A version as NVIDIA's images have it."""

anyone = pytest.mark.parametrize("file", FILES.values(), ids=FILES)


def run(
    *command: object, check: bool = True, timeout: float = 120, cwd: Path = ROOT, **environment: object
) -> subprocess.CompletedProcess[str]:
    words = {"PYTHONPATH": "", **{name: str(value) for name, value in environment.items()}}
    finished = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, **words},
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        check=False,
    )
    assert not check or finished.returncode == 0, finished.stdout + finished.stderr
    return finished


def tool(name: str) -> Path:
    path = TOOLS / name
    if not path.exists():
        pytest.skip(f"{name} is not installed (jreg_megatron[dev])")
    return path


# The files


@anyone
def test_hadolint_finds_nothing_in(file: Path) -> None:
    finished = run(tool("hadolint"), "--no-color", file, check=False)
    assert (finished.returncode, finished.stdout) == (0, "")


def test_hadolint_would_find_something(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN apt-get install git\n")
    assert "DL3006" in run(tool("hadolint"), "--no-color", tmp_path / "Dockerfile", check=False).stdout


def test_shellcheck_finds_nothing_in_a_script() -> None:
    scripts = [*DOCKER.glob("*.sh"), *STEPS.glob("*.sh")]
    assert len(scripts) > 8
    finished = run(tool("shellcheck"), *scripts, check=False)
    assert (finished.returncode, finished.stdout) == (0, "")


def test_every_script_can_be_run_and_stops_at_an_error() -> None:
    for script in [*DOCKER.glob("*.sh"), *STEPS.glob("*.sh")]:
        assert script.stat().st_mode & stat.S_IXUSR, script
        lines = script.read_text().splitlines()
        assert lines[0] == "#!/usr/bin/env bash" and "set -euo pipefail" in lines, script


def instructions(file: Path) -> list[tuple[str, str]]:
    """(instruction, value) in order, by the parser of dockerfile-parse."""
    dockerfile_parse = pytest.importorskip("dockerfile_parse")
    parser = dockerfile_parse.DockerfileParser(fileobj=io.BytesIO(file.read_bytes()), env_replace=False)
    return [
        (each["instruction"], each["value"]) for each in parser.structure if each["instruction"] != "COMMENT"
    ]


@anyone
def test_every_run_is_one_step_of_ours(file: Path) -> None:
    steps = set()
    for instruction, value in instructions(file):
        if instruction == "RUN":
            word = next(word for word in shlex.split(value) if not word.startswith("--mount=type=cache,"))
            step = STEPS / Path(word).name
            assert Path(word).parent.as_posix().endswith("docker/steps") and os.access(step, os.X_OK), value
            steps.add(step.name)
        assert instruction != "ADD", "COPY does all that is wanted, and fetches nothing"
    assert {"environment.sh", "plugin.sh", "system.sh", "user.sh"} <= steps


@anyone
def test_dependencies_come_before_the_source(file: Path) -> None:
    order = [f"{name} {value}" for name, value in instructions(file)]
    dependencies = next(at for at, line in enumerate(order) if "_dependencies.sh" in line and "RUN" in line)
    assert "COPY . ." in order[dependencies:]
    copied = " ".join(line for line in order[:dependencies] if line.startswith("COPY"))
    assert "jreg_megatron " not in copied and "README" not in copied


@anyone
def test_the_base_is_pinned_by_tag_and_digest(file: Path) -> None:
    arguments = dict(
        value.split("=", 1) for name, value in instructions(file) if name == "ARG" and "=" in value
    )
    assert re.fullmatch(r"[\w./]+:\d+\.\d+[\w.-]*", arguments["BASE_IMAGE"])
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", arguments["BASE_DIGEST"])
    first, *others = [value for name, value in instructions(file) if name == "FROM"]
    assert first == "${BASE_IMAGE}${BASE_DIGEST:+@${BASE_DIGEST}} AS base"
    assert {other.split()[0] for other in others} == {"base"}


@anyone
def test_the_image_has_a_user_without_rights_labels_a_check_and_an_entry(file: Path) -> None:
    last = dict(instructions(file))
    user, _, group = last["USER"].partition(":")
    assert int(user) > 1000 and int(group) > 1000  # as numbers, for Kubernetes' runAsNonRoot
    assert f"--uid {user} " in (STEPS / "user.sh").read_text()
    assert set(re.findall(r"org\.opencontainers\.image\.([\w.]+)=", last["LABEL"])) >= {
        "title",
        "description",
        "licenses",
        "version",
        "revision",
        "created",
        "base.name",
        "base.digest",
    }
    for instruction in ("ENTRYPOINT", "HEALTHCHECK"):
        command = json.loads(last[instruction][last[instruction].index("[") :])
        script = Path(command[-1]).relative_to("/opt/jreg_megatron")
        assert os.access(ROOT / script, os.X_OK)


@anyone
def test_no_secret_is_asked_for_or_kept(file: Path) -> None:
    for instruction, value in instructions(file):
        if instruction in ("ARG", "ENV"):
            assert not re.search(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY", value, re.IGNORECASE), value


@anyone
def test_packages_of_the_data_tools_are_installed(file: Path) -> None:
    step = next(value for name, value in instructions(file) if name == "RUN" and "_dependencies.sh" in value)
    extras = step.split("_dependencies.sh ")[1].split()
    assert set(extras) <= set(EXTRAS)
    assert "data" in extras or "data" not in EXTRAS


def test_only_named_files_go_into_an_image() -> None:
    first, *others = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"
    ]
    assert first == "*"
    named = [line[1:] for line in others if line.startswith("!")]
    assert {"jreg_megatron", "docker", "recipes", "constraints.txt", "pyproject.toml"} <= set(named)
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


# Building


def test_the_build_command_names_version_commit_and_time() -> None:
    command = shlex.split(run(DOCKER / "build.sh", "cpu", "--dry-run", "--no-cache").stdout)
    assert command[:4] == ["docker", "build", "--file", "docker/Dockerfile.cpu"]
    assert command[-2:] == ["--no-cache", "."]
    assert f"jreg_megatron:{jreg_megatron.__version__}-cpu" in command
    arguments = dict(word.split("=", 1) for word in command if re.match(r"[A-Z_]+=", word))
    known = {name.partition("=")[0] for kind, name in instructions(FILES["Dockerfile.cpu"]) if kind == "ARG"}
    assert set(arguments) <= known
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(int(arguments["SOURCE_DATE_EPOCH"])))
    assert arguments["CREATED"] == moment


def test_an_unknown_image_is_one_line_and_status_2() -> None:
    finished = run(DOCKER / "build.sh", "gpu", check=False)
    assert finished.returncode == 2
    assert finished.stderr.splitlines() == [
        "docker/build.sh: error: the image is 'gpu'; it must be cluster or cpu"
    ]


# The cluster image's steps, with a stand-in for NVIDIA's base


def wheel(
    folder: Path, name: str, version: str, requires: str = "", files: dict[str, str] | None = None
) -> None:
    """A wheel of that name with one empty module, or ``files``."""
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += f"Requires-Dist: {requires}\n" if requires else ""
    contents = (files or {f"{module}/__init__.py": ""}) | {
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    contents[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*contents, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in contents.items():
            archive.writestr(path, text)


@pytest.fixture(scope="module")
def plain_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with pip and packaging and nothing else."""
    base = tmp_path_factory.mktemp("base") / "base"
    run(sys.executable, "-m", "venv", base)
    site = next(base.glob("lib/python3.*/site-packages"))
    for file in distribution("packaging").files or ():
        if ".." not in file.parts and "__pycache__" not in file.parts:
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file.locate(), site / file)
    return base


class Cluster:
    """A project whose steps run over a base with NVIDIA's torch, from wheels in a folder."""

    def __init__(self, plain_base: Path, folder: Path, base: dict[str, str], needs: list[str]) -> None:
        self.wheels, self.project, self.venv = folder / "wheels", folder / "project", folder / "venv"
        self.base = folder / "base"
        shutil.copytree(STEPS, self.project / "docker/steps")
        self.wheels.mkdir()
        needed = json.dumps(needs)
        (self.project / "pyproject.toml").write_text(
            f'[project]\nname = "x"\ndependencies = {needed}\n[project.optional-dependencies]\ndemo = []\n'
        )
        (self.project / "constraints.txt").write_text("torch==2.15.0\nhelper==3.0\nadded==1.5\n")
        self.environment = {
            **{"VIRTUAL_ENV": self.venv, "BASE_PYTHON": self.base / "bin/python", "PIP_NO_INDEX": 1},
            **{"PIP_FIND_LINKS": self.wheels, "PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": 1},
            # NVIDIA's images set it to a file of their own.
            "PIP_CONSTRAINT": folder / "nowhere.txt",
        }
        shutil.copytree(plain_base, self.base, symlinks=True)
        site = self.site(self.base)
        for name, version in base.items():
            wheel(self.wheels, name, version)
            self.pip(self.base, f"{name}=={version}")
        self.step("environment.sh", "--on-base")
        # A virtual environment sees the packages of its base's Python, but here the base is one too.
        (self.site(self.venv) / "base.pth").write_text(f"{site}\n")

    @staticmethod
    def site(venv: Path) -> Path:
        return next(venv.glob("lib/python3.*/site-packages"))

    def pip(self, venv: Path, *what: str) -> None:
        environment = self.environment | {"PIP_CONSTRAINT": ""}
        run(venv / "bin/python", "-m", "pip", "install", "--quiet", *what, **environment)

    def step(self, name: str, *arguments: str, check: bool = True, **more: object) -> str:
        script = self.project / "docker/steps" / name
        python = [self.venv / "bin/python"] if name.endswith(".py") else []
        finished = run(*python, script, *arguments, check=check, **(self.environment | more))
        assert check or finished.returncode != 0, finished.stdout
        return finished.stdout + finished.stderr

    def imported(self, name: str) -> str:
        program = f"import importlib.metadata as m; print(m.version({name!r}))"
        return run(self.venv / "bin/python", "-c", program).stdout.strip()


Over = Callable[[dict[str, str], list[str]], Cluster]


@pytest.fixture
def over(plain_base: Path, tmp_path: Path) -> Over:
    """A cluster's project over a base of these packages, with these requirements."""
    return lambda base, needs: Cluster(plain_base, tmp_path, base, needs)


def test_the_base_keeps_its_torch_and_gets_what_it_lacks(over: Over) -> None:
    cluster = over({"torch": NVIDIA, "helper": "2.0", "older": "1.0"}, ["torch>=2.6", "added", "helper"])
    for name, version in {"torch": "2.15.0", "helper": "3.0", "added": "1.5"}.items():
        wheel(cluster.wheels, name, version)
    wheel(cluster.wheels, "added", "1.6")  # newer than the pin
    said = cluster.step("cluster_dependencies.sh", "demo")
    assert f"The base's torch {NVIDIA} and all that is compiled for it are kept" in said
    assert cluster.imported("torch") == NVIDIA
    assert cluster.imported("added") == "1.5"
    assert cluster.imported("helper") == "2.0"
    torchrun = (cluster.venv / "bin/torchrun").read_text()
    assert f'exec "{cluster.venv}/bin/python" -m torch.distributed.run "$@"' in torchrun


def test_a_base_that_is_too_old_gets_our_pin_and_a_line_that_says_so(over: Over) -> None:
    cluster = over({"torch": NVIDIA, "helper": "2.0"}, ["helper>=2.5"])
    for version in ("2.6", "3.0", "3.1"):
        wheel(cluster.wheels, "helper", version)
    said = cluster.step("cluster_dependencies.sh", "demo")
    assert "helper 2.0 -> 3.0" in said
    assert cluster.imported("helper") == "3.0"


def test_nothing_of_the_base_is_replaced_by_something_older(over: Over) -> None:
    cluster = over({"torch": NVIDIA, "helper": "2.0"}, ["helper<2"])
    wheel(cluster.wheels, "helper", "1.0")
    cluster.step("cluster_dependencies.sh", "demo", check=False)
    assert cluster.imported("helper") == "2.0"


def test_a_need_for_another_torch_ends_the_build(over: Over) -> None:
    cluster = over({"torch": NVIDIA}, ["added"])
    wheel(cluster.wheels, "added", "1.5", requires="torch>=2.14")
    wheel(cluster.wheels, "torch", "2.15.0")
    said = cluster.step("cluster_dependencies.sh", "demo", check=False)
    assert "does not fit the base" in said
    assert cluster.imported("torch") == NVIDIA


def put_torch_by_pip(cluster: Cluster) -> None:
    wheel(cluster.wheels, "torch", "2.15.0")
    cluster.pip(cluster.venv, "--ignore-installed", "torch==2.15.0")


def put_torch_by_hand(cluster: Cluster) -> None:
    (cluster.site(cluster.venv) / "torch").mkdir()
    (cluster.site(cluster.venv) / "torch/__init__.py").touch()


def put_the_web_toolkit(cluster: Cluster) -> None:
    wheel(cluster.wheels, "apex", "0.9.10")
    cluster.pip(cluster.venv, "apex")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (put_torch_by_pip, f"replaced what the base compiled: torch {NVIDIA} -> 2.15.0"),
        (put_torch_by_hand, "replaced what the base compiled: torch -> "),
        (put_the_web_toolkit, "apex is not NVIDIA's Apex"),
    ],
)
def test_the_last_check_refuses_an_image_with(
    over: Over, damage: Callable[[Cluster], None], says: str
) -> None:
    cluster = over({"torch": NVIDIA}, [])
    cluster.step("base.py", "check")
    damage(cluster)
    said = cluster.step("base.py", "check", check=False)
    assert says in said and "Traceback" not in said


def test_a_base_without_torch_is_refused(over: Over) -> None:
    with pytest.raises(AssertionError, match=r"torch.*BASE_IMAGE"):
        over({"helper": "2.0"}, [])


def test_transformer_engine_and_apex_are_the_bases_or_built(over: Over) -> None:
    cluster = over({"torch": NVIDIA, "transformer-engine": "2.16.0+5f8f1c2"}, [])
    wheel(cluster.wheels, "apex", "0.1", files={"apex/__init__.py": "", "apex/optimizers/__init__.py": ""})
    said = cluster.step("extensions.sh", TRANSFORMER_ENGINE="2.20.2", APEX="apex==0.1")
    assert "transformer-engine of the base: 2.16.0+5f8f1c2" in said
    assert cluster.imported("apex") == "0.1"
    cluster.step("base.py", "check")


def test_an_extension_that_cannot_be_built_ends_the_build_and_an_empty_one_is_left_out(over: Over) -> None:
    cluster = over({"torch": NVIDIA}, [])
    said = cluster.step("extensions.sh", TRANSFORMER_ENGINE="", APEX="apex==0.1", check=False)
    assert "No matching distribution found for apex==0.1" in said
    cluster.step("extensions.sh", TRANSFORMER_ENGINE="", APEX="")


# The CPU image's steps, in a fresh virtual environment


@pytest.fixture(scope="module")
def cpu_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Source and virtual environment as in the CPU image, from uv's cache."""
    uv = tool("uv")
    folder = tmp_path_factory.mktemp("image")
    source = folder / "jreg_megatron"
    source.mkdir()
    (folder / "work").mkdir()
    for name in ("jreg_megatron", "docker", "recipes"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    environment = {"VIRTUAL_ENV": folder / "venv", "UV": uv, "UV_OFFLINE": 1, "TORCH_BACKEND": ""}
    environment["BASE_PYTHON"] = sys.executable
    extras = [name for name in ("demo", "data") if name in EXTRAS]
    for step in (["environment.sh"], ["cpu_dependencies.sh", *extras], ["plugin.sh"]):
        finished = run(source / "docker/steps" / step[0], *step[1:], check=False, **environment)
        if re.search(r"network was disabled|not found in the cache", finished.stderr):
            pytest.skip("uv's cache does not hold the pinned packages; docker/check.sh downloads them")
        assert finished.returncode == 0, finished.stdout + finished.stderr
    return folder


def in_image(image: Path, *command: str) -> str:
    """The entry point's output for these arguments."""
    path = f"{image / 'venv/bin'}:{os.environ['PATH']}"
    entrypoint = image / "jreg_megatron/docker/entrypoint.sh"
    return run(entrypoint, *command, cwd=image / "work", PATH=path).stdout


def test_the_entry_point_runs_the_tools_of_its_own_environment(cpu_image: Path) -> None:
    where = in_image(cpu_image, "python", "-c", "import jreg_megatron as j; print(j.__file__)")
    assert str(cpu_image / "jreg_megatron/jreg_megatron/__init__.py") in where
    layouts = in_image(cpu_image, "selftest", "--nproc", "2", "--tp", "2", "--list")
    assert layouts.startswith("TP2")


def test_every_recipe_and_tool_that_the_entry_point_lists_is_there(cpu_image: Path) -> None:
    text = in_image(cpu_image)
    known = dict(line.split(": ", 1) for line in text.splitlines() if re.match(r"\w+: ", line))
    assert {"llama_170m", "llama_1b", "llama_3b4"} <= set(known["recipes"].split())
    assert not {"run", "slurm"} & set(known["recipes"].split())
    assert known["tools"].split() == list(_COMMANDS)


def test_the_entry_point_runs_a_recipe(cpu_image: Path) -> None:
    text = in_image(cpu_image, "llama_1b", "jreg", "--dry-run")
    assert "--jreg-coeff 1 " in text


# The entry point and the health check alone


def test_the_entry_point_refuses_what_it_does_not_know_in_one_line() -> None:
    finished = run(DOCKER / "entrypoint.sh", "llama_2b", check=False)
    assert finished.returncode == 2
    assert finished.stderr.count("\n") == 1
    assert "no recipe, tool or command 'llama_2b' here; recipes: " in finished.stderr


def test_a_signal_reaches_what_the_entry_point_runs(tmp_path: Path) -> None:
    ready, got = tmp_path / "ready", tmp_path / "got"
    home = tmp_path / "home"
    shutil.copytree(DOCKER, home / "docker")
    recipe = home / "recipes/llama_9b.sh"
    recipe.parent.mkdir()
    recipe.write_text(
        f'#!/usr/bin/env bash\ntrap "echo $1 > {got}; exit 75" TERM\ntouch {ready}\n'
        "while true; do sleep 0.05; done\n"
    )
    recipe.chmod(0o755)
    process = subprocess.Popen([home / "docker/entrypoint.sh", "llama_9b", "jreg"])
    try:
        deadline = time.monotonic() + 30
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 75
    finally:
        process.kill()
    assert got.read_text() == "jreg\n"


def test_the_health_check_is_the_self_test_once_and_then_looks_at_the_gpus(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    smi = tmp_path / "bin/nvidia-smi"

    def gpus(text: str, status: int = 0) -> None:
        smi.write_text(f"#!/bin/sh\nprintf '{text}'\nexit {status}\n")
        smi.chmod(0o755)

    def check(**environment: object) -> tuple[int, str]:
        environment = {"JREG_HEALTH": tmp_path / "healthy", **environment}
        environment["PATH"] = f"{tmp_path / 'bin'}:{TOOLS}:{os.environ['PATH']}"
        finished = run(DOCKER / "healthcheck.sh", check=False, timeout=240, cwd=tmp_path, **environment)
        return finished.returncode, finished.stdout

    gpus("GPU 0\\nGPU 1\\n")
    # Packages of the same name that come first: without a self-test, and with one that passes.
    broken, sound = (tmp_path / name / "jreg_megatron" for name in ("broken", "sound"))
    for package in (broken, sound):
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
    (sound / "selftest.py").write_text("print('3 layouts: 3 passed, 0 failed')")
    status, said = check(PYTHONPATH=broken.parent)
    assert status == 1 and "unhealthy: the self-test fails" in said and "selftest" in said
    assert not (tmp_path / "healthy").exists()

    assert check(PYTHONPATH=sound.parent) == (0, "healthy: 3 layouts: 3 passed, 0 failed\n")
    assert check(PYTHONPATH=broken.parent) == (0, "healthy: the self-test has passed before\n")
    gpus("GPU 0\\n")
    assert check() == (1, "unhealthy: the GPUs are not those of the start: GPU 0\n")
    gpus("GPU 1 has fallen off the bus", status=9)
    assert check() == (1, "unhealthy: nvidia-smi fails: GPU 1 has fallen off the bus\n")


@pytest.mark.slow
def test_both_images_can_be_built_and_used() -> None:
    if os.geteuid() != 0 or not shutil.which("buildah") or not shutil.which("debootstrap"):
        pytest.skip("docker/check.sh needs root, buildah and debootstrap")
    run(DOCKER / "check.sh", timeout=3600)
