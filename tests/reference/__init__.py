"""A plain-torch oracle for engine tests: real architectures, exact dropping, no code of vLLM or ours."""

from tests.reference.checkpoints import FAMILIES, make_checkpoint
from tests.reference.model import Generation, ReferenceModel
from tests.reference.selection import Drop

__all__ = ["FAMILIES", "Drop", "Generation", "ReferenceModel", "make_checkpoint"]
