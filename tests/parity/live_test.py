"""Published models against the installed torch and transformers, in full.

Runs where the extra `parity` is installed. Beside what golden_test.py compares,
whole gradients instead of sketches, and the golden files themselves.
"""

import functools

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `parity`")
transformers = pytest.importorskip(
  "transformers", reason="needs the extra `parity`"
)

from rlm.losses import global_weights, make_pretrain_loss  # noqa: E402
from tests.parity import cases, compare, mtp_test  # noqa: E402
from tests.parity.ours import Ours, quick_jit  # noqa: E402
from tools import make_golden  # noqa: E402

ALL = list(cases.CONFIGS)


@pytest.fixture(scope="module")
def live(tmp_path_factory):
  """Name of a case -> arrays, and gradients by batch, of transformers."""

  @functools.cache
  def live(name):
    folder = tmp_path_factory.mktemp(name)
    cases.write_case(folder, name)
    return make_golden.run_model(folder)

  threads = torch.get_num_threads()
  torch.set_num_threads(1)  # as the files were made
  yield live
  torch.set_num_threads(threads)


def below(arrays, prefix):
  prefix += "/"
  return {
    key.removeprefix(prefix): value
    for key, value in arrays.items()
    if key.startswith(prefix)
  }


@pytest.mark.parametrize("name", ALL)
def test_logits_loss_and_every_gradient(load, live, name):
  arrays, gradients = live(name)
  for batch in cases.BATCHES:
    found, ours = load(name).run_batch(batch)
    compare.check_outputs(found, below(arrays, batch))
    compare.check_gradients(ours, gradients[batch])


@pytest.mark.parametrize("name", ALL)
def test_every_sublayer_alone(load, live, name):
  expected = below(live(name)[0], "sublayers")
  del expected["attention_peak"]
  compare.check_sublayers(load(name).run_sublayers(expected), expected)


@pytest.mark.parametrize("name", ALL)
def test_greedy_decode_is_identical(load, live, name):
  arrays, _ = live(name)
  expected = [arrays[f"greedy/{i}"] for i in range(2)]
  found = load(name).decode_greedily(compare.unused_token(expected))
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ALL)
def test_the_golden_files_hold_what_transformers_gives(live, name):
  arrays, gradients = live(name)
  arrays = arrays | make_golden.sketch_gradients(gradients)
  expected = compare.golden(name)
  assert set(arrays) == set(expected)
  for key, value in arrays.items():
    assert value.dtype == expected[key].dtype
    # Another processor or release may round differently; bfloat16 the more.
    atol = 2e-3 if key == "bfloat16_drift" else 2e-5
    np.testing.assert_allclose(value, expected[key], rtol=1e-5, atol=atol)


def test_mtp_against_the_layers_of_transformers(tmp_path, monkeypatch):
  """transformers keeps MTP apart from its model, for speculative decoding."""
  modules = pytest.importorskip("transformers.modeling_layers")
  if not hasattr(modules, "MtpModel"):
    pytest.skip("this release of transformers has no MtpModel")
  cases.write_folder(tmp_path, mtp_test.CONFIG, mtp_test.WEIGHTS)
  # Their class knows by name only layer 61 as one of MTP.
  monkeypatch.setattr(
    transformers.DeepseekV3ForCausalLM,
    "_keys_to_ignore_on_load_unexpected",
    [
      rf"model\.layers\.{mtp_test.LAYERS + k}\..*"
      for k in range(mtp_test.DEPTH)
    ],
  )
  model = make_golden.load_model(tmp_path)
  theirs = modules.MtpModel.from_pretrained(model).eval()
  tokens = cases.make_batch(cases.BATCHES["padded"])["tokens"][:1]
  expected, loss = torch_mtp(model, theirs, torch.from_numpy(tokens).long())
  loss.backward()

  ours = Ours.load(tmp_path)
  ones = np.ones_like(tokens)
  positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
  batch = dict(tokens=tokens, positions=positions, segment_ids=ones)
  batch = {**batch, "loss_mask": ones > 0, "mtp_weight": np.float32(1)}
  batch = global_weights(batch, mtp_depth=mtp_test.DEPTH)
  loss_fn = make_pretrain_loss(ours.model, train_mtp=True, balance_weight=0.0)

  @quick_jit
  def run(variables, batch):
    rows = [batch[key] for key in ("tokens", "positions", "segment_ids")]

    def scalar(params):
      return loss_fn({**variables, "params": params}, batch, None)[0]

    hidden, _ = ours.model.apply(variables, *rows)
    states, _ = ours.model.apply(variables, hidden, *rows, method="mtp")
    logits = states[:, 0] @ variables["params"]["head"][None]
    return logits, *jax.value_and_grad(scalar)(variables["params"])

  logits, our_loss, gradients = run(ours.variables, batch)
  for k, their_logits in enumerate(expected):
    worst = np.abs(logits[k, : len(their_logits)] - their_logits).max()
    assert worst <= compare.LOGITS, f"depth {k}: {worst:.2e}"
  np.testing.assert_allclose(our_loss, loss.item(), rtol=compare.LOSS)
  their_gradients = make_golden.gradients_of(model)
  for name, gradient in make_golden.gradients_of(theirs).items():
    if name.startswith("layers."):  # the rest is shared with the model
      their_gradients[published_name(name)] = gradient
  compare.check_gradients(ours.published(gradients), their_gradients)


def torch_mtp(model, theirs, tokens):
  """Logits of each depth [n, V], and next-token loss plus the mean of MTP."""

  def cross_entropy(logits, ahead):
    return torch.nn.functional.cross_entropy(logits[:-1], tokens[0, ahead:])

  hidden = model.model(tokens).last_hidden_state
  loss = cross_entropy(model.lm_head(hidden)[0], 1)
  found, length = [], tokens.shape[1]
  for k in range(mtp_test.DEPTH):
    # Module k reads token t + 1 + k beside the state of position t.
    ahead = length - 1 - k
    hidden = theirs.forward_layer(
      k,
      hidden[:, :ahead],
      torch.arange(ahead)[None],
      None,
      input_ids=tokens[:, k + 1 :],
    )
    logits = model.lm_head(hidden)[0]
    loss = loss + cross_entropy(logits, k + 2) / mtp_test.DEPTH
    found.append(logits.detach().numpy())
  return found, loss


def published_name(name):
  """Of a parameter of MtpModel."""
  _, layer, rest = name.split(".", 2)
  rest = rest.removeprefix("mtp_block.").replace(
    "post_norm", "shared_head.norm"
  )
  return f"model.layers.{mtp_test.LAYERS + int(layer)}.{rest}"
