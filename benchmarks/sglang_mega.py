"""SGLang's whole FP8 layer in one launch (sgl-deep-gemm, `fp8_mega_moe`) on one GPU, for `race.py --kernels sglang_mega:SglangMega`.

    python benchmarks/sglang_mega.py LAYER TOKENS...      # compiles what these need, with nvcc, into $DG_JIT_CACHE_DIR; a hang shows here

The package is built for ranks that send each other tokens through symmetric memory; one rank needs a buffer and its address. Its first
launch quantises and copies ids and weights, the second is the layer. With experts elsewhere, their ids become -1 by a gather before.
"""

import importlib
import importlib.metadata
import sys
import types
from typing import Any

import attrs
import torch

from rampwrap.adapters.layer import LayerKernel, only_on_hopper
from rampwrap.errors import ConfigError, InputError
from rampwrap.kernel.grid import CtaGrid
from rampwrap.kernel.placement import Placement
from rampwrap.kernel.protocol import Config
from rampwrap.kernel.shape import MoEShape
from rampwrap.kernels.common.operands import FP8, Contract, Operands, scale_shapes

MAX_TOKENS = 1024
"Of the buffer, which is part of what is compiled: one for all batches, as it is served."
BLOCK = 128


class SglangMega(LayerKernel):
    """The layer of one shape.

    Raises:
        InputError: the package is not here, or the GPU is not a Hopper.
        ConfigError: it cannot run this shape.
    """

    name = "sglang_mega"
    weight_layout = "sglang_mega_interleaved8"
    capturable = True
    tolerance = 0.05

    def __init__(self, shape: MoEShape) -> None:
        try:
            self._gemm: Any = importlib.import_module("deep_gemm")
            self._gemm.get_symm_buffer_for_sm90_mega_moe  # noqa: B018
        except (ImportError, AttributeError) as error:
            raise InputError(f"sgl-deep-gemm is not installed ({error}); install 0.1.5 beside torch 2.11.") from error
        only_on_hopper("sgl-deep-gemm's layer runs")
        if shape.dtype != "fp8" or shape.form or shape.hidden_size % BLOCK or shape.intermediate_size % BLOCK:
            raise ConfigError(f"{self.name} runs no {shape}; give an FP8 layer with scales of 128 x 128.")
        self.version = importlib.metadata.version("sgl-deep-gemm")
        super().__init__(shape, [{"max_tokens": MAX_TOKENS}], Contract(shape, topk_weights=(torch.float32,)))
        self._held: Any = None

    def supports(self, config: Config, shape: MoEShape) -> str | None:
        """None for its one config."""
        return None if config == {"max_tokens": MAX_TOKENS} else f"max_tokens is {MAX_TOKENS} here; use that."

    def grid(self, config: Config, shape: MoEShape) -> CtaGrid:
        """A CTA an SM, which take blocks of 64 tokens or more."""
        return CtaGrid(64, -(-2 * shape.intermediate_size // 256), persistent=True)

    def default_config(self, num_tokens: int) -> Config:
        """Its one config."""
        return self.configs[0]

    @property
    def _buffer(self) -> Any:
        if self._held is None:
            import torch.distributed._symmetric_memory as symmetric

            symmetric.empty = torch.empty
            symmetric.rendezvous = lambda tensor, group: types.SimpleNamespace(buffer_ptrs=[tensor.data_ptr()])
            alone = types.SimpleNamespace(size=lambda: 1, rank=lambda: 0, barrier=lambda: None)
            its = self.shape
            sizes = its.num_local_experts, MAX_TOKENS, its.top_k, its.hidden_size, its.intermediate_size
            self._held = self._gemm.get_symm_buffer_for_sm90_mega_moe(alone, *sizes)
        return self._held

    def run(self, config: Config, operands: Operands, /) -> torch.Tensor:
        """Two launches, and a gather where experts are elsewhere."""
        ids, tokens, held, out = operands.topk_ids, operands.num_tokens, self._buffer, operands.output()
        if operands.expert_map is not None:
            ids = operands.expert_map.index_select(0, ids.view(-1)).view(ids.shape)
        into = held.x, held.x_sf, held.topk_idx, held.topk_weights
        self._gemm.mega_moe_pre_dispatch_sm90(operands.hidden_states, ids, operands.topk_weights, *into, tokens)
        self._gemm.fp8_mega_moe(out, (operands.w13, operands.w13_scale), (operands.w2, operands.w2_scale), held)
        return out

    def convert_weights(self, *, w13: torch.Tensor, w13_scale: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        """w13 with 8 gate rows and 8 up rows in turn; a copy. Made of bytes, since FP8 has few operations."""
        experts, rows, columns = w13.shape
        halves = w13.view(torch.uint8).view(experts, 2, rows // 16, 8, columns)
        return {"w13": halves.transpose(1, 2).contiguous().view(w13.shape).view(w13.dtype), "w13_scale": w13_scale}

    def converted_bytes(self, shape: MoEShape) -> int:
        """Bytes of the copy of w13."""
        return shape.num_local_experts * 2 * shape.intermediate_size * shape.hidden_size

    def reference(self, shape: MoEShape, inputs: dict[str, Any]) -> torch.Tensor:
        """Of the converted weights."""
        experts, rows, columns = inputs["w13"].shape
        plain = inputs["w13"].view(torch.uint8).view(experts, rows // 16, 2, 8, columns).transpose(1, 2).contiguous()
        return super().reference(shape, inputs | {"w13": plain.view(inputs["w13"].shape).view(inputs["w13"].dtype)})


def main() -> int:
    from race_field import LAYERS

    if len(sys.argv) < 3 or sys.argv[1] not in LAYERS:
        print(f"usage: sglang_mega.py LAYER TOKENS..., LAYER one of {', '.join(LAYERS)}")
        return 0 if "--help" in sys.argv else 2
    shape = attrs.evolve(LAYERS[sys.argv[1]], dtype="fp8")
    kernel, scales = SglangMega(shape), scale_shapes(shape)
    experts, hidden, inter = shape.num_local_experts, shape.hidden_size, shape.intermediate_size
    # Zeros: random weights would keep a GPU busy on which something else may be timed.
    given: dict[str, Any] = {
        "w13": torch.zeros(experts, 2 * inter, hidden, dtype=FP8, device="cuda"),
        "w2": torch.zeros(experts, hidden, inter, dtype=FP8, device="cuda"),
        **{name: torch.ones(its, device="cuda") for name, its in scales.items()},
    }
    if experts < shape.num_experts:
        given["expert_map"] = torch.from_numpy(Placement.first(shape).expert_map).cuda()
    for tokens in map(int, sys.argv[2:]):
        ids = torch.arange(tokens * shape.top_k, dtype=torch.int32, device="cuda").view(tokens, -1) % shape.num_experts
        x = torch.zeros(tokens, hidden, dtype=torch.bfloat16, device="cuda")
        kernel.launch(
            kernel.configs[0], hidden_states=x, topk_weights=torch.ones_like(ids).float(), topk_ids=ids, **given
        )
        torch.cuda.synchronize()
        print(f"{tokens} tokens ran", flush=True)
    return 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
