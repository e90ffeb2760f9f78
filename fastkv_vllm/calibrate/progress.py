"""Long loops that go on where they were cut off."""

import json
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from fastkv_vllm.calibrate.artefact import write_json
from fastkv_vllm.calibrate.errors import CalibrationError


class Resumable(Protocol):
    """A measurement made of numbered steps, whose state between two of them is plain JSON."""

    def step(self, index: int) -> None:
        """Do step `index`; it may depend on the state and on the number, on nothing else."""

    def state(self) -> dict[str, Any]:
        """Everything later steps depend on; floats in JSON are exact."""

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a state."""


class PartialFile:
    """The file beside an artefact that holds the states of its phases until it is done.

    Fields:
        path: the file.
        every: steps between two writes.
    """

    def __init__(self, path: Path, *, resume: bool, every: int) -> None:
        """Go on from the file if `resume` is set and there is one; without `resume` an old one is forgotten."""
        self.path = path
        self.every = every
        self._phases: dict[str, dict[str, Any]] = {}
        if resume and path.is_file():
            self._phases = json.loads(path.read_text())

    def run(self, name: str, work: Resumable, num_steps: int, *, identity: dict[str, Any]) -> None:
        """Run the steps of one phase that are not done yet, with a progress bar.

        Args:
            name: of the phase, in the bar and in the file.
            work: ends in the state after all steps, the same as without an interruption.
            num_steps: of the whole phase.
            identity: all that the phase's result depends on, JSON types.

        Raises:
            CalibrationError: the file holds this phase with another identity.
        """
        done = 0
        if name in self._phases:
            before = self._phases[name]
            if before["identity"] != identity:
                changed = sorted(k for k in identity if before["identity"].get(k) != identity[k])
                raise CalibrationError(
                    f"--resume needs the settings of the interrupted run; {', '.join(changed)} changed since "
                    f"{self.path} was written: run with those settings, or without --resume to begin again"
                )
            done = before["done"]
            work.restore(before["state"])
        for index in tqdm(range(done, num_steps), desc=name, initial=done, total=num_steps):
            work.step(index)
            if (index + 1) % self.every == 0 or index + 1 == num_steps:
                self._phases[name] = {"identity": identity, "done": index + 1, "state": work.state()}
                write_json(self.path, self._phases)

    def remove(self) -> None:
        """Delete the file, once the artefact is written."""
        self.path.unlink(missing_ok=True)
