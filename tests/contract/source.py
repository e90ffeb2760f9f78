"""Signatures of vLLM's symbols, read from its source."""

import ast
import copy
import functools
import zipfile
from collections.abc import Iterator
from pathlib import Path


class Source:
    """vLLM's Python files, in a folder that holds `vllm/` or in a wheel."""

    def __init__(self, path: Path) -> None:
        self._root = path if path.is_dir() else zipfile.Path(path)
        self.tree = functools.cache(self._tree)

    def signature(self, symbol: str) -> str | None:
        """How "module:name" or "module:Class.member" is written; None where it is not there.

        A function is its parameters with their defaults, a variable or field its annotation and value.
        """
        module, _, path = symbol.partition(":")
        name, _, member = path.partition(".")
        found = self.find(module, name)
        if found is not None and member:
            found = self.member(*found, member)
        return None if found is None else _written(found[1])

    def find(self, module: str, name: str) -> tuple[str, ast.AST] | None:
        """The statement that defines a name of a module, and the module it stands in; imports are followed."""
        tree = self.tree(module)
        for statement in _statements(tree.body if tree else []):
            if isinstance(statement, ast.ImportFrom):
                for alias in statement.names:
                    if (alias.asname or alias.name) in (name, "*"):
                        original = name if alias.name == "*" else alias.name
                        target = _absolute(module, self._is_package(module), statement)
                        found = None if (target, original) == (module, name) else self.find(target, original)
                        if found is not None:
                            return found
            elif name in _defined(statement):
                return module, statement
        submodule = self.tree(f"{module}.{name}")
        return None if submodule is None else (f"{module}.{name}", submodule)

    def member(self, module: str, owner: ast.AST, name: str) -> tuple[str, ast.AST] | None:
        """What defines a member of a class: a statement of its body, one that assigns it to `self`, or a base's."""
        if not isinstance(owner, ast.ClassDef):
            return None
        own = list(_statements(owner.body))
        for statement in own:
            if name in _defined(statement):
                return module, statement
        for method in own:
            for node in ast.walk(method) if isinstance(method, ast.FunctionDef) else ():
                if f"self.{name}" in _defined(node):
                    return module, node
        for base in owner.bases:
            found = self.find(module, base.id) if isinstance(base, ast.Name) else None
            inherited = self.member(*found, name) if found is not None else None
            if inherited is not None:
                return inherited
        return None

    def _tree(self, module: str) -> ast.Module | None:
        path = self._root.joinpath(*module.split("."))
        for file in (path.parent / f"{path.name}.py", path / "__init__.py"):
            if file.is_file():
                return ast.parse(file.read_text(encoding="utf-8"))
        return None

    def _is_package(self, module: str) -> bool:
        return self._root.joinpath(*module.split("."), "__init__.py").is_file()


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a body, those under `if` and `try` among them."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try):
            yield from _statements(statement.body)
            yield from _statements(statement.orelse)


def _defined(node: ast.AST) -> set[str]:
    """Names a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Assign):
        return {ast.unparse(name) for target in node.targets for name in getattr(target, "elts", [target])}
    return {ast.unparse(node.target)} if isinstance(node, ast.AnnAssign) else set()


def _absolute(module: str, is_package: bool, statement: ast.ImportFrom) -> str:
    """Module an import names."""
    if not statement.level:
        return statement.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - statement.level + is_package]
    return ".".join([*parts, *([statement.module] if statement.module else [])])


def _written(node: ast.AST) -> str:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        arguments = copy.deepcopy(node.args)
        for argument in ast.walk(arguments):
            if isinstance(argument, ast.arg):
                argument.annotation = None
        kinds = [ast.unparse(d) for d in node.decorator_list]
        kinds = [f"@{kind} " for kind in kinds if kind in ("property", "staticmethod", "classmethod")]
        return f"{''.join(kinds)}({ast.unparse(arguments)})"
    if isinstance(node, ast.AnnAssign):
        return f": {ast.unparse(node.annotation)}"
    return "class" if isinstance(node, ast.ClassDef) else "module" if isinstance(node, ast.Module) else "variable"
