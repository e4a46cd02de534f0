"""Mistakes in what a user gave: the text is the sentence that she reads, so it names the place and the remedy."""


class UserError(ValueError):
    """A value, row, file or setting that cannot be worked with."""


class UserTypeError(UserError, TypeError):
    """The same of a value of the wrong type."""


class UserImportError(UserError, ImportError):
    """The same of an installed package."""
