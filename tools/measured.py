"""How long programs take here, and what this machine reads and multiplies.

A figure of a kernel means something beside two others of the same machine and
the same run: the rate at which it reads memory, and that of matrix products.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rlm.kernels.backend import backend
from rlm.kernels.product import exact_rounded

# A sample lasts at least as long, or the clock and the last call's way back
# would weigh in it; no program is sampled for longer than _MOST_SECS.
_SAMPLE_SECS = 0.03
_MOST_SECS = 3.0
# Whoever takes this many times as long as the fastest is sampled once.
_HOPELESS = 8


@dataclasses.dataclass(frozen=True)
class Program:
  """Compiled work.

  Attributes:
    dispatch: starts one pass and returns its arrays, perhaps before it ends.
    calls: how many calls of what is measured one pass holds.
  """

  dispatch: Callable[[], Any]
  calls: int = 1


@dataclasses.dataclass(frozen=True)
class Stage:
  """A program on its way: lowered, then compiled; `program` makes it ready.

  Attributes:
    make: key -> (what is new in every call, what calls share).
    run: all calls of a pass in one, or a single call.
    calls: of a pass.
    in_one: which.
  """

  make: Any
  run: Any
  calls: int
  in_one: bool

  def compile(self) -> "Stage":
    """Compiles; from any thread."""
    make, run = self.make.compile(), self.run.compile()
    return dataclasses.replace(self, make=make, run=run)

  def program(self) -> Program:
    """Makes operands of its own for each call of a pass.

    Raises:
      MemoryError: they do not fit.
    """
    _check_memory(self.run, copies=1 if self.in_one else self.calls)
    keys = jax.random.split(_key(1), self.calls)
    made = [self.make(key) for key in keys]
    many, shared = [new for new, _ in made], made[0][1]
    jax.block_until_ready((many, shared))
    if self.in_one:
      return Program(lambda: self.run(many, shared), self.calls)

    def one_by_one():  # two at once would share a CPU's cores
      for new in many:
        out = jax.block_until_ready(self.run(new, shared))
      return out

    return Program(one_by_one, self.calls)


def lower(
  make: Callable[[jax.Array], tuple[Any, Any]],
  run: Callable[[Any, Any], Any],
  *,
  calls: int,
) -> Stage:
  """`run` on what `make` gives, `calls` times a pass.

  On a GPU one program makes all the calls, one after the other, so that the
  time it takes to start a program does not hide theirs.
  """
  run, make = jax.jit(run), jax.jit(make)
  new, shared = make.eval_shape(_key(0))

  def chained(many, shared):
    results: list[Any] = []
    for new in many:
      if results:  # not before the call before has ended
        new, _ = jax.lax.optimization_barrier((new, results[-1]))
      results.append(run(new, shared))
    return results

  in_one = backend() == "gpu"
  lowered = (
    jax.jit(chained).lower([new] * calls, shared)
    if in_one
    else run.lower(new, shared)
  )
  return Stage(make.lower(_key(0)), lowered, calls, in_one)


def _key(seed: int) -> jax.Array:
  """Of a generator that compiles and draws many times faster."""
  return jax.random.key(seed, impl="rbg")


def _check_memory(compiled: Any, copies: int) -> None:
  limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
  needed = compiled.memory_analysis()
  if not limit or needed is None:
    return
  total = copies * needed.argument_size_in_bytes
  total += needed.output_size_in_bytes + needed.temp_size_in_bytes
  if total > 0.97 * limit:
    raise MemoryError(
      f"takes {total / 1e9:.0f} GB; there are {limit / 1e9:.0f}"
    )


def _sample(program: Program, passes: int) -> float:
  """Seconds of one call, over several passes that are waited for once."""
  start = time.perf_counter()
  for _ in range(passes):
    out = program.dispatch()
  jax.block_until_ready(out)
  return (time.perf_counter() - start) / (passes * program.calls)


def measure(
  programs: Mapping[str, Program], *, rounds: int
) -> dict[str, list[float]]:
  """Seconds a call of each program, in rounds: A B C A B C ...

  Programs have run before: what happens once is not to be measured. Passes of
  a sample are in flight together. A program that would take seconds is sampled
  fewer times; one beyond hope, once.
  """
  passes, times = {}, {}
  for name, program in programs.items():
    once = _sample(program, 1)
    of_pass = once * program.calls
    passes[name] = max(1, math.ceil(_SAMPLE_SECS / of_pass))
    times[name] = [once]
  fastest = min(t[0] for t in times.values()) if times else 0.0
  samples = {}
  for name, (once,) in times.items():
    sample_secs = once * programs[name].calls * passes[name]
    fitting = max(1, int(_MOST_SECS / sample_secs))
    hopeless = once > _HOPELESS * fastest
    samples[name] = 1 if hopeless else min(rounds, fitting)
  measured: dict[str, list[float]] = {name: [] for name in programs}
  for i in range(rounds):
    for name, program in programs.items():
      if i < samples[name]:
        measured[name].append(_sample(program, passes[name]))
  return measured


def _least(run: Callable, *operands: Any, rounds: int) -> float:
  """Seconds of the fastest sample: a machine's rate is the best it reaches."""
  compiled = jax.jit(run).lower(*operands).compile()
  jax.block_until_ready(compiled(*operands))
  program = Program(lambda: compiled(*operands))
  return min(measure({"": program}, rounds=rounds)[""])


def read_bandwidth(*, nbytes: int, rounds: int) -> float:
  """Bytes per second that this device reads: the best of a few reductions."""
  x = jax.random.normal(jax.random.key(0), (1024, nbytes // 4096))
  ones = jnp.ones(x.shape[1])
  ways: list[tuple[Callable, tuple[Any, ...]]] = [
    (lambda x: x.sum(axis=1), (x,)),
    (lambda x: x.max(axis=1), (x,)),
    (lambda x: x.max(), (x,)),
    (lambda x, ones: x @ ones, (x, ones)),
  ]
  seconds = [_least(run, *given, rounds=rounds) for run, given in ways]
  return x.nbytes / min(seconds)


def matmul_rate(dtype: str, *, sizes: tuple[int, ...], rounds: int) -> float:
  """FLOPs per second of products of random matrices, of the best size."""
  rates = []
  for size in sizes:
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (size, size), dtype) for key in keys)
    seconds = _least(
      lambda a, b: jnp.matmul(a, b, **exact_rounded(dtype)),
      a,
      b,
      rounds=rounds,
    )
    rates.append(2 * size**3 / seconds)
  return max(rates)


@dataclasses.dataclass(frozen=True)
class Rates:
  """What bounds every program here.

  Attributes:
    read: bytes per second.
    matmul: FLOPs per second, by dtype.
  """

  read: float
  matmul: dict[str, float]


def measured_rates(dtypes: set[str], *, rounds: int) -> Rates:
  """Both rates of this machine, at sizes that fill it."""
  gpu = backend() == "gpu"
  nbytes, sizes = (2**32, (4096, 8192)) if gpu else (2**28, (512, 2048))
  return Rates(
    read_bandwidth(nbytes=nbytes, rounds=rounds),
    {d: matmul_rate(d, sizes=sizes, rounds=rounds) for d in sorted(dtypes)},
  )
