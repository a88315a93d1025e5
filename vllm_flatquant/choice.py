"""Which backend serves on which device. This file alone decides; it needs neither vLLM nor Triton."""

from dataclasses import dataclass

import torch

MIN_CAPABILITY = 80


@dataclass(frozen=True)
class Choice:
    """The backend's name and why it was chosen."""

    name: str
    reason: str


def cuda_capability() -> int | None:
    """Compute capability of PyTorch's current CUDA device as 80, 90, ...; None without one."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def choose_backend(capability: int | None) -> Choice:
    """Backend for a CUDA compute capability (80, 90, ...); None means no CUDA device."""
    if capability is None:
        return Choice("torch", "no CUDA device")
    if capability < MIN_CAPABILITY:
        return Choice("torch", f"compute capability {capability} is below {MIN_CAPABILITY}")
    return Choice("triton", f"CUDA device of compute capability {capability}")


def kernel_name(weight_bits: int, activation_bits: int, capability: int | None) -> str:
    """What multiplies the weights of a scheme on a device, in words. Capability as ``choose_backend``."""
    if choose_backend(capability).name == "torch":
        return "PyTorch reference functions (right, and slow)"
    if activation_bits == 16:
        return "vLLM's own weight-only kernel (Machete or Marlin) behind our transform"
    if weight_bits == 8:
        return "vLLM's own int8 kernel (CUTLASS) behind our transform"
    on_hopper = "Gluon with wgmma" if capability == 90 else "plain Triton"
    return f"w4_gemm, {on_hopper}: int{max(weight_bits, 4)} weights unpacked to int8 tensor cores"


def suitable_scheme(capability: int | None) -> Choice:
    """The scheme that suits a GPU of this compute capability, and why. None means no CUDA device.

    Follows from which tensor cores the GPU has and from ours using int8 (int4 values sit in int8
    containers): where int8 is fast, 8-bit activations cost no time over 4-bit ones and are more accurate.
    """
    if capability is None:
        return Choice("w4a8", "no CUDA device here; most GPUs that will serve it multiply int8 fast")
    if capability < MIN_CAPABILITY:
        return Choice(
            "w4a16",
            f"no kernels of ours below {MIN_CAPABILITY}: fewer roundings cost nothing in PyTorch",
        )
    if capability == 103:
        return Choice(
            "w4a16", "this GPU kept hardly any int8 tensor cores; 16-bit activations go through vLLM's"
        )
    tested = "" if capability == 90 else "; our kernels were timed on 90 only"
    return Choice(
        "w4a8",
        "int8 tensor cores run 4- and 8-bit activations at one speed, and 8 bits are more accurate; w4a4 where "
        f"a fully 4-bit model is the aim{tested}",
    )
