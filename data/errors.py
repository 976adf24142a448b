"""The two errors that are not defects of ours: a mistake of the user, and a fault of a machine."""


class UserError(ValueError):
    """Bad input: a key, a value or a file that a user can change.

    Its message names the key or file, the value, the rule and a way out. The launchers print it
    without a traceback and exit with status 2; anything else is a defect of ours and keeps its
    traceback.

    Attributes:
        on_every_rank: True if every rank raises it together, so that one of them prints it.
            Before the ranks have joined, all of them see the same input and this does not matter.
    """

    def __init__(self, message: str, on_every_rank: bool = False) -> None:
        super().__init__(message)
        self.on_every_rank = on_every_rank


class MachineError(RuntimeError):
    """A fault of a machine, such as weights that have changed by themselves.

    Its message says what was found and what to do. The launchers print it without a traceback and
    exit with status 3: a new start goes on from the last checkpoint.

    Attributes:
        on_every_rank: True if every rank raises it, so that one rank prints it.
    """

    def __init__(self, message: str, on_every_rank: bool = False) -> None:
        super().__init__(message)
        self.on_every_rank = on_every_rank
