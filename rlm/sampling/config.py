"""How tokens are drawn, as config files say it."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How tokens are drawn.

  Attributes:
    temperature: divides the logits; 0 takes the likeliest token.
    top_k: tokens kept at each step; 0 keeps all.
    top_p: probability kept at each step, in (0, 1]; 1 keeps all.
    max_new_tokens: longest completion, its end token included.
    stop_tokens: ids that end a completion besides the end of sequence.
  """

  temperature: float
  top_k: int
  top_p: float
  max_new_tokens: int
  stop_tokens: tuple[int, ...] = ()

  def __post_init__(self):
    if not 0 <= self.temperature < float("inf"):
      raise ValueError(
        f"temperature={self.temperature} must be at least 0 and finite;"
        " 0 takes the likeliest token."
      )
    if self.top_k < 0:
      raise ValueError(
        f"top_k={self.top_k} must not be negative; 0 keeps all tokens."
      )
    if not 0 < self.top_p <= 1:
      raise ValueError(
        f"top_p={self.top_p} must lie in (0, 1]; 1 keeps all tokens."
      )
    if self.max_new_tokens < 1:
      raise ValueError(
        f"max_new_tokens={self.max_new_tokens} must be at least 1."
      )
