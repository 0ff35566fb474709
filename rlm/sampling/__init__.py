"""Generation over the latent cache with fixed slots."""
