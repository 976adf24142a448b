"""Every message of the config names key path, value and way out; what is right resolves once."""

import copy
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magnetar.data.errors import UserError
from magnetar.engine.config.batch_sizes import BatchSizes, batch_problems, filled
from magnetar.engine.config.errors import expected, key_paths, section_model
from magnetar.engine.config.refused_keys import REFUSED
from magnetar.engine.config.schema import ConfigFile, RunConfig, check_config, load_config
from tests.engine.config.shipped import CONFIGS, SHIPPED, example_config

# Like the quickstart, but nobody tunes it.
EXAMPLE = Path(__file__).with_name("example.json")


def set_path(raw: dict, path: str, value: object) -> dict:
    """A copy of `raw` with one value replaced."""
    raw = copy.deepcopy(raw)
    *parents, last = path.split(".")
    here = raw
    for key in parents:
        if not isinstance(here.get(key), dict):
            here[key] = {}
        here = here[key]
    here[last] = value
    return raw


def messages(raw: dict, world_size: int | None = 2) -> list[str]:
    """The lines of what is wrong."""
    return [problem.text for problem in check_config(raw, world_size)[1]]


def quickstart(**values: object) -> dict:
    """The quickstart with values replaced; `__` in a name stands for a dot."""
    raw = json.loads(EXAMPLE.read_text())
    for path, value in values.items():
        raw = set_path(raw, path.replace("__", "."), value)
    return raw


def user_error(path: Path, *overrides: str, world_size: int | None = None) -> str:
    """What a user reads."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides, world_size)
    return str(caught.value)


def worlds_of(name: str) -> tuple[int, ...]:
    """Numbers of ranks that a shipped config fits."""
    if name.startswith("mt_"):
        return 1, 2
    if name == "translate_demo.json":
        return 2, 2
    small_batches = {"quickstart.json": (2, 4)} | dict.fromkeys(
        ("subln_200.json", "deepnorm_1000.json"), (1, 2, 32)
    )
    return small_batches.get(name, (8, 16, 64))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_config_loads(name: str) -> None:
    worlds = worlds_of(name)
    for world_size in (None, *worlds):
        config = load_config(CONFIGS / name, world_size=world_size)
        assert isinstance(config, RunConfig)
    sizes = config.deepspeed
    assert sizes["train_batch_size"] == (
        sizes["train_micro_batch_size_per_gpu"] * sizes["gradient_accumulation_steps"] * worlds[-1]
    )


def test_every_config_in_the_folder_is_listed() -> None:
    page = (CONFIGS / "README.md").read_text()
    assert sorted(re.findall(r"^\| \[(\S+\.json)\]\(\1\) \|", page, re.MULTILINE)) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("is_launched", [False, True])
def test_the_resolved_config_loads_again_as_itself(
    name: str, is_launched: bool, tmp_path: Path
) -> None:
    world_size = worlds_of(name)[1] if is_launched else None
    config = load_config(CONFIGS / name, world_size=world_size)
    saved = tmp_path / "resolved.json"
    saved.write_text(json.dumps(config.to_dict()))
    assert load_config(saved, world_size=world_size) == config


@pytest.mark.parametrize(
    "extra",
    [
        {"type": "polynomial", "power": 2.0},
        {"type": "inverse_sqrt", "warmup_start_lr": 1e-5},
        {"type": "constant"},
        {"type": "cosine", "total_steps": 50, "end_lr": 1e-5},
        {"type": "wsd", "decay_steps": 20, "decay": "1-sqrt"},
    ],
    ids=lambda extra: extra["type"],
)
def test_every_schedule_round_trips(extra: dict) -> None:
    schedule = {"warmup_steps": 5, **extra}
    config, problems = check_config(quickstart(magnetar__training__lr_schedule=schedule), 2)
    assert config is not None, problems
    assert check_config(config.to_dict(), 2)[0] == config


def test_the_resolved_config_is_a_copy() -> None:
    config = load_config(EXAMPLE)
    config.to_dict()["optimizer"]["params"]["lr"] = 7.0
    assert config.deepspeed["optimizer"]["params"]["lr"] == 3e-3


def test_the_minimal_example_is_valid() -> None:
    config, problems = check_config(example_config(), 2)
    assert config is not None, problems


def test_properties_read_the_sections() -> None:
    config, _ = check_config(quickstart(bf16__enabled=True), 2)
    assert config is not None
    assert (config.dtype, config.zero_stage, config.gradient_clipping) == ("bf16", 1, 1.0)
    assert config.model.moe is not None
    assert config.data.seq_len == 128
    assert config.training.num_steps == 400
    assert config.sparse_clip.enabled
    half, _ = check_config(quickstart(fp16__enabled=True), 2)
    single, _ = check_config(quickstart(bf16__enabled=False), 2)
    assert half is not None
    assert single is not None
    assert (half.dtype, single.dtype) == ("fp16", "fp32")


@pytest.mark.parametrize(
    ("stage", "moe", "aligned"),
    [(1, True, True), (2, True, True), (0, True, None), (1, False, None)],
)
def test_experts_under_zero_are_aligned(stage: int, moe: bool, aligned: bool | None) -> None:
    raw = quickstart(zero_optimization__stage=stage)
    if not moe:
        raw = set_path(raw, "magnetar.model.moe", None)
    config, problems = check_config(raw, 2)
    assert config is not None, problems
    assert config.deepspeed["zero_optimization"].get("parameter_alignment") is aligned


def test_whole_numbers_pass_for_numbers_and_5e8_for_a_size() -> None:
    raw = quickstart(gradient_clipping=1, zero_optimization__reduce_bucket_size=5e8)
    config, problems = check_config(raw, 2)
    assert config is not None, problems
    assert config.gradient_clipping == 1.0
    assert config.deepspeed["zero_optimization"]["reduce_bucket_size"] == 500_000_000


@pytest.mark.parametrize("every", ["never", 5, None])
def test_saving_may_be_switched_off(every: object) -> None:
    config, problems = check_config(quickstart(magnetar__training__save_every=every), 2)
    assert config is not None, problems
    assert config.training.save_every == every
    assert check_config(config.to_dict(), 2)[0] == config


def test_no_clipping_is_allowed_without_sparse_clip() -> None:
    raw = quickstart(magnetar__sparse_clip__enabled=False)
    del raw["gradient_clipping"]
    config, problems = check_config(raw, 2)
    assert config is not None, problems
    assert config.deepspeed["gradient_clipping"] == 0.0


WRONG = [
    # path, value, what the message must hold besides path and value
    ("magnetar.model.num_layers", "4", ["a whole number, at least 1"]),
    ("magnetar.model.num_layers", 0, ["at least 1"]),
    ("magnetar.model.num_layers", 2.5, ["a whole number"]),
    ("magnetar.model.num_layers", True, ["a whole number"]),
    ("magnetar.model.num_layers", None, ["a whole number"]),
    ("magnetar.model.dropout", 1.0, ["at least 0, less than 1"]),
    ("magnetar.model.tie_embeddings", 1, ["true or false"]),
    ("magnetar.model.norm", "sublm", ['"post", "subln"', 'did you mean "subln"?']),
    ("magnetar.model.num_layer", 4, ["did you mean magnetar.model.num_layers?"]),
    ("magnetar.model.num_experts", 4, ["did you mean magnetar.model.moe.num_experts?"]),
    ("magnetar.model.frobnicate", 4, ["the keys there are architecture, vocab_size"]),
    ("magnetar.model.moe", 8, ["an object, { ... } (or null)"]),
    ("magnetar.modle", {}, ["did you mean magnetar.model?"]),
    ("magnetar.model.moe.num_experts", 0, ["at least 1, at most 65536, or a list of such"]),
    ("magnetar.model.moe.num_experts", [4, "8"], ["at least 1, at most 65536, or a list of such"]),
    ("magnetar.model.moe.num_experts", 10**18, ["at most 65536"]),
    ("magnetar.model.moe.d_router", 10**12, ["at most 1048576"]),
    ("magnetar.model.d_model", 10**18 + 1, ["at most 1048576"]),
    ("magnetar.model.d_ff", 10**18, ["at most 4194304"]),
    ("magnetar.model.num_layers", 10**9, ["at most 10000"]),
    ("magnetar.model.max_seq_len", 10**12, ["at most 16777216"]),
    ("magnetar.model.relative_buckets", 10**12, ["at most 1048576"]),
    ("train_batch_size", 10**9, ["at most 1048576"]),
    ("train_micro_batch_size_per_gpu", 10**9, ["at most 1048576"]),
    ("gradient_accumulation_steps", 10**9, ["at most 1048576"]),
    ("zero_optimization.allgather_bucket_size", 1, ["more than 0, a multiple of 2"]),
    ("fp16.initial_scale_power", 10**6, ["at least 0, at most 127"]),
    ("magnetar.model.moe.num_experts", [8, 8, 8], ["of which moe.every=2 makes 1, not 3"]),
    ("magnetar.model.moe.ep_size", 3, ["num_experts=8 must be a multiple", "use 9 experts"]),
    ("magnetar.model.moe.capacity_factor", 1.5, ["dispatch 'capacity'", "leave it out"]),
    ("magnetar.data.path", "", ["a text, not empty"]),
    ("magnetar.data.seq_len", 256, ["max_seq_len=128", "use seq_len 128, or max_seq_len 256"]),
    (
        "magnetar.data.masking",
        {"unit": "span"},
        ["'encoder_decoder', but architecture is 'decoder'"],
    ),
    ("magnetar.data.masking.probability", 1.0, ["more than 0, less than 1"]),
    ("magnetar.data.masking.probability", 0.0, ["more than 0, less than 1"]),
    ("magnetar.data.masking.mean_span_length", 0.5, ["at least 1"]),
    ("magnetar.data.masking.unit", "spans", ['did you mean "span"?']),
    ("magnetar.data.masking.replace", "t5", ['"bert", "mask"']),
    ("magnetar.model.output_projection", False, ["nothing to tie", "tie_embeddings false"]),
    ("magnetar.training.z_loss_weight", -1.0, ["at least 0"]),
    ("magnetar.training.label_smoothing", 1.0, ["a number, at least"]),
    ("magnetar.training.label_smoothing", -0.1, ["a number, at least"]),
    ("magnetar.model.moe.router_z_loss_weight", -1.0, ["at least 0"]),
    ("activation_checkpointing", {"profile": True}, ["set that to true, or remove the section"]),
    ("magnetar.training.log_every", 0, ["at least 1"]),
    ("magnetar.training.save_every", "nevr", ['a whole number, at least 1, or "never" (or null)']),
    ("magnetar.training.save_every", 0, ['a whole number, at least 1, or "never" (or null)']),
    ("magnetar.training.save_every", [5], ['a whole number, at least 1, or "never" (or null)']),
    ("magnetar.training.resume", "yes", ['"auto", "never"']),
    ("magnetar.training.lr_schedule.warmup_steps", 401, ["num_steps=400", "use at most 400"]),
    ("magnetar.training.lr_schedule.total_steps", 30, ["warmup_steps=40", "use at most 30"]),
    ("magnetar.training.lr_schedule.type", "linear", ['"inverse_sqrt", "constant", "cosine"']),
    ("magnetar.sparse_clip", True, ["an object"]),
    ("magnetar", 3, ["an object"]),
    ("train_batch_size", "16", ["a whole number, at least 1"]),
    ("train_batch_size", 17, ["2 ranks", "use train_batch_size 16 or 18"]),
    ("train_batch_szie", 16, ["did you mean train_batch_size?"]),
    ("num_layers", 16, ["did you mean magnetar.model.num_layers?"]),
    ("gradient_clipping", -1, ["at least 0"]),
    ("gradient_clipping", float("inf"), ["a number, at least 0"]),
    ("optimizer", None, ["an object"]),
    ("optimizer.type", "Lamb", ['"Adam", "AdamW"', "SparseClip"]),
    ("optimizer.type", "adamw", ['did you mean "AdamW"?']),
    ("optimizer.params.lr", 0, ["more than 0"]),
    ("optimizer.params.betas", [0.9, 1.2], ["a list of 2 numbers"]),
    ("optimizer.params.betas", [0.9], ["a list of 2 numbers"]),
    ("optimizer.params.max_grad_norm", 1.0, ["`gradient_clipping`"]),
    ("optimizer.params.beta", [0.9, 0.9], ["did you mean optimizer.params.betas?"]),
    ("optimizer.params.adam_w_mode", False, ['type="AdamW"', 'use type "Adam"']),
    ("zero_optimization", True, ["an object"]),
    ("zero_optimization.stage", 4, ["one of 0, 1, 2, 3"]),
    ("zero_optimization.stage", "2", ["did you mean 2?"]),
    ("zero_optimization.stage3_prefetch_bucket", 1, ["zero_optimization.stage3_prefetch_bucket_"]),
    ("zero_optimization.offload_optimizer.device", "nvme", ["disk", "use `cpu`"]),
    ("zero_optimization.parameter_alignment", False, ["16 bytes", "set it to true"]),
    ("zero_optimization.contiguous_gradients", False, ["gradients of different experts", "remove"]),
    ("zero_optimization.reduce_scatter", False, ["gradients of different experts", "remove it"]),
    ("magnetar.model.d_ff", 510, ["multiple of 4", "rows of 16 bytes", "use 512"]),
    ("gradient_clipping", 1e40, ["1e+30"]),
    ("zero_optimization.compute_grad_norm", False, ["without a norm", "remove it"]),
    ("zero_optimization.overlap_com", True, ["did you mean zero_optimization.overlap_comm?"]),
    ("data_types.grad_accum_dtype", "bf16", ["weights in fp32", "leave it out"]),
    ("data_types.grad_accum_dtype", "int8", ['"fp32", "bf16", "fp16"']),
    ("tensorboard.output", "x", ["did you mean tensorboard.output_path?"]),
    ("timers.throughput.enable", True, ["did you mean timers.throughput.enabled?"]),
    ("fp16.min_loss_scale", 0, ["at least 1"]),
]


@pytest.mark.parametrize(("path", "value", "parts"), WRONG)
def test_a_wrong_value_is_named_with_a_way_out(path: str, value: object, parts: list[str]) -> None:
    lines = messages(set_path(quickstart(), path, value))
    found = "\n".join(lines)
    name = path.rpartition(".")[2]
    given_value = json.dumps(value)
    if name not in ("betas", "ep_size", "masking", "activation_checkpointing"):
        assert f"{name}={given_value}" in found
    assert path.rpartition(".")[0] in found
    for part in parts:
        assert part in found
    assert len(lines) == 1, lines


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("magnetar.model.moe.exchange", "auto"),
        ("magnetar.model.moe.exchange_chunks", None),
        ("zero_optimization.load_from_fp32_weights", True),
        ("zero_optimization.load_from_fp32_weights", False),
        ("checkpoint", {"tag_validation": "Warn"}),
        ("checkpoint", {"tag_validation": "Fail"}),
    ],
)
def test_a_stored_config_with_retired_keys_is_read(path: str, value: object) -> None:
    config, _ = check_config(quickstart())
    assert config is not None
    assert check_config(set_path(quickstart(), path, value)) == (config, [])


@pytest.mark.parametrize("path", sorted(REFUSED))
def test_a_refused_key_says_why(path: str) -> None:
    found = messages(set_path(quickstart(), path, 2))
    assert found == [f"{path}=2 is refused: {REFUSED[path]}"]
    assert ": " in REFUSED[path] or REFUSED[path].startswith(("use", "master"))


@pytest.mark.parametrize(
    "path",
    [
        "magnetar",
        "optimizer",
        "optimizer.params",
        "magnetar.data",
        "optimizer.params.lr",
        "magnetar.training.num_steps",
    ],
)
def test_a_missing_key_is_named(path: str) -> None:
    raw = quickstart()
    *parents, last = path.split(".")
    here = raw
    for key in parents:
        here = here[key]
    del here[last]
    found = messages(raw)
    assert len(found) == 1
    assert found[0].startswith(f"{path} is missing: add ")


@pytest.mark.parametrize(
    ("kind", "extra", "part"),
    [
        ("constant", {"power": 1.0}, "lr_schedule.power=1.0 belongs to type 'polynomial'"),
        ("constant", {"total_steps": 9}, "lr_schedule.total_steps=9 belongs"),
        (
            "inverse_sqrt",
            {"end_lr": 1e-5},
            "lr_schedule.end_lr=1e-05 belongs to type 'polynomial' or 'cosine' or 'wsd', but",
        ),
        ("cosine", {"decay_steps": 5}, "lr_schedule.decay_steps=5 belongs to type 'wsd', but"),
        ("wsd", {}, "decay_steps is missing: type 'wsd' needs the number of steps"),
        (
            "wsd",
            {"decay_steps": 396},
            "lr_schedule.decay_steps=396 must not exceed the 395 steps between the warm-up and "
            "num_steps=400: use at most 395",
        ),
        (
            "cosine",
            {"warmup_steps": 1, "warmup_start_lr": 1e-5},
            "warmup_start_lr=1e-05 needs a warm-up of 2 steps or more, and warmup_steps is 1",
        ),
        ("inverse_sqrt", {"warmup_steps": 0}, "use warmup_steps 1 or more, or type 'constant'"),
    ],
)
def test_a_schedule_does_not_contradict_itself(kind: str, extra: dict, part: str) -> None:
    schedule = {"type": kind, "warmup_steps": 5, **extra}
    found = messages(quickstart(magnetar__training__lr_schedule=schedule))
    assert len(found) == 1
    assert part in found[0]
    assert found[0].startswith("magnetar.training.lr_schedule.")


@pytest.mark.parametrize("absent", [True, False])
def test_sparse_clip_needs_a_threshold(absent: bool) -> None:
    raw = quickstart(gradient_clipping=0)
    if absent:
        del raw["gradient_clipping"]
    (found,) = messages(raw)
    assert "SparseClip has no threshold" in found
    assert "set gradient_clipping (1.0, say), or magnetar.sparse_clip.enabled=false" in found


@pytest.mark.parametrize(
    ("precision", "reason"), [("bf16", "Adam's counter"), ("fp16", "never scales the loss")]
)
@pytest.mark.parametrize("section", [{"stage": 0}, {}])
def test_low_precision_needs_zero(precision: str, reason: str, section: dict) -> None:
    raw = quickstart(zero_optimization=section)
    raw[precision] = {"enabled": True}
    (found,) = messages(raw)
    assert found.startswith("zero_optimization.stage=0")
    assert f"{precision}.enabled=true" in found
    assert reason in found
    assert "set zero_optimization.stage=1" in found


def test_offloading_needs_zero() -> None:
    raw = quickstart(zero_optimization={"stage": 0, "offload_optimizer": {"device": "cpu"}})
    assert messages(raw) == [
        'zero_optimization.offload_optimizer.device="cpu" needs ZeRO, but '
        "zero_optimization.stage=0: set stage 1, 2 or 3, or remove offload_optimizer"
    ]
    raw["zero_optimization"]["stage"] = 3
    assert messages(raw) == []


@pytest.mark.parametrize("accumulate", ["fp32", "bf16", None])
@pytest.mark.parametrize("stage", [1, 2])
def test_bf16_accumulates_in_float32_or_bf16(accumulate: str | None, stage: int) -> None:
    raw = quickstart(bf16__enabled=True, zero_optimization__stage=stage)
    assert messages(set_path(raw, "data_types.grad_accum_dtype", accumulate)) == []


def test_ep_size_divides_the_ranks() -> None:
    (found,) = messages(quickstart(magnetar__model__moe__ep_size=4, train_batch_size=12), 6)
    assert found.startswith("magnetar.model.moe.ep_size=4 must divide the 6 ranks")
    assert "ep_size [1, 2], or 4 or 8 ranks" in found
    assert messages(quickstart(magnetar__model__moe__ep_size=4), None) == []


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        (
            {"bf16.enabled": True, "fp16.enabled": True},
            ["bf16.enabled=true and fp16.enabled=true", "keep one"],
        ),
        (
            {"bf16.enabled": True, "data_types.grad_accum_dtype": "fp16"},
            [
                'data_types.grad_accum_dtype="fp16" does not go with weights in bf16: use "bf16" '
                'or "fp32"'
            ],
        ),
        (
            {"bf16.enabled": True, "magnetar.model.d_model": 132},
            ["magnetar.model.d_model=132 must be a multiple of 8", "use 136"],
        ),
        (
            {"magnetar.training.eval_translations": 8},
            ["magnetar.training.eval_translations=8 needs magnetar.data.pairs", "prepare pairs"],
        ),
        (
            {"magnetar.model.output_projection": False, "magnetar.model.tie_embeddings": False},
            ["magnetar.model.output_projection=false leaves training without logits"],
        ),
        (
            {
                "magnetar.model.architecture": "encoder",
                "magnetar.model.multiway": True,
                "magnetar.model.moe": None,
            },
            ["magnetar.model.multiway=true needs two modalities", "remove it"],
        ),
        (
            {"magnetar.training.independent_weight_decay": True, "optimizer.type": "Adam"},
            [
                "magnetar.training.independent_weight_decay=true needs optimizer.type",
                'use type "AdamW", or remove it',
            ],
        ),
        (
            {"magnetar.training.compile": True, "zero_optimization.stage": 3},
            ["magnetar.training.compile=true contradicts zero_optimization.stage=3"],
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_sections_that_contradict_each_other_are_named(keys: dict, parts: list[str]) -> None:
    raw = quickstart()
    for path, value in keys.items():
        raw = set_path(raw, path, value)
    (line,) = messages(raw)
    assert line.startswith(parts[0])
    assert parts[-1] in line


@pytest.mark.parametrize(
    "keys",
    [
        {"magnetar__training__independent_weight_decay": True},
        {
            "magnetar__training__activation_checkpointing": True,
            "activation_checkpointing": {"profile": True},
        },
        {"magnetar__training__compile": True, "zero_optimization__stage": 2},
    ],
    ids=str,
)
def test_what_goes_together_is_accepted(keys: dict) -> None:
    assert messages(quickstart(**keys)) == []


def test_all_problems_are_listed_at_once() -> None:
    found = user_error(
        EXAMPLE,
        "magnetar.model.num_layers=0",
        "magnetar.model.moe.top_k=0",
        "magnetar.data.seq_len=-1",
        "optimizer.params.lr=-1",
        "gradient_clipping=0",
        "scheduler={}",
        world_size=2,
    )
    assert found.startswith(f"{EXAMPLE} has 6 problems:\n  ")
    assert found.count("\n") == 6


def test_all_contradictions_of_the_experts_are_listed_at_once() -> None:
    moe = {
        "num_experts": 1,
        "ep_size": 2,
        "dispatch": "capacity",
        "router": "linear",
        "d_router": 4,
    }
    found = messages(quickstart(magnetar__model__moe=moe))
    assert len(found) == 4
    assert all(line.startswith("magnetar.model.moe.") for line in found)


def test_no_message_speaks_pydantic() -> None:
    for path, value, _ in WRONG:
        found = "\n".join(messages(set_path(quickstart(), path, value)))
        assert not any(
            word in found
            for word in ("pydantic", "http", "Input should", "type=int", "validation error")
        )


SIZES = st.none() | st.integers(1, 96)


@settings(max_examples=300, deadline=None)
@given(train=SIZES, micro=SIZES, accumulation=SIZES, world_size=st.integers(1, 16))
def test_a_refused_batch_proposes_sizes_that_fit(
    train: int | None, micro: int | None, accumulation: int | None, world_size: int
) -> None:
    sizes = BatchSizes(train, micro, accumulation)
    problems = batch_problems(sizes, world_size)
    if train is None and micro is None:
        assert "both missing" in problems[0].text
        return
    if not problems:
        full = filled(sizes, world_size)
        assert full.train == full.micro * full.accumulation * world_size  # type: ignore[operator]
        return
    if "or leave it out" in problems[0].text:
        micro_alone = problems[0].text.split("use train_micro_batch_size_per_gpu ")[1]
        assert (
            batch_problems(sizes._replace(micro=int(micro_alone.split(",")[0])), world_size) == []
        )
        assert batch_problems(sizes._replace(micro=None), world_size) == []
        return
    proposal = problems[0].text.split("use train_batch_size ")[1].split(", or")[0]
    for number in proposal.split(" or "):
        assert batch_problems(sizes._replace(train=int(number)), world_size) == []
    if "leave out train_batch_size" in problems[0].text:
        assert batch_problems(sizes._replace(train=None), world_size) == []
    if "leave out gradient_accumulation_steps" in problems[0].text:
        assert batch_problems(sizes._replace(accumulation=None), world_size) == []
    if "or train_micro_batch_size_per_gpu " in problems[0].text:
        other = int(problems[0].text.split("or train_micro_batch_size_per_gpu ")[1].split(",")[0])
        assert batch_problems(sizes._replace(micro=other), world_size) == []
    if problems[0].text.endswith(("rank", "ranks")):
        for number in problems[0].text.split(", or ")[-1].split()[:-1:2]:
            assert batch_problems(sizes, int(number)) == []


def test_on_other_ranks_the_batch_and_its_accumulation_steps_can_stay() -> None:
    (problem,) = batch_problems(BatchSizes(8, 2, 2), 1)
    assert problem.text.endswith("use train_micro_batch_size_per_gpu 4, or leave it out")


@pytest.mark.parametrize(
    ("sizes", "ranks", "way_out"),
    [
        ((16, None, None), 3, "or 2 or 4 ranks"),
        ((16, None, 4), 3, "or 2 or 4 ranks"),
        ((17, None, None), 2, "or 1 or 17 ranks"),
        ((16, 8, None), 4, "or 2 ranks"),
        ((16, 16, None), 2, "or 1 rank"),
    ],
)
def test_numbers_of_ranks_that_fit_are_named(
    sizes: tuple[int | None, int | None, int | None], ranks: int, way_out: str
) -> None:
    (problem,) = batch_problems(BatchSizes(*sizes), ranks)
    assert problem.text.endswith(way_out)
    for number in way_out.split():
        if number.isdigit():
            assert not batch_problems(BatchSizes(*sizes), int(number))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_value_at_any_path_ends_in_a_traceback(data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(key_paths(ConfigFile)))
    leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    value = data.draw(
        leaf | st.lists(leaf, max_size=3) | st.dictionaries(st.text(max_size=5), leaf)
    )
    config, problems = check_config(set_path(quickstart(), path, value), 2)
    assert (config is None) == bool(problems)


def test_every_key_has_a_description_and_a_kind() -> None:
    def walk(model: type) -> None:
        for name, field in model.model_fields.items():  # type: ignore[attr-defined]
            assert field.description, name
            assert expected(field)
            if below := section_model(field.annotation):
                walk(below)

    walk(ConfigFile)


def test_a_dense_model_may_have_any_width_and_any_reduction() -> None:
    raw = set_path(quickstart(), "magnetar.model.moe", None)
    raw = set_path(raw, "magnetar.model.d_ff", 510)
    assert messages(set_path(raw, "zero_optimization.contiguous_gradients", False)) == []


def masked(**values: object) -> dict:
    """The quickstart as an encoder, with values replaced."""
    return quickstart(**{"magnetar__model__architecture": "encoder", **values})


@pytest.mark.parametrize("architecture", ["encoder", "encoder_decoder"])
def test_a_model_with_an_encoder_masks_by_default_and_the_resolved_config_says_how(
    architecture: str,
) -> None:
    raw = masked(magnetar__model__architecture=architecture)
    for each in (raw, set_path(raw, "magnetar.data.masking", None)):
        config, problems = check_config(each, 2)
        assert config is not None, problems
        resolved = config.to_dict()
        expected_masking = {"probability": 0.15, "unit": "token", "replace": "bert"}
        assert resolved["magnetar"]["data"]["masking"] == expected_masking
        assert check_config(resolved, 2)[0] == config


def test_spans_round_trip_with_their_mean_length() -> None:
    config, problems = check_config(masked(magnetar__data__masking={"unit": "span"}), 2)
    assert config is not None, problems
    assert config.to_dict()["magnetar"]["data"]["masking"]["mean_span_length"] == 3.0
    assert check_config(config.to_dict(), 2)[0] == config


def test_a_decoder_has_no_masking() -> None:
    config, _ = check_config(quickstart(), 2)
    assert config is not None
    assert config.to_dict()["magnetar"]["data"]["masking"] is None


def test_a_span_length_without_spans_is_refused() -> None:
    (line,) = messages(masked(magnetar__data__masking={"mean_span_length": 4.0}))
    assert line.startswith("magnetar.data.masking.mean_span_length=4.0 belongs to unit 'span'")
    assert "remove it, or use unit 'span'" in line


def test_the_decoder_of_an_encoder_decoder_bounds_the_sequences_too() -> None:
    raw = masked(magnetar__model__architecture="encoder_decoder")
    assert messages(set_path(raw, "magnetar.model.max_target_len", 128)) == []
    (line,) = messages(set_path(raw, "magnetar.model.max_target_len", 100))
    assert "magnetar.data.seq_len=128 must not exceed magnetar.model.max_target_len=100" in line
    assert "use seq_len 100, or max_target_len 128" in line


def translating(**values: object) -> dict:
    """The quickstart on sentence pairs, with values replaced."""
    own = {
        "magnetar__model__architecture": "encoder_decoder",
        "magnetar__data__pairs": {"bin_tokens": 512},
        "train_micro_batch_size_per_gpu": 1,
    }
    return quickstart(**own | values)


def test_pairs_mask_nothing_and_round_trip() -> None:
    raw = translating(magnetar__data__pairs={"directions": ["en-de"], "bin_tokens": 256})
    config, problems = check_config(raw, 2)
    assert config is not None, problems
    resolved = config.to_dict()
    assert resolved["gradient_accumulation_steps"] == 8
    assert resolved["magnetar"]["data"] == {
        "path": "prepared/sotu",
        "seq_len": 128,
        "pairs": {
            "bin_tokens": 256,
            "temperature": 5.0,
            "directions": ["en-de"],
            "too_long": "drop",
            "too_long_inference": "split",
        },
        "masking": None,
    }
    assert check_config(resolved, 2)[0] == config


@pytest.mark.parametrize(
    ("path", "value", "parts"),
    [
        (
            "magnetar.model.architecture",
            "decoder",
            ["magnetar.data.pairs={...} needs", "but architecture is 'decoder'", "remove pairs"],
        ),
        ("magnetar.data.masking", {}, ["contradicts magnetar.data.pairs", "keep one of them"]),
        (
            "magnetar.model.moe",
            {"num_experts": 8, "dispatch": "capacity", "capacity_factor": 1.0},
            ["moe.dispatch", "bins differ in shape", 'use "dropless"'],
        ),
        (
            "magnetar.data.pairs.bin_tokens",
            255,
            ["seq_len=128 and 128 target tokens", "use at least 256"],
        ),
        ("magnetar.data.pairs.bin_tokens", 8, ["at least 16"]),
        ("magnetar.data.pairs.temperature", 0.5, ["at least 1"]),
        ("magnetar.data.pairs.directions", "en-de", ["a list of texts"]),
        ("magnetar.data.pairs.too_long", "split", ['one of "drop", "truncate", "refuse"']),
        ("train_micro_batch_size_per_gpu", 8, ["must be 1 with magnetar.data.pairs", "bin_tokens"]),
        ("train_micro_batch_size_per_gpu", None, ["=null must be 1 with magnetar.data.pairs"]),
    ],
)
def test_what_contradicts_pairs_is_named_with_a_way_out(
    path: str, value: object, parts: list[str]
) -> None:
    (line,) = messages(set_path(translating(), path, value))
    for part in (path.rpartition(".")[2], *parts):
        assert part in line


def test_pairs_may_be_translated_as_the_run_goes_on() -> None:
    assert messages(translating(magnetar__training__eval_translations=8)) == []


def test_targets_of_pairs_have_a_length_of_their_own() -> None:
    assert messages(translating(magnetar__model__max_target_len=100)) == []
    longest = translating(magnetar__model__max_target_len=385)
    assert "385 target tokens: use at least 513" in messages(longest)[0]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("magnetar.training.run_dir", "runs/\0"),
        ("magnetar.data.path", "\ud800"),
        ("tensorboard.output_path", "\0"),
        ("magnetar.data.pairs.directions", ["en-\udfff"]),
        ("magnetar.\0", 1),
    ],
)
def test_a_text_that_no_file_can_hold_is_refused(path: str, value: object) -> None:
    (line,) = messages(set_path(quickstart(), path, value))
    assert "has a NUL or half a character in it: write it anew" in line
    line.encode()  # it can be printed
