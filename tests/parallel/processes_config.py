"""configs/pretrain/laptop.py made tiny: six steps on 8 devices, more rows."""

from configs.pretrain import laptop

SIZES = dict(
  hidden_size=16,
  num_hidden_layers=1,
  first_k_dense_replace=0,
  intermediate_size=24,
  moe_intermediate_size=8,
  n_routed_experts=4,
  n_shared_experts=1,
  num_attention_heads=2,
  q_lora_rank=12,
  kv_lora_rank=8,
  qk_nope_head_dim=8,
  qk_rope_head_dim=4,
  v_head_dim=8,
  max_position_embeddings=64,
  initializer_range=0.2,
  num_nextn_predict_layers=0,
  unroll_layers=False,
)


def get_config():
  c = laptop.get_config()
  c.steps = 6
  c.model.update(SIZES)
  c.tasks.sums.update(heldout_fraction=0.2, letters="abcdef")
  c.data.update(row_length=48, packing_window=64, heldout_rows=6)
  c.data.sources.stdlib.update(
    heldout_fraction=0.2, fim_rate=0.5, max_bytes=60_000
  )
  c.data.sources.sums.update(
    weight=1.0, documents=90, heldout_documents=8, levels=(2,)
  )
  c.batch = dict(rows=16, first_rows=8, ramp_steps=3, microbatch_rows=8)
  c.mesh = dict(data=2, fsdp=2, expert=2, context=1, tensor=1)
  c.mtp_weight = 0.0
  c.optimizer.muon = None
  c.schedule = dict(
    peak=0.01, phases=(dict(shape="constant", steps=6, factor=1.0),)
  )
  c.eval.update(every_steps=3, batch_rows=8, levels=(2,), problems_per_level=3)
  c.checkpoint_every_steps = 3
  c.keep_best = dict(metric="heldout/stdlib/bits_per_byte", mode="min")
  c.peak_flops = 1e12
  return c
