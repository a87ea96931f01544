"""The engine that is installed here, and why our hook would leave it as it is: known before a GPU is used."""

import importlib.metadata

import attrs

from rampwrap.errors import InputError
from rampwrap.plan.folder import DISABLE, disabled

NAMES = {"vllm": "vLLM", "sglang": "SGLang", "transformers": "transformers"}
"Engines as they are imported, and as they are called."


@attrs.frozen
class Installed:
    """An engine here.

    Attributes:
        engine: of `NAMES`.
        version: what its package says; "" where it is not installed.
        faults: why our hook would stand aside from all its layers, as clauses.
    """

    engine: str
    version: str = ""
    faults: tuple[str, ...] = ()

    def __str__(self) -> str:
        name = NAMES[self.engine]
        return f"{name} {self.version}" if self.version else f"{name}, which is not installed here"

    def check(self) -> None:
        """Raises an InputError where the hook of what is installed would stand aside; what is not here may be elsewhere."""
        if self.version and self.faults:
            raise InputError(
                f"rampwrap leaves {self} as it is: {'; '.join(self.faults)}; mend that, or add --ignore-engine where the "
                "plans are for another installation."
            )


def installed(engine: str) -> Installed:
    """What is installed of an engine, and what speaks against our hook."""
    version = _version(engine)
    faults = [f"{DISABLE} is set"] if disabled() else []
    return Installed(engine, version, (*faults, *(_FAULTS[engine](version) if version else ())))


def _version(engine: str) -> str:
    try:
        return importlib.metadata.version(engine)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _vllm(version: str) -> list[str]:
    from rampwrap.engines.vllm_contract import faults

    return faults()


def _sglang(version: str) -> list[str]:
    from rampwrap.engines.sglang import too_old

    reason = too_old(version)  # the rest of the contract is checked when SGLang starts
    return [] if reason is None else [reason]


def _transformers(version: str) -> list[str]:
    from rampwrap.engines.transformers_layer import mismatch

    reason = mismatch(version)
    return [] if reason is None else [reason]


_FAULTS = {"vllm": _vllm, "sglang": _sglang, "transformers": _transformers}
