"""What Hopper offers, and products of a warpgroup, also where interpreted.

`wgmma` multiplies 64 rows that one warpgroup has, asynchronously: an operand on
the left comes from registers or SMEM, one on the right from SMEM, read as it
lies or turned. Interpreters of Pallas know less. All take both operands from
memory, and that of jax 0.10 knows no turned one; so where kernels are
interpreted, and only there, such operands go through spare memory first.
"""

import math
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from rlm.kernels.backend import chip, interpretation

# Warpgroups of a block that compute, and the rows that each has in a product.
COMPUTING = 2
ROWS = 64
# Shared memory that a block may take.
SMEM_BYTES = 227 * 1024
# Exponentials are taken of 2, which has an instruction.
LOG2_E = math.log2(math.e)


def other_chip() -> str:
  """What to say where the chip is no Hopper."""
  return (
    f"the chip is {chip()!r}; its instructions are those of Hopper, an H100,"
    " H200, H800, H20 or GH200"
  )


def spare_memory(
  tokens: int, widths: tuple[int, ...], dtype: Any
) -> dict[str, Any]:
  """Scratch that an interpreter needs; none where kernels are compiled.

  Args:
    tokens: of a tile of scores [ROWS, tokens].
    widths: of what is multiplied into scores.
    dtype: of operands.

  Returns:
    SMEM by use, a part for each warpgroup that computes.
  """
  if not interpretation():
    return {}
  spare: dict[str, Any] = {"left": plgpu.SMEM((COMPUTING, ROWS, tokens), dtype)}
  if jax.__version_info__ < (0, 11):
    spare["turned"] = {
      width: plgpu.SMEM((COMPUTING, width, tokens), dtype) for width in widths
    }
  return spare


def multiply(acc_ref, left: jax.Array, right_ref, spare, group) -> None:
  """Starts acc += left @ right, `left` in registers.

  Args:
    acc_ref: accumulator [ROWS, N].
    left: [ROWS, K].
    right_ref: SMEM [K, N].
    spare: of `spare_memory`.
    group: this warpgroup.
  """
  if not spare:
    plgpu.wgmma(acc_ref, left, right_ref)
    return
  left_ref = spare["left"].at[group]
  left_ref[...] = left
  plgpu.commit_smem()
  plgpu.wgmma(acc_ref, left_ref, right_ref)


def multiply_turned(acc_ref, left_ref, right_ref, spare, group) -> None:
  """Starts acc += left @ right^T.

  Args:
    acc_ref: accumulator [ROWS, N].
    left_ref: SMEM [ROWS, K].
    right_ref: SMEM [N, K].
    spare: of `spare_memory`.
    group: this warpgroup.
  """
  if "turned" not in spare:
    plgpu.wgmma(acc_ref, left_ref, right_ref.T)
    return
  turned_ref = spare["turned"][right_ref.shape[1]].at[group]
  turned_ref[...] = right_ref[...].T
  plgpu.wgmma(acc_ref, left_ref, turned_ref)
