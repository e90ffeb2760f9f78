"""To be imported first, in a process of its own: Triton interprets its kernels, and vLLM is told that there is one."""

import os
import sys
from types import SimpleNamespace

assert not {"triton", "vllm"} & sys.modules.keys(), "this comes first"
os.environ["TRITON_INTERPRET"] = "1"

from triton.backends import Backend, backends  # noqa: E402

backends["cpu"] = Backend(compiler=None, driver=SimpleNamespace(is_active=lambda: True))
