"""Our preparation against Megatron-LM's tools/preprocess_data.py: the same bytes, and how fast.

    python tests/preprocess_comparison.py CLONE [--tokenizer-model FILE] [--rounds 5]

CLONE is a clone of Megatron-LM, with or without a work tree. Both run on the same file with the same number
of workers, one after the other, in rounds. The processor time of all their processes counts, which other load
on the machine hardly changes. The time of a run on a single document, nearly all of it imports, is
subtracted. Prints a row of a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from jreg_megatron.data.speeches import read_speeches

HEAD = (
    "| Megatron-LM | tokenizer | workers | tool, tokens/s a core | ours | ours / tool (least to most) |",
    "| --- | --- | --- | --- | --- | --- |",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clone", type=Path)
    parser.add_argument(
        "--tag", default="core_v0.19.0", help="what to take the tool from (default: %(default)s)"
    )
    parser.add_argument("--tokenizer-type", default="SentencePieceTokenizer")
    parser.add_argument("--tokenizer-model", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--copies", type=int, default=8, help="copies of the State of the Union speeches, 12 MB each"
    )
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tool = take_tool(args.clone, args.tag, folder)
        text, one = folder / "text.jsonl", folder / "one.jsonl"
        write_text(text, args.copies)
        one.write_text('{"text": "one"}\n')
        common = ["--tokenizer-type", args.tokenizer_type, "--tokenizer-model", args.tokenizer_model]
        common += ["--workers", args.workers]
        rows = []
        for _ in range(args.rounds):
            seconds = []
            for command in (tool_command(tool, common), our_command(common)):
                start_up = run(command(one, folder / "one"))
                seconds.append(run(command(text, folder / command.__name__)) - start_up)
                for left in folder.glob("one[._]*"):
                    if left != one:
                        left.unlink()
            tokens = same_bytes(folder / "of_tool", folder / "of_ours")
            rows.append([tokens / taken for taken in seconds])
            print(
                f"tool {rows[-1][0]:,.0f}, ours {rows[-1][1]:,.0f} tokens/s a core, the same bytes",
                file=sys.stderr,
            )
            for left in folder.glob("of_ours*"):
                left.unlink()
    print("\n".join((*HEAD, row(args, rows))))
    print(f"\n{os.cpu_count()} cores, Megatron-Core {version('megatron-core')}, {datetime.now(UTC):%Y-%m-%d}")


def row(args: argparse.Namespace, rows: Sequence[Sequence[float]]) -> str:
    tool, ours = (statistics.median(values) for values in zip(*rows, strict=True))
    ratios = sorted(mine / theirs for theirs, mine in rows)
    spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    return f"| {args.tag} | {args.tokenizer_type} | {args.workers} | {tool:,.0f} | {ours:,.0f} | {spread} |"


def take_tool(clone: Path, tag: str, folder: Path) -> Path:
    """The tool as it is in the tag, beside nothing else, so that it runs with the installed Megatron."""
    git = clone if not (clone / ".git").exists() else clone / ".git"
    show = ["git", f"--git-dir={git}", "show", f"{tag}:tools/preprocess_data.py"]
    tool = folder / "tools" / "preprocess_data.py"
    tool.parent.mkdir()
    tool.write_bytes(subprocess.run(show, check=True, capture_output=True).stdout)
    return tool


def write_text(path: Path, copies: int) -> None:
    """Documents of up to 4,000 characters, with the odd ones that both must treat alike."""
    documents: list[object] = []
    for text in read_speeches().values():
        documents += [text[start : start + 4000] for start in range(0, len(text), 4000)]
    documents[5], documents[17] = "", "漢字 🙂 ñ \u2028 \x85 \x00 end"
    documents[30], documents[31], documents[32] = ["one", "", "two three"], [], [""]
    with path.open("w", encoding="utf-8") as stream:
        for _ in range(copies):
            for number, document in enumerate(documents):
                record = {"id": number, "text": document, "score": 0.5}
                stream.write(json.dumps(record, ensure_ascii=number % 2 == 0) + "\n")


def tool_command(tool: Path, common: list[object]):  # type: ignore[no-untyped-def]
    def of_tool(text: Path, prefix: Path) -> list[object]:
        return [tool, *common, "--input", text, "--output-prefix", prefix, "--append-eod"]

    return of_tool


def our_command(common: list[object]):  # type: ignore[no-untyped-def]
    def of_ours(text: Path, prefix: Path) -> list[object]:
        return ["-m", "jreg_megatron.data", "prepare", text, *common, "--output", prefix, "--quiet"]

    return of_ours


def run(arguments: Sequence[object]) -> float:
    """Seconds of processor time that a command and its processes take."""
    before = processor_seconds()
    command = [sys.executable, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return processor_seconds() - before


def processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def same_bytes(one: Path, other: Path) -> int:
    """Compare two datasets and return their number of tokens."""
    for ending in ("bin", "idx"):
        content = [Path(f"{prefix}_text_document.{ending}").read_bytes() for prefix in (one, other)]
        assert content[0] == content[1], f".{ending} differs"
    manifest = json.loads(Path(f"{other}.manifest.json").read_text())
    return int(manifest["outputs"][f"{other.name}_text_document"]["tokens"])


if __name__ == "__main__":
    main()
