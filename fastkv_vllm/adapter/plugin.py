"""Entry points of vLLM's plugin groups."""

import logging
import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from fastkv_vllm.adapter import native

logger = logging.getLogger("vllm.fastkv")

_ARG_UTILS = "vllm.engine.arg_utils"


def register() -> None:
    """`vllm.general_plugins`: teach vLLM's engine arguments ours. Idempotent; changes nothing without the flag."""
    if native.register_arguments():
        return
    import_module(_ARG_UTILS)  # first: its import may call us back through `platform_hook`
    from fastkv_vllm.adapter.patches import engine_args_cli, engine_args_config, engine_args_init

    engine_args_init.add_fields()
    for patch in (*engine_args_init.PATCHES, engine_args_cli.PATCH, engine_args_config.PATCH):
        patch.install()


def platform_hook() -> None:
    """`vllm.platform_plugins`: claims no platform; makes `LLM(model, kv_compression=...)` work without our import.

    vLLM loads general plugins inside `EngineArgs.__init__`, which is too late to add an argument to it. Platform
    plugins are loaded when vLLM is first imported: from here we run `register` as soon as the module of the engine
    arguments has been imported.
    """
    if native.register_arguments():
        return
    module = sys.modules.get(_ARG_UTILS)
    if module is None:
        sys.meta_path.insert(0, _AfterImport())
    elif hasattr(module, "AsyncEngineArgs"):
        register()
    else:
        _register_after_class_body(module)


class _AfterImport(MetaPathFinder):
    """Finds the engine arguments' module the ordinary way and runs `register` once it is loaded."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _ARG_UTILS:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register_or_log()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def _register_after_class_body(module: ModuleType) -> None:
    """Half-imported module (it is the program's very first import of vLLM): wait for its last dataclass.

    The name `dataclass` in that module is what decorates `AsyncEngineArgs`, its last class; we stand in for it until
    then.
    """
    decorate = module.dataclass

    def dataclass(*args: Any, **kwargs: Any) -> Any:
        made = decorate(*args, **kwargs)
        if getattr(made, "__name__", None) == "AsyncEngineArgs":
            module.dataclass = decorate  # type: ignore[attr-defined]
            module.AsyncEngineArgs = made  # type: ignore[attr-defined]
            _register_or_log()
        return made

    module.dataclass = dataclass  # type: ignore[attr-defined]


def _register_or_log() -> None:
    """Run `register` where an exception would be lost or would break an import of vLLM without the flag."""
    try:
        register()
    except Exception:
        logger.exception("fastkv-vllm could not add its arguments; --kv-compression will be refused as unknown")
