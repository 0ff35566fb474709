"""Group advantages, policy objectives, rollouts and the curriculum."""
