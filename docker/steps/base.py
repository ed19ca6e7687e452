#!/usr/bin/env python3
"""What the cluster image's base brings, and whether Python still imports it after our installation.

``record FILE`` writes down each package of the Python that runs it; ``constraints FILE PINS`` prints what pip
may install over them; ``requirements PYPROJECT EXTRA...`` prints what is needed; ``check`` looks again.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

# Compiled for each other in the base: another one of these breaks the rest, perhaps without a word.
KEPT = re.compile(
    r"(torch|pytorch|triton|transformer-engine|apex|numpy|flash-attn|nvidia|cuda)(-.*)?|torchvision"
)


def packages() -> dict[str, str]:
    """Version by name of what this Python would import: of several, the first on its path."""
    found: dict[str, str] = {}
    for distribution in distributions():
        if name := distribution.metadata["Name"]:
            found.setdefault(canonicalize_name(name), distribution.version)
    return found


def record(file: str) -> None:
    found = packages()
    if "torch" not in found:
        sys.exit("base.py: error: the base has no torch; BASE_IMAGE must be one of NVIDIA's PyTorch images")
    Path(file).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(f"The base has torch {found['torch']} and {len(found) - 1} other packages")


def constraints(file: str, pins: str) -> None:
    """The base's version of what is compiled there, and of all that we do not pin.

    The rest may be newer than in the base, up to our pin, if it has to. Of what the base lacks pip takes the
    newest, which is our pin if that fits.
    """
    base, ours = json.loads(Path(file).read_text()), read_pins(pins)
    for name in sorted(base.keys() | ours.keys()):
        if name in base and (KEPT.fullmatch(name) or name not in ours):
            line = f"{name}=={base[name]}"
        elif name in base:
            low, high = sorted((base[name], ours[name]), key=Version)
            line = f"{name}>={low},<={high}"
        else:
            line = f"{name}<={ours[name]}"
        if is_version(base.get(name, "0")):  # else a package of the distribution's own, which pip cannot name
            print(line)


def read_pins(file: str) -> dict[str, str]:
    lines = [line.split("==") for line in Path(file).read_text().splitlines() if "==" in line]
    return {canonicalize_name(name): version for name, version in lines}


def is_version(text: str) -> bool:
    try:
        Version(text)
    except InvalidVersion:
        return False
    return True


def requirements(pyproject: str, *extras: str) -> None:
    project = tomllib.loads(Path(pyproject).read_text())["project"]
    optional = project["optional-dependencies"]
    print("\n".join([*project["dependencies"], *(line for extra in extras for line in optional[extra])]))


def check() -> None:
    base, found = json.loads(Path(sys.prefix, "base.json").read_text()), packages()
    moved = {
        name: f"{name} {version} -> {found.get(name)}"
        for name, version in base.items()
        if found.get(name) != version
    }
    lost = [line for name, line in moved.items() if KEPT.fullmatch(name)]
    # The metadata may be the base's while a folder of ours comes first.
    for name in ("torch", "triton", "transformer_engine", "apex", "numpy"):
        spec = importlib.util.find_spec(name)
        folder = Path(spec.origin).parent if spec and spec.origin else None
        if folder and canonicalize_name(name) in base and folder.is_relative_to(sys.prefix):
            lost.append(f"{name} -> {folder}")
        # The package index has an "apex" that is a web toolkit.
        if folder and name == "apex" and not (folder / "optimizers").is_dir():
            sys.exit(f"base.py: error: {folder} is not NVIDIA's Apex")
    if lost:
        sys.exit(f"base.py: error: the installation has replaced what the base compiled: {'; '.join(lost)}")
    print(f"The base's torch {found['torch']} and all that is compiled for it are kept")
    tell("Too old in the base, so newer in the virtual environment", list(moved.values()))
    tell(
        "Older than in constraints.txt, to fit the base",
        [
            f"{name} {found[name]} ({pin})"
            for name, pin in read_pins("constraints.txt").items()
            if name in found and name not in base and found[name] != pin
        ],
    )


def tell(what: str, lines: list[str]) -> None:
    if lines:
        print(f"{what}: {', '.join(lines)}")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["record", file]:
            record(file)
        case ["constraints", file, pins]:
            constraints(file, pins)
        case ["requirements", pyproject, *extras]:
            requirements(pyproject, *extras)
        case ["check"]:
            check()
        case _:
            sys.exit(__doc__)
