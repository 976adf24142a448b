"""Make a folder of prepared pairs: train or copy the vocabulary, tokenise, choose the pairs.

The rows are read three times: to count them, to sample text for the vocabulary, and to tokenise
them column by column, as data.text.prepare does with documents. Then the pairs are chosen from the
token files alone.

The vocabulary has a temperature T: a language with n characters gives a share of the sample that is
proportional to n^(1/T) (Arivazhagan et al., 2019). The text of a small language is therefore read
more than once.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from magnetar.data.atomic import write_atomically
from magnetar.data.errors import UserError
from magnetar.data.pairs.codec import Codec, parse_direction, tag
from magnetar.data.pairs.filters import PairFilter, choose_pairs, refuse_no_pair
from magnetar.data.pairs.folder import (
    PAIRS_VERSION,
    PairsManifest,
    TableRecord,
    TableSplitRecord,
    open_pairs,
)
from magnetar.data.pairs.stored_tables import (
    Files,
    Reader,
    Rows,
    StoredTable,
    TableConfig,
    counted_tables,
)
from magnetar.data.pairs.tables import TABLE_FORMATS
from magnetar.data.prepared_folder import (
    SILENT,
    Config,
    Reporter,
    check_config,
    files_digest,
    prepare_folder,
)
from magnetar.data.source_files import matching_files, same_file
from magnetar.data.text.corpus import Piece
from magnetar.data.text.shards import join, tokenise
from magnetar.data.text.token_files import SPLITS, token_dtype
from magnetar.data.text.tokenizer import (
    load_tokenizer,
    sample_chars,
    train_sentencepiece,
    trained_before,
)


@dataclass(frozen=True)
class PreparePairsConfig(Config):
    """What to prepare; `tokenizer` is a folder of pairs whose vocabulary is used."""

    tables: tuple[TableConfig, ...]
    vocab_temperature: float = 5.0  # at least 1; 1: as much text as there is
    directions: tuple[str, ...] | None = None  # None: n-way all, long those that it lists
    filter: PairFilter = field(default_factory=PairFilter)  # of the training pairs


def prepare_pairs(config: PreparePairsConfig, reporter: Reporter = SILENT) -> PairsManifest:
    """The manifest of the folder `config.out`, made now unless it is already up to date.

    Raises:
        UserError: if settings contradict each other, the text cannot be used, the disk is full, or
            the folder `config.out` was made from something else.
    """
    _check(config)
    files = _files(config)
    settings = _settings(config, files)

    def fill(partial: Path) -> PairsManifest:
        reader = counted_tables(config.tables, files, reporter)
        tables = [*reader.tables.values()]
        languages = [*dict.fromkeys(language for table in tables for language in table.languages)]
        asked = _directions(config, tables, languages)
        if not any(table.valid for table in config.tables):
            reporter.message(
                "no table has a validation file, which training needs: --table NAME=TRAIN,VALID"
            )
        _report_shared(files, reporter)
        codec = _vocabulary(config, languages, reader, partial, reporter)
        stems = tokenise(
            _pieces(reader.rows("tokenising"), codec),
            codec.tokenizer,
            partial / "shards",
            config.workers,
            reporter,
            [_column(table.name, *place) for table in tables for place in _places(table)],
        )
        reporter.message("choosing pairs")
        records = [_join(table, asked, stems, partial) for table in tables]
        choose_pairs(partial, records, config.filter, codec.vocab_size)
        refuse_no_pair(records)
        return PairsManifest(
            tokenizer_fingerprint=codec.tokenizer.fingerprint,
            vocab_size=codec.vocab_size,
            eos_id=codec.eos_id,
            dtype=token_dtype(codec.vocab_size),
            languages=[*codec.languages],
            tables=records,
            settings=settings,
        )

    return prepare_folder(config, settings, reporter, lambda path: open_pairs(path).manifest, fill)


def _check(config: PreparePairsConfig) -> None:
    names = [table.name for table in config.tables]
    if not names:
        raise UserError("give a table at least: --table NAME=TRAIN.tsv,VALID.tsv")
    for table in config.tables:
        if names.count(table.name) > 1:
            raise UserError(f"--table {table.name} is given twice: give each its own name")
        if not table.name.replace("-", "").replace("_", "").isalnum() or not table.name.isascii():
            raise UserError(f"--table {table.name!r}: a name is letters, digits, - and _")
        if not (table.train or table.valid):
            raise UserError(f"--table {table.name} names no file: --table NAME=TRAIN,VALID")
        if not 0 < table.weight < float("inf"):
            raise UserError(f"--weight {table.name}={table.weight} must be above 0")
        if table.columns is not None and len({*table.columns}) < 2:
            raise UserError(f"--columns {','.join(table.columns)}: name two languages at least")
    check_config(
        config,
        tokenizer="--tokenizer DIR, to use that of other prepared pairs",
        must_fit=", the tags and the text's own characters must fit",
    )
    if config.vocab_size is not None and not any(table.train for table in config.tables):
        raise UserError(
            "no table has a training file, and a vocabulary learns from those: use "
            "--tokenizer DIR, the folder of the training pairs"
        )
    if not 1 <= config.vocab_temperature < float("inf"):
        raise UserError(f"vocab_temperature={config.vocab_temperature} must be at least 1")
    if config.directions is not None and not config.directions:
        raise UserError("--directions names none: use all, or en-de,de-en")
    config.filter.check()


def _files(config: PreparePairsConfig) -> Files:
    files = {}
    for table in config.tables:
        for split, pattern in zip(SPLITS, (table.train, table.valid), strict=True):
            if pattern:
                files[table.name, split] = matching_files([pattern], TABLE_FORMATS)
    trained = {
        same_file(path) for (_, of), paths in files.items() if of == "train" for path in paths
    }
    validated = [path for (_, of), paths in files.items() if of == "valid" for path in paths]
    if both := [path for path in validated if same_file(path) in trained]:
        raise UserError(
            f"{both[0]} is named for training and for validation: what is validated must not be "
            "trained on"
        )
    return files


def _report_shared(files: Files, reporter: Reporter) -> None:
    """Say which files are in several tables, whose pairs may count as often."""
    tables: dict[tuple[int, int], dict[str, Path]] = {}
    for (name, _), paths in files.items():
        for path in paths:
            tables.setdefault(same_file(path), {})[name] = path
    for named in tables.values():
        if len(named) > 1:
            reporter.message(
                f"warning: {next(iter(named.values()))} is read for each of the tables "
                f"{', '.join(named)}: its pairs count as often, unless --dedupe drops them"
            )


def _settings(config: PreparePairsConfig, files: Files) -> dict[str, Any]:
    """All settings that determine the result, as JSON; a later run is compared with them."""
    other = open_pairs(config.tokenizer).manifest if config.tokenizer else None
    settings: dict[str, Any] = {
        "version": PAIRS_VERSION,
        "tables": [table.name for table in config.tables],
        "vocab_size": config.vocab_size,
        "vocab_temperature": config.vocab_temperature if config.vocab_size else None,
        "tokenizer": other and other.tokenizer_fingerprint,
        "directions": None if config.directions is None else [*config.directions],
        "dedupe": config.filter.dedupe,
        "max_length_ratio": config.filter.max_length_ratio,
        "max_length": config.filter.max_length,
    }
    for table in config.tables:
        for split in SPLITS:
            settings[f"{table.name}.{split}"] = files_digest(files.get((table.name, split), []))
        settings[f"{table.name}.columns"] = None if table.columns is None else [*table.columns]
        settings[f"{table.name}.weight"] = table.weight
    return settings


def _directions(
    config: PreparePairsConfig, tables: list[StoredTable], languages: list[str]
) -> list[tuple[str, str]] | None:
    """The directions that are asked for; None for all."""
    if config.directions is None:
        return None
    asked = [*dict.fromkeys(parse_direction(given, languages) for given in config.directions)]
    for direction in asked:
        if not any({*direction} <= {*table.languages} for table in tables):
            raise UserError(
                f"--directions {'-'.join(direction)}: no table holds both languages; give a table "
                "that does, or leave the direction out"
            )
    return asked


def _vocabulary(
    config: PreparePairsConfig,
    languages: list[str],
    reader: Reader,
    partial: Path,
    reporter: Reporter,
) -> Codec:
    """The codec; writes its vocabulary into `partial`."""
    file = partial / "tokenizer.model"
    if config.tokenizer is not None:
        other = open_pairs(config.tokenizer)
        absent = [language for language in languages if language not in other.languages]
        if absent:
            raise UserError(
                f"the vocabulary of {config.tokenizer} has no language {absent[0]!r}, only "
                f"{', '.join(other.languages)}: name these with --columns, or train another "
                "vocabulary with --vocab-size"
            )
        write_atomically(file, other.codec.tokenizer.file_content)
        return other.codec
    assert config.vocab_size is not None
    if trained_before(file) is None:
        num_chars: Counter[str] = Counter()
        for table in reader.tables.values():
            num_chars.update(table.num_chars)
        if not num_chars.total():
            raise UserError(
                f"no training text in {', '.join(languages)}: name other columns with --columns"
            )
        rows = reader.rows("reading for the vocabulary", ("train",))
        texts = (side for _, _, row in rows for side in row.texts.items())
        limit = sample_chars(config.vocab_size)
        drawn = sampled_texts(texts, num_chars, config.vocab_temperature, limit)
        reporter.message(f"training a vocabulary of {config.vocab_size} entries")
        symbols = [tag(language) for language in languages]
        train_sentencepiece(drawn, config.vocab_size, file, 2 * limit, symbols)
    return Codec(load_tokenizer(file), languages)


def sampled_texts(
    texts: Iterator[tuple[str, str]],
    num_chars: dict[str, int],
    temperature: float,
    max_chars: int,
) -> Iterator[str]:
    """Text spread evenly over each language, in shares proportional to n^(1/T).

    Args:
        texts: language and text, in any order.
        num_chars: n, number of characters of each language.
        temperature: T.
        max_chars: approximate number of characters to draw; all of them if there are fewer.

    Yields:
        Texts with the leading space that a codec adds; a text may occur several times.
    """
    size = min(max_chars, sum(num_chars.values()))
    powers = {language: n ** (1 / temperature) if n else 0.0 for language, n in num_chars.items()}
    rates = {
        language: size * powers[language] / sum(powers.values()) / max(n, 1)
        for language, n in num_chars.items()
    }
    seen, drawn = dict.fromkeys(num_chars, 0), dict.fromkeys(num_chars, 0.0)
    for language, text in texts:
        seen[language] += len(text)
        while text and drawn[language] + len(text) / 2 <= seen[language] * rates[language]:
            drawn[language] += len(text)
            yield " " + text


def _column(table: str, split: str, language: str) -> str:
    """Name of a column's shards. It has no dot, which would begin a suffix."""
    return f"{table}.{split}.{language}".replace(".", "+")


def _places(table: StoredTable) -> Iterator[tuple[str, str]]:
    """Split and language of every column of every split that has rows."""
    return (
        (split, language)
        for split in SPLITS
        if table.num_rows[split]
        for language in table.languages
    )


def _pieces(rows: Rows, codec: Codec) -> Iterator[tuple[str, Piece]]:
    """Every text with the name of its column; a missing text has only the end."""
    for table, split, row in rows:
        for language in table.languages:
            text = row.texts.get(language, "")
            parts = codec.parts(text) if text.strip() else [""]
            column = _column(table.name, split, language)
            for i, part in enumerate(parts):
                yield column, Piece(part, i == 0, i == len(parts) - 1)


def _join(
    table: StoredTable,
    asked: list[tuple[str, str]] | None,
    stems: dict[str, list[Path]],
    partial: Path,
) -> TableRecord:
    """The record of a table, still without pairs, after writing its token files."""
    splits: dict[str, TableSplitRecord] = {}
    for split, language in _places(table):
        bin_file = partial / f"{table.name}.{split}.{language}.bin"
        joined = join(stems[_column(table.name, split, language)], bin_file)
        num_rows = table.num_rows[split]
        assert joined.num_documents == num_rows
        record = TableSplitRecord(num_rows=num_rows, columns={}, pairs=[])
        # The shards counted the space in front of each text too.
        num_bytes = table.num_bytes[split, language]
        splits.setdefault(split, record).columns[language] = joined.model_copy(
            update={"num_bytes": num_bytes}
        )
    return TableRecord(
        name=table.name,
        weight=table.config.weight,
        directions=table.directions(asked),
        splits=splits,
    )
