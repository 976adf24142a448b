import json
from pathlib import Path

import pytest

from magnetar.data.errors import UserError
from magnetar.engine.checkpoint.format import newest_checkpoint
from magnetar.engine.checkpoint.open_run import open_run
from magnetar.engine.checkpoint.run_folder import check_run_folder
from magnetar.engine.config.schema import RunConfig, check_config
from tests.convert.checkpoints import run_config, write_checkpoint
from tests.engine.programs import BASE, with_keys


def config(run_dir: Path, world_size: int = 1, **changes: object) -> RunConfig:
    keys = {key.replace("__", "."): value for key, value in changes.items()}
    result, problems = check_config(
        with_keys(BASE, {"magnetar.training.run_dir": str(run_dir)} | keys), world_size
    )
    assert result is not None, problems
    return result


def begin(run_dir: Path, begun: RunConfig) -> None:
    run_dir.mkdir()
    (run_dir / "config.json").write_text(json.dumps(begun.to_dict()))


def test_a_new_folder_is_welcome(tmp_path: Path) -> None:
    check_run_folder(config(tmp_path / "run"))


def test_the_same_config_may_go_on(tmp_path: Path) -> None:
    begin(tmp_path / "run", config(tmp_path / "run"))
    check_run_folder(config(tmp_path / "run"))


def test_a_longer_run_and_other_reports_may_go_on(tmp_path: Path) -> None:
    begin(tmp_path / "run", config(tmp_path / "run"))
    check_run_folder(
        config(
            tmp_path / "run",
            magnetar__training__num_steps=99,
            magnetar__training__log_every=3,
            magnetar__training__activation_checkpointing=True,
            zero_optimization__stage=2,
        )
    )


@pytest.mark.parametrize(
    ("moe", "refused"),
    [
        (None, False),
        ({"num_experts": 4}, True),
        ({"num_experts": 4, "aux_loss_weight": 0.0}, False),
        ({"num_experts": 4, "balance_scope": "batch"}, False),
        (
            {
                "num_experts": 4,
                "aux_loss_weight": 0.0,
                "dispatch": "capacity",
                "capacity_factor": 1.0,
            },
            True,
        ),
    ],
)
def test_accumulation_may_change_where_it_changes_no_number(
    moe: dict | None, refused: bool, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    begin(run_dir, config(run_dir, magnetar__model__moe=moe, gradient_accumulation_steps=1))
    other = config(run_dir, magnetar__model__moe=moe, gradient_accumulation_steps=2)
    if not refused:
        check_run_folder(other)
        return
    with pytest.raises(UserError, match="gradient_accumulation_steps: 1 there, 2 here") as error:
        check_run_folder(other)
    assert "gradient_accumulation_steps=1 gives the same numbers on any ranks" in str(error.value)


def test_what_becomes_of_long_sentences_in_translation_may_change(tmp_path: Path) -> None:
    def on_pairs(**pairs: object) -> RunConfig:
        return config(
            tmp_path / "run",
            train_micro_batch_size_per_gpu=1,
            magnetar__model__architecture="encoder_decoder",
            magnetar__data__pairs=pairs,
        )

    begin(tmp_path / "run", on_pairs())
    check_run_folder(on_pairs(too_long_inference="refuse"))
    with pytest.raises(
        UserError, match=r"magnetar\.data\.pairs\.too_long: drop there, refuse here"
    ):
        check_run_folder(on_pairs(too_long="refuse"))


@pytest.mark.parametrize("scope", ["micro_step", "batch"])
def test_a_run_on_pairs_goes_on_with_other_ranks_where_that_changes_no_number(
    scope: str, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    pairs = {
        "magnetar__model__architecture": "encoder_decoder",
        "magnetar__model__moe": {"num_experts": 4, "balance_scope": scope},
        "magnetar__data__pairs": {},
        "train_micro_batch_size_per_gpu": 1,
    }
    begin(run_dir, config(run_dir, 2, **pairs))
    other = config(run_dir, 1, **pairs)
    if scope == "batch":
        check_run_folder(other)
        return
    with pytest.raises(UserError, match="gradient_accumulation_steps: 4 there, 8 here") as error:
        check_run_folder(other)
    assert "with data.pairs it follows from the ranks: take as many" in str(error.value)
    assert 'moe.balance_scope="batch"' in str(error.value)


def test_where_experts_lie_may_change(tmp_path: Path) -> None:
    begin(tmp_path / "run", config(tmp_path / "run"))
    other, _ = check_config(
        with_keys(
            BASE,
            {
                "magnetar.training.run_dir": str(tmp_path / "run"),
                "magnetar.model.moe.ep_size": 2,
            },
        ),
        2,
    )
    assert other is not None
    check_run_folder(other)


def test_another_config_is_refused_and_each_key_named(tmp_path: Path) -> None:
    begin(tmp_path / "run", config(tmp_path / "run"))
    other = config(
        tmp_path / "run",
        magnetar__model__d_ff=128,
        optimizer__params__lr=1.0,
        magnetar__training__seed=7,
    )
    with pytest.raises(UserError) as refused:
        check_run_folder(other)
    message = str(refused.value)
    assert "magnetar.model.d_ff: 64 there, 128 here" in message
    assert "optimizer.params.lr: 0.003 there, 1.0 here" in message
    assert "magnetar.training.seed: 1 there, 7 here" in message
    assert "--set magnetar.training.run_dir=" in message


def test_resume_never_refuses_a_folder_that_holds_a_run(tmp_path: Path) -> None:
    begin(tmp_path / "run", config(tmp_path / "run"))
    with pytest.raises(UserError, match="resume is 'never'"):
        check_run_folder(config(tmp_path / "run", magnetar__training__resume="never"))


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="is a file"):
        check_run_folder(config(tmp_path / "run"))


NO_RECORDS = {
    b"{": "Expecting property name",
    b"null": "it holds no object",
    b"[{}]": "it holds no object",
    b"\xff\xfe{\0}\0": "it is not UTF-8 text",
    b'{"magnetar": \xe9}': "it is not UTF-8 text",
    b"\0" * 512: "Expecting value",
    b"[" * 100_000: "nested more than 50 deep",
    b'{"a":' * 600 + b"1" + b"}" * 600: "nested more than 50 deep",
    b'{"a": ' + b"7" * 5_000 + b"}": "a number in it has thousands of digits",
}


@pytest.mark.parametrize("content", [*NO_RECORDS, b"{}", b'{"magnetar": []}'], ids=lambda c: c[:9])
def test_a_config_that_is_none_is_refused_with_ways_out(content: bytes, tmp_path: Path) -> None:
    run = tmp_path / "run"
    checkpoint = write_checkpoint(run)
    (run / "config.json").write_bytes(content)
    with pytest.raises(UserError) as refused:
        check_run_folder(run_config(run))
    message = str(refused.value)
    assert f"{run / 'config.json'} cannot be read (" in message
    assert NO_RECORDS.get(content, "it has no key magnetar") in message
    assert "copy the config of a checkpoint's manifest.json there" in message
    (run / "config.json").write_text(json.dumps(checkpoint.manifest["config"]))
    check_run_folder(run_config(run))


@pytest.mark.parametrize("content", NO_RECORDS, ids=lambda c: c[:9])
def test_a_manifest_that_is_no_record_is_damage(content: bytes, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 3)
    manifest = write_checkpoint(tmp_path, 5).path / "manifest.json"
    manifest.write_bytes(content)
    with pytest.raises(UserError) as refused:
        newest_checkpoint(tmp_path)
    assert f"{manifest} cannot be read (" in str(refused.value)
    assert NO_RECORDS[content] in str(refused.value)
    assert f"the newest complete one is {manifest.parent.parent}/step_00000003" in str(
        refused.value
    )
    assert open_run(tmp_path, "step_00000003").step == 3


@pytest.mark.parametrize(
    ("key", "package"), [("wandb.enabled", "wandb"), ("comet.enabled", "comet_ml")]
)
def test_a_monitor_without_its_package_is_refused(
    key: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from magnetar.engine import prepare_run

    monkeypatch.setattr(prepare_run, "find_spec", lambda name: None if name == package else name)
    with pytest.raises(UserError, match=f"{key}=true needs the package {package}.*pip install"):
        prepare_run.require_monitor_packages(with_keys(BASE, {key: True}))


def test_the_schedule_of_steps_done_does_not_bend_when_a_run_gets_longer(tmp_path: Path) -> None:
    schedule = {"type": "polynomial", "warmup_steps": 0, "total_steps": 20}
    begin(tmp_path / "run", config(tmp_path / "run", magnetar__training__lr_schedule=schedule))
    longer = config(
        tmp_path / "run",
        magnetar__training__num_steps=80,
        magnetar__training__lr_schedule=schedule | {"total_steps": 80},
    )
    with pytest.raises(UserError, match="total_steps: 20 there, 80 here"):
        check_run_folder(longer)


ADDED_LATER = [
    "model.drop_path",
    "model.norm_eps",
    "model.moe.jitter",
    "model.moe.frozen",
    "training.init_from",
    "training.z_loss_weight",
    "sparse_clip",
]


def begin_with_an_older_version(run_dir: Path, begun: RunConfig) -> None:
    saved = begun.to_dict()
    for path in ADDED_LATER:
        *sections, key = path.split(".")
        section = saved["magnetar"]
        for name in sections:
            section = section[name]
        del section[key]
    run_dir.mkdir()
    (run_dir / "config.json").write_text(json.dumps(saved))


MOE = {"num_experts": 4, "every": 1}


def test_a_run_begun_before_keys_existed_goes_on_with_their_defaults(tmp_path: Path) -> None:
    now = config(tmp_path / "run", magnetar__model__moe=MOE)
    begin_with_an_older_version(tmp_path / "run", now)
    check_run_folder(now)


def test_a_run_begun_before_a_key_existed_is_refused_with_another_value(tmp_path: Path) -> None:
    begun = config(tmp_path / "run", magnetar__model__moe=MOE)
    begin_with_an_older_version(tmp_path / "run", begun)
    other = config(
        tmp_path / "run",
        magnetar__model__moe=MOE | {"jitter": 0.1},
        magnetar__model__drop_path=0.2,
        magnetar__training__seed=7,
    )
    with pytest.raises(UserError) as refused:
        check_run_folder(other)
    assert str(refused.value).splitlines()[1:-1] == [
        "  magnetar.model.drop_path: 0.0 there, 0.2 here",
        "  magnetar.model.moe.jitter: 0.0 there, 0.1 here",
        "  magnetar.training.seed: 1 there, 7 here",
    ]


def test_a_config_that_this_version_cannot_read_is_compared_as_it_is(tmp_path: Path) -> None:
    now = config(tmp_path / "run")
    saved = now.to_dict()
    saved["magnetar"]["model"]["given_up"] = 1
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match=r"model\.given_up: 1 there, absent here"):
        check_run_folder(now)
