"""Why a run cannot start, or cannot go on."""


class RunError(ValueError):
    """Every rank finds the same (`everywhere`), so it is said once."""

    everywhere = True
