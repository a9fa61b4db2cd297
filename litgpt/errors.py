"""The one error that users see: a single line about something they can mend."""


class UserError(Exception):
    """Something the user can mend, said in one line: the key or file, its value, and one that would do."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split())
