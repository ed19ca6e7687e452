"""For several machines: NeMo Curator writes Megatron's token files on a Ray cluster; `inspect` lists them.

    pip install nemo-curator            # written for 1.4; in a separate environment
    python recipes/nemo_curator.py --input TEXT --output TOKENS --tokenizer-model FOLDER_OR_NAME
    python -m jreg_megatron.data inspect TOKENS --blend TOKENS/blend.txt

Then train on the list. In place of the data paths give --data-args-path TOKENS/blend.txt --split 999,1,0 and
--tokenizer-type HuggingFaceTokenizer --tokenizer-model FOLDER_OR_NAME.

Run it on one node of a running Ray cluster (RAY_ADDRESS names it). Without a cluster it starts Ray on this
machine. TEXT and TOKENS are on a shared file system, or URLs that fsspec knows.

Differences to `python -m jreg_megatron.data prepare`:
- The tokenizer is a Hugging Face one, since Curator has no SentencePiece.
- Each group of input files makes its own pair .bin/.idx. The blend file lists the pairs.
- A text without tokens is an empty sequence.
- With a vocabulary of 65,500 to 65,536 an id has two bytes; Megatron's own tool writes four, and reads both.
- A bad record ends the run.
"""

from __future__ import annotations

import argparse
import os


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="recipes/nemo_curator.py",
    )
    parser.add_argument("--input", required=True, help="folder of Parquet or JSON-lines files, or a pattern")
    parser.add_argument("--output", required=True, help="folder for the token files")
    parser.add_argument("--tokenizer-model", required=True, help="Hugging Face tokenizer: a folder or a name")
    parser.add_argument("--format", choices=("parquet", "jsonl"), default="parquet")
    parser.add_argument("--key", default="text", help="column or field of the text")
    parser.add_argument("--files-per-pair", type=int, default=1, help="input files per pair .bin/.idx")
    args = parser.parse_args()

    # Curator's reader and writer run as stages on Ray; to distribute, retry and scale is its business.
    from nemo_curator.core.client import RayClient
    from nemo_curator.pipeline import Pipeline
    from nemo_curator.stages.text.io.reader import JsonlReader, ParquetReader
    from nemo_curator.stages.text.io.writer.megatron_tokenizer import MegatronTokenizerWriter

    reader = ParquetReader if args.format == "parquet" else JsonlReader
    stages = [
        reader(file_paths=args.input, fields=[args.key], files_per_partition=args.files_per_pair),
        MegatronTokenizerWriter(
            path=args.output, model_identifier=args.tokenizer_model, text_field=args.key, append_eod=True
        ),
    ]
    client = None if "RAY_ADDRESS" in os.environ else RayClient()
    if client is not None:
        client.start()
    try:
        written = Pipeline(name="megatron_tokens", stages=stages).run()
        print(f"Wrote {len(written or [])} pairs of .bin/.idx to {args.output}")
    finally:
        if client is not None:
            client.stop()


if __name__ == "__main__":
    main()
