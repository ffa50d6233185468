"""Parts of a large package, without all that the package imports for its users' convenience."""

import importlib.util
import sys
from types import ModuleType


class _Pending(ModuleType):
    """A package whose `__init__` runs when a name is asked of the package itself, and not when one
    of its modules is imported."""

    def __getattr__(self, name: str) -> object:
        # what the import system, pytest or inspect ask of any module tells of no use
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        _run_init(self)
        return getattr(self, name)

    def __setattr__(self, name: str, value: object) -> None:
        # the import system binds modules here; `__init__` may give the same name to something else
        if not isinstance(value, ModuleType):
            super().__setattr__(name, value)


def _run_init(package: ModuleType) -> None:
    package.__class__ = ModuleType
    spec = package.__spec__
    assert spec is not None and spec.loader is not None
    try:
        spec.loader.exec_module(package)
    except BaseException:
        package.__class__ = _Pending  # the next use raises it again
        raise
    prefix = f"{package.__name__}."
    for name, module in list(sys.modules.items()):
        child = name.removeprefix(prefix)
        if name != child and "." not in child and child not in vars(package):
            setattr(package, child, module)


def postpone_init(name: str) -> None:
    """Let `import name.part` load that part only, until somebody uses `name` itself.

    `hypothesaes/__init__.py` imports sentence-transformers, scikit-learn, statsmodels and openai:
    about five seconds, of which its autoencoder needs none. Does nothing where the package is
    already imported, or is not installed (the import then says so).
    """
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None or spec.submodule_search_locations is None:
        return
    package = importlib.util.module_from_spec(spec)
    package.__class__ = _Pending
    sys.modules[name] = package
