"""The exceptions for what a user can mend."""


class InputError(ValueError):
    """Something that the user gave cannot be used: a file, a record in it, or a setting.

    The message is one line that names the thing, its value and the remedy. The command line prints it
    without a stack trace.
    """


class ProtocolError(InputError, TypeError):
    """A model or a source of pseudo masks does not follow its protocol; the message names what is wrong."""


class InconclusiveError(RuntimeError):
    """`check_provider` can neither pass nor fault a model, because it has not learned enough to be judged."""
