"""The one exception that stands for something a user can mend."""


class UserError(ValueError):
    """Bad input: a key, a value or a file that a user can change.

    Its message names the key or file, the value, the rule and a way out. The launchers print it
    without a traceback and exit with status 2; anything else is a defect of ours and keeps its
    traceback.
    """
