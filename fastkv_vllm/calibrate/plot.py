"""A picture of the recall table; the only code that uses matplotlib, which serving does not need."""

from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from fastkv_vllm.calibrate.errors import CalibrationError


def check_can_plot() -> None:
    """Fail before the measurement, not after it.

    Raises:
        CalibrationError: matplotlib is missing.
    """
    if find_spec("matplotlib") is None:
        raise CalibrationError("--plot needs matplotlib, which is not installed: install it, or leave --plot out")


def plot_recall(table: Tensor, recall: Tensor, layer: int, min_recall: float, file: Path) -> None:
    """Draw the mean table [L, L] and the candidates' recall [L - 1] with the threshold and the chosen layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    shown = table.masked_fill(table.new_ones(table.shape).tril().bool(), float("nan"))
    image = left.imshow(shown.numpy(), vmin=0, vmax=1, cmap="viridis")
    left.set(xlabel="later layer", ylabel="candidate layer", title="Attention mass on the candidate's rows, mean")
    figure.colorbar(image, ax=left)
    right.plot(range(len(recall)), recall.numpy(), marker="o", color="tab:blue")
    right.axhline(min_recall, color="grey", linestyle="--", label=f"--min-recall {min_recall:g}")
    right.axvline(layer, color="tab:orange", label=f"TSP layer {layer}")
    right.set(xlabel="candidate layer", ylabel="recall in the worst later layer", ylim=(0, 1.02))
    right.legend(loc="lower right")
    figure.savefig(file)
