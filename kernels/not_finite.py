"""The error of a kernel that is given what it would spread over a document."""


class NotFiniteError(ValueError):
    """An input has a NaN. The input is at fault, not the call: what made it is to be found upstream."""
