"""What tests.faults.fuzz breaks: the JSONs of ds_configs/, prepared folders, and raw text."""

import gzip
import json
import lzma
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from tests.faults.mutations import Drawn, broken_jsons, damaged, drawn

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
TRAIN = "magnetar.launchers.train"
NUM_VALID = 6  # pairs, which take long to translate
_COUNTS = ("num_tokens", "num_documents", "num_bytes", "sha256")  # of a split in a manifest


class Case(NamedTuple):
    """A case.

    Attributes:
        kind: name of the JSON or the file that was broken.
        module: name of the launcher.
        arguments: arguments of the launcher, in the case's folder.
        files: contents of files, or targets of links, by their path in the case's folder.
        environment: variables to set, or with None to remove.
        documents: number of documents that must be prepared, if any are; None: any number.
    """

    kind: str
    module: str
    arguments: list[str]
    files: dict[str, bytes | str]
    environment: Mapping[str, str | None] = {}
    documents: int | None = None


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """A config of ds_configs/ as two steps of a tiny model on what tests.faults.fuzz prepares."""
    config = json.loads(json.dumps(config))
    own = config["magnetar"]
    model, data, training = own["model"], own["data"], own["training"]
    sizes = {"num_layers": 2, "d_model": 16, "d_ff": 32, "num_heads": 2, "max_seq_len": 64}
    model |= sizes
    model.pop("vocab_size", None)
    if model.get("moe"):
        model["moe"] |= {"num_experts": 4, "every": 2, "ep_size": 1}
    data |= {"path": "../inputs/tokens", "seq_len": 64}
    config["train_batch_size"] = 4
    config.pop("train_micro_batch_size_per_gpu", None)
    config.pop("gradient_accumulation_steps", None)
    if "pairs" in data:
        data["path"] = "../inputs/pairs"
        data["pairs"]["bin_tokens"] = 256
        config |= {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1}
        training["eval_translations"] = 2
    training |= {"run_dir": "run", "num_steps": 2, "log_every": 1, "eval_every": 2}
    training["lr_schedule"]["warmup_steps"] = 1
    if training.get("save_every") != "never":
        training["save_every"] = 2
    training["sample_tokens"] = 4
    if "pairs" not in data:
        training["eval_sequences"] = 4
    return config


def allowed_values(model: Any, path: str = "") -> dict[str, list[Any]]:
    """Every key of a section and those within, with some values of its type."""
    from magnetar.engine.config.errors import joined, section_model, without_none

    found: dict[str, list[Any]] = {}
    for name, field in model.model_fields.items():
        here, kind = joined(path, name), without_none(field.annotation)
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        values = {bool: [True, False], int: [1, 2, 3, 4, 8], float: [0.0, 1e-3, 0.1, 0.5, 1.0]}
        found[here] = list(get_args(kind)) if get_origin(kind) is Literal else values.get(kind, [])
        if below := section_model(field.annotation):
            found |= allowed_values(below, here)
    return found


def words_of(schema: Any) -> set[str]:
    """Every word that a JSON schema allows somewhere."""
    found: set[str] = set()
    if isinstance(schema, dict):
        values = [*schema.get("enum", []), schema.get("const")]
        found |= {value for value in values if isinstance(value, str)}
        schema = list(schema.values())
    if isinstance(schema, list):
        for inner in schema:
            found |= words_of(inner)
    return found


def sentences(number: int, words: str) -> list[str]:
    """Deterministic ones, each unlike any other."""
    draw = random.Random(words)
    return [f"{i} " + " ".join(draw.choices(words.split(), k=6)) for i in range(number)]


def raw_files(num_rows: int = 120) -> dict[str, bytes]:
    """Small text and pairs, in every form that is read."""
    english = sentences(num_rows, "the ship sails north over a blue sea with old wind")
    german = sentences(num_rows, "das Schiff segelt nach Norden berück die alte See im Wind")
    rows = zip(english, german, strict=True)
    text = "\n".join(f"{e}. {g}." for e, g in zip(english, german, strict=True)).encode()
    lines = [json.dumps({"text": line}) for line in text.decode().split("\n")]
    table = ["id\ten\tde", *(f"{i}\t{e}\t{g}" for i, (e, g) in enumerate(rows))]
    tsv = "\n".join(table).encode() + b"\n"
    keys = ("source_language", "target_language", "source", "target")
    long = [
        json.dumps(dict(zip(keys, ("en", "de", e, g), strict=True)))
        for e, g in zip(english, german, strict=True)
    ]
    return {
        "text.txt": text,
        "text.jsonl": "\n".join(lines).encode(),
        "text.txt.gz": gzip.compress(text, mtime=0),
        "table.tsv": tsv,
        "table.jsonl": "\n".join(long).encode(),
        "table.tsv.xz": lzma.compress(tsv),
    }


def preparation(name: str) -> tuple[str, list[str]]:
    """The launcher that prepares a raw file in its folder, and its arguments."""
    sizes = ["--workers", "1", "--out", "out", "--vocab-size"]
    if name.startswith("table"):
        table = f"t=raw/{name},raw/valid-{name}"
        return "magnetar.launchers.prepare_pairs", ["--table", table, *sizes, "310"]
    documents = ["--documents", "line"] * name.startswith("text.txt")
    return "magnetar.launchers.prepare_data", [
        *("--train", f"raw/{name}", "--valid-fraction", "0.2"),
        *(*documents, *sizes, "310"),
    ]


def sound_config() -> bytes:
    """The JSON of a run of two steps, which may go on to the third."""
    config = shrunk(json.loads((CONFIGS / "quickstart.json").read_text()))
    config["magnetar"]["training"]["lr_schedule"]["total_steps"] = 3
    return json.dumps(config).encode()


def make_world(world: Path, must: Callable[[str, list[str], Path], None]) -> None:
    """Make everything that cases share: raw text, prepared folders, and a run.

    Args:
        world: a new folder.
        must: function that runs a launcher with arguments in a folder.
    """
    inputs = world / "inputs"
    (inputs / "raw").mkdir(parents=True)
    for prefix, num_rows in (("", 120), ("valid-", NUM_VALID)):
        for name, content in raw_files(num_rows).items():
            (inputs / "raw" / (prefix + name)).write_bytes(content)
    (world / "sentinel.txt").write_text("nobody may write here\n")
    for name, made in (("text.txt", "tokens"), ("table.tsv", "pairs")):
        must(*preparation(name), inputs)
        (inputs / "out").rename(inputs / made)
    other = shrunk(json.loads((CONFIGS / "quickstart.json").read_text()))
    other["magnetar"]["model"]["d_ff"] = 24  # no other config can go on with it
    other["magnetar"]["data"]["path"] = "inputs/tokens"
    other["magnetar"]["training"]["run_dir"] = "runs/other"
    (world / "other.json").write_text(json.dumps(other))
    must(TRAIN, ["--deepspeed_config", "other.json"], world)
    (world / "base").mkdir()  # as deep as a case: its relative paths are a case's, too
    (world / "base/run.json").write_bytes(sound_config())
    must(TRAIN, ["--deepspeed_config", "run.json"], world / "base")


def config_cases(number: int, seed: int) -> list[Case]:
    """Broken JSONs of every kind of run."""
    from magnetar.engine.config.schema import ConfigFile

    words = sorted(words_of(json.loads((CONFIGS / "schema.json").read_text())))
    keys = allowed_values(ConfigFile)
    starts = {
        path.name: shrunk(json.loads(path.read_text()))
        for path in sorted(CONFIGS.glob("*.json"))
        if path.name != "schema.json"
    }
    strategies = {name: broken_jsons(start, keys, words) for name, start in starts.items()}
    return [
        Case(name, TRAIN, ["--deepspeed_config", "run.json"], {"run.json": value})
        for name, value in drawn(strategies, number, seed)
    ]


def file_cases(number: int, seed: int, world: Path) -> list[Case]:
    """Broken files of prepared folders, and of raw text."""
    inputs = world / "inputs"
    strategies: dict[str, Any] = {}
    for made in ("tokens", "pairs"):
        contents = {
            p.name: p.read_bytes() for p in sorted((inputs / made).iterdir()) if p.is_file()
        }
        for name, content in contents.items():
            strategies[f"{made}/{name}"] = damaged(content, list(contents.values()))
        manifest = json.loads(contents["manifest.json"])
        # Twice: as bytes, and key by key.
        strategies[f"{made}/manifest.json, its keys"] = broken_jsons(
            manifest,
            dict.fromkeys(
                [f"splits.{split}.{key}" for split in ("train", "valid") for key in _COUNTS]
                + list(manifest),
                (),
            ),
            ["tokenizer.model", "uint16", "uint32", "train"],
        )
    raw = raw_files()
    strategies |= {
        f"raw/{name}": damaged(content, list(raw.values())) for name, content in raw.items()
    }
    return [_file_case(each, inputs) for each in drawn(strategies, number, seed)]


def _file_case(case: Drawn, inputs: Path) -> Case:
    folder, name = case.name.removesuffix(", its keys").split("/")
    if folder == "raw":
        files = {f"raw/{name}": case.value, f"raw/valid-{name}": raw_files(NUM_VALID)[name]}
        return Case(case.name, *preparation(name), files)
    files = {f"data/{p.name}": p.read_bytes() for p in (inputs / folder).iterdir() if p.is_file()}
    files[f"data/{name}"] = case.value
    start = "quickstart.json" if folder == "tokens" else "translate_demo.json"
    config = shrunk(json.loads((CONFIGS / start).read_text()))
    config["magnetar"]["data"]["path"] = "data"
    files["run.json"] = json.dumps(config).encode()
    return Case(case.name, TRAIN, ["--deepspeed_config", "run.json"], files)
