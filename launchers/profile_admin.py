"""The profile that a model with norm "admin" starts from: one batch, before training.

deepspeed [--hostfile H] --module launchers.profile_admin --deepspeed_config ds_configs/X.json
"""

from launchers.train import launched_world_size, parse_arguments
from launchers.user_errors import user_errors


@user_errors()
def main() -> None:
    """Check everything, then join the other ranks, profile and print."""
    arguments = parse_arguments("launchers.profile_admin", __doc__)
    from engine.config import load_config

    world_size = launched_world_size()
    config = load_config(arguments.deepspeed_config, arguments.set, world_size)
    from engine.admin import profile_path, require_admin
    from engine.engine import launched_rank
    from engine.process_groups import leave_distributed
    from engine.profile_admin import profile
    from engine.trainer import resolve_run

    require_admin(config)
    omegas = profile(*resolve_run(config, world_size))
    leave_distributed()
    if launched_rank() == 0:
        for stack, values in omegas.items():
            shown = " ".join(f"{value:.3f}" for value in values)
            print(f"omega of the {stack}'s sublayers: {shown}")
        print(f"profile   {profile_path(config)}; launchers.train starts from it")


if __name__ == "__main__":
    main()
