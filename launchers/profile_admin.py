"""Measure the profile that a model with norm "admin" starts from: one batch, before training.

`magnetar profile-admin JSON` starts the deepspeed launcher, which starts this. By hand:

deepspeed [--hostfile H] --module magnetar.launchers.profile_admin --deepspeed_config JSON
"""

from collections.abc import Sequence
from pathlib import Path

from magnetar.launchers.terminal.defects import reports_in
from magnetar.launchers.terminal.output import let_no_print_fail
from magnetar.launchers.terminal.user_errors import user_errors
from magnetar.launchers.train import launched_config, parse_arguments


@user_errors()
def main(arguments: Sequence[str] | None = None) -> None:
    """Check everything, then join the other ranks, profile and print."""
    let_no_print_fail()
    options = parse_arguments(arguments, "magnetar.launchers.profile_admin", __doc__)
    config, world_size = launched_config(options)
    from magnetar.engine.admin.measure import profile
    from magnetar.engine.admin.profile import profile_path, require_admin
    from magnetar.engine.cluster.environment import launched_rank
    from magnetar.engine.cluster.process_groups import leave_distributed
    from magnetar.engine.prepare_run import resolve_run

    require_admin(config)
    with reports_in(Path(config.training.run_dir)):
        omegas = profile(*resolve_run(config, world_size))
        leave_distributed()
    if launched_rank() == 0:
        for stack, values in omegas.items():
            shown = " ".join(f"{value:.3f}" for value in values)
            print(f"omega of the {stack}'s sublayers: {shown}")
        print(f"profile   {profile_path(config)}; magnetar train starts from it")


if __name__ == "__main__":
    main()
