"""The errors a user can meet, and the one exception that passes use among themselves."""


class MoeCompileError(RuntimeError):
    """A mistake the user can mend: the message says what, where and what to do."""


class Refusal(Exception):
    """A proof that could not be finished.  The text names the first unproven point and its values.

    Never leaves the library: the caller puts the reason into the report and the program runs unchanged.
    """
