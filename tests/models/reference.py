"""DeepSeek-V2 and V3 in float64 numpy, written from the papers' equations.

Of rlm it knows the names of config fields and parameters, nothing else. It
reads one document at a time, token by token, head by head, expert by expert:
there is no mask, no padding and no segment in it to get wrong.
"""

import dataclasses
import math

import numpy as np


def rms_norm(x, scale, eps):
  return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def silu(x):
  return x / (1 + np.exp(-x))


def swiglu(p, x):
  return (silu(x @ p["gate_proj"]) * (x @ p["up_proj"])) @ p["down_proj"]


def yarn_magnitude(factor, mscale):
  return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def frequencies(dim, theta, scaling):
  """Radians per position of each pair; YaRN's ramp by pair index."""
  result = []
  for i in range(dim // 2):
    f = theta ** (-2 * i / dim)
    if scaling is not None:
      length = scaling.original_max_position_embeddings

      def index(turns, length=length):
        return (
          dim * math.log(length / (2 * math.pi * turns)) / (2 * math.log(theta))
        )

      low = max(math.floor(index(scaling.beta_fast)), 0)
      high = min(math.ceil(index(scaling.beta_slow)), dim - 1)
      ramp = min(max((i - low) / (high - low), 0), 1)
      f = f * (1 - ramp) + f / scaling.factor * ramp
    result.append(f)
  return np.array(result)


def rotate(x, position, freqs, magnitude=1.0):
  """Turns the complex numbers x[2i] + j x[2i + 1]."""
  z = (x[0::2] + 1j * x[1::2]) * np.exp(1j * position * freqs) * magnitude
  out = np.empty_like(x)
  out[0::2], out[1::2] = z.real, z.imag
  return out


def attention(p, x, cfg):
  """V3 eq. 1-11 over one document x [n, D]."""
  n_heads = cfg.num_attention_heads
  nope, rope, width = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
  scaling = cfg.rope_scaling
  freqs = frequencies(rope, cfg.rope_theta, scaling)
  scale, magnitude = (nope + rope) ** -0.5, 1.0
  if scaling is not None:
    m = yarn_magnitude(scaling.factor, scaling.mscale_all_dim)
    magnitude = yarn_magnitude(scaling.factor, scaling.mscale) / m
    scale *= m * m
  queries, keys, values = [], [], []
  for t, h in enumerate(x):
    if cfg.q_lora_rank is None:
      q = h @ p["q_proj"]
    else:
      eps = cfg.rms_norm_eps
      q = rms_norm(h @ p["q_a"], p["q_norm"]["scale"], eps) @ p["q_b"]
    latent = h @ p["kv_a"]
    k_rope = rotate(latent[cfg.kv_lora_rank :], t, freqs, magnitude)
    latent = latent[: cfg.kv_lora_rank]
    latent = rms_norm(latent, p["kv_norm"]["scale"], cfg.rms_norm_eps)
    kv = latent @ p["kv_b"]
    queries.append([])
    keys.append([])
    values.append([])
    for head in range(n_heads):
      q_head = q[head * (nope + rope) : (head + 1) * (nope + rope)]
      q_rope = rotate(q_head[nope:], t, freqs, magnitude)
      queries[t].append(np.concatenate([q_head[:nope], q_rope]))
      kv_head = kv[head * (nope + width) : (head + 1) * (nope + width)]
      keys[t].append(np.concatenate([kv_head[:nope], k_rope]))
      values[t].append(kv_head[nope:])
  out = []
  for t in range(len(x)):
    heads = []
    for head in range(n_heads):
      scores = [scale * queries[t][head] @ keys[s][head] for s in range(t + 1)]
      weights = np.exp(np.array(scores) - max(scores))
      weights /= weights.sum()
      heads.append(sum(w * values[s][head] for s, w in enumerate(weights)))
    out.append(np.concatenate(heads) @ p["out_proj"])
  return np.array(out)


def affinities(logits, scoring_func):
  if scoring_func == "sigmoid":
    return 1 / (1 + np.exp(-logits))
  e = np.exp(logits - logits.max())
  return e / e.sum()


def best(values, k):
  """Indices of the k largest, the earlier of equal ones first."""
  return sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


def choose(scores, bias, cfg):
  """The experts of one token, V3 2.1.2; V2's rules for the other methods."""
  n_experts = len(scores)
  chosen_by = list(scores)
  if cfg.topk_method == "noaux_tc":
    chosen_by = [s + b for s, b in zip(scores, bias, strict=True)]
  candidates = range(n_experts)
  if cfg.topk_method != "greedy":
    size = n_experts // cfg.n_group
    members = [
      list(range(g * size, (g + 1) * size)) for g in range(cfg.n_group)
    ]
    counted = 2 if cfg.topk_method == "noaux_tc" else 1
    group_scores = [
      sum(sorted((chosen_by[i] for i in group), reverse=True)[:counted])
      for group in members
    ]
    kept = best(group_scores, cfg.topk_group)
    candidates = sorted(i for g in kept for i in members[g])
  order = best([chosen_by[i] for i in candidates], cfg.num_experts_per_tok)
  return [candidates[i] for i in order]


def gates(scores, ids, cfg):
  g = np.array([scores[i] for i in ids])
  if cfg.norm_topk_prob:
    g = g / g.sum()
  return g * cfg.routed_scaling_factor


def balance_loss(scores, k):
  """V3 eq. 17-20 without alpha over one row of tokens, scores [T, E]."""
  if not len(scores):
    return 0.0
  length, n_experts = scores.shape
  total = 0.0
  for i in range(n_experts):
    count = sum(i in best(s, k) for s in scores)
    f = n_experts / (k * length) * count
    total += f * np.mean([s[i] / s.sum() for s in scores])
  return total


def mixture(p, bias, x, cfg, replayed=None):
  """Routed and shared experts over one document; returns out, ids, scores."""
  out, all_ids, all_scores = [], [], []
  for t, u in enumerate(x):
    scores = affinities(u @ p["router"], cfg.scoring_func)
    ids = choose(scores, bias, cfg) if replayed is None else replayed[t]
    y = swiglu(p["shared"], u) if cfg.n_shared_experts else np.zeros_like(u)
    for g, i in zip(gates(scores, ids, cfg), ids, strict=True):
      names = ("gate_proj", "up_proj", "down_proj")
      y = y + g * swiglu({name: p[name][i] for name in names}, u)
    out.append(y)
    all_ids.append(ids)
    all_scores.append(scores)
  return np.array(out), np.array(all_ids), np.array(all_scores)


def block(p, bias, x, cfg, replayed=None):
  """bias None: a dense layer. Returns x, and (ids, scores) or None."""
  eps = cfg.rms_norm_eps
  x = x + attention(p["attn"], rms_norm(x, p["attn_norm"]["scale"], eps), cfg)
  h = rms_norm(x, p["ffn_norm"]["scale"], eps)
  if bias is None:
    return x + swiglu(p["ffn"], h), None
  out, ids, scores = mixture(p["ffn"], bias, h, cfg, replayed)
  return x + out, (ids, scores)


@dataclasses.dataclass
class Forward:
  """Of one document of n tokens.

  Attributes:
    hidden: [n, D], after the final norm.
    ids: per MoE layer [n, K].
    scores: per MoE layer [n, E].
    mtp_hidden: per depth k [n - 1 - k, D]; row t predicts token t + 2 + k.
    mtp_scores: per depth k [n - 1 - k, E]; none in a dense model.
  """

  hidden: np.ndarray
  ids: list
  scores: list
  mtp_hidden: list
  mtp_scores: list


def layer(tree, i):
  """Layer i of a stacked tree of parameters."""
  if isinstance(tree, dict):
    return {name: layer(leaf, i) for name, leaf in tree.items()}
  return tree[i]


def forward(variables, tokens, cfg, replayed=None) -> Forward:
  """The whole model over one document.

  Args:
    variables: params and router as float64 numpy.
    tokens: ids of the document.
    cfg: ModelConfig, read for its fields.
    replayed: per MoE layer [n, K] expert ids, or None.
  """
  params, router = variables["params"], variables.get("router", {})
  eps = cfg.rms_norm_eps
  embedding = params["embed"]["embedding"]
  x = np.array([embedding[token] for token in tokens])
  n_dense = cfg.first_k_dense_replace
  ids, scores = [], []
  for i in range(cfg.num_hidden_layers):
    if i < n_dense:
      x, _ = block(layer(params["dense_layers"], i), None, x, cfg)
    else:
      at = i - n_dense
      x, (layer_ids, layer_scores) = block(
        layer(params["moe_layers"], at),
        router["moe_layers"]["ffn"]["expert_bias"][at],
        x,
        cfg,
        None if replayed is None else replayed[at],
      )
      ids.append(layer_ids)
      scores.append(layer_scores)
  hidden = rms_norm(x, params["final_norm"]["scale"], eps)

  mtp_hidden, mtp_scores, h = [], [], hidden
  for k in range(cfg.num_nextn_predict_layers):
    if k + 1 >= len(tokens):
      break
    p = layer(params["mtp_modules"], k)
    bias = None
    if n_dense < cfg.num_hidden_layers:
      bias = router["mtp_modules"]["block"]["ffn"]["expert_bias"][k]
    ahead = np.array([embedding[token] for token in tokens[k + 1 :]])
    joined = [
      np.concatenate([a, b])
      for a, b in zip(
        rms_norm(ahead, p["embedding_norm"]["scale"], eps),
        rms_norm(h, p["hidden_norm"]["scale"], eps)[: len(ahead)],
        strict=True,
      )
    ]
    x, routes = block(p["block"], bias, np.array(joined) @ p["proj"], cfg)
    if routes is not None:
      mtp_scores.append(routes[1])
    h = rms_norm(x, p["norm"]["scale"], eps)
    mtp_hidden.append(h)
  return Forward(hidden, ids, scores, mtp_hidden, mtp_scores)
