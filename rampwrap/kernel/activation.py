"""What a layer makes of the gate and up columns of its first GEMM."""

import math
from typing import Any

import attrs

from rampwrap.errors import InputError
from rampwrap.schema import OMIT

NAMES = ("silu", "gelu_tanh")


def _finite(instance: "Activation", attribute: "attrs.Attribute[Any]", value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or (attribute.name != "beta" and value <= 0):
        more = "" if attribute.name == "beta" else " above 0"
        raise InputError(f"{attribute.name} of an activation is {value!r}; give a finite number{more}.")


def _text(value: float) -> str:
    """The shortest text that is the number again, without a fraction where it is whole."""
    return repr(float(value)).removesuffix(".0")


@attrs.frozen
class Activation:
    """f(gate) * (up + beta), where f is SiLU with a slope, gate * sigmoid(alpha * gate), or GELU in its tanh form.

    Attributes:
        name: ``silu`` or ``gelu_tanh``.
        limit: where given, gate is cut off above it and up on both sides, before anything else: the ``swiglu_limit`` of
            DeepSeek-V4 and GLM-5.3, as vLLM's `SiluAndMulWithClamp` states it. Other models cut SiLU's result off instead.
        alpha: slope of SiLU's sigmoid.
        beta: added to up. Limit 7, alpha 1.702 and beta 1 make SwiGLU-OAI, of MiniMax-M3 (`SWIGLU_OAI`).

    >>> str(Activation(limit=10.0))
    'silu:limit=10'
    """

    name: str = "silu"
    limit: float | None = attrs.field(default=None, validator=attrs.validators.optional(_finite), metadata=OMIT)
    alpha: float = attrs.field(default=1.0, validator=_finite, metadata=OMIT)
    beta: float = attrs.field(default=0.0, validator=_finite, metadata=OMIT)

    def __attrs_post_init__(self) -> None:
        if self.name not in NAMES:
            raise InputError(f"activation {self.name!r} is unknown; use one of {', '.join(NAMES)}.")
        if self.name == "gelu_tanh" and (self.limit, self.alpha, self.beta) != (None, 1.0, 0.0):
            raise InputError(f"activation {self} is unknown: limit, alpha and beta are those of silu; leave them out.")

    def __str__(self) -> str:
        given = ((name, getattr(self, name)) for name in ("limit", "alpha", "beta"))
        plain = {"limit": None, "alpha": 1.0, "beta": 0.0}
        said = ",".join(f"{name}={_text(value)}" for name, value in given if value != plain[name])
        return f"{self.name}:{said}" if said else self.name

    @classmethod
    def parse(cls, text: str) -> "Activation":
        """What `str` gives, or ``swiglu_oai``.

        Raises:
            InputError: it is none.
        """
        if text == "swiglu_oai":
            return SWIGLU_OAI
        name, _, said = text.partition(":")
        numbers: dict[str, float] = {}
        for part in filter(None, said.split(",")):
            key, _, value = part.partition("=")
            try:
                numbers[key] = float(value)
            except ValueError:
                key = ""
            if key not in ("limit", "alpha", "beta"):
                raise InputError(
                    f"activation {text!r} is not understood; write silu, silu:limit=10, swiglu_oai or gelu_tanh."
                )
        return cls(name, **numbers)


SILU = Activation()
SWIGLU_OAI = Activation(limit=7.0, alpha=1.702, beta=1.0)
