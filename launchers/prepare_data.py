"""Makes the prepared folder that training reads.

magnetar prepare --corpus sotu --vocab-size 2000 --out prepared/sotu
magnetar prepare --train 'text/*.jsonl.zst' --tokenizer gpt2/ --out prepared/own
"""

from collections.abc import Sequence
from typing import get_args

import rich.table

from magnetar.data.text.corpus import Documents
from magnetar.data.text.prepare import DEFAULT_VALID_FRACTION, PrepareConfig, prepare
from magnetar.data.text.token_files import Manifest
from magnetar.launchers.terminal.command_line import CommandParser
from magnetar.launchers.terminal.preparing import add_options, prepare_and_print, summary_table
from magnetar.launchers.terminal.user_errors import user_errors


def parse_arguments(arguments: Sequence[str] | None = None) -> PrepareConfig:
    """The command line as a config."""
    parser = CommandParser(
        prog="magnetar prepare",
        description="Tokenise text into a folder that training reads. Stopped runs resume: give "
        "the same command again.",
    )
    add = parser.add_argument
    add("--corpus", help="a known corpus: sotu")
    files = ".txt .jsonl .parquet [.gz .xz .zst]"
    add("--train", nargs="+", default=[], metavar="GLOB", help=files)
    add("--valid", nargs="+", default=[], metavar="GLOB", help="validation files")
    add(
        "--valid-fraction",
        type=float,
        metavar="F",
        help=f"without --valid: part of the training documents (default {DEFAULT_VALID_FRACTION})",
    )
    add_options(parser, ".model, tokenizer.json, or GPT-2's folder", "PATH")
    add(
        "--documents",
        choices=get_args(Documents),
        default="file",
        help="what a document of a .txt file is (default %(default)s)",
    )
    add("--text-key", default="text", help="key of the text in .jsonl and .parquet")
    add("--seed", type=int, default=0, help="seed of the choice of validation documents")
    values = vars(parser.parse_args(arguments))
    return PrepareConfig(**{**values, "train": (*values["train"],), "valid": (*values["valid"],)})


def summary(manifest: Manifest) -> tuple[rich.table.Table, list[str]]:
    """What each split holds, and no lines below."""
    columns = ("split", "documents", "tokens", "bytes", "bytes per token")
    table = summary_table(columns, texts=("split",))
    for name, split in manifest.splits.items():
        counts = (split.num_documents, split.num_tokens, split.num_bytes)
        ratio = split.num_bytes / split.num_tokens
        table.add_row(name, *(f"{count:,}" for count in counts), f"{ratio:.3f}")
    return table, []


@user_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare text, and print what the folder holds."""
    prepare_and_print(parse_arguments(arguments), prepare, summary)


if __name__ == "__main__":
    main()
