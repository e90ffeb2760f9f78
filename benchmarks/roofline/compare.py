"""A predicted figure beside the same figure from elsewhere."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Comparison:
    """One figure, predicted and as it came out.

    Fields:
        what: which figure, with its unit.
        predicted, actual: both in that unit.
        calibrated: a machine's constant was taken from this figure, so that its error says nothing.
    """

    what: str
    predicted: float
    actual: float
    calibrated: bool = False

    @property
    def error(self) -> float:
        """predicted / actual - 1."""
        return self.predicted / self.actual - 1
