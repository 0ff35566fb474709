import dataclasses

import numpy as np
import pytest

from rlm.hardware import CHIPS
from tools import roofline, torus
from tools.hlo_groups import MeshAxes
from tools.hlo_traffic import Collective

V5P = CHIPS["v5p"]


def mesh_of(shape, **axes):
  coords = torus.all_coords(torus.Torus(shape, (True,) * len(shape)))
  return MeshAxes(tuple(axes), tuple(axes.values()), coords)


def collective(mesh, axes, kind="all-gather", sent=9e9, rings=None, turns=1.0):
  groups = mesh.groups(axes)
  return Collective(
    kind=kind,
    form="sync",
    instead_of="",
    name="c",
    op_name="",
    source="",
    axes=axes,
    groups=groups,
    group_size=groups.shape[1],
    executions=turns,
    buffer=0,
    sent=sent,
    dtype="bf16",
    shard=(16, 128),
    emitter="",
    rings=rings,
  )


def secs(mesh, axes, emitted=False, chip=V5P, **how):
  c = collective(mesh, axes, **how)
  return roofline.collective_secs(c, chip, mesh, emitted=emitted)


def test_the_published_speed_is_given_back():
  reference = roofline.MAXTEXT
  efficiency = roofline.calibrate(V5P, reference)
  assert 0.4 < efficiency.overlapped < efficiency.summed < 0.6
  assert reference.mfu(V5P) == pytest.approx(0.332, abs=5e-4)
  mesh = mesh_of((8, 8, 8), fsdp=512)
  step = roofline.predict(
    chip=V5P,
    flops=reference.tokens * reference.executed_flops,
    hbm_bytes=0.0,
    collectives=[
      collective(mesh, ("fsdp",), sent=reference.gathered),
      collective(mesh, ("fsdp",), kind="all-reduce", sent=reference.reduced),
    ],
    mesh=mesh,
    efficiency=efficiency,
    tokens=reference.tokens,
    model_flops=reference.model_flops,
  )
  for overlap in (True, False):
    for emitted in (True, False):
      took = step.step_secs(overlap=overlap, emitted=emitted)
      assert step.tokens_per_second(took) == pytest.approx(542)
      assert step.mfu(took) == pytest.approx(0.332, abs=5e-4)


@pytest.mark.parametrize("speed", [5420.0, 1e9])
def test_figures_that_contradict_each_other(speed):
  impossible = dataclasses.replace(roofline.MAXTEXT, tokens_per_second=speed)
  with pytest.raises(ValueError, match="do not fit into"):
    roofline.calibrate(V5P, impossible)


def test_a_gather_uses_the_links_of_its_axes():
  mesh = mesh_of((8, 8, 8), data=64, model=8)
  link = 9e9 / V5P.link_bandwidth
  assert secs(mesh, ("model",)) == pytest.approx(link / 2)
  assert secs(mesh, ("data",)) == pytest.approx(link / 4)
  assert secs(mesh, ("data", "model")) == pytest.approx(link / 6)
  # One ring through a plane uses two of the four links there are.
  assert secs(mesh, ("data",), True, rings=2) == pytest.approx(link / 2)
  assert secs(mesh, ("data",), True, rings=6) == pytest.approx(link / 4)
  assert secs(mesh, ("data",), False, rings=2) == pytest.approx(link / 4)


def test_an_exchange_pays_for_hops():
  mesh = mesh_of((8, 8, 8), data=64, model=8)
  link = 9e9 / V5P.link_bandwidth
  for axes, n in ((("model",), 8), (("data",), 64), (("data", "model"), 512)):
    # Rings of 8: V 8 / 8 over each link, of which (n-1)/n is sent.
    took = secs(mesh, axes, kind="all-to-all")
    assert took == pytest.approx(link * n / (n - 1))
    assert secs(mesh, axes, kind="ragged-all-to-all") == took


def test_a_permutation_pays_for_its_distance():
  mesh = mesh_of((8, 8, 8), data=64, model=8)
  c = collective(mesh, ("model",), kind="collective-permute")
  ids = np.arange(512).reshape(64, 8)
  link = 9e9 / V5P.link_bandwidth
  for shift, load in ((1, 1), (3, 3)):
    pairs = np.stack([ids.ravel(), np.roll(ids, -shift, 1).ravel()], axis=1)
    moved = dataclasses.replace(c, groups=pairs)
    took = roofline.collective_secs(moved, V5P, mesh, emitted=False)
    assert took == pytest.approx(load * link)


def test_the_order_of_devices_matters():
  straight = mesh_of((8, 8, 1), data=8, model=8)
  coords = np.random.default_rng(0).permutation(straight.coords)
  shuffled = dataclasses.replace(straight, coords=coords)
  assert secs(shuffled, ("model",)) > 2 * secs(straight, ("model",))


def test_behind_a_switch_all_links_serve():
  mesh = MeshAxes(("data",), (8,))
  took = secs(mesh, ("data",), chip=CHIPS["h100"])
  assert took == pytest.approx(9e9 / CHIPS["h100"].fabric_bandwidth)


def test_terms_add_up():
  mesh = mesh_of((8, 8, 8), data=64, model=8)
  efficiency = roofline.Efficiency(summed=0.5, overlapped=0.4)
  step = roofline.predict(
    chip=V5P,
    flops=V5P.peak_flops,
    hbm_bytes=V5P.hbm_bandwidth,
    collectives=[
      collective(mesh, ("data",), rings=2, turns=3),
      collective(mesh, ("data",), rings=2, turns=2),
      collective(mesh, ("model",), kind="all-to-all", turns=2),
    ],
    mesh=mesh,
    efficiency=efficiency,
    tokens=4096,
    model_flops=281e9,
  )
  assert [t.name for t in step.collectives] == [
    "all-gather over data",
    "all-to-all over model",
  ]
  gather, exchange = step.collectives
  assert gather.sent == 5 * 9e9
  assert gather.emitted_secs == pytest.approx(2 * gather.secs)
  assert exchange.emitted_secs == exchange.secs
  assert gather.unnamed == exchange.unnamed == 0.0
  communication = gather.secs + exchange.secs
  assert step.step_secs(overlap=False, emitted=False) == pytest.approx(
    2.0 + communication
  )
  assert step.step_secs(overlap=True, emitted=False) == 2.5
  assert step.hbm == 1.0
  took = step.step_secs(overlap=True, emitted=True)
  assert step.tokens_per_second(took) == pytest.approx(4096 / 2.5)
  assert step.mfu(took) == pytest.approx(4096 / 2.5 * 281e9 / V5P.peak_flops)


def test_a_gather_without_a_name_is_reported():
  mesh = mesh_of((8, 8, 8), data=64, model=8)
  step = roofline.predict(
    chip=V5P,
    flops=1e12,
    hbm_bytes=0.0,
    collectives=[
      collective(mesh, ("data",), rings=2),
      collective(mesh, ("data",), turns=3),
    ],
    mesh=mesh,
    efficiency=roofline.Efficiency(summed=0.5, overlapped=0.5),
    tokens=1,
    model_flops=1.0,
  )
  (term,) = step.collectives
  assert (term.sent, term.unnamed) == (4 * 9e9, 3 * 9e9)
  assert term.emitted_secs == pytest.approx(5 / 4 * term.secs)


def test_what_the_model_does_not_cover():
  mesh = mesh_of((8, 8, 8), data=64, model=8)
  with pytest.raises(ValueError, match="2 devices a chip"):
    secs(mesh, ("data",), chip=CHIPS["tpu7x"])
  nowhere = dataclasses.replace(mesh, coords=None)
  with pytest.raises(ValueError, match="no coordinates"):
    secs(nowhere, ("data",))
  half = MeshAxes(("a",), (4,), np.eye(4, 3, dtype=int))
  with pytest.raises(ValueError, match="do not fill a block"):
    secs(half, ("a",))
