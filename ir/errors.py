"""The exceptions that nemoc raises on bad input; each message is one line a user can act on."""


class NemocError(Exception):
    """Bad input: the message is one line naming the place, what was found and what was expected.

    The command line prints it without a traceback and exits with code 2.
    """


class IRError(NemocError):
    """A graph, an op or its text breaks a rule of the IR.

    Args:
        message: what was found and what was expected, one line.
        location: `file:line` or `graph/%value` where it was found; empty when not known yet (type
            inference does not know its place; the verifier and the parser add it).
    """

    def __init__(self, message: str, location: str = "") -> None:
        super().__init__(f"{location}: {message}" if location else message)
        self.message = message
        self.location = location

    def at(self, location: str) -> "IRError":
        """The same error with a location, unless it has one already."""
        return self if self.location else IRError(self.message, location)


def expect(condition: bool, message: str) -> None:
    """Raise `IRError(message)` unless the condition holds; for type inference and verification."""
    if not condition:
        raise IRError(message)
