"""What transformers computes for the models of tests/parity, kept as files.

  python -m tools.make_golden --output=tests/parity/golden

Needs the extra `parity`. Of each model of tests/parity/cases.py it writes one
safetensors file: logits, loss and gradients of two batches, tokens decoded
greedily, and what every sublayer gives. Gradients are kept as sketches of eight
numbers a tensor (`cases.sketch`), since whole ones would take most of the
space; `tests/parity/live_test.py` compares them number by number. Beside lies
versions.json. Equal versions on one machine write equal bytes.
"""

import argparse
import functools
import json
import pathlib
import tempfile
from typing import Any

import numpy as np
import safetensors.numpy
import torch
import transformers

from tests.parity import cases
from tests.parity.compare import drift

Arrays = dict[str, np.ndarray]


def load_model(
  folder: pathlib.Path, dtype: torch.dtype = torch.float32
) -> transformers.PreTrainedModel:
  """The model of a published folder, strictly.

  Raises:
    ValueError: transformers misses a tensor, or has no place for one.
  """
  model, report = transformers.AutoModelForCausalLM.from_pretrained(
    folder,
    dtype=dtype,
    output_loading_info=True,
    # Eager, since it alone returns the attention; it also defines the others.
    attn_implementation="eager",
    experts_implementation="eager",
  )
  problems = {name: found for name, found in report.items() if found}
  if problems:
    raise ValueError(f"{folder} was not loaded strictly: {problems}")
  return model.eval()


def run_batch(model, name: str) -> tuple[Arrays, Arrays]:
  """One of `cases.BATCHES`.

  Returns:
    logits [2, LENGTH, V], 0 in padding, and the mean loss of all next tokens;
    and the loss's gradient by published name.
  """
  batch = cases.make_batch(cases.BATCHES[name])
  tokens = torch.from_numpy(batch["tokens"]).long()
  logits = torch.zeros(*tokens.shape, model.config.vocab_size)
  if name == "padded":
    mask = torch.from_numpy(batch["segment_ids"] != 0)
    positions = torch.from_numpy(batch["positions"]).long()
    found = model(tokens, attention_mask=mask.long(), position_ids=positions)
    logits = torch.where(mask[:, :, None], found.logits, logits)
  else:  # each document by itself, so that nothing can reach across
    for row, start, length in cases.BATCHES[name]:
      cells = slice(start, start + length)
      logits[row, cells] = model(tokens[row : row + 1, cells]).logits[0]
  losses = [
    torch.nn.functional.cross_entropy(
      logits[row, start : start + length - 1],
      tokens[row, start + 1 : start + length],
      reduction="sum",
    )
    for row, start, length in cases.BATCHES[name]
  ]
  loss = sum(losses) / sum(n - 1 for _, _, n in cases.BATCHES[name])
  model.zero_grad()
  loss.backward()
  outputs = {"logits": _numpy(logits), "loss": _numpy(loss)}
  return outputs, gradients_of(model)


@torch.no_grad()
def bfloat16_drift(folder: pathlib.Path, logits: np.ndarray) -> np.ndarray:
  """How far bfloat16 moves transformers itself, as `compare.drift`."""
  model = load_model(folder, torch.bfloat16)
  batch = cases.make_batch(cases.BATCHES["padded"])
  mask = batch["segment_ids"] != 0
  found = model(
    torch.from_numpy(batch["tokens"]).long(),
    attention_mask=torch.from_numpy(mask).long(),
    position_ids=torch.from_numpy(batch["positions"]).long(),
  )
  return drift(_numpy(found.logits.float())[mask], logits[mask])


def _numpy(tensor: torch.Tensor) -> np.ndarray:
  return tensor.detach().numpy().copy()


def gradients_of(model) -> Arrays:
  """Of the last `backward`, by published name.

  transformers joins the experts, and two matrices of each.
  """
  found: Arrays = {}
  for name, parameter in model.named_parameters():
    # A parameter that nothing reached has the gradient 0.
    value = torch.zeros_like(parameter)
    gradient = _numpy(value if parameter.grad is None else parameter.grad)
    prefix, _, joined = name.rpartition(".experts.")
    if not prefix:
      found[name] = gradient
      continue
    for expert, one in enumerate(gradient):
      parts = {"down_proj": one}
      if joined == "gate_up_proj":
        gate, up = np.split(one, 2)
        parts = {"gate_proj": gate, "up_proj": up}
      for part, value in parts.items():
        found[f"{prefix}.experts.{expert}.{part}.weight"] = value
  return found


@torch.no_grad()
def decode_greedily(model, prompt: list[int]) -> tuple[np.ndarray, float]:
  """The likeliest `NEW_TOKENS` tokens, without any cache, and how clearly.

  Returns:
    int32 [NEW_TOKENS], and the smallest lead of a token over the next one.
  """
  tokens, lead = list(prompt), float("inf")
  for _ in range(cases.NEW_TOKENS):
    logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
    best, second = torch.topk(logits, 2).values.tolist()
    lead = min(lead, best - second)
    tokens.append(int(logits.argmax()))
  return np.array(tokens[len(prompt) :], np.int32), lead


@torch.no_grad()
def run_sublayers(model) -> Arrays:
  """Outputs [LENGTH, D] of every sublayer for row 0 of "padded".

  Keys are `<layer>.<attn_norm, attn, ffn_norm or ffn>` and `final_norm`. Their
  inputs follow: a layer's is the embedding plus all outputs of attention and
  feed-forward before it. `attention_peak` is the mean over layers and heads of
  the largest weight that the last token gives.
  """
  found: Arrays = {}

  def keep(name, module, arguments, output):
    output = output[0] if isinstance(output, tuple) else output
    found[name] = _numpy(output)[0]

  body = model.model
  modules = {"final_norm": body.norm}
  for i, layer in enumerate(body.layers):
    modules[f"{i}.attn_norm"] = layer.input_layernorm
    modules[f"{i}.attn"] = layer.self_attn
    modules[f"{i}.ffn_norm"] = layer.post_attention_layernorm
    modules[f"{i}.ffn"] = layer.mlp
  handles = [
    module.register_forward_hook(functools.partial(keep, name))
    for name, module in modules.items()
  ]
  tokens = cases.make_batch(cases.BATCHES["padded"])["tokens"][:1]
  output = model(torch.from_numpy(tokens).long(), output_attentions=True)
  for handle in handles:
    handle.remove()
  last = torch.stack([weights[0, :, -1] for weights in output.attentions])
  found["attention_peak"] = _numpy(last.max(dim=-1).values.mean())
  return found


def run_model(folder: pathlib.Path) -> tuple[Arrays, dict[str, Arrays]]:
  """Everything that a file holds but the sketches, and whole gradients.

  Args:
    folder: of `cases.write_case`.

  Returns:
    Arrays by the names of the file; per batch, gradients by published name.
  """
  model = load_model(folder)
  found, gradients = {}, {}
  for name in cases.BATCHES:
    outputs, gradients[name] = run_batch(model, name)
    found |= {f"{name}/{key}": value for key, value in outputs.items()}
  for i, prompt in enumerate(cases.make_prompts()):
    found[f"greedy/{i}"], lead = decode_greedily(model, prompt)
    found[f"greedy_lead/{i}"] = np.float32(lead)
  found["bfloat16_drift"] = bfloat16_drift(folder, found["padded/logits"])
  for name, value in run_sublayers(model).items():
    found[f"sublayers/{name}"] = value
  return {key: np.asarray(value) for key, value in found.items()}, gradients


def sketch_gradients(gradients: dict[str, Arrays]) -> Arrays:
  """Per batch one array [tensors, SKETCH], tensors by sorted name."""
  return {
    f"{batch}/gradients": np.stack(
      [cases.sketch(name, found[name]) for name in sorted(found)]
    )
    for batch, found in gradients.items()
  }


def versions() -> dict[str, Any]:
  """Of what wrote the files."""
  return {
    "torch": torch.__version__,
    "transformers": transformers.__version__,
    "numpy": np.__version__,
  }


def main() -> None:
  """Writes all files."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--output", required=True, metavar="DIR")
  output = pathlib.Path(parser.parse_args().output)
  # More threads would add in another order.
  torch.set_num_threads(1)
  output.mkdir(parents=True, exist_ok=True)
  for name in cases.CONFIGS:
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder)
      cases.write_case(path, name)
      found, gradients = run_model(path)
    found |= sketch_gradients(gradients)
    file = output / f"{name}.safetensors"
    file.write_bytes(safetensors.numpy.save(found))
    print(f"{file}: {describe(found)}")
  text = json.dumps(versions(), indent=2, sort_keys=True) + "\n"
  (output / "versions.json").write_text(text)


def describe(found: Arrays) -> str:
  """Whether a case is able to fail, in a line."""
  logits = found["padded/logits"]
  lead = min(found[f"greedy_lead/{i}"] for i in range(2))
  return (
    f"logit std {logits[logits != 0].std():.2f}, attention peak"
    f" {found['sublayers/attention_peak']:.2f}, smallest lead {lead:.4f},"
    f" bfloat16 drift {found['bfloat16_drift']:.3f}"
  )


if __name__ == "__main__":
  main()
