"""Shared by export and import: the command line, its checks, and atomic writing of the output folder."""

from __future__ import annotations

import os
import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jreg_megatron.decoder.load import DTYPES
from jreg_megatron.runtime.errors import UserError, user_errors_exit
from jreg_megatron.runtime.output import STDOUT, add_output_arguments, check_outputs, document, write_json

if TYPE_CHECKING:
    from jreg_megatron.decoder.decoder import Decoder

Report = dict[str, Any]

_CHECKED_TOKENS = 64
_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}
"""Largest allowed difference of logits, relative to the largest logit, or to 1 if all are smaller."""


def parser(
    command: str, source: tuple[str, str], output: str, description: str, epilog: str
) -> ArgumentParser:
    """A parser with the flags of both commands; ``source`` is the first argument's name and help."""
    made = ArgumentParser(prog=f"jreg-megatron {command}", description=description, epilog=epilog)
    made.add_argument("source", type=Path, metavar=source[0], help=source[1])
    made.add_argument("output", type=Path, metavar="OUTPUT", help=output)
    made.add_argument("--dtype", choices=DTYPES, help="type of the weights (default: as saved)")
    made.add_argument("--overwrite", action="store_true", help="replace what this command wrote to OUTPUT")
    add_output_arguments(made, csv=False)
    return made


def run(
    command: str,
    options: Namespace,
    own: tuple[str, ...],
    work: Callable[[Namespace], Report],
    show: Callable[[Report], None],
) -> None:
    """Check the outputs, do the work, and write or print its report; ``own`` is as in :func:`check_place`.

    Raises:
        SystemExit: with status 2 and one line for a user's mistake, 130 for Ctrl-C.
    """
    with user_errors_exit("nothing was written"):
        check_outputs(json=options.json)
        check_place(options.output, own, options.overwrite)
        places = {"source": str(options.source), "output": str(options.output)}
        packages = ("megatron-core", "torch", "transformers")
        report = document(command, *packages, **places, **work(options))
        if options.json:
            write_json(options.json, report)
        if not options.quiet and options.json != STDOUT:
            step = f" at step {report['step']}" if report.get("step") is not None else ""
            print(f"{report['source']}{step} -> {report['output']}")
            count = f"{report['parameters']:,} parameters in {report['dtype']}"
            print(f"{count}, vocabulary {report['vocab_size']:,}")
            show(report)


def check_logits(decoder: Decoder, model: Any, what: str) -> float:
    """Run a random sequence through a Megatron model and its copy in Hugging Face.

    Returns:
        The largest difference of their logits.

    Raises:
        UserError: if the difference is larger than rounding errors.
    """
    import torch

    length = min(_CHECKED_TOKENS, decoder.max_length or _CHECKED_TOKENS)
    ids = torch.randint(decoder.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        theirs = model(input_ids=ids, use_cache=False).logits.float()
    ours = decoder.logits(ids).float()
    largest = float((theirs - ours).abs().max())
    tolerance = _TOLERANCE[str(model.dtype).removeprefix("torch.")]
    if not largest <= tolerance * max(1.0, float(ours.abs().max())):
        raise UserError(
            f"the {what} model's logits differ by up to {largest:g} from the original's, which is more than "
            "rounding, so nothing was written; please report it"
        )
    return largest


def check_place(output: Path, own: tuple[str, ...], overwrite: bool) -> None:
    """Refuse an output folder that cannot be written, or that holds other files.

    ``own`` are patterns of the file names that the command writes. With ``overwrite``, a folder that holds
    only such files may be replaced.

    Raises:
        UserError: naming the folder.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UserError(f"OUTPUT is {output}, which is not a folder; name a new one")
    held = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    others = [name for name in held if not any(fnmatch(name, pattern) for pattern in own)]
    if others:
        what = f"{others[0]}, a file that this command does not write; name a new folder"
        raise UserError(f"OUTPUT is {output}, which holds {what}")
    if held and not overwrite:
        what = "a model already; name a new folder, or give --overwrite to replace it"
        raise UserError(f"OUTPUT is {output}, which holds {what}")
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"OUTPUT is {output}, but {parent} cannot be written to; name another folder")


@contextmanager
def made_beside(output: Path) -> Iterator[Path]:
    """A new folder beside ``output``. At the end of the block it replaces ``output``; an error removes it."""
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(f".{output.name}-{os.getpid()}.part")
    old = output.with_name(f".{output.name}-{os.getpid()}.old")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        if output.exists():
            output.rename(old)
        part.rename(output)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:
        # Some libraries report a full disk in their own words.
        said = getattr(error, "strerror", None) or (
            "No space left" in str(error) and "No space left on device"
        )
        if not said or isinstance(error, UserError):
            raise
        raise UserError(
            f"OUTPUT {output} cannot be written ({said}); free the disk or name another"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
