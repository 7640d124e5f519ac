"""Peak arithmetic of GPUs, from data sheets. Needs no torch."""

# Dense peak FLOP/s per GPU: (bf16 with fp32 accumulation, fp32 without TF32). From the vendors' data sheets;
# where a sheet states bf16 with 2:4 sparsity, half of it. The first name that is a word of torch's device name counts.
GPUS: dict[str, tuple[float, float]] = {
    "GB200": (2500e12, 80e12),  # GB200 NVL72: 360 PFLOPS sparse, 5,760 TFLOPS fp32 / 72
    "B200": (2250e12, 75e12),  # HGX B200: 36 PFLOPS sparse, 600 TFLOPS fp32 / 8
    "GH200": (989e12, 67e12),  # GH200 Grace Hopper
    "H200 NVL": (835e12, 60e12),  # H200 Tensor Core GPU
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),  # H100 Tensor Core GPU
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),  # SXM5: torch names it "NVIDIA H100 80GB HBM3"
    "H20": (148e12, 44e12),
    "A100": (312e12, 19.5e12),  # A100 Tensor Core GPU, SXM4 and PCIe
    "A800": (312e12, 19.5e12),
    "A40": (149.7e12, 37.4e12),
    "A30": (165e12, 10.3e12),
    "A10G": (70e12, 35e12),
    "A10": (125e12, 31.2e12),
    "L40S": (362e12, 91.6e12),
    "L40": (181e12, 90.5e12),
    "L4": (121e12, 30.3e12),
    "RTX A6000": (154.8e12, 38.7e12),
    "RTX 4090": (165.2e12, 82.6e12),  # Ada architecture white paper
    "RTX 3090": (71e12, 35.6e12),  # GA102 white paper
    "MI325X": (1307.4e12, 163.4e12),  # AMD Instinct data sheets; fp32 with matrix instructions
    "MI300X": (1307.4e12, 163.4e12),
    "MI250X": (191.5e12, 47.9e12),  # one of its two dies, which torch takes for devices
}
