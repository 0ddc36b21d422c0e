__version__ = "0.1.0"

_FACE = {"GenerativeRetriever": "grnb.retriever", "Hits": "grnb.retriever", "Recipe": "grnb.recipes", "Task": "grnb.data.task", "load_task": "grnb.features.tasks"}
__all__ = sorted(_FACE)


def __getattr__(name):
    "Load the face on first use, so that `import grnb` stays light"
    if name not in _FACE: raise AttributeError(f"module 'grnb' has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(_FACE[name]), name)


def __dir__(): return sorted([*globals(), *_FACE])
