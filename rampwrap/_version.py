try:
    from rampwrap._built import __version__  # written by the build, from git's tag
except ImportError:  # a source tree that was never installed
    __version__ = "0.1.0.dev0"

__all__ = ["__version__"]
