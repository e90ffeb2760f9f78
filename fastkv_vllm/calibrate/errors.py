"""What a user can put right: a wrong file, a model that does not fit, a threshold nothing reaches."""


class CalibrationError(ValueError):
    """One sentence: what must hold, what came, what to do. The command line prints it without a traceback."""
