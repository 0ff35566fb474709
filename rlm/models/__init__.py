"""DeepSeek-V3: latent attention, experts and multi-token prediction."""
