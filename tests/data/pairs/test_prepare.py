import math
from dataclasses import replace

import pytest

import magnetar.data.text.shards
from magnetar.data.errors import UserError
from magnetar.data.pairs.filters import PairFilter
from magnetar.data.pairs.folder import open_pairs
from magnetar.data.pairs.prepare import (
    PreparePairsConfig,
    TableConfig,
    prepare_pairs,
    sampled_texts,
)
from magnetar.data.text.corpus import Piece
from tests.data.parallel import LANGUAGES, long_rows, verses, write_jsonl, write_tsv

TRAIN, VALID = verses(120), verses(10, seed=1)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(magnetar.data.text.shards, "SHARD_CHARS", 1500)  # several a column


@pytest.fixture
def table(tmp_path):
    return TableConfig(
        "verses",
        str(write_tsv(tmp_path / "train.tsv", TRAIN)),
        str(write_tsv(tmp_path / "valid.tsv", VALID)),
    )


@pytest.fixture
def config(tmp_path, table):
    return PreparePairsConfig(tmp_path / "out", (table,), vocab_size=320)


def test_every_direction_of_an_n_way_table_gives_its_texts_back(config):
    prepare_pairs(config)
    prepared = open_pairs(config.out)
    assert prepared.languages == LANGUAGES
    assert len(prepared.directions("train")) == 6
    for split, rows in (("train", TRAIN), ("valid", VALID)):
        for source, target in prepared.directions(split):
            pairs = prepared.pairs(split, source, target)
            assert [*pairs.sources] == [row[source] for row in rows]
            assert [*pairs.references] == [row[target] for row in rows]
    column = prepared.manifest.tables[0].splits["valid"].columns["de"]
    assert column.num_bytes == sum(len(row["de"].encode()) for row in VALID)


def test_a_long_table_has_the_directions_that_it_lists(config, tmp_path, table):
    rows = long_rows(TRAIN, "en", "de") + long_rows(TRAIN[:50], "pt-br", "en")
    path = write_jsonl(tmp_path / "long.jsonl", rows)
    config = replace(config, tables=(TableConfig("long", str(path)),))
    prepare_pairs(config)
    prepared = open_pairs(config.out)
    assert prepared.directions("train") == [("en", "de"), ("pt-br", "en")]
    assert [*prepared.pairs("train", "pt-br", "en").references] == [r["en"] for r in TRAIN[:50]]
    turned = replace(config, out=tmp_path / "turned", directions=("de-en", "en-pt-br"))
    prepare_pairs(turned)
    prepared = open_pairs(turned.out)
    assert prepared.directions("train") == [("de", "en"), ("en", "pt-br")]
    assert [*prepared.pairs("train", "de", "en").sources] == [row["de"] for row in TRAIN]


def test_several_tables_share_one_vocabulary_and_their_directions(config, tmp_path, table):
    path = write_jsonl(tmp_path / "long.jsonl", long_rows(verses(30, seed=2), "en", "de"))
    other = TableConfig("help", str(path), weight=2.5)
    prepare_pairs(replace(config, tables=(table, other)))
    prepared = open_pairs(config.out)
    assert len(prepared.pairs("train", "en", "de")) == 150
    assert [*prepared.pairs("train", "en", "de").sources][120:] == [
        row["en"] for row in verses(30, seed=2)
    ]
    assert len(prepared.pairs("train", "de", "en")) == 120
    assert [record.weight for record in prepared.manifest.tables] == [1, 2.5]


def test_only_the_columns_and_directions_that_are_asked_for_are_prepared(config, table):
    columns = replace(table, columns=("de", "en"))
    prepare_pairs(replace(config, tables=(columns,), directions=("de-en", "de-en")))
    prepared = open_pairs(config.out)
    assert {*prepared.languages} == {"en", "de"}
    assert prepared.directions("train") == [("de", "en")]
    assert len(prepared.pairs("train", "de", "en")) == len(TRAIN)


def test_an_empty_side_is_no_pair_of_its_directions_and_counted(config, tmp_path):
    rows = [dict(row) for row in TRAIN]
    for i in (3, 4):
        rows[i]["de"] = " "
    rows[5]["en"] = ""
    write_tsv(tmp_path / "train.tsv", rows)
    prepare_pairs(config)
    prepared = open_pairs(config.out)
    records = {
        pairs.languages: pairs for pairs in prepared.manifest.tables[0].splits["train"].pairs
    }
    assert records["en", "de"].dropped == {"empty side": 3}
    assert records["de", "pt-br"].dropped == {"empty side": 2}
    assert len(prepared.pairs("train", "pt-br", "en")) == 119
    assert rows[5]["de"] not in {*prepared.pairs("train", "de", "en").sources}


def test_a_finished_folder_is_never_replaced(config, table, tmp_path):
    prepare_pairs(config)
    for changes, message in [
        ({"vocab_size": 325}, r"was made with vocab_size=320, not 325: choose another --out"),
        ({"filter": PairFilter(dedupe=True)}, r"was made with dedupe=False, not True"),
        ({"tables": (replace(table, weight=2),)}, r"was made with verses\.weight=1\.0, not 2"),
        ({"tables": (replace(table, name="v"),)}, r"was made with tables=\['verses'\], not \['v'"),
        ({"directions": ("en-de",)}, r"was made with directions=None, not \['en-de'\]"),
    ]:
        with pytest.raises(UserError, match=message):
            prepare_pairs(replace(config, **changes))
    write_tsv(tmp_path / "train.tsv", TRAIN[1:])
    with pytest.raises(UserError, match=r"was made with verses\.train=\(1 files, \d+ bytes"):
        prepare_pairs(config)


def test_another_folders_vocabulary_can_be_used(config, tmp_path, table):
    prepare_pairs(config)
    test = TableConfig("test", valid=str(write_tsv(tmp_path / "test.tsv", verses(9, seed=3))))
    given = replace(config, out=tmp_path / "test", tables=(test,), vocab_size=None)
    prepare_pairs(replace(given, tokenizer=config.out))
    prepared, first = open_pairs(given.out), open_pairs(config.out)
    assert prepared.manifest.tokenizer_fingerprint == first.manifest.tokenizer_fingerprint
    assert [*prepared.pairs("valid", "en", "de").references] == [r["de"] for r in verses(9, 3)]
    assert prepared.directions("train") == []
    rows = [{"en": row["en"], "fr": row["de"]} for row in TRAIN]
    path = write_tsv(tmp_path / "fr.tsv", rows, ("en", "fr"))
    given = replace(given, out=tmp_path / "fr", tables=(TableConfig("fr", str(path)),))
    with pytest.raises(
        UserError, match=r"out has no language 'fr', only en, de, pt-br: name these wi"
    ):
        prepare_pairs(replace(given, tokenizer=config.out))
    assert not given.out.with_name("fr.partial").exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (PairFilter(), r"train split is a pair .*\(tables t; dropped: empty side 240\): fill in"),
        (PairFilter(max_length=3), r"empty side 238, too long 2\): fill in .* raise --max-length$"),
    ],
)
def test_a_split_without_any_pair_is_a_message_and_leaves_nothing(
    config, table, tmp_path, asked, message
):
    rows = [{**row, ("en", "de")[i % 2]: ""} for i, row in enumerate(TRAIN)]
    if asked.max_length:
        rows[0] = TRAIN[0]
    train = write_tsv(tmp_path / "sided.tsv", rows, ("en", "de"))
    one_sided = TableConfig("t", train=str(train))
    before = {*tmp_path.iterdir()}
    with pytest.raises(UserError, match=message):
        prepare_pairs(replace(config, tables=(one_sided,), filter=asked, vocab_size=300))
    both = (replace(table, valid=""), TableConfig("t", valid=str(train)))
    write_tsv(train, rows[1:], ("en", "de"))
    with pytest.raises(UserError, match=r"no row of the valid split is a pair"):
        prepare_pairs(replace(config, tables=both))
    assert {*tmp_path.iterdir()} == before


def test_that_training_needs_a_validation_file_is_said(config, table, reporter, messages):
    prepare_pairs(replace(config, tables=(replace(table, valid=""),)), reporter)
    assert (
        messages.count(
            "no table has a validation file, which training needs: --table NAME=TRAIN,VALID"
        )
        == 1
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tables": ()}, r"give a table at least: --table NAME=TRAIN\.tsv,VALID\.tsv"),
        ({"name": "a.b"}, r"--table 'a\.b': a name is letters, digits, - and _"),
        ({"train": "", "valid": ""}, r"--table verses names no file: --table NAME=TRAIN,VALID"),
        ({"train": "none.tsv"}, r"no file matches 'none\.tsv'"),
        ({"weight": 0}, r"--weight verses=0 must be above 0"),
        ({"weight": math.nan}, r"--weight verses=nan must be above 0"),
        ({"columns": ("en",)}, r"--columns en: name two languages at least"),
        (
            {"columns": ("en", "fr")},
            r"train\.tsv has no column 'fr', which --columns asks for: it has id, en, de, pt-br\.",
        ),
        ({"vocab_size": None}, r"give either --vocab-size N.*or --tokenizer DIR"),
        ({"tokenizer": "x"}, r"give either --vocab-size N.*or --tokenizer DIR"),
        ({"vocab_size": 299}, r"vocab_size=299 is too small.*use 300 at least"),
        ({"vocab_size": 9000}, r"vocab_size=9000 is too large for this text: use at most \d+"),
        ({"vocab_temperature": 0.5}, r"vocab_temperature=0\.5 must be at least 1"),
        (
            {"directions": ("en-fr",)},
            r"direction 'en-fr' is not SOURCE-TARGET of two languages.*en, de",
        ),
        ({"directions": ()}, r"--directions names none: use all, or en-de,de-en"),
        ({"workers": 0}, r"workers=0 must be at least 1"),
        ({"filter": PairFilter(max_length_ratio=0.5)}, r"max_length_ratio=0\.5 must be at least 1"),
        ({"filter": PairFilter(max_length=2)}, r"max_length=2 must be at least 3"),
        ({"train": ""}, r"no table has a training file.*use --tokenizer DIR"),
        ({"valid": "train.tsv"}, r"train\.tsv is named for training and for validation"),
        ({"tables": 2}, r"--table verses is given twice"),
        ({"vocab_size": None, "tokenizer": "."}, r"so \S+ is not a prepared folder"),
    ],
)
def test_bad_settings_are_named_with_a_way_out(
    config, table, tmp_path, monkeypatch, changes, message
):
    monkeypatch.chdir(tmp_path)
    if changes.get("tables"):
        changes = {"tables": (table,) * changes["tables"]}
    of_table = {key: changes[key] for key in changes if key in ("name", "train", "valid", "weight")}
    of_table |= {key: changes[key] for key in changes if key == "columns"}
    if of_table:
        changes = {"tables": (replace(table, **of_table),)}
    if "tokenizer" in changes:
        changes["tokenizer"] = tmp_path / changes["tokenizer"]
    with pytest.raises(UserError, match=message):
        prepare_pairs(replace(config, **changes))
    assert not [*tmp_path.glob("out*")]


def test_languages_without_any_training_text_are_a_message(config, tmp_path):
    rows = [{"en": "", "de": "", "fr": "bonjour"}, {"en": "", "de": "", "fr": "salut"}]
    train = write_tsv(tmp_path / "french.tsv", rows, ("en", "de", "fr"))
    table = TableConfig("t", train=str(train), columns=("en", "de"))
    before = {*tmp_path.iterdir()}
    with pytest.raises(UserError, match=r"no training text in en, de: name other columns with"):
        prepare_pairs(replace(config, tables=(table,)))
    assert {*tmp_path.iterdir()} == before


def test_empty_cells_do_not_make_a_shard_without_end(monkeypatch):
    monkeypatch.setattr(magnetar.data.text.shards, "SHARD_CHARS", 100)
    pieces = (("c", Piece("", True, True)) for _ in range(1000))
    assert [len(found) for _, found in magnetar.data.text.shards._shards(pieces, ["c"])] == [
        100
    ] * 10


def test_a_file_of_two_tables_is_said(config, table, tmp_path, reporter, messages):
    (tmp_path / "link.tsv").symlink_to(table.train)
    again = TableConfig("again", str(tmp_path / "link.tsv"))
    prepare_pairs(replace(config, tables=(table, again)), reporter)
    assert any("train.tsv is read for each of the tables verses, again" in m for m in messages)


def test_a_table_without_rows_is_a_message(config, tmp_path):
    write_tsv(tmp_path / "valid.tsv", [])
    with pytest.raises(UserError, match=r"valid\.tsv holds no row of table verses: fill it"):
        prepare_pairs(config)


def test_a_table_of_one_language_is_a_message(config, tmp_path):
    path = write_jsonl(tmp_path / "one.jsonl", [{"en": "sea"}])
    with pytest.raises(UserError, match=r"table one has only one language, en: add another"):
        prepare_pairs(replace(config, tables=(TableConfig("one", str(path)),)))


@pytest.mark.parametrize("suffix", ["tsv", "jsonl"])
def test_a_file_without_one_of_the_languages_is_a_message(config, table, tmp_path, suffix):
    rows = [{"en": row["en"], "ger": row["de"]} for row in VALID]
    write_jsonl(tmp_path / "train2.jsonl", rows)
    write_tsv(tmp_path / "train2.tsv", rows, ("en", "ger"))
    write_jsonl(tmp_path / "train.jsonl", TRAIN)
    other, both = str(tmp_path / f"train2.{suffix}"), str(tmp_path / f"train*.{suffix}")
    asked = rf"train2\.{suffix} has no column 'de', which --columns asks for: it has (id, )?en, ger"
    missing = rf"train\.{suffix} has no column 'ger', which other files of the table have: it has"
    for changes, message in [
        ({"valid": other, "columns": ("en", "de")}, asked),
        ({"train": both, "columns": ("en", "de")}, asked),
        ({"train": both}, missing),
    ]:
        with pytest.raises(UserError, match=message):
            prepare_pairs(replace(config, tables=(replace(table, **changes),)))


def test_a_long_table_without_a_language_that_is_asked_for_is_a_message(config, tmp_path):
    path = write_jsonl(tmp_path / "long.jsonl", long_rows(TRAIN, "en", "de"))
    table = TableConfig("long", str(path), columns=("en", "fr"))
    with pytest.raises(UserError, match=r"long has no row in 'fr', which --columns asks for.* de"):
        prepare_pairs(replace(config, tables=(table,)))


def test_rows_of_other_directions_are_counted(config, tmp_path, reporter, messages):
    rows = long_rows(TRAIN, "en", "de") + long_rows(VALID, "pt-br", "en")
    table = TableConfig("long", str(write_jsonl(tmp_path / "long.jsonl", rows)))
    prepare_pairs(replace(config, tables=(replace(table, columns=("en", "de")),)), reporter)
    expected = "table long: left out 10 rows that are not in two languages of --columns"
    assert expected in messages


def test_indonesian_is_a_language_where_it_is_named(config, tmp_path, reporter, messages):
    rows = [{"en": row["en"], "id": row["de"]} for row in TRAIN]
    table = TableConfig("t", str(write_jsonl(tmp_path / "n-way.jsonl", rows)))
    with pytest.raises(UserError, match=r"only one language, en: add another\. table t: column id"):
        prepare_pairs(replace(config, tables=(table,)))
    prepare_pairs(replace(config, tables=(replace(table, columns=("en", "id")),)))
    assert len(open_pairs(config.out).pairs("train", "en", "id")) == len(TRAIN)
    table = TableConfig("t", str(write_jsonl(tmp_path / "long.jsonl", long_rows(rows, "en", "id"))))
    prepare_pairs(replace(config, tables=(table,), out=tmp_path / "long"), reporter)
    assert len(open_pairs(tmp_path / "long").pairs("train", "en", "id")) == len(TRAIN)
    assert not any("Indonesian" in message for message in messages)


def test_a_column_id_that_is_no_language_is_said(config, reporter, messages):
    prepare_pairs(config, reporter)
    hint = "column id is what its rows are called; if it is Indonesian, use --columns verses="
    assert f"table verses: {hint}en,de,pt-br,id" in messages


def test_a_direction_that_no_table_holds_is_a_message(config, tmp_path, table):
    path = write_jsonl(tmp_path / "fr.jsonl", [{"en": row["en"], "fr": row["de"]} for row in TRAIN])
    tables = (table, TableConfig("fr", str(path)))
    with pytest.raises(UserError, match=r"--directions de-fr: no table holds both languages"):
        prepare_pairs(replace(config, tables=tables, directions=("en-de", "de-fr")))


@pytest.mark.parametrize("temperature", [1, 2, 5])
def test_a_vocabulary_learns_from_shares_of_the_temperature(temperature):
    texts = [("en", f"word {i:05}") for i in range(4000)] + [
        ("de", f"wort {i:05}") for i in range(250)
    ]
    num_chars = {"en": 40_000, "de": 2500}
    drawn = [*sampled_texts(iter(texts), num_chars, temperature, 20_000)]
    counts = [sum(word in text for text in drawn) * 10 for word in ("word", "wort")]
    assert sum(counts) == pytest.approx(20_000, abs=20)
    assert counts[0] / counts[1] == pytest.approx(16 ** (1 / temperature), rel=0.02)
    assert all(text.startswith(" wor") for text in drawn)


def test_a_small_language_is_learnt_from_more_than_once():
    texts = [("en", "x" * 10)] * 1000 + [("de", f"{i:010}") for i in range(10)]
    drawn = [*sampled_texts(iter(texts), {"en": 10_000, "de": 100}, 1000, 10_000)]
    counts = [drawn.count(f" {i:010}") for i in range(10)]
    assert all(49 <= count <= 51 for count in counts)
    assert sum(counts) == pytest.approx(500, abs=2)
