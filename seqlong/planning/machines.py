"""GPUs and links: what makers publish, and what share of it was measured."""

from __future__ import annotations

from dataclasses import dataclass

from seqlong.errors import ConfigError, nearest


@dataclass(frozen=True)
class Machine:
    """One kind of GPU in a usual server.

    Attributes:
        name: as people say it.
        memory: GiB that a program can have.
        flops: bfloat16 a second, dense, without sparsity.
        bandwidth: bytes a second of its memory.
        processors: multiprocessors.
        peers: GPUs of a server that are joined by the fast link.
        link: bytes a second, one way, between GPUs of a server.
        network: bytes a second, one way, of a GPU to other servers.
        source: of these numbers.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    processors: int
    peers: int
    link: float
    network: float
    source: str


_NDR, _HDR, _PCIE = 50e9, 25e9, 28e9
MACHINES = {
    "h100": Machine("H100 SXM 80 GB", 79.1, 989e12, 3.35e12, 132, 8, 450e9, _NDR, "NVIDIA H100 datasheet; DGX H100"),
    "h200": Machine("H200 SXM 141 GB", 139.8, 989e12, 4.8e12, 132, 8, 450e9, _NDR, "NVIDIA H200 datasheet; DGX H200"),
    "b200": Machine("B200 SXM 180 GB", 178.0, 2250e12, 7.7e12, 148, 8, 900e9, _NDR, "NVIDIA DGX B200 datasheet"),
    "a100": Machine("A100 SXM 80 GB", 79.1, 312e12, 2.039e12, 108, 8, 300e9, _HDR, "NVIDIA A100 datasheet; DGX A100"),
    "a100-40": Machine("A100 SXM 40 GB", 39.4, 312e12, 1.555e12, 108, 8, 300e9, _HDR, "NVIDIA A100 datasheet"),
    "l40s": Machine("L40S 48 GB", 44.5, 362e12, 0.864e12, 142, 8, _PCIE, _HDR, "NVIDIA L40S datasheet; PCIe 4 x16"),
    "a10": Machine("A10 24 GB", 22.0, 125e12, 0.6e12, 72, 4, _PCIE, 12.5e9, "NVIDIA A10 datasheet; PCIe 4 x16"),
    "rtx4090": Machine("RTX 4090 24 GB", 23.5, 165e12, 1.008e12, 128, 4, _PCIE, 12.5e9, "NVIDIA Ada whitepaper"),
}  # fmt: skip


def machine(name: str) -> Machine:
    """A GPU by name.

    Raises:
        ConfigError: an unknown one.
    """
    if (found := MACHINES.get(name.lower())) is None:
        raise ConfigError(f"--gpu {name} is unknown{nearest(name, MACHINES)}; known are {', '.join(MACHINES)}")
    return found


@dataclass(frozen=True)
class Reached:
    """Shares of a GPU's published rates that long rows reach, and what else time goes to.

    Attributes:
        products: of FLOPs, in matrix products of a model's widths.
        attention: of FLOPs, in fused attention, forward and backward.
        kernels: of bandwidth, in our Triton kernels, each tensor moved once.
        other: of bandwidth, in torch's elementwise kernels.
        call: seconds of the host for each operation: a step is never shorter than all of them.
        link: of a link's rate, in collectives of many MiB.
        latency: seconds of a collective within a server, and between servers for each doubling of these.
        memory: of what is live, which the allocator holds beside it in pieces that fit nothing.
        context: GiB of CUDA and of libraries' workspaces.
    """

    products: float = 0.68
    attention: float = 0.437
    kernels: float = 0.69
    other: float = 0.8
    call: float = 8e-6
    link: float = 0.8
    latency: tuple[float, float] = (15e-6, 15e-6)
    memory: float = 0.03
    context: float = 0.8


#: Where each number is from, for what is printed.
REACHED_FROM = {
    "products": "fitted to the two steps of 131,072 tokens in benchmarks/results/long_steps-h100.json",
    "attention": "cuDNN on an H100: 285 ms forward and backward, a row of 131,072, 16 heads of 64, causal",
    "kernels": "mamba2_ssd at 131,072 on an H100 (benchmarks/results/kernels-h100.json)",
    "other": "assumed for torch's elementwise kernels",
    "link": "assumed: NCCL's usual share for messages of many MiB",
}
