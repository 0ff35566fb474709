"""Accelerators by name: peak, memory, links, price and power, as published.

A figure that nobody publishes is None here, and whoever needs it is told which
flag sets it.  Prices are list prices on demand, at the date their source says.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  """One accelerator chip.

  Attributes:
    name: its key in CHIPS.
    peak_flops: operations per second of dense bfloat16 products.
    hbm_bytes: memory that a program may use.  Of TPUs the limit that XLA's
      compiler states when it refuses one, a little less than what is built in;
      of GPUs what is built in, of which the CUDA context takes some.
    hbm_bandwidth: bytes per second.
    links: to chips of the slice or node, usable at once.
    link_bandwidth: bytes per second of one link, one way.
    torus_dims: of the network that the links make; 0 is a switch.
    network_bandwidth: bytes per second and chip, one way, out of the slice or
      node; None where unpublished.
    dollars_per_hour: of one chip; None where no source was found.
    watts: of one chip alone, without its host, network and cooling; None where
      unpublished.
    source: where these figures are.
    devices_per_chip: jax devices that one chip is.
  """

  name: str
  peak_flops: float
  hbm_bytes: float
  hbm_bandwidth: float
  links: int
  link_bandwidth: float
  torus_dims: int
  network_bandwidth: float | None
  dollars_per_hour: float | None
  watts: float | None
  source: str
  devices_per_chip: int = 1

  @property
  def fabric_bandwidth(self) -> float:
    """Bytes per second out of a chip over all its links at once."""
    return self.links * self.link_bandwidth


_GIB = 2.0**30

# "Book" is How to Scale Your Model (jax-ml.github.io/scaling-book): its chapter
# 2 has link bandwidths as they are reached, about a tenth below Google's own.
_CHIPS = (
  Chip(
    name="v4",
    peak_flops=275e12,
    hbm_bytes=30.75 * _GIB,
    hbm_bandwidth=1.2e12,
    links=6,
    link_bandwidth=4.5e10,
    torus_dims=3,
    network_bandwidth=6.25e9,
    dollars_per_hour=None,
    watts=170.0,  # mean of what was measured, 90 to 192
    source=(
      "docs.cloud.google.com/tpu/docs/v4: peak, HBM bandwidth, mean power; book"
      " ch. 2: links, network; XLA's limit of 30.75 GiB"
    ),
  ),
  Chip(
    name="v5e",
    peak_flops=197e12,
    hbm_bytes=15.75 * _GIB,
    hbm_bandwidth=8.19e11,
    links=4,
    link_bandwidth=4.5e10,
    torus_dims=2,
    network_bandwidth=3.125e9,
    dollars_per_hour=1.2,
    watts=None,
    source=(
      "docs.cloud.google.com/tpu/docs/v5e: peak, HBM bandwidth; book ch. 2:"
      " links, network; book ch. 8: Google Cloud's price of February 2025;"
      " XLA's limit of 15.75 GiB"
    ),
  ),
  Chip(
    name="v5p",
    peak_flops=459e12,
    hbm_bytes=95.74 * _GIB,
    hbm_bandwidth=2.765e12,
    links=6,
    link_bandwidth=9.0e10,
    torus_dims=3,
    network_bandwidth=6.25e9,  # 50 Gbit/s
    dollars_per_hour=4.2,
    watts=None,
    source=(
      "docs.cloud.google.com/tpu/docs/v5p: peak, HBM bandwidth, network; book"
      " ch. 2: links; book ch. 8: Google Cloud's price of February 2025; XLA's"
      " limit of 95.74 GiB"
    ),
  ),
  Chip(
    name="v6e",
    peak_flops=918e12,
    hbm_bytes=31.25 * _GIB,
    hbm_bandwidth=1.638e12,
    links=4,
    link_bandwidth=9.0e10,
    torus_dims=2,
    network_bandwidth=12.5e9,  # 100 Gbit/s
    dollars_per_hour=None,
    watts=None,
    source=(
      "docs.cloud.google.com/tpu/docs/v6e and /tpu7x: peak, HBM bandwidth,"
      " network; book ch. 2: links; XLA's limit of 31.25 GiB"
    ),
  ),
  Chip(
    name="tpu7x",
    peak_flops=2307e12,
    hbm_bytes=2 * 94.75 * _GIB,
    hbm_bandwidth=7.38e12,
    links=6,
    # Google's figure, of which the book has no reached one: 1200 GB/s over six
    # links and both ways, which it also gives for the v5p.
    link_bandwidth=1.0e11,
    torus_dims=3,
    network_bandwidth=12.5e9,  # 100 Gbit/s
    dollars_per_hour=None,
    watts=None,
    source=(
      "docs.cloud.google.com/tpu/docs/tpu7x: all but XLA's limit of 94.75 GiB a"
      " device"
    ),
    devices_per_chip=2,
  ),
  Chip(
    name="a100",
    peak_flops=312e12,
    hbm_bytes=80e9,
    hbm_bandwidth=2.039e12,
    links=12,
    link_bandwidth=2.5e10,
    torus_dims=0,
    network_bandwidth=2.5e10,  # 200 Gbit/s
    dollars_per_hour=None,
    watts=400.0,
    source="NVIDIA's A100 80 GB SXM data sheet; DGX A100: network",
  ),
  Chip(
    name="h100",
    peak_flops=989e12,
    hbm_bytes=80e9,
    hbm_bandwidth=3.35e12,
    links=18,
    link_bandwidth=2.5e10,
    torus_dims=0,
    network_bandwidth=5.0e10,  # 400 Gbit/s
    dollars_per_hour=10.8,
    watts=700.0,
    source=(
      "NVIDIA's H100 SXM data sheet; DGX H100: network; book ch. 8: Google"
      " Cloud's price of February 2025"
    ),
  ),
  Chip(
    name="h200",
    peak_flops=989e12,
    hbm_bytes=141e9,
    hbm_bandwidth=4.8e12,
    links=18,
    link_bandwidth=2.5e10,
    torus_dims=0,
    network_bandwidth=5.0e10,  # 400 Gbit/s
    dollars_per_hour=None,
    watts=700.0,
    source="NVIDIA's H200 SXM data sheet; DGX H200: network",
  ),
  Chip(
    name="h800",
    peak_flops=989e12,
    hbm_bytes=80e9,
    hbm_bandwidth=3.35e12,
    links=8,
    link_bandwidth=2.0e10,
    torus_dims=0,
    network_bandwidth=5.0e10,
    dollars_per_hour=2.0,
    watts=700.0,
    source=(
      "DeepSeek-V3, arXiv:2412.19437: price (table 1), NVLink of 160 and"
      " InfiniBand of 50 GB/s as they are reached (section 3.2);"
      " arXiv:2505.09343: bfloat16 peak; the H100 SXM's HBM;"
      " huggingface.co/hardware/h800: power"
    ),
  ),
)

CHIPS: dict[str, Chip] = {chip.name: chip for chip in _CHIPS}

# What jax calls them, in full: an H100 PCIe or NVL is another chip.
_DEVICE_KINDS = {
  "TPU v4": "v4",
  "TPU v5 lite": "v5e",
  "TPU v5e": "v5e",
  "TPU v5": "v5p",
  "TPU v5p": "v5p",
  "TPU v6 lite": "v6e",
  "TPU v6e": "v6e",
  "TPU7x": "tpu7x",
  "NVIDIA A100-SXM4-80GB": "a100",
  "NVIDIA H100 80GB HBM3": "h100",
  "NVIDIA H200": "h200",
  "NVIDIA H800": "h800",
}


def find_chip(name: str) -> Chip:
  """The chip of this name.

  Raises:
    ValueError: there is none; the message lists those that there are.
  """
  if name not in CHIPS:
    raise ValueError(
      f"the hardware {name!r} is unknown. Known are {', '.join(CHIPS)}; add"
      " another to CHIPS in rlm/hardware.py, with its source."
    )
  return CHIPS[name]


def chip_of_device_kind(device_kind: str) -> Chip | None:
  """The chip that jax means by a device's `device_kind`.

  Args:
    device_kind: such as "TPU v5p" or "NVIDIA H200".

  Returns:
    The chip; None for one that is not in CHIPS, such as a CPU.
  """
  name = _DEVICE_KINDS.get(device_kind)
  return None if name is None else CHIPS[name]
